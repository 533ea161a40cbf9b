"""Which baseline did this attribution assume, and would another tell a different story? Let a bandit choose one.

Path attributions depend on the baseline b, and metrics of explanations disagree on the best one. BEE (Barkan et al.
2025) makes b random: first a family k of baselines is chosen, then b is drawn from it, and the map is the path integral

    s_i = (x_i - b_i)  integral over a in 0..1 of  df/dx_i (b + a (x - b)) da,      scored by the metric s(.)

The family is chosen by contextual Thompson sampling. Family k has weights w_k with a Gaussian posterior N(m_k, 1/q_k),
prior N(0, 1), for a reward r in {-1, 1} of probability sigma(r w_k x), x the context. In each pull

    draw w_k from each posterior;  pull k = argmax w_k x;  draw b from family k;  integrate;  take the metric
    rho = rank of the metric among those of earlier pulls, 0..1;   r = 1 with probability rho, else -1
    m_k <- argmin over w of  q_k (w - m_k)^2 / 2 + log(1 + exp(-r w x)),    q_k <- q_k + x^2 p (1 - p), p = sigma(m_k x)

and of all maps the one with the best metric is kept. That is optimising to the metric; whatever the metric then says
of the map is no evidence for it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..engine.attribution import Coalitions, by_unit, explanation_of, require
from ..engine.randomness import stream
from ..errors import MethodError
from ..method import Card

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from ..explanation import Explanation
    from ..question import White

CARD = Card(
    name="bee",
    verb="BEE",
    paper="Barkan, Elisha, Weill and Koenigstein, BEE: Metric-Adapted Explanations via Baseline "
    "Exploration-Exploitation, AAAI 2025",
    systems=("S002-52",),
    question="Which baseline did this attribution assume, and would another tell a different story?",
    units=("any unit",),
    works_on=("every model that answers a Question and can be differentiated",),
    needs=("ask", "gradients"),
    cost="pulls x (steps + points x draws) forwards and pulls x steps backwards: 801 and 320 at most",
    claim="The unit that decides the outcome scores higher than its twin that does nothing.",
    falsifier={
        "trial": "twins.single",
        "planted": "a keyed coin made one of two twin units decide the outcome; certified on the model by swaps",
        "expect": 0.9,
        "control": "random scores, and its own scores with the units shuffled",
        "seconds": 5,
    },
    departs="One question at a time, so the context x is the constant 1: no encoder is trained over many inputs. The "
    "signed integrated gradient at the input, where the paper adds up rectified gradient times activation in a hidden "
    "layer of a vision model. Of the paper's families 'blur' needs pictures: 'mean', an average of several ordinary "
    "inputs, stands in. The metric removes units by drawing them anew and asks each coalition once per question; the "
    "reward's rank is among earlier pulls, not among all families in each round.",
    avoid="To judge it by the metric it chose by: an explanation chosen by its score must not be judged by the same "
    "score. Hold it against fresh draws of another metric, or a sealed prediction.",
)

FAMILIES = ("world", "mean", "normal", "uniform", "constant")
METRICS = ("deletion", "insertion")
POOL = 32
"""Inputs of the world that the families learn their means and ranges from."""


@dataclass(frozen=True)
class BEE:
    """Settings. ``metric`` (one of METRICS) with its ``points`` and ``draws``; ``pulls`` of the bandit over the
    ``families``; ``steps`` of each path integral."""

    metric: str = "deletion"
    families: tuple[str, ...] = FAMILIES
    pulls: int = 40
    steps: int = 8
    points: int = 6
    draws: int = 2
    seed: int = 0

    def rows(self, units: int) -> int:
        """Most rows sent forwards for so many units."""
        return 1 + self.pulls * (self.steps + self.points * self.draws)

    def explain(self, question: White) -> Explanation:
        """scores[unit] in the readout's units: the map with the best metric of all pulls; ``spread`` is the standard
        deviation over the pulls of its family.

        ``details``: "best" (family and metric of the chosen map), "metrics" (of all pulls, in order), "pulls" and
        "posterior" (mean, standard deviation of w) by family. Raises MethodError for a question without gradients,
        an unknown family or metric.
        """
        from captum.attr import IntegratedGradients

        began = time.perf_counter()
        require(question, "bee", "gradients")
        _known("family", self.families, FAMILIES)
        _known("metric", (self.metric,), METRICS)
        rng = stream("bee", self.seed)
        estimator, x, n = IntegratedGradients(question.forward), question.inputs.detach(), len(question.units)
        pool = question.background(POOL).detach()
        coalitions, known = Coalitions(question, self.draws), dict[bytes, float]()
        m, q = np.zeros(len(self.families)), np.ones(len(self.families))
        pulled: list[int] = []
        maps: list[NDArray[np.float64]] = []
        metrics: list[float] = []
        for _ in range(self.pulls):
            k = int(rng.normal(m, 1 / np.sqrt(q)).argmax())
            b = baseline(self.families[k], x, pool, rng)
            entries = estimator.attribute(x, baselines=b, n_steps=self.steps)
            scores = by_unit(entries, question.unit_of, n)[0]
            value = faithfulness(coalitions, scores, self.metric, self.points, known)
            before = np.array(metrics)
            rho = float(((before < value) + (before == value) / 2).mean()) if metrics else 0.5
            m[k], q[k] = _update(m[k], q[k], 1 if rng.random() < rho else -1)
            pulled.append(k)
            maps.append(scores)
            metrics.append(value)
        best = int(np.argmax(metrics))
        same = [s for s, k in zip(maps, pulled, strict=True) if k == pulled[best]]
        details = {
            "best": {"family": self.families[pulled[best]], "metric": metrics[best]},
            "metrics": metrics,
            "pulls": {name: pulled.count(i) for i, name in enumerate(self.families)},
            "posterior": {name: (float(m[i]), float(q[i] ** -0.5)) for i, name in enumerate(self.families)},
        }
        rows = coalitions.rows + self.pulls * self.steps
        return explanation_of(question, "bee", self, maps[best], began, rows, np.std(same, axis=0), details)


def baseline(family: str, x: Tensor, pool: Tensor, rng: np.random.Generator) -> Tensor:
    """One baseline, [1, ...], of a family: "world": an ordinary input; "mean": the mean of 2 to 16 of them; "normal"
    and "uniform": noise with each entry's mean and deviation, or range, in the world; "constant": one number per
    channel (the last axis, where there are three) between its least and largest in x."""
    import torch

    def noise(kind: str, shape: tuple[int, ...]) -> Tensor:
        return torch.from_numpy(getattr(rng, kind)(size=shape)).to(x)

    if family == "world":
        return pool[rng.integers(len(pool))][None]
    if family == "mean":
        return pool[rng.integers(len(pool), size=int(rng.integers(2, 17)))].mean(0, keepdim=True)
    if family == "normal":
        return pool.mean(0, keepdim=True) + pool.std(0, keepdim=True) * noise("standard_normal", tuple(x.shape))
    if family == "uniform":
        low, high = pool.amin(0, keepdim=True), pool.amax(0, keepdim=True)
        return low + (high - low) * noise("random", tuple(x.shape))
    axes = tuple(range(1, x.ndim - 1)) or (1,)
    low, high = x.amin(axes, keepdim=True), x.amax(axes, keepdim=True)
    return (low + (high - low) * noise("random", tuple(low.shape))).expand_as(x)


def faithfulness(
    coalitions: Coalitions,
    scores: NDArray[np.float64],
    metric: str = "deletion",
    points: int = 6,
    known: dict[bytes, float] | None = None,
) -> float:
    """Larger is better. "deletion": minus the mean value with the k highest units drawn anew; "insertion": the mean
    value with only the k highest kept; over ``points`` numbers k from 1 to half of the units. ``known`` remembers the
    value of each coalition, so that equal rankings score equally. Ties are broken by a fixed random order."""
    n = len(scores)
    known = {} if known is None else known
    order = np.lexsort((stream("bee", "ties").permutation(n), -scores.round(9)))
    rows = np.ones((0, n), bool)
    for k in np.unique(np.geomspace(1, max(1, n // 2), points).round().astype(int)):
        top = np.zeros((1, n), bool)
        top[0, order[:k]] = True
        rows = np.concatenate([rows, ~top if metric == "deletion" else top])
    new = np.array([row.tobytes() not in known for row in rows])
    if new.any():
        known.update({r.tobytes(): float(v) for r, v in zip(rows[new], coalitions.values(rows[new]), strict=True)})
    mean = float(np.mean([known[row.tobytes()] for row in rows]))
    return -mean if metric == "deletion" else mean


def _update(m: float, q: float, r: int) -> tuple[float, float]:
    """The posterior after reward r in context 1: its mode, and its precision by Laplace's approximation."""
    w = m
    for _ in range(30):  # Newton's steps on a convex function of one number
        p = 1 / (1 + np.exp(r * w))
        w -= (q * (w - m) - r * p) / (q + p * (1 - p))
    p = 1 / (1 + np.exp(-w))
    return float(w), float(q + p * (1 - p))


def _known(what: str, given: tuple[str, ...], names: tuple[str, ...]) -> None:
    wrong = [g for g in given if g not in names]
    if wrong or not given:
        raise MethodError(f"bee with the {what} {', '.join(wrong) or 'none'!s}", f"no such {what}", ", ".join(names))
