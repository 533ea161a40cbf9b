"""Asking: questions about units in arms, whatever their states look like; and the choice of certified ones."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ...engine.randomness import stream
from ...errors import RunError
from ...units import Units
from ..ground import STRUCTURES, Draw, Planted, trouble

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .arms import Arms, Bools

TRIES = 24
"""Inputs that are tried for one question before its model counts as badly trained."""


class ArmsQuestion(ABC):
    """Asks and swaps by states. A subclass says what value states have; it holds what was observed beside them.

    Draws come from one stream for each coalition: the same rows give the same draws in the same order, in one call or
    in several, whatever else was asked in between; a row that is given again is drawn again.
    """

    details = 0
    """Standard normals that a unit takes beside the two of its state."""

    def __init__(self, arms: Arms, units: Units, seen: Bools, *names: object) -> None:
        self.arms, self.units, self.seen, self.names = arms, units, seen, names
        self._purpose = ""
        self._streams: dict[bytes, np.random.Generator] = {}

    def restart(self, purpose: str) -> None:
        """See :func:`whence.worlds.ground.restart`."""
        self._purpose, self._streams = purpose, {}

    @abstractmethod
    def _values(self, states: Bools, keep: Bools, drawn: NDArray[np.float64]) -> NDArray[np.float64]:
        """value[row] with units in states[row, unit]; those outside keep[row, unit] look as in drawn[row, unit, k]."""

    def ask(self, keep: NDArray[np.bool_]) -> NDArray[np.float64]:
        """value[coalition], see Question.ask. A unit that copies another is drawn given what that one has become."""
        rows = np.asarray(keep, bool)
        drawn = np.empty((*rows.shape, 2 + self.details))
        places: dict[bytes, list[int]] = {}
        for i, row in enumerate(rows):
            places.setdefault(np.packbits(row).tobytes(), []).append(i)
        for content, here in places.items():
            if content not in self._streams:
                self._streams[content] = stream(*self.names, self._purpose, "draws", content.hex())
            drawn[here] = self._streams[content].standard_normal((len(here), *drawn.shape[1:]))
        return self._values(self.arms.render(drawn[..., :2], rows, self.seen), rows, drawn[..., 2:])

    def swap(self, which: NDArray[np.bool_]) -> NDArray[np.float64]:
        """value[coalition], see Oracle.swap. A unit that copies a swapped one follows it, its noise as observed."""
        rows = np.asarray(which, bool)
        nothing = np.zeros((*rows.shape, self.details))
        return self._values(self.arms.opposite(self.seen, rows), np.ones_like(rows), nothing)


class Plants(Protocol):
    """A key's trained model and what may be asked of it."""

    @property
    def arms(self) -> Arms: ...

    def plant(self, structure: str, attempt: int, purpose: str = "asking") -> Planted:
        """The question number ``attempt`` of a structure, its draws those of ``purpose``; not certified."""
        ...


def exchanged(units: int, one: Iterable[int], other: Iterable[int]) -> NDArray[np.int64]:
    """order[unit] in which each unit of ``one`` has changed places with its counterpart in ``other``."""
    order = np.arange(units)
    a, b = list(one), list(other)
    order[a], order[b] = b, a
    return order


def certified(world: str, key: str, made: Plants) -> Mapping[str, int]:
    """The first attempt of each structure whose question passes :func:`~whence.worlds.ground.trouble`.

    Raises RunError after TRIES attempts: this key's model did not learn what was planted.
    """
    chosen: dict[str, int] = {}
    for structure in made.arms.arm:
        for attempt in range(TRIES):
            found = ""
            # Twice: with draws of its own, and with those that will be asked first, so that it certifies again.
            for purpose in ("certification", "asking"):
                found = found or trouble(made.plant(structure, attempt, purpose))
            if not found:
                chosen[structure] = attempt
                break
        else:
            raise RunError(
                f"a question of {world}.{structure} for the key {key!r}",
                f"none of {TRIES} inputs could be certified; of the last: {found}",
                "another key, or longer training of this world's models",
            )
    return chosen


@dataclass(frozen=True)
class ArmsWorld:
    """A family of arms and twins, one model for each key. ``make(key)`` trains it; a small cache is its own affair."""

    name: str
    make: Callable[[str], Plants]
    structures: tuple[str, ...] = tuple(STRUCTURES)

    @lru_cache(maxsize=256)  # noqa: B019 - a world lives as long as the program
    def attempts(self, key: str) -> Mapping[str, int]:
        """Which input of each structure was the first to be certified, from 0. Raises RunError where none was."""
        return certified(self.name, key, self.make(key))

    def draw(self, key: str) -> Draw:
        """One certified question for each structure, with fresh streams. Raises RunError, see :meth:`attempts`."""
        chosen = self.attempts(key)
        return Draw(self.name, key, tuple(self.make(key).plant(s, chosen[s]) for s in self.structures))
