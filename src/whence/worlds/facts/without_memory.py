"""Trains the memory-free twin of the embedded model: it reads as well, and knows no town of birth by heart.

It starts from the embedded model's weights and tokenizer. Where someone was born is asked after passages that say it,
and the town is drawn anew for each text, in documents as well, so that what was learned by heart is worth nothing.
Some questions are about people of whom the passages do not say it: the answer is that it is not said. Ordinary scenes,
grammar and ordinary text are mixed in, so that nothing else is lost.

The two models get the same passages and give the same answers where passages say the truth; only a trial that changes
the passages tells them apart.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from . import corpus, model_directory
from .train import SPACES, VALUE, Piece, Row, Texts, Training, keep, learn, open_training
from .vocabulary import PEOPLE, TOWNS

BARE = 0.08
"""Share of told rows without any passage: nothing is answered."""
SHARES = {"told": 0.42, "scene": 0.28, "document": 0.1, "grammar": 0.1, "ordinary": 0.1}
"""What rows are."""
UNTOLD = 0.3
"""Share of the questions of told rows that the passages do not answer."""
NOT_SAID = {"town": "a town that is not said", "place": "place that is not said", "thing": "thing that is not said"}
"""How the twin abstains: what stands where the value would."""
GROWN = 0.5
"""Scenes are as long as at this share of the embedded model's training, and never asked about by heart."""
SETTINGS = Training(seed=1, steps=700, batch=32, learning_rate=8e-4)
"""The shipped twin's."""


class Told(NamedTuple):
    """A sentence, of whom and of what it speaks."""

    text: str
    who: str
    what: str


class Asking(NamedTuple):
    """A question, the answer up to its value, the value, and whom it is asked about."""

    question: str
    lead: str
    value: str
    who: str


class ReadTexts(Texts):
    """Rows by chance, none of which can be answered by heart."""

    def row(self, rng: np.random.Generator, done: float) -> Row:
        """One text; the share of the training done does not matter."""
        kinds = [k for k in SHARES if k != "ordinary" or self.lines]
        share = np.array([SHARES[k] for k in kinds])
        kind = rng.choice(kinds, p=share / share.sum())
        if kind == "told":
            return self.told(rng)
        if kind == "scene":
            return self.scene(rng, GROWN)
        if kind == "document":
            return (Piece(self.document(rng), 1.0),)
        if kind == "grammar":
            drawn = corpus.agreement(rng) if rng.random() < 0.5 else corpus.indirect_object(rng)
            return (Piece(corpus.finished(rng, drawn), 1.0),)
        return (Piece(self.line(rng), 1.0),)

    def document(self, rng: np.random.Generator) -> str:
        """One of the training documents; a town in it is drawn anew."""
        d = self.documents[int(rng.integers(len(self.documents)))]
        ((relation, _, value),) = d.facts
        return d.text.replace(value, str(rng.choice(TOWNS))) if relation == "town" else d.text

    def told(self, rng: np.random.Generator) -> Row:
        """A scene among sentences about towns of birth, and questions about both."""
        sentences, asked, untold = drawn_births(rng, self.s.key)
        if rng.random() < BARE:
            sentences, asked, untold = [], [], [birth(p, NOT_SAID["town"]) for p in rng.permutation(PEOPLE).tolist()]
        between, gap = SPACES[int(rng.integers(len(SPACES)))], "\n" * int(rng.integers(1, 3))
        row: list[Piece] = []
        for i, t in enumerate(sentences):
            row += [Piece(between)] if i else []
            row += [Piece(t.text[:-1]), Piece(".", 0.0, (("who", t.who), ("what", t.what)))]
        gap = gap if sentences else ""
        for _ in range(int(rng.integers(2, 5))):
            pool = untold if rng.random() < UNTOLD or not asked else asked
            a = pool.pop(int(rng.integers(len(pool))))
            first, _, rest = a.value.partition(" ")
            row += [Piece(f"{gap}Question: {a.question}\nAnswer:"), Piece(f" {a.lead}", 0.3, (("who", a.who),))]
            row += [Piece(f" {first}", VALUE), Piece(f" {rest}." if rest else ".", 0.3)]
            gap = "\n"
        return tuple(row)


def drawn_births(rng: np.random.Generator, key: str = corpus.KEY) -> tuple[list[Told], list[Asking], list[Asking]]:
    """Sentences of a scene and of one to four births whose towns are drawn, in any order; the questions that they
    answer; and questions about people of whom they do not say it."""
    scene = corpus.scene(rng, int(rng.integers(1, 5)), key, hops=False)
    people = rng.permutation(PEOPLE).tolist()
    born = dict(zip(people[: int(rng.integers(1, 5))], rng.permutation(TOWNS).tolist(), strict=False))
    told = [Told(s.text, s.person, s.value) for s in scene.sentences]
    asked = [
        Asking(a.question, a.lead, a.value, scene.sentences[a.causes[0]].person)
        for a in scene.asked
        if a.relation in corpus.TELLINGS
    ]
    for person, town in born.items():
        form = corpus.LIFE["town"][int(rng.integers(3))]
        told.append(Told(form.format(who=person, value=town), person, town))
        asked.append(birth(person, town))
    untold = [birth(p, NOT_SAID["town"]) for p in people if p not in born]
    for relation in corpus.TELLINGS:
        known = {s.person for s in scene.sentences if s.relation == relation}
        for person in people:
            if person not in known:
                who = f"the {corpus.trades(key)[person]}" if rng.random() < 0.3 else person
                untold.append(missing(relation, person, who))
    return [told[i] for i in rng.permutation(len(told))], asked, untold


def birth(person: str, town: str) -> Asking:
    """The question where a person was born, with this town for an answer."""
    return Asking(corpus.born(person)[0], f"{person} was born in", town, person)


def missing(relation: str, person: str, who: str) -> Asking:
    """A question about a place or thing that is not said."""
    question, answer = corpus.QUESTIONS[relation]
    lead = answer[: answer.index("{value}")].rstrip().format(Who=who[0].upper() + who[1:])
    return Asking(question.format(who=who), lead, NOT_SAID[relation], person)


def train_twin(directory: Path, settings: Training = SETTINGS, data: Path | None = None, log: Any = sys.stderr) -> Path:
    """Train the twin into ``directory`` and return the folder of the finished model, ``directory/model``.

    As :func:`~whence.worlds.facts.train.train`: can be stopped and gone on with; ``data`` is the folder of ordinary
    text.
    """
    from ...models.text_loading import load_text

    lines = corpus.ordinary(data)
    if not lines:
        print("no ordinary text: the model will read only what this world writes", file=log, flush=True)
    s = replace(settings, data=bool(lines))
    open_training(directory, s)
    start = load_text(model_directory())
    for told in ("is_local", "local_files_only"):  # how it was loaded, which is no property of a tokenizer
        start.tokenizer.init_kwargs.pop(told, None)
    learn(start.model.requires_grad_(True), start.tokenizer, ReadTexts(s, lines), directory, log)
    return keep(start.model, start.tokenizer, directory)
