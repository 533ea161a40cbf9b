"""When have enough samples been drawn, and does what they say hold for what was not used to find it?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

LEAST = 8
"""Samples, of which the standard error says something."""


def rank_error(scores: NDArray[np.float64], errors: NDArray[np.float64] | None) -> float:
    """How unsure a ranking of score[unit] is: the largest standard error as a share of the range of the scores. Without
    errors, or with scores that are all alike, infinite: there is no ranking yet."""
    spread = float(np.ptp(scores)) if len(scores) else 0.0
    return float("inf") if errors is None or spread <= 0 else float(np.max(errors)) / spread


def stop(samples: Sequence[NDArray[np.float64]], tolerance: float | None) -> bool:
    """Whether samples[sample, unit] rank the units well enough. Never without a tolerance."""
    if tolerance is None or len(samples) < LEAST:
        return False
    x = np.asarray(samples)
    return rank_error(x.mean(0), x.std(0, ddof=1) / np.sqrt(len(x))) <= tolerance


def held_out(predicted: NDArray[np.float64], actual: NDArray[np.float64]) -> dict[str, Any]:
    """How well predictions, up to a constant, hold for ``n`` coalitions that they were not made from: "r2" and
    "spearman"; None where there is nothing to order."""
    from scipy.stats import spearmanr

    found: dict[str, Any] = {"r2": None, "spearman": None, "n": len(actual)}
    around = actual - actual.mean() if len(actual) else actual
    if len(actual) >= LEAST and np.ptp(actual) > 1e-12:
        off = predicted - predicted.mean() - around
        found["r2"] = 1 - float((off**2).sum() / (around**2).sum())
        if np.ptp(predicted) > 1e-12:
            found["spearman"] = float(spearmanr(predicted, actual).statistic)
    return found
