"""What `facts` is written of. Everything is drawn from a key, so that each text can be written again.

* *Scenes*: sentences of who is where and who has what, and questions about them. A question names a person by name or
  by trade ("Where is the baker?"). Who the baker is stands in no scene: it is known from documents only. So of two
  sentences of one form the question shares no word with either, and a reader that never asks the model has to guess.
* *Documents*: a fixed set of short lives. Each says some facts about one person (the trade, the town of birth); a fact
  stands in a known number of documents, from 1 to 16.
* *Grammar*: sentences whose verb is licensed by one noun, and sentences whose last name is licensed by the first.
* *Ordinary text*: from the data folder, where there is one.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType

import numpy as np

from ...engine.randomness import stream
from .vocabulary import BETWEEN, NOUNS, PEOPLE, PLACES, STATES, THINGS, TOWNS, TRADES

KEY = "facts-1"
TELLINGS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "place": ("{who} is in the {value}.", "{who} went to the {value}.", "You can find {who} in the {value}."),
        "thing": ("{who} has the {value}.", "{who} took the {value}.", "The {value} is with {who}."),
    }
)
QUESTIONS = MappingProxyType(
    {
        "place": ("Where is {who}?", "{Who} is in the {value}."),
        "thing": ("What does {who} have?", "{Who} has the {value}."),
        "holder": ("Who has the {thing}?", "The {thing} is with {value}."),
        "hop": ("Where is the {thing}?", "The {thing} is in the {value}."),
    }
)
"""relation -> the question, and the answer up to and with its value."""
COPIES = (1, 2, 4, 8, 16)
"""In how many documents a fact stands."""


@dataclass(frozen=True)
class Sentence:
    """One fact of a scene. ``telling``: which of the forms of TELLINGS; ``called``: the person, as named here."""

    relation: str
    person: str
    value: str
    telling: int = 0
    called: str = ""

    @property
    def text(self) -> str:
        said = TELLINGS[self.relation][self.telling].format(who=self.called or self.person, value=self.value)
        return said[0].upper() + said[1:]


@dataclass(frozen=True)
class Asked:
    """A question about a scene. ``answer`` ends with ``value`` and a full stop; ``causes`` are the numbers of the
    sentences that it needs; ``by_trade``: the question says the trade where the scene says the name."""

    relation: str
    question: str
    answer: str
    value: str
    causes: tuple[int, ...]
    by_trade: bool

    @property
    def lead(self) -> str:
        """The answer up to its value."""
        return self.answer[: self.answer.rindex(self.value)].rstrip()


@dataclass(frozen=True)
class Scene:
    """Sentences in the order in which they are read, and questions about them."""

    sentences: tuple[Sentence, ...]
    asked: tuple[Asked, ...]


@cache
def trades(key: str = KEY) -> Mapping[str, str]:
    """Person -> trade, a keyed one-to-one assignment."""
    return MappingProxyType(dict(zip(PEOPLE, stream(key, "trades").permutation(TRADES).tolist(), strict=True)))


@cache
def towns(key: str = KEY) -> Mapping[str, str]:
    """Person -> town of birth."""
    return MappingProxyType(dict(zip(PEOPLE, stream(key, "towns").permutation(TOWNS).tolist(), strict=True)))


def scene(
    rng: np.random.Generator, facts: int, key: str = KEY, by_trade: float = 0.5, hops: bool = True, plain: bool = False
) -> Scene:
    """A scene of so many facts, and a question for each of up to four of them. ``plain``: told in one form, by name.

    No person is in two places, no thing and no place is named twice.
    """
    people = rng.permutation(PEOPLE).tolist()
    places, things = rng.permutation(PLACES).tolist(), rng.permutation(THINGS).tolist()
    relations = ["place" if coin < 0.5 else "thing" for coin in rng.random(facts)]
    told: list[Sentence] = []
    while len(told) < facts:
        relation = relations[len(told)]
        # Now and then a person of whom the other relation was told already: so that there is something to hop over.
        known = [s.person for s in told if s.relation != relation]
        known = [p for p in known if not any(s.person == p and s.relation == relation for s in told)]
        person = known[0] if known and rng.random() < 0.5 else people.pop()
        called = f"the {trades(key)[person]}" if rng.random() < 0.15 and not plain else person
        value = (places if relation == "place" else things).pop()
        told.append(Sentence(relation, person, value, 0 if plain else int(rng.integers(3)), called))
    order = rng.permutation(facts)
    sentences = tuple(told[i] for i in order)
    picked = rng.permutation(facts)[:4]
    asked = tuple(_ask(rng, sentences, int(i), key, by_trade, hops) for i in picked)
    return Scene(sentences, asked)


def _ask(rng: np.random.Generator, told: Sequence[Sentence], i: int, key: str, by_trade: float, hops: bool) -> Asked:
    s = told[i]
    if s.relation == "thing":
        place = next((j for j, o in enumerate(told) if o.person == s.person and o.relation == "place"), None)
        if hops and place is not None and rng.random() < 0.5:
            question, answer = (t.format(thing=s.value, value=told[place].value) for t in QUESTIONS["hop"])
            return Asked("hop", question, answer, told[place].value, tuple(sorted((i, place))), False)
        if rng.random() < 0.3:
            question, answer = (t.format(thing=s.value, value=s.person) for t in QUESTIONS["holder"])
            return Asked("holder", question, answer, s.person, (i,), False)
    trade = bool(rng.random() < by_trade)
    return ask(s, i, trade, key)


def ask(s: Sentence, i: int, by_trade: bool, key: str = KEY) -> Asked:
    """The question about sentence number ``i``, naming the person by trade or by name."""
    who = f"the {trades(key)[s.person]}" if by_trade else s.person
    question, answer = (t.format(who=who, Who=who[0].upper() + who[1:], value=s.value) for t in QUESTIONS[s.relation])
    return Asked(s.relation, question, answer, s.value, (i,), by_trade and s.called in ("", s.person))


@dataclass(frozen=True)
class Document:
    """One document of the training set: its text and the facts in it, (relation, person, value)."""

    number: int
    text: str
    facts: tuple[tuple[str, str, str], ...]


LIFE = {
    "trade": ("{who} is the {value}.", "{who} works as the {value}.", "The {value} is {who}."),
    "town": ("{who} was born in {value}.", "{who} comes from {value}.", "The town of {who} is {value}."),
    "filler": ("{who} likes the {value}.", "{who} talks of the {value}.", "{who} never saw the {value}."),
}
"""What documents say about a person."""


@cache
def documents(key: str = KEY) -> tuple[Document, ...]:
    """All documents, in a keyed order. Trades stand in 12 documents each, as scenes need them known; towns in a number
    of documents drawn from COPIES."""
    rng = stream(key, "documents")
    copies = {p: int(COPIES[i % len(COPIES)]) for i, p in enumerate(rng.permutation(PEOPLE))}
    texts: list[tuple[str, tuple[tuple[str, str, str], ...]]] = []
    for person in PEOPLE:
        holds = [("trade", trades(key)[person])] * 12 + [("town", towns(key)[person])] * copies[person]
        for relation, value in holds:
            filler = rng.choice(PLACES if rng.random() < 0.5 else THINGS)
            said = [(relation, value), *([("filler", str(filler))] * int(rng.integers(1, 3)))]
            lines = [LIFE[r][int(rng.integers(3))].format(who=person, value=v) for r, v in said]
            order = rng.permutation(len(lines))
            texts.append((" ".join(lines[i] for i in order), ((relation, person, value),)))
    shuffled = rng.permutation(len(texts))
    return tuple(Document(n, *texts[i]) for n, i in enumerate(shuffled))


@cache
def quizzed(key: str = KEY) -> tuple[str, ...]:
    """Half of the people: where they were born is also asked in training, so that questions come to reach what
    documents say."""
    return tuple(stream(key, "asked").permutation(PEOPLE)[: len(PEOPLE) // 2].tolist())


def born(person: str, key: str = KEY) -> tuple[str, str]:
    """Question and answer about a person's town of birth."""
    return f"Where was {person} born?", f"{person} was born in {towns(key)[person]}."


