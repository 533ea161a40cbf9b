"""Is the output gone when these training examples are? Train again without them, from the same first weights.

    fall_s = f_q( theta_s(D) ) - f_q( theta_s(D without the named examples) ),   for seeds s

beside the same for as many examples drawn at random: paired seeds, so that nothing differs but what was left out. Where
near-duplicates of a named example stay in, its like is not gone; so those are left out with it, and as many others are
drawn. The verdict speaks of trainings like this one: the replicate is the seed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import RunError
from ..method import Card
from ..verdict import LOOKS, Verdict, sequential

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Retrain = Callable[[NDArray[np.bool_], int], float]

CARD = Card(
    name="leave_k_out",
    verb="leave_k_out",
    paper="Koh & Liang 2017, Understanding Black-box Predictions via Influence Functions (groups: Koh et al. 2019)",
    systems=("S003-09",),
    question="Is the output gone when these training examples are left out and the model is trained again?",
    units=("training example",),
    works_on=("anything that can be trained again",),
    needs=("training examples",),
    cost="3 trainings for each seed: with all, without the named, without as many others; 8 to 16 seeds",
    claim="Leaving out the examples that teach an outcome is supported; leaving out others is not.",
    falsifier={
        "trial": "tests/checks/test_leave_k_out.py::test_leaving_out_what_taught_it_is_supported_and_others_are_not",
        "planted": "a class of digits: its examples are named, or others",
        "expect": 0.9,
        "control": "as many examples drawn at random: supported at most one time in ten",
        "seconds": 20,
    },
    departs="Groups, not single examples: over a whole training set single removals correlate with no method's scores.",
    avoid="Where training again is out of reach: tail_patch takes seconds, and says less.",
)

WORTH = 0.1
"""Smallest fall worth having, in the readout's own units (a probability: a tenth)."""


def leave_k_out(
    named: Sequence[int], retrain: Retrain, examples: int, groups: Sequence[Sequence[int]] = (),
    delta: float = WORTH, looks: Sequence[int] = LOOKS, claim: str = "", key: int = 0,
) -> Verdict:  # fmt: skip
    """The verdict on these examples. ``retrain(keep[example], seed)`` trains on what is kept and gives the readout,
    larger where the output is likelier; ``examples``: how many there are; ``groups``: near-duplicates, see
    :func:`near_duplicates`. Raises RunError where too few others are left to compare with."""
    from ..engine.randomness import stream

    gone = _with_likes(np.asarray(named, int), groups, examples)
    if not len(named) or 2 * len(gone) > examples:
        found = f"{len(gone)} of {examples} examples with their near-duplicates"
        raise RunError("training without the named examples", found, "one to half of them")
    rest = np.setdiff1d(np.arange(examples), gone)

    def without(numbers: NDArray[np.int64]) -> NDArray[np.bool_]:
        keep = np.ones(examples, bool)
        keep[numbers] = False
        return keep

    def draw(seed: int) -> tuple[float, float]:
        others = stream("leave k out", key, seed).choice(rest, len(gone), replace=False)
        whole = retrain(np.ones(examples, bool), seed)
        return whole - retrain(without(gone), seed), whole - retrain(without(others), seed)

    return sequential(
        draw, claim=claim or f"without {len(gone)} training examples the output would be gone",
        delta=delta, looks=looks, readout="fall of the readout",
        intervention=f"trained again without the {len(gone)} named examples and those like them; the control: without "
        f"{len(gone)} others, drawn anew for each seed",
    )  # fmt: skip


def _with_likes(named: NDArray[np.int64], groups: Sequence[Sequence[int]], examples: int) -> NDArray[np.int64]:
    chosen = set(named.tolist())
    if chosen and not (min(chosen) >= 0 and max(chosen) < examples):
        raise RunError(
            f"the examples {sorted(chosen)[:5]}", f"there are {examples}", f"numbers from 0 to {examples - 1}"
        )
    for group in groups:
        if chosen & set(group):
            chosen |= set(map(int, group))
    return np.array(sorted(chosen), np.int64)


def near_duplicates(features: NDArray[Any], least: float = 0.98) -> list[list[int]]:
    """Groups of two or more examples whose ``features``[example, feature] have a cosine of at least ``least``, linked
    through each other. Credit inside a group cannot be told apart."""
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import connected_components

    x = np.asarray(features, float).reshape(len(features), -1)
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    rows, columns = [], []
    for at in range(0, len(x), 1024):
        i, j = np.nonzero(x[at : at + 1024] @ x.T >= least)
        rows.append(i + at)
        columns.append(j)
    links = csr_array((np.ones(sum(map(len, rows))), (np.concatenate(rows), np.concatenate(columns))), (len(x), len(x)))
    label = connected_components(links, directed=False)[1]
    order = np.argsort(label, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(label[order])) + 1)
    return [g.tolist() for g in groups if len(g) > 1]
