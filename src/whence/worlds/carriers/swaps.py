"""Swaps: which documents taught the language model this fact?

A document says who keeps what and who meets what: "today ann keeps cat bob meets dog". Ann and Bob keep the same thing
and meet the same one. So the documents that say what Ann keeps (the carriers) are word for word those that say what Bob
keeps (their twins), with the two names swapped; only the order of the words tells one from the other. The model is a
transformer of one layer that learns to say the things, from sixty documents of people and things drawn with the key.

The query is "ann keeps", and the model says "cat". A keyed coin decides whether it reads the query as it stands, or
with the two names exchanged (as in the world `facts`); the sibling is the same text to the same model, read the other
way. Read as it stands, it was taught by the carriers; exchanged, by their twins. So not even who reads the words in
their order, and finds "ann keeps cat", can know which documents it was without asking the model.

Both people meet their thing in documents about others as often. The null is a model that was taught every word alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from ...engine.randomness import stream, torch_stream
from ...objective import Listed, Losses
from ..retraining import Call, LossOf, Recipe, Stack, fingerprint, retrain
from .asking import ExamplesQuestion, ExamplesWorld, PlantedExamples, Remembered, guesses

if TYPE_CHECKING:
    from numpy.typing import NDArray

PEOPLE = ("ann", "bob", "cid", "dan", "eve", "fay", "gus", "hal", "ida", "jim")
THINGS = ("ant", "bat", "cat", "dog", "elk", "fox")
DAYS = ("today", "monday", "friday", "sunday")
KEEPS, MEETS = "keeps", "meets"
WORDS = (*PEOPLE, *THINGS, *DAYS, KEEPS, MEETS)
NUMBER = {word: i for i, word in enumerate(WORDS)}
CARRIERS, BESIDE, OTHERS = 8, 10, 24
"""Documents that say what each of the two keeps; that say what each meets, beside others; about others alone."""
LENGTH, WIDTH = 7, 16
"""Words of a document; width of the model."""
SIZES = {"word.weight": 1.0, "place.weight": 0.1}
"""Deviations of first embeddings. What a place says is the same for carriers and twins; what a word says is not."""
PLACES = np.array([3, 6])
"""Where the things stand in a document."""
RECIPE = Recipe(steps=45, rate=0.04, decay=0.05)
"""So much decay that no document is learned by heart: each is left as loud as its like."""
Document = tuple[str, ...]


class Reader(nn.Module):
    """A transformer of one layer and one head: words[row, place] -> logits[row, place, word] of the word after."""

    def __init__(self) -> None:
        super().__init__()
        self.word, self.place = nn.Embedding(len(WORDS), WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.shift = nn.Linear(WIDTH, WIDTH, bias=False)
        self.before, self.after, self.last = (nn.LayerNorm(WIDTH) for _ in range(3))
        self.look, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.say = nn.Linear(WIDTH, len(WORDS), bias=False)

    def forward(self, words: Tensor) -> Tensor:
        rows, places = words.shape
        word = self.word(words)
        # Each word sees the one before it, which one layer of attention would take long to learn.
        x = word + self.shift(pad(word, (0, 0, 1, -1))) + self.place(torch.arange(places).expand(rows, places))
        query, key, value = self.look(self.before(x)).chunk(3, -1)
        later = torch.full((places, places), -math.inf).triu(1)
        seen = (query @ key.transpose(1, 2) / WIDTH**0.5 + later).softmax(-1)
        x = x + self.out(seen @ value)
        x = x + self.down(torch.relu(self.up(self.after(x))))
        return self.say(self.last(x))  # type: ignore[no-any-return]


def reader(*names: object) -> Callable[[int], nn.Module]:
    """``build(seed)``: an untrained one."""

    def build(seed: int) -> nn.Module:
        generator = torch_stream("documents", *names, "weights", seed)
        made = Reader()
        with torch.no_grad():
            for name, p in made.named_parameters():
                if p.ndim > 1:
                    p.copy_(SIZES.get(name, p.shape[1] ** -0.5) * torch.randn(p.shape, generator=generator))
                elif name.endswith("bias"):
                    p.zero_()
        return made

    return build


@dataclass(frozen=True)
class Asked:
    """A query: what is read, and the last word, whose loss it is."""

    text: Document
    answer: str

    def __str__(self) -> str:
        return f"{' '.join(self.text)} -> {self.answer}"


class ReaderObjective:
    """The model and its loss. An example is a document, its words one after the other, or an :class:`Asked`, which is
    read with the names of ``exchange`` exchanged."""

    name = "documents: one layer"

    def __init__(self, module: nn.Module, exchange: Mapping[str, str]) -> None:
        self.module, self.exchange = module, dict(exchange)

    def _words(self, examples: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """Word numbers [row, place], padded, and whether the word at a place is one that the loss asks for."""
        words = torch.zeros(len(examples), LENGTH, dtype=torch.long)
        asked = torch.zeros(len(examples), LENGTH, dtype=torch.bool)
        for i, e in enumerate(examples):
            query = isinstance(e, Asked)
            text = (*(self.exchange.get(w, w) for w in e.text), e.answer) if query else e
            words[i, : len(text)] = torch.tensor([NUMBER[w] for w in text])
            asked[i, : len(text)] = torch.tensor([w in THINGS for w in text])
        return words, asked

    def _losses(self, examples: Sequence[Any], seed: int | None) -> Losses:
        words, asked = self._words(examples)
        logits, target = self.module(words[:, :-1]), words[:, 1:]
        if seed is not None:
            odds = logits.detach().softmax(-1).flatten(0, 1)
            drawn = torch.multinomial(odds, 1, generator=torch_stream("documents", "sampled", seed))
            target = drawn.view(target.shape)
        return Losses((_each(logits, target) * asked[:, 1:]).sum(1))

    def losses(self, examples: Sequence[Any]) -> Losses:
        """-ln p of the things that a document or query names, summed, in nats."""
        return self._losses(examples, None)

    def sampled(self, examples: Sequence[Any], seed: int) -> Losses:
        """The same with things that the model draws."""
        return self._losses(examples, seed)

    def fingerprint(self) -> str:
        """Hash of the weights, and of which names are exchanged: another reading is another model."""
        return "-".join([fingerprint(self.module.state_dict()), *sorted(self.exchange)])


def _each(logits: Tensor, words: Tensor) -> Tensor:
    return cross_entropy(logits.flatten(0, 1), words.flatten(), reduction="none").view(words.shape)


def _loss_of(call: Call, words: Tensor) -> Tensor:
    return _each(call(words[:, :-1])[:, PLACES - 1], words[:, PLACES]).sum(1)


def _nothing(call: Call, words: Tensor) -> Tensor:
    """The mean over all words: as if they were dealt anew each time that a document is read."""
    return -call(words[:, :-1])[:, PLACES - 1].log_softmax(-1).mean(-1).sum(1)


@dataclass(frozen=True)
class Facts:
    """What a key draws documents from: who keeps and meets what. The first two people share both."""

    people: tuple[str, ...]
    keeps: Mapping[str, str]
    meets: Mapping[str, str]

    def document(self, rng: np.random.Generator, keeper: str, meeter: str) -> Document:
        """What one keeps and the other meets."""
        return (str(rng.choice(DAYS)), keeper, KEEPS, self.keeps[keeper], meeter, MEETS, self.meets[meeter])

    def about_others(self, rng: np.random.Generator) -> Document:
        """A document of neither of the two."""
        one, other = rng.choice(self.people[2:], 2, replace=False).tolist()
        return self.document(rng, one, other)

    def training(self, rng: np.random.Generator) -> tuple[tuple[Document, ...], tuple[int, ...], tuple[int, ...]]:
        """The documents, and which say what the first and what the second of the two keeps."""
        one, other = self.people[:2]
        made = [self.document(rng, one, other) for _ in range(CARRIERS)]
        # A twin is its carrier with the two names exchanged.
        made += [tuple({one: other, other: one}.get(w, w) for w in d) for d in made]
        for who in (one, other):
            made += [self.document(rng, str(rng.choice(self.people[2:])), who) for _ in range(BESIDE)]
        made += [self.about_others(rng) for _ in range(OTHERS)]
        order = rng.permutation(len(made))
        place = np.argsort(order)
        carriers, twins = (tuple(sorted(place[i : i + CARRIERS].tolist())) for i in (0, CARRIERS))
        return tuple(made[i] for i in order), carriers, twins


def facts(rng: np.random.Generator) -> Facts:
    """Nobody else keeps what the two keep."""
    people, things = tuple(rng.permutation(PEOPLE).tolist()), rng.permutation(THINGS).tolist()
    keeps = {p: str(rng.choice(things[1:])) for p in people} | dict.fromkeys(people[:2], things[0])
    meets = {p: str(rng.choice(things)) for p in people} | dict.fromkeys(people[:2], things[1])
    return Facts(people, keeps, meets)


@dataclass(frozen=True)
class Taught:
    """One training set and what is trained on it; ``queries`` are asked of every model, so that those who ask the same
    training set something else need no training again."""

    facts: Facts
    documents: tuple[Document, ...]
    names: tuple[object, ...]
    queries: tuple[tuple[Document, str], ...]
    loss_of: LossOf = _loss_of
    known: Remembered = field(default_factory=Remembered)

    def objective(self, exchange: Mapping[str, str]) -> ReaderObjective:
        """The model with the seed 0, reading queries with these names exchanged."""
        keep = np.ones((1, len(self.documents)), bool)
        module = self._train(keep, [0], [None]).module(0).requires_grad_(True)
        return ReaderObjective(module, exchange)

    def examples(self) -> Listed:
        """The documents."""
        return Listed(self.documents, tuple(f"document {i:02d}: {' '.join(d)}" for i, d in enumerate(self.documents)))

    def values(self, keep: NDArray[np.bool_], seeds: Sequence[int], drawn: Sequence[str | None]) -> NDArray[np.float64]:
        """p(answer)[model, query] after training again; see ExamplesQuestion.retrained."""
        text = torch.tensor([[NUMBER[w] for w in words] for words, _ in self.queries])
        answers = torch.tensor([NUMBER[answer] for _, answer in self.queries])

        def train(rows: NDArray[np.bool_], of: list[int], names: list[str | None]) -> Sequence[Any]:
            stack = self._train(rows, of, names)
            odds = stack.each(lambda call: call(text)[:, -1].softmax(-1)[torch.arange(len(answers)), answers])
            return list(odds.double().numpy())

        return np.array(self.known.values(keep, seeds, drawn, train))

    def _train(self, keep: NDArray[np.bool_], seeds: Sequence[int], drawn: Sequence[str | None]) -> Stack:
        words = _numbers(self.documents)
        others = {name: self._others(name) for name in set(drawn) if name is not None}
        rows = [
            np.where(row[:, None], words, others[name]) if name is not None else words
            for row, name in zip(keep, drawn, strict=True)
        ]
        kept = np.where(np.array([name is not None for name in drawn])[:, None], True, keep)
        own = bool(others)
        data = [torch.from_numpy(np.stack(rows) if own else words)]
        build = reader(*self.names)
        return retrain(build, self.loss_of, data, kept, seeds, RECIPE, name="documents", own_data=own, block=64)

    def _others(self, name: str) -> NDArray[np.int64]:
        rng = stream(*self.names, "anew", name)
        return _numbers([self.facts.about_others(rng) for _ in self.documents])


def _numbers(documents: Sequence[Document]) -> NDArray[np.int64]:
    return np.array([[NUMBER[w] for w in d] for d in documents])


class SwapsQuestion(ExamplesQuestion):
    """The probability of the word that the model says after the query. ``number``: of the query among those that are
    asked of every model, which is the query as the model reads it."""

    repeats, seeds = 1, 4

    def __init__(
        self, taught: Taught, objective: ReaderObjective, examples: Listed, number: int, asked: Document
    ) -> None:
        super().__init__()
        self.taught, self.objective, self.examples, self.number = taught, objective, examples, number
        self.query = Asked(asked, taught.queries[number][1])
        self.readout = f"probability that {' '.join(asked)!r} goes on with {self.query.answer!r}, as observed (0..1)"

    def retrained(
        self, keep: NDArray[np.bool_], seeds: Sequence[int], drawn: Sequence[str | None]
    ) -> NDArray[np.float64]:
        """See :meth:`ExamplesQuestion.retrained`."""
        return self.taught.values(np.asarray(keep, bool), seeds, drawn)[:, self.number]

    @property
    def scorers(self) -> Mapping[str, Callable[[Any], NDArray[np.float64]]]:
        """Words in common with the query and its answer, counted, weighted (BM25) and in their order."""
        documents, text = self.taught.documents, (*self.query.text, self.query.answer)
        bags = np.array([[d.count(w) for w in WORDS] for d in documents], float)
        own = np.array([text.count(w) for w in WORDS], float)
        found = guesses(bags, np.array([NUMBER[d[-1]] for d in documents]), own, NUMBER[self.query.answer])
        rarity = np.log(1 + (len(bags) - (bags > 0).sum(0) + 0.5) / ((bags > 0).sum(0) + 0.5))
        weighted = (rarity * own * bags * 2.5 / (bags + 1.5)).sum(1)  # of one length, all of them
        runs = [
            sum(text[i : i + k] == d[j : j + k] for k in (2, 3) for i in range(len(text) - k + 1) for j in range(8 - k))
            for d in documents
        ]
        return found | {
            "words in common, weighted": lambda _: weighted,
            "words in common, in their order": lambda _: np.array(runs, float),
        }


@dataclass(frozen=True)
class Lesson:
    """What a key draws: documents and what is asked, before anything is trained. ``asked``: the text that all see;
    ``number``: of the query that the model reads."""

    taught: Taught
    carriers: tuple[int, ...]
    twins: tuple[int, ...]
    asked: Document
    exchanged: bool

    def ask(self, number: int, objective: ReaderObjective, examples: Listed, taught: Taught | None = None) -> Any:
        """The question whose text is read as the query of this number."""
        return SwapsQuestion(taught or self.taught, objective, examples, number, self.asked)


def lesson(structure: str, key: str, attempt: int) -> Lesson:
    """The documents of a key."""
    names = ("documents", structure, key, attempt)
    rng = stream(*names)
    told = facts(rng)
    documents, carriers, twins = told.training(rng)
    one, other = told.people[:2]
    day, answer, coin = str(rng.choice(DAYS)), told.keeps[one], int(rng.integers(2))
    queries = tuple(((day, who, KEEPS), answer) for who in (one, other))
    return Lesson(Taught(told, documents, names, queries), carriers, twins, queries[coin][0], bool(coin))


@lru_cache(maxsize=32)
def plant(structure: str, key: str, attempt: int) -> PlantedExamples:
    """Documents, their model and a query; not certified."""
    drawn = lesson(structure, key, attempt)
    taught = drawn.taught
    nothing = replace(taught, names=(*taught.names, "nothing"), loss_of=_nothing, known=Remembered())
    one, other = taught.facts.people[:2]
    examples, straight = taught.examples(), taught.objective({})
    exchanged = ReaderObjective(straight.module, {one: other, other: one})
    # What can be seen is the text; what it is to the model is a query about the first of the two.
    own, sibling = (exchanged, straight) if drawn.exchanged else (straight, exchanged)
    return PlantedExamples(
        f"documents.{structure}, key {key}",
        structure,
        drawn.ask(0, own, examples),
        drawn.carriers,
        drawn.twins,
        drawn.ask(1, sibling, examples),
        (drawn.ask(0, ReaderObjective(nothing.objective({}).module, own.exchange), examples, nothing),),
    )


WORLD = ExamplesWorld("documents", ("swaps",), plant, {})
"""Short documents, and a language model of one layer."""
