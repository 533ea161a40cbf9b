"""The proving ground: what a world is, and how its planted answers are certified on the model itself.

A world draws, from a key, a small model and questions to it whose answers were planted: an *arm* of units that a keyed
coin made decide the outcome, and a *twin* arm that is the same in everything visible without the model. To add a world
of your own, write one file with an object that has ``name``, ``structures`` and ``draw(key)``; the rest works on that.

Certification asks the actual model, not the recipe. With *swap* (units put into their opposite state, which is as
common in the world as their own) and *ask* (units drawn anew), a question counts only if

* the minimal sets of units whose swap ends the outcome are the planted ones, and no others, among arm and twin;
* the minimal sets that keep the outcome, whatever the other units are drawn to be, are the planted ones (in the mean,
  whose 95 % interval lies above one half);
* drawing everything outside the arm anew leaves the outcome as it is;
* the sibling, the same input asked of the model with its roles swapped, says the same of the twin arm;
* the nulls, models of the same build that learned nothing, do not move whatever is swapped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ..question import Question
from ..verdict import t_interval

if TYPE_CHECKING:
    from numpy.typing import NDArray

Sets = tuple[frozenset[int], ...]
ENDS, STILL = 0.5, 0.2
"""A swap that lowers the value by more than ENDS ends the outcome; one that moves it by at most STILL does nothing."""
DRAWS, STAYS = 48, 0.9
"""A set keeps the outcome if over DRAWS re-renderings of all other units at least this share of the value is left. A
question that costs much (a picture) may have ``repeats``, its number of draws."""


class Oracle(Question, Protocol):
    """A Question as its world sees it: it can also put units into their opposite state.

    One that draws should also have ``restart(purpose)``, which begins its streams anew, other ones for each purpose.
    """

    def swap(self, which: NDArray[np.bool_]) -> NDArray[np.float64]:
        """value[coalition] with these units, which[coalition, unit], in their opposite state (and what the world's
        mechanism makes follow from that), everything else as observed. Nothing is drawn."""
        ...


def restart(question: Question, purpose: str) -> None:
    """Begin a question's streams of draws anew, those of this purpose; without effect where it has no such method."""
    begin = getattr(question, "restart", None)
    if begin:
        begin(purpose)


@dataclass(frozen=True)
class Structure:
    """How an arm's units make the outcome: the minimal sets that end it and that keep it, as places in the arm."""

    size: int
    ends: Sets
    keeps: Sets
    says: str


def _sets(*groups: Iterable[int]) -> Sets:
    return tuple(frozenset(g) for g in groups)


STRUCTURES: Mapping[str, Structure] = MappingProxyType(
    {
        "single": Structure(1, _sets([0]), _sets([0]), "one unit decides"),
        "and": Structure(2, _sets([0], [1]), _sets([0, 1]), "both units are needed, both are on"),
        "or": Structure(2, _sets([0, 1]), _sets([0], [1]), "either unit suffices, both are on"),
        "xor": Structure(2, _sets([0], [1]), _sets([0, 1]), "on if exactly one of the two units is on"),
        "suppression": Structure(2, _sets([1]), _sets([1]), "the first unit would, the second stops it: outcome off"),
        "absence": Structure(1, _sets([0]), _sets([0]), "on because the unit is off"),
        "mediation": Structure(2, _sets([0], [1]), _sets([1]), "the first unit sets the second, which alone decides"),
        "confounder": Structure(2, _sets([0]), _sets([0]), "the second unit goes with the first and does nothing"),
    }
)


@dataclass(frozen=True)
class Planted:
    """A question with its planted answer. ``twin[i]`` has in the decoy arm the role that ``arm[i]`` has in the real
    one; in ``sibling``, the same input asked of the model with its roles swapped, the two change places."""

    name: str
    structure: str
    question: Oracle
    arm: tuple[int, ...]
    twin: tuple[int, ...]
    sibling: Oracle
    nulls: tuple[Oracle, ...] = ()

    @property
    def ends(self) -> Sets:
        """Minimal sets whose swap ends the outcome."""
        return tuple(frozenset(self.arm[i] for i in s) for s in STRUCTURES[self.structure].ends)

    @property
    def keeps(self) -> Sets:
        """Minimal sets that keep the outcome."""
        return tuple(frozenset(self.arm[i] for i in s) for s in STRUCTURES[self.structure].keeps)

    @property
    def causes(self) -> frozenset[int]:
        """Units in any of these sets."""
        return frozenset().union(*self.ends, *self.keeps)

    def mirrored(self) -> Planted:
        """The sibling's question: arm and twin in each other's place."""
        return Planted(
            f"{self.name}, roles swapped", self.structure, self.sibling, self.twin, self.arm, self.question, self.nulls
        )


