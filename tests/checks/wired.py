"""Hand-wired functions of units, where every effect is known exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from whence.engine.randomness import stream
from whence.units import Units

Values = Callable[[Any], Any]


class Wired:
    """``value(states[row, unit])``; observed states ``x`` (all 1), re-rendered ones are 0 or 1 with equal chance."""

    readout, capabilities = "value", frozenset[str]()

    def __init__(self, value: Values, n: int, name: object = "") -> None:
        self.value, self.x, self.rng = value, np.ones(n), stream("wired", name)
        self.units = Units("unit", tuple(f"u{i}" for i in range(n)), tuple(((i,),) for i in range(n)))

    def ask(self, keep: np.ndarray) -> np.ndarray:
        fresh = self.rng.integers(0, 2, keep.shape)
        return np.asarray(self.value(np.where(keep, self.x, fresh)), float)


def weighted(weights: np.ndarray) -> Values:
    return lambda s: s @ weights / weights.sum()


GRADED = np.zeros(12)
GRADED[[2, 5, 9, 11]] = 8, 4, 2, 1
"""Effects of twelve units: 8, 4, 2, 1 and eight times nothing."""
