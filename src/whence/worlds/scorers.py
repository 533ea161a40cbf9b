"""Scorers that never ask the model: what a unit looks like, where it stands, how it goes with others.

A world whose planted causes one of these finds tests nothing. Each takes a Question and gives one number per unit; they
look at units, inputs, which unit an input belongs to, and the background, and call neither ``ask`` nor ``forward``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from ..engine.randomness import stream

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..question import Question, White

    Scores = NDArray[np.float64]
    Scorer = Callable[[White], Scores]

SAMPLE = 128
"""Inputs of the background that a scorer looks at."""


def _by_unit(question: White) -> tuple[Scores, Scores]:
    """(seen[unit, entry], background[row, unit, entry]); units of fewer entries are filled up with zeros."""
    owner = question.unit_of[0].ravel().numpy()
    listed = [np.flatnonzero(owner == i) for i in range(len(question.units))]
    width = max(map(len, listed))
    entries = np.array([[*e, *[len(owner)] * (width - len(e))] for e in listed], int)
    seen = np.append(question.inputs[0].detach().ravel().double().numpy(), 0.0)
    around = question.background(SAMPLE).detach().flatten(1).double().numpy()
    around = np.pad(around, ((0, 0), (0, 1)))
    return seen[entries], around[:, entries]


def _one_number(background: Scores) -> Scores:
    """The first principal component of each unit's entries, [row, unit], of either sign."""
    centred = (background - background.mean(0)).swapaxes(0, 1)  # [unit, row, entry]
    if centred.shape[2] <= centred.shape[1]:
        axes = np.linalg.eigh(centred.swapaxes(1, 2) @ centred)[1][..., -1:]
        return np.asarray((centred @ axes)[..., 0].T)
    # Fewer rows than entries: the same numbers are the first eigenvector of the smaller matrix, of the rows.
    values, vectors = np.linalg.eigh(centred @ centred.swapaxes(1, 2))
    return np.asarray((vectors[..., -1] * np.sqrt(np.maximum(values[:, -1:], 0))).T)


def _cosine(a: Scores, b: Scores) -> Scores:
    return np.asarray((a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1) + 1e-12))


def random(question: White) -> Scores:
    """Numbers drawn from the units' names."""
    return np.asarray(stream("scorer", *question.units.names).random(len(question.units)))


def listed_first(question: White) -> Scores:
    """Units early in the list."""
    return -np.arange(len(question.units), dtype=float)


def stands_first(question: White) -> Scores:
    """Units whose first entry comes early in the input."""
    owner = question.unit_of[0].ravel().numpy()
    return -np.array([np.flatnonzero(owner == i)[0] for i in range(len(question.units))], float)


def name_order(question: White) -> Scores:
    """Units whose names come first in the alphabet."""
    return -np.argsort(np.argsort(question.units.names)).astype(float)


def value(question: White) -> Scores:
    """The sum of a unit's entries."""
    return np.asarray(_by_unit(question)[0].sum(-1))


def norm(question: White) -> Scores:
    """The length of a unit's entries."""
    return np.asarray(np.linalg.norm(_by_unit(question)[0], axis=-1))


def unusual(question: White) -> Scores:
    """How far a unit's entries are from their mean in the background."""
    seen, around = _by_unit(question)
    return np.asarray(np.linalg.norm(seen - around.mean(0), axis=-1))


def like_the_mean(question: White) -> Scores:
    """How much a unit's entries look like their mean in the background."""
    seen, around = _by_unit(question)
    return _cosine(seen, around.mean(0))


def like_the_others(question: White) -> Scores:
    """How much a unit's entries look like the mean of the units of this input."""
    seen = _by_unit(question)[0]
    return _cosine(seen, seen.mean(0))


def varies(question: White) -> Scores:
    """A unit's variance in the background."""
    return np.asarray(_by_unit(question)[1].var(0).sum(-1))


def goes_with_others(question: White) -> Scores:
    """The sum of a unit's squared correlations with the other units in the background."""
    return np.asarray((np.corrcoef(_one_number(_by_unit(question)[1]), rowvar=False) ** 2).sum(0))


SCORERS: dict[str, Callable[[White], Scores]] = {
    f.__name__: f
    for f in (
        listed_first, stands_first, name_order, value, norm, unusual, like_the_mean, like_the_others, varies,
        goes_with_others, random,
    )
}  # fmt: skip

BY_NAME = ("random", "listed_first", "name_order")
"""Those that look at the units' names and order alone."""


def scorers_for(question: Question, more: Mapping[str, Scorer] | None = None) -> dict[str, Scorer]:
    """The scorers that this question can be asked, and ``more``, a world's own. Where a unit's entries do not vary, a
    scorer that divides by that says nothing of it (0)."""
    able = {n: s for n, s in SCORERS.items() if n in BY_NAME or "gradients" in question.capabilities}

    def finite(scorer: Scorer) -> Scorer:
        def score(asked: White) -> Scores:
            with np.errstate(all="ignore"):
                return np.asarray(np.nan_to_num(np.asarray(scorer(asked), float)))

        return score

    return {n: finite(s) for n, s in (able | dict(more or {})).items()}