@dataclass(frozen=True)
class Draw:
    """A world drawn from one key: the replicate of every trial."""

    world: str
    key: str
    planted: tuple[Planted, ...]


class World(Protocol):
    """A family of worlds. The same key gives the same model and questions. Names and places of units, and which output
    stands for which structure, should be drawn from the key, or they give the answer away."""

    @property
    def name(self) -> str: ...

    @property
    def structures(self) -> tuple[str, ...]: ...

    def draw(self, key: str) -> Draw:
        """Build or train the model of ``key`` and draw its questions, one or more for each structure."""
        ...


def rows(sets: Iterable[Iterable[int]], units: int) -> NDArray[np.bool_]:
    """which[set, unit]."""
    listed = [list(s) for s in sets]
    out = np.zeros((len(listed), units), bool)
    for row, s in zip(out, listed, strict=True):
        row[s] = True
    return out


def subsets(units: Iterable[int]) -> list[frozenset[int]]:
    """All subsets but the empty one, small ones first."""
    listed = sorted(units)
    return [frozenset(c) for k in range(1, len(listed) + 1) for c in combinations(listed, k)]


def minimal(sets: Iterable[frozenset[int]]) -> frozenset[frozenset[int]]:
    """Those that contain no other of them."""
    listed = sorted(set(sets), key=len)
    return frozenset(s for s in listed if not any(t < s for t in listed))


def trouble(planted: Planted) -> str:
    """Why this question may not be asked; "" if the actual model and its sibling do what was planted."""
    own = getattr(planted, "trouble", None)
    if own:  # a kind of question that certifies itself, as one that is answered by training again
        return str(own())
    for side, p in (("", planted), ("sibling: ", planted.mirrored())):
        found = _trouble(p)
        if found:
            return side + found
    for i, null in enumerate(planted.nulls):
        n = len(null.units)
        moved = null.swap(np.eye(n, dtype=bool)) - null.ask(np.ones((1, n), bool))
        everything = null.swap(rows(subsets(planted.arm + planted.twin), n)) - null.ask(np.ones((1, n), bool))
        worst = max(abs(moved).max(), abs(everything).max())
        if worst > STILL:
            return f"null {i} moves by {worst:.2f}"
    return ""


def _trouble(p: Planted) -> str:
    n = len(p.question.units)
    seen = float(p.question.ask(np.ones((1, n), bool))[0])
    if seen < 1 - STILL:
        return f"the model is not sure of its outcome: {seen:.2f}"
    asked = subsets(p.arm + p.twin)
    falls = seen - p.question.swap(rows(asked, n))
    ends = minimal(s for s, fall in zip(asked, falls, strict=True) if fall > ENDS)
    if ends != frozenset(p.ends):
        return f"swaps of {_show(ends)} end the outcome, planted were {_show(p.ends)}"
    between = [s for s, fall in zip(asked, falls, strict=True) if STILL < fall <= ENDS]
    if between:
        return f"swapping {_show(between)} moves the outcome half-way"
    kept = [s for s in subsets(p.arm) if _keeps(p.question, s, seen)]
    if minimal(kept) != frozenset(p.keeps):
        return f"{_show(minimal(kept))} keep the outcome, planted were {_show(p.keeps)}"
    return ""


def _keeps(question: Oracle, s: frozenset[int], seen: float) -> bool:
    draws = max(12, getattr(question, "repeats", DRAWS))
    keep = np.repeat(rows([s], len(question.units)), draws, 0)
    values = question.ask(keep)
    # On average, and beyond doubt more than ended.
    return bool(values.mean() >= STAYS * seen and t_interval(values.tolist(), 0.05)[0] > ENDS)


def _show(sets: Iterable[frozenset[int]]) -> str:
    return ", ".join("+".join(map(str, sorted(s))) for s in sets) or "nothing"
