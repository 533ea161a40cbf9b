"""Asking which training examples did it: a Question whose units are examples, answered by training again.

``ask(keep)`` trains the model again, from the same first weights, on a training set in which the examples that are not
kept were drawn anew (others of the same law, which say nothing about what is asked); ``swap(which)`` trains it without
those at all. The value is the probability of the outcome that the model gives, as in every world.

What an explainer has beside that (capability "training examples"): ``objective``, the trained model and its loss;
``examples``, what it was trained on; and ``query``, the output in the objective's own form, so that
``METHOD().fit(question.objective, question.examples).explain(question.query)`` answers.

One example hardly ever decides by itself, as others say the same. What is planted and certified is therefore a group:
the *carriers*, which taught the outcome, and their *twins*. With paired seeds (first weights, drawn examples)

* without the carriers the outcome ends; without their twins it stays;
* with all other examples drawn anew it stays;
* the sibling's question says the same with the two in each other's place;
* the nulls do not move, whichever group is left out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import RunError
from ...units import Units
from ...verdict import t_interval
from ..ground import ENDS, STAYS, STILL, Draw, Planted, Sets

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ...objective import Examples, Objective

KIND = "training example"
NULL_SEEDS = 2
TRIES = 24
"""Training sets that are tried for one key before it counts as one that teaches nothing."""


class ExamplesQuestion(ABC):
    """A Question about one output of a trained model. ``repeats``: draws of the oracle for each intervention;
    ``seeds``: retrainings for each claim of a certificate, paired."""

    capabilities = frozenset({"training examples"})
    repeats, seeds = 2, 8
    readout: str
    objective: Objective
    examples: Examples
    query: Any

    def __init__(self) -> None:
        self._purpose = ""
        self._asked: dict[bytes, int] = {}

    @property
    def units(self) -> Units:
        """The training examples, in their order."""
        n = len(self.examples)
        return Units(KIND, tuple(self.examples.label(i) for i in range(n)), tuple(((i,),) for i in range(n)))

    @abstractmethod
    def retrained(
        self, keep: NDArray[np.bool_], seeds: Sequence[int], drawn: Sequence[str | None]
    ) -> NDArray[np.float64]:
        """value[model] after training on the examples of keep[model, example] with the seed of each model; 0 is that
        of the model that is explained. The others are left out (None) or drawn anew, under this name."""
        ...

    @property
    @abstractmethod
    def scorers(self) -> Mapping[str, Callable[[Any], NDArray[np.float64]]]:
        """Guesses that never ask the model: score[example]."""
        ...

    def restart(self, purpose: str) -> None:
        """See :func:`whence.worlds.ground.restart`."""
        self._purpose, self._asked = purpose, {}

    def ask(self, keep: NDArray[np.bool_]) -> NDArray[np.float64]:
        """value[coalition], see :meth:`whence.question.Question.ask`. The first time that a row is asked its missing
        examples come from the first set of drawn ones, then from the second, ...: rows are paired."""
        rows, drawn = np.asarray(keep, bool), []
        for row in rows:
            content = np.packbits(row).tobytes()
            self._asked[content] = self._asked.get(content, 0) + 1
            drawn.append(f"{self._purpose} {self._asked[content]}")
        return self.retrained(rows, [0] * len(rows), drawn)

    def swap(self, which: NDArray[np.bool_]) -> NDArray[np.float64]:
        """value[coalition], see :meth:`whence.worlds.ground.Oracle.swap`: these examples were never seen."""
        rows = ~np.asarray(which, bool)
        return self.retrained(rows, [0] * len(rows), [None] * len(rows))


@dataclass(frozen=True)
class PlantedExamples(Planted):
    """A question whose arm are the carriers, all of them together; see :class:`whence.worlds.ground.Planted`."""

    question: ExamplesQuestion
    sibling: ExamplesQuestion
    nulls: tuple[ExamplesQuestion, ...] = ()

    @property
    def ends(self) -> Sets:
        return (frozenset(self.arm),)

    @property
    def keeps(self) -> Sets:
        return (frozenset(self.arm),)

    def mirrored(self) -> PlantedExamples:
        return PlantedExamples(
            f"{self.name}, roles swapped", self.structure, self.sibling, self.twin, self.arm, self.question, self.nulls
        )

    def trouble(self) -> str:
        """Why this question may not be asked; "" if retraining does what was planted. See the top of the file."""
        sides = (("", self), ("sibling: ", self.mirrored()))

        def on_both(seeds: int) -> str:
            return next((side + why for side, planted in sides if (why := _trouble(planted, seeds))), "")

        # What is cheap to find comes first: most of what fails does so at the first seed, or on a null.
        nulls = (f"null {i} {why}" for i, null in enumerate(self.nulls) if (why := _moves(null, self)))
        return on_both(1) or next(nulls, "") or on_both(self.question.seeds)


def _values(question: Any, groups: Sequence[Any], seeds: int, drawn: bool) -> NDArray[np.float64]:
    """value[group, seed] without each group of examples, left out or drawn anew."""
    keep = np.ones((len(groups) * seeds, len(question.units)), bool)
    for i, group in enumerate(groups):
        keep[i * seeds : (i + 1) * seeds, list(group)] = False
    names = [f"certification {i}" if drawn else None for i in range(seeds)] * len(groups)
    found: NDArray[np.float64] = question.retrained(keep, list(range(seeds)) * len(groups), names)
    return found.reshape(len(groups), seeds)


def _trouble(p: PlantedExamples, seeds: int) -> str:
    others = sorted(set(range(len(p.question.units))) - set(p.arm))
    seen, without, still = _values(p.question, [(), p.arm, p.twin], seeds, drawn=False)
    if seen.mean() < 1 - STILL:
        return f"the model is not sure of its outcome: {seen.mean():.2f}"
    falls, stays = seen - without, seen - still
    # The model that is explained has to fall by itself; models like it on average, and beyond doubt.
    if falls[0] <= ENDS or falls.mean() <= ENDS or (seeds > 1 and t_interval(falls.tolist(), 0.05)[0] <= STILL):
        return f"without the carriers the outcome falls by {falls[0]:.2f}, in models like it {falls.mean():.2f}"
    if stays[0] > STILL or stays.mean() > STILL or (seeds > 1 and t_interval(stays.tolist(), 0.05)[1] >= ENDS):
        return f"without the twins the outcome falls by {stays[0]:.2f}, in models like it {stays.mean():.2f}"
    if seeds == 1:
        return ""
    gone, twins, alone = _values(p.question, [p.arm, p.twin, others], seeds, drawn=True)
    if t_interval((gone - twins).tolist(), 0.05)[1] >= 0 or (seen - gone).mean() <= ENDS:
        return f"with the carriers drawn anew the outcome falls by {(seen - gone).mean():.2f}"
    if alone.mean() < STAYS * seen.mean() or t_interval(alone.tolist(), 0.05)[0] <= ENDS:
        return f"with all others drawn anew {alone.mean():.2f} is left of the outcome's {seen.mean():.2f}"
    return ""


def _moves(null: Any, p: PlantedExamples) -> str:
    seen, *without = _values(null, [(), p.arm, p.twin, p.arm + p.twin], NULL_SEEDS, drawn=False)
    worst = max(float(abs(v - seen).mean()) for v in without)
    return f"moves by {worst:.2f}" if worst > STILL else ""


@dataclass(frozen=True)
class ExamplesWorld:
    """A family of planted training sets. ``plant(structure, key, attempt)`` makes the question of one; its cache is its
    own affair. ``attempts``: which one of a structure and key was the first to be certified."""

    name: str
    structures: tuple[str, ...]
    plant: Callable[[str, str, int], PlantedExamples]
    attempts: dict[tuple[str, str], int]

    def draw(self, key: str) -> Draw:
        """A certified question of each structure, with fresh streams."""
        return Draw(self.name, key, tuple(self._certified(s, key) for s in self.structures))

    def _certified(self, structure: str, key: str) -> PlantedExamples:
        """Raises RunError where none of TRIES training sets taught what was planted."""
        if (structure, key) in self.attempts:
            return self.plant(structure, key, self.attempts[structure, key])
        for attempt in range(TRIES):
            planted = self.plant(structure, key, attempt)
            found = planted.trouble()
            if not found:
                self.attempts[structure, key] = attempt
                return planted
        raise RunError(
            f"a question of {self.name}.{structure} for the key {key!r}",
            f"none of {TRIES} training sets could be certified; of the last: {found}",
            "another key, or longer training of this world's models",
        )


class Remembered:
    """Values of retrainings by what was trained on, so that none is done twice."""

    def __init__(self, most: int = 20_000) -> None:
        self._found: dict[tuple[Any, ...], Any] = {}
        self._most = most

    def values(
        self,
        keep: NDArray[np.bool_],
        seeds: Sequence[int],
        drawn: Sequence[str | None],
        train: Callable[[NDArray[np.bool_], list[int], list[str | None]], Sequence[Any]],
    ) -> list[Any]:
        """What ``train`` finds of each row, asked for those that are new."""
        everything = np.atleast_1d(keep.all(1))
        names = [
            (np.packbits(row).tobytes(), seed, None if whole else name)  # nothing is missing, so nothing is drawn
            for row, whole, seed, name in zip(keep, everything, seeds, drawn, strict=True)
        ]
        new = {name: i for i, name in enumerate(names) if name not in self._found}
        if len(self._found) + len(new) > self._most:
            self._found.clear()
            new = {name: i for i, name in enumerate(names)}
        if new:
            rows = list(new.values())
            told = train(keep[rows], [seeds[i] for i in rows], [names[i][2] for i in rows])
            self._found |= dict(zip(new, told, strict=True))
        return [self._found[name] for name in names]


# -- guesses that never ask the model ----------------------------------------------------------------------------------


def guesses(
    features: NDArray[np.float64], labels: NDArray[np.int64], query: NDArray[np.float64], outcome: int
) -> dict[str, Callable[[Any], NDArray[np.float64]]]:
    """What examples look like, features[example, entry], and what they are labelled, against the query's."""

    def cosine(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(a @ b.T / (np.linalg.norm(a, axis=1)[:, None] * np.linalg.norm(b, axis=1)[None] + 1e-12))

    def neighbours(_: Any) -> NDArray[np.float64]:
        alike = cosine(features, features) - 2 * np.eye(len(features))
        return np.asarray((labels[np.argsort(-alike, 1)[:, :5]] == labels[:, None]).mean(1))

    return {
        "similarity to the query": lambda _: cosine(features, query[None])[:, 0],
        "distance to the query": lambda _: -np.linalg.norm(features - query, axis=1),
        "has the outcome's label": lambda _: (labels == outcome).astype(float),
        "size": lambda _: np.linalg.norm(features, axis=1),
        "like the other examples": lambda _: cosine(features, features).mean(1),
        "label of those like it": neighbours,
    }
