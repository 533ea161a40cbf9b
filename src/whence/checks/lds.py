"""Do these scores foretell what training on part of the data would have made of the output?

Linear datamodelling score (Park et al. 2023, TRAK, definition 2.3): for random subsets S_1..S_m of the training set,

    LDS(q) = Spearman( sum_{i in S_j} tau(q, i),  f_q(theta(S_j)) )   over j

where f_q(theta(S)) is the output of a model trained on S, larger where q is likelier (minus its loss), averaged over
seeds of the training. The replicate is the query; the control is the same scores given to other examples.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import RunError
from ..method import Card
from ..verdict import Verdict, judge

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..score import Score

CARD = Card(
    name="lds",
    verb="lds",
    paper="Park et al. 2023, TRAK: Attributing Model Behavior at Scale; Ilyas et al. 2022, Datamodels",
    systems=("S001-03",),
    question="Do scores of training examples foretell what training on part of them would have made?",
    units=("training example",),
    works_on=("anything that can be trained again",),
    needs=("training examples",),
    cost="subsets x seeds trainings, once for any number of methods",
    claim="Scores made of the retrained outputs themselves are near their ceiling, shuffled ones at 0.",
    falsifier={
        "trial": "tests/checks/test_lds.py::test_true_effects_score_high_and_shuffled_ones_do_not",
        "planted": "outputs that are a known sum of the examples' effects, and noise",
        "expect": 0.9,
        "control": "the same effects, given to other examples: about 0",
        "seconds": 2,
    },
    departs="As a verdict it also wants a control: the scores in another order of the examples.",
    avoid="As the truth about one example: it judges sums over halves of the data.",
)

WORTH = 0.1
"""Smallest rank correlation worth having."""


def correlations(scores: NDArray[Any], subsets: NDArray[np.bool_], outputs: NDArray[Any]) -> NDArray[np.float64]:
    """LDS of each query. ``scores``[query, example], ``subsets``[subset, example], ``outputs``[subset, query] (larger:
    likelier). Raises RunError for shapes that do not fit or fewer than 8 subsets."""
    from scipy.stats import spearmanr

    s, kept, f = np.asarray(scores, float), np.asarray(subsets, bool), np.asarray(outputs, float)
    if s.ndim != 2 or kept.shape != (len(f), s.shape[1]) or f.shape != (len(kept), len(s)):
        found = f"scores {s.shape}, subsets {kept.shape}, outputs {f.shape}"
        raise RunError("the LDS", found, "[query, example], [subset, example], [subset, query]")
    if len(kept) < 8 or not (np.isfinite(s).all() and np.isfinite(f).all()):
        raise RunError("the LDS", f"{len(kept)} subsets, or numbers that are not finite", "8 subsets or more")
    foretold = s @ kept.T
    # Scores that say nothing (all equal) foretell nothing.
    values = [spearmanr(a, b).statistic if np.ptp(a) and np.ptp(b) else 0.0 for a, b in zip(foretold, f.T, strict=True)]
    return np.asarray(np.nan_to_num(np.array(values, float)))


def score(scores: NDArray[Any], subsets: NDArray[np.bool_], outputs: NDArray[Any]) -> Score:
    """Mean LDS with its interval over queries."""
    from ..score import Score

    return Score.of("LDS", "Spearman", correlations(scores, subsets, outputs))


def lds(scores: NDArray[Any], subsets: NDArray[np.bool_], outputs: NDArray[Any], seed: int = 0) -> Verdict:
    """The verdict on scores of training examples, over queries; see :func:`correlations` for the shapes."""
    from ..engine.randomness import stream

    own = correlations(scores, subsets, outputs)
    order = stream("lds", seed).permutation(np.asarray(scores).shape[1])
    return judge(
        own, correlations(np.asarray(scores)[:, order], subsets, outputs),
        claim="these scores foretell what training on part of the data makes of an output",
        delta=WORTH, readout="LDS", unit="Spearman", replicate="query", alpha=0.05,
        intervention=f"trained again on {len(subsets)} subsets of {np.asarray(subsets).shape[1]} examples",
    )  # fmt: skip
