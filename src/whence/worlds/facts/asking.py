"""Questions about scenes, with planted answers: which sentence made the model answer so?

Two people are in two places, told in the same form, among other sentences. The question says a trade, which shares no
word with any of them: whose trade it is stands in no text that can be seen. There is one structure, *single*. Answers
that take two sentences (where is the key? with its holder, who is in ...) were planted too, and the model does not give
them surely enough to be certified.

Whoever asks sees one text. A keyed coin decides whether the model reads the question as it stands, or with the two
people's trades exchanged: so the words that a question shares with a sentence say nothing. The sibling is the other
reading. A removed sentence is replaced by one of the same form that a scene could hold as well.

Nulls: a question whose answer is known by heart (where someone was born), and an untrained model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...engine.ablate import Version
from ...engine.decompose import LogitParts
from ...engine.randomness import seed_of, stream
from ...errors import RunError
from ...models.text import LanguageModel
from ...models.text_question import PromptQuestion
from ...segments import Segment, Segments
from ...text import TextSettings
from ..ground import Draw, Planted, trouble
from . import model_directory
from .corpus import KEY, Sentence, ask, born, towns, trades
from .vocabulary import PEOPLE, PLACES

TRIES = 24
QUESTIONS = 2
"""Of each draw: of one cause and its twin a guess is right or wrong, and six coins fall alike too often."""
OTHERS = 4
"""Sentences in a scene beside those of arm and twin."""


@lru_cache(maxsize=4)
def adapter(untrained: int = 0) -> LanguageModel:
    """The embedded model, or an untrained one of the same build (its number, from 1)."""
    from ...models.text_loading import load_text

    known = load_text(model_directory())
    if untrained:
        from ...models.small_llama import build_llama

        model = build_llama(known.tokenizer, seed_of("facts", "untrained", untrained) % 2**31)
        return LanguageModel(model.requires_grad_(False), known.tokenizer, "facts, untrained")
    return LanguageModel(known.model, known.tokenizer, "facts, the embedded model")


@dataclass(frozen=True)
class Told:
    """A sentence of a scene, and the ones that could stand in its place; the first is its opposite."""

    sentence: Sentence
    others: tuple[Sentence, ...]


class SceneQuestion(PromptQuestion):
    """The probability of the value that the model named. Units are the scene's sentences. An Oracle."""

    removal = "replace"
    repeats = 4
    """Draws of the oracle for each intervention: each is a text of its own that goes through the model."""

    def __init__(
        self, model: LanguageModel, told: Sequence[Told], question: str, lead: str, value: str,
        exchange: Mapping[str, str], names: tuple[object, ...],
    ) -> None:  # fmt: skip
        """``exchange``: words of the question that the model reads as others, in question and answer."""
        self.told, self._names, self._purpose = tuple(told), names, ""
        self._rest = f"\nQuestion: {question}\nAnswer: {lead}"
        self._swapped = {self._token(model, a): self._token(model, b) for a, b in exchange.items()}
        self._draws: dict[bytes, np.random.Generator] = {}
        text, parts = "", []
        for t in told:
            parts.append(Segment("sentence", len(text), len(text) + len(t.sentence.text)))
            text += t.sentence.text + " "
        prompt = text.rstrip() + self._rest
        run = model.write(TextSettings(prompt, forced=f" {value}"))
        super().__init__(model, run, Segments(prompt, tuple(parts)), removal="drop")

    @staticmethod
    def _token(model: LanguageModel, word: str) -> int:
        (found,) = model.encode_output(f" {word}")[0]
        return found

    @property
    def readout(self) -> str:
        """What is asked."""
        return f"probability of the answer{self.run.text!r} (0..1)"

    @property
    def capabilities(self) -> frozenset[str]:
        """See TextQuestion; sentences are not taken apart, as their parts could not be drawn anew."""
        return super().capabilities - {"levels", "deterministic", "reword"}

    @property
    def scorers(self) -> dict[str, Any]:
        """A guess of its own: the words that a sentence shares with the question."""
        asked = set(self._rest.replace("?", " ").replace(":", " ").split())
        shared = [len(asked & set(t.sentence.text.rstrip(".").split())) for t in self.told]
        return {"lexical overlap": lambda _: np.array(shared, float)}

    # -- asking -------------------------------------------------------------------------------------------------------

    def restart(self, purpose: str) -> None:
        """See :func:`whence.worlds.ground.restart`."""
        self._purpose, self._draws = purpose, {}

    def _scene(self, sentences: Sequence[Sentence]) -> Version:
        ids = self.adapter.encode(" ".join(s.text for s in sentences) + self._rest)[0]
        return Version(self._read(ids), self._target)

    def _read(self, ids: Sequence[int]) -> tuple[int, ...]:
        """Token numbers as the model gets them: the question's words exchanged."""
        tail = len(self.adapter.encode_output(self._rest)[0])
        return (*ids[:-tail], *(self._swapped.get(i, i) for i in ids[-tail:]))

    def ask_tokens(self, keep: NDArray[np.bool_]) -> NDArray[np.float64]:
        """logprob[coalition, 1] with the sentences that are not kept drawn anew; the same rows give the same draws in
        the same order, whatever else was asked."""
        versions = []
        for row in np.asarray(keep, bool):
            content = np.packbits(row).tobytes()
            if content not in self._draws:
                self._draws[content] = stream(*self._names, self._purpose, content.hex())
            rng, drawn = self._draws[content], []
            for kept, t in zip(row, self.told, strict=True):
                among = (t.sentence, *t.others)
                drawn.append(t.sentence if kept else among[int(rng.integers(len(among)))])
            versions.append(self._scene(drawn))
        return self._measured(versions)

    def ask(self, keep: NDArray[np.bool_]) -> NDArray[np.float64]:
        """value[coalition], see :meth:`whence.question.Question.ask`."""
        return np.asarray(np.exp(self.ask_tokens(keep).sum(1)))

    def swap(self, which: NDArray[np.bool_]) -> NDArray[np.float64]:
        """value[coalition], see :meth:`whence.worlds.ground.Oracle.swap`."""
        versions = [
            self._scene([t.others[0] if out else t.sentence for out, t in zip(row, self.told, strict=True)])
            for row in np.asarray(which, bool)
        ]
        return np.asarray(np.exp(self._measured(versions).sum(1)))

    def _measured(self, versions: Sequence[Version], how: str = "") -> NDArray[np.float64]:
        read = [replace(v, prompt=self._read(v.prompt)) if how else v for v in versions]
        return super()._measured(read, how)

    def forward(self, inputs: Tensor) -> Tensor:
        """The probability, differentiable, of embeddings [batch, token, width]."""
        seen = torch.as_tensor(self.run.prompt_ids)
        read = torch.tensor(self._read([int(i) for i in seen]))
        places = torch.nonzero(read != seen)[:, 0]
        if len(places):
            inputs = inputs.clone()
            inputs[:, places] = self.adapter.model.get_input_embeddings()(read[places]).detach()
        return super().forward(inputs).exp()

    def attention(self) -> NDArray[np.float64]:
        """See PromptQuestion; of the text as the model reads it."""
        with self._as_read():
            return super().attention()

    def logit_parts(self, foil: int | str | None = None) -> LogitParts:
        """See PromptQuestion; of the text as the model reads it."""
        with self._as_read():
            return super().logit_parts(foil)

    @contextmanager
    def _as_read(self) -> Iterator[None]:
        seen = self.run
        self.run = replace(seen, prompt_ids=np.array(self._read([int(i) for i in seen.prompt_ids])))
        try:
            yield
        finally:
            self.run = seen