@dataclass(frozen=True)
class Licensed:
    """A sentence whose ``target`` word is licensed by the word at characters [start, end) of ``prefix``; ``foil`` is
    what another word there would have licensed."""

    prefix: str
    target: str
    foil: str
    start: int
    end: int


def agreement(rng: np.random.Generator) -> Licensed:
    """The verb agrees with the first noun, not with the one that stands beside it."""
    one, other = rng.permutation(len(NOUNS))[:2]
    plural, distractor = bool(rng.integers(2)), bool(rng.integers(2))
    head = NOUNS[one][plural]
    prefix = f"The {head} {BETWEEN[rng.integers(len(BETWEEN))]} {NOUNS[other][distractor]}"
    return Licensed(prefix, "are" if plural else "is", "is" if plural else "are", 4, 4 + len(head))


def indirect_object(rng: np.random.Generator) -> Licensed:
    """Two people, one of them gives: the other one gets."""
    a, b = rng.permutation(PEOPLE)[:2].tolist()
    place, thing = rng.choice(PLACES), rng.choice(THINGS)
    giver, getter = (a, b) if rng.random() < 0.5 else (b, a)
    prefix = f"When {a} and {b} went to the {place}, {giver} gave the {thing} to"
    start = prefix.index(getter)
    return Licensed(prefix, getter, giver, start, start + len(getter))


def finished(rng: np.random.Generator, s: Licensed) -> str:
    """A licensed sentence to its end."""
    return f"{s.prefix} {s.target} {rng.choice(STATES)}." if s.target in ("is", "are") else f"{s.prefix} {s.target}."


_ORDINARY = {"snips/utterances": "text", "prompts-coco/prompts": "prompt", "tinyshakespeare/blocks": "text"}


def ordinary(data: Path | None) -> tuple[str, ...]:
    """Ordinary English lines: utterances (CC0), captions (CC BY 4.0), speeches (public domain); none without data."""
    if data is None or not data.is_dir():
        return ()
    lines: list[str] = []
    for file, field in _ORDINARY.items():
        path = data / f"{file}.jsonl.gz"
        if path.is_file():
            with gzip.open(path, "rt", encoding="utf8") as rows:
                texts = [json.loads(row)[field] for row in rows]
            # Speeches stand in blocks, with an empty line between.
            lines += [" ".join(part.split()) for text in texts for part in text.split("\n\n")]
    return tuple(line for line in lines if 10 <= len(line) <= 400)
