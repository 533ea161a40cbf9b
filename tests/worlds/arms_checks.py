"""What holds on every world of arms and twins, table or sequence."""

from __future__ import annotations

from typing import Any

import numpy as np

from whence.worlds.ground import ENDS, STRUCTURES, Planted, rows, subsets, trouble
from whence.worlds.twins.arms import Arms


def auc(scores: Any, causes: Any, others: Any) -> float:
    """How often a cause scores above another unit, ties counting half."""
    return float(np.mean([np.sign(scores[i] - scores[j]) / 2 + 0.5 for i in causes for j in others]))


def every(planted: Planted) -> Any:
    """The full coalition."""
    return np.ones((1, len(planted.question.units)), bool)


def does_what_was_planted(draw: Any) -> None:
    """Every structure is there, and certified again on what the draw gave."""
    assert [p.structure for p in draw.planted] == list(STRUCTURES)
    assert {p.structure: trouble(p) for p in draw.planted} == dict.fromkeys(STRUCTURES, "")


def swaps_do_what_the_recipe_says(p: Any, arms: Arms) -> None:
    """Each subset of arm and twin in its opposite state: the model's outcome is the recipe's."""
    which = rows(subsets(p.arm + p.twin), len(p.question.units))
    output, seen = list(arms.arm).index(p.structure), p.question.seen
    expected = arms.outcomes(arms.opposite(seen, which))[:, output] == arms.outcomes(seen)[output]
    assert 0 < expected.sum() < len(expected)
    np.testing.assert_array_equal(p.question.swap(which) > ENDS, expected)