def _told(rng: np.random.Generator, who: str, value: str, telling: int, free: Sequence[str]) -> Told:
    """Who is where; the others are other places."""
    said = Sentence("place", who, value, telling)
    return Told(said, tuple(replace(said, value=p) for p in rng.permutation(free).tolist()))


@dataclass(frozen=True)
class Facts:
    """The world: scenes and the embedded model."""

    name: str = "facts"
    structures: tuple[str, ...] = ("single",)

    def draw(self, key: str) -> Draw:
        """Certified questions of each structure. Raises RunError where none could be found."""
        numbers = range(QUESTIONS)
        return Draw(self.name, key, tuple(self._planted(key, s, i) for s in self.structures for i in numbers))

    def _planted(self, key: str, structure: str, number: int) -> Planted:
        why = ""
        for attempt in range(number * TRIES, (number + 1) * TRIES):
            planted = propose(key, structure, attempt)
            why = trouble(planted)
            if not why:
                # Again, with the draws that will be asked first.
                for q in (planted.question, planted.sibling, *planted.nulls):
                    q.restart("asking")  # type: ignore[attr-defined]
                why = trouble(planted)
                if not why:
                    return propose(key, structure, attempt)
        raise RunError(
            f"a {structure} question of the facts world, key {key!r}",
            f"none of {TRIES} scenes is certified; the last: {why}",
            "a better trained model",
        )


def propose(key: str, structure: str, attempt: int) -> Planted:
    """A scene with its question, its sibling and its nulls; not certified."""
    rng = stream("facts", key, structure, attempt)
    people, places = (rng.permutation(x).tolist() for x in (PEOPLE, PLACES))
    one, other, telling = people[0], people[1], int(rng.integers(3))
    free = places[2 + OTHERS :]
    first, second = (_told(rng, who, places[i], telling, free) for i, who in enumerate((one, other)))
    told = [first, second]
    for i in range(2, 2 + OTHERS):
        told.append(_told(rng, people[i], places[i], int(rng.integers(3)), free))
    told = [told[i] for i in rng.permutation(len(told))]
    words = (trades(KEY)[one], trades(KEY)[other])
    asked = ask(first.sentence, 0, True)
    question, lead = asked.question, asked.lead
    names = ("facts", key, structure, attempt)
    exchange = dict(zip(words, words[::-1], strict=True))
    # The coin: half of the time the text names the other one, and the model reads it exchanged.
    turned = bool(rng.integers(2))
    if turned:
        question, lead = (_exchanged(t, exchange) for t in (question, lead))

    def asks(reading: Mapping[str, str], value: str) -> SceneQuestion:
        return SceneQuestion(adapter(), told, question, lead, value, reading, names)

    birth = born(one)[0]
    town = towns(KEY)[one]
    return Planted(
        name=f"facts/{key}/{structure}/{attempt}",
        structure=structure,
        question=asks(exchange if turned else {}, places[0]),
        arm=(told.index(first),),
        twin=(told.index(second),),
        sibling=asks({} if turned else exchange, places[1]),
        nulls=(
            SceneQuestion(adapter(), told, birth, f"{one} was born in", town, {}, names),
            SceneQuestion(adapter(1), told, question, lead, places[0], {}, names),
        ),
    )


def _exchanged(text: str, words: Mapping[str, str]) -> str:
    a, b = words
    return text.replace(a, "\0").replace(b, a).replace("\0", b)


WORLD = Facts()
