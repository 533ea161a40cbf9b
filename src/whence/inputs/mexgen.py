"""Which passages, then which sentences inside them, made the model write this? Few sets dropped, level by level.

Let D be a set of units that are dropped and v(D) the scalarizer: a number for what the model then makes of its output.
MExGen (Monteiro Paes, Wei et al. 2024) asks coarse units first and splits only the highest into their parts. Two
estimators, both linear in the number n of units, K the most units dropped together:

    C-LIME   minimise over c, s   sum over D of  w_D [ v(D) - c + sum over u in D of s_u ]^2
             D: the empty set and about 10 n sets of 1 to K units; w_D: each size, 0 too, has the same total weight;
             with ``nonzeros``: so many units by LARS, then the fit again over these alone
    L-SHAP   s_u = 1/(M + 1)  sum over k = 0..M of   mean over T in N_u, |T| = k of  [ v(T) - v(T and u) ]
             N_u: units at most 2 places from u, M = min(K, |N_u|): for K = |N_u| the Shapley value in the game of N_u
             and u, all others kept

No set is asked twice. ``details["fit"]`` holds the sum of scores against what was measured: a poor fit means that the
units do not add up, and then no list of single scores is the answer.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from itertools import combinations
from math import comb
from typing import TYPE_CHECKING, Any

import numpy as np

from ..engine.attribution import Coalitions, explanation_of, require
from ..engine.randomness import stream
from ..errors import MethodError
from ..method import Card

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from ..explanation import Explanation
    from ..question import Question

CARD = Card(
    name="mexgen",
    verb="MExGen",
    paper="Monteiro Paes, Wei et al., Multi-Level Explanations for Generative Language Models, ACL 2025 "
    "(arXiv 2403.14459, 2024)",
    systems=("S002-86",),
    question="Which passages, then which sentences inside them, made the model write this?",
    units=("any unit; L-SHAP: any unit in an order",),
    works_on=("every model that answers a Question",),
    needs=("ask",),
    cost="C-LIME: per_unit x units forwards, L-SHAP: about 9 x units; 32 more for the fit: 273 and 227 for 24 units; "
    "the same again for the parts of each unit that is refined",
    claim="The sentence that the answer was read from scores higher than its twin, which the answer does not need.",
    falsifier={
        "trial": "facts.single",
        "planted": "one sentence of the context holds the answer; its twin has the same form and is not asked for",
        "expect": 0.9,
        "control": "random scores, and its own scores with the units shuffled",
        "seconds": 25,
    },
    departs="The scalarizer is the Question's own readout, or the mean log-probability of the target's tokens. What "
    "the paper calls text scalarizers (generate again, then measure similarity) is a Question with such a readout; "
    "none is computed here. The parts of each refined unit are asked on their own, all else kept; as we read it, the "
    "paper asks the parts of all refined units in one round. Scores equal to the last refined one are refined too. In "
    "L-SHAP at most K neighbours are dropped beside the unit itself, so K + 1 at most, and near the ends, where "
    "neighbours are fewer, the weights still add up to 1. Standard errors and the fit's R2 are Whence's additions.",
    avoid="Where units stand in for each other (nothing happens until more than K of them go) or act together from "
    "afar: look at details 'fit'.",
)

ESTIMATORS = ("clime", "lshap")
SCALARIZERS = ("readout", "log-prob")
Set = tuple[int, ...]


@dataclass(frozen=True)
class MExGen:
    """Settings. ``estimator``: one of ESTIMATORS; ``scalarizer``: "readout" (what the Question asks for) or "log-prob"
    (mean over the target's tokens, in nats); ``levels`` from the Question's own downwards, of each the ``top`` units
    refined; ``together``: K; ``per_unit`` sets for each unit and ``nonzeros`` (None: all): C-LIME; ``radius``: places
    to each side, L-SHAP; ``far``: coalitions that the fit is held against; ``draws`` of each coalition, more than one
    only where removed units are drawn anew."""

    estimator: str = "clime"
    scalarizer: str = "readout"
    levels: int = 2
    top: int = 2
    together: int = 2
    per_unit: int = 10
    nonzeros: int | None = None
    radius: int = 2
    far: int = 32
    draws: int = 1
    seed: int = 0

    def explain(self, question: Question) -> Explanation:
        """scores[unit] at the Question's own level: by how much the value falls without the unit. ``spread`` is the
        standard error of the C-LIME fit; None for L-SHAP, for chosen ``nonzeros``, and for too few sets.

        ``details``: "fit", R2 of the sum of scores: "near", on the sets that were dropped, and "far", on ``n``
        coalitions with each unit kept by a fair coin (all there are, if few); None where the value never moved;
        "levels": of each refined unit ("parent") the "level", "units", "scores", "spread" and "fit" of its parts.
        Raises MethodError for an unknown estimator or scalarizer, and for numbers that are not positive.
        """
        began = time.perf_counter()
        require(question, "mexgen", "text" if self.scalarizer == "log-prob" else "ask")
        self._check()
        (top, *finer), rows = self._walk(question, "", self.levels - 1)
        scores, spread = np.array(top["scores"]), top["spread"] and np.array(top["spread"])
        details = {"fit": top["fit"], "levels": finer}
        e = explanation_of(question, "mexgen", self, scores, began, rows, spread, details)
        if self.scalarizer == "log-prob":
            e = replace(e, readout=f"{question.readout}: mean log-probability of the target's tokens, nats")
        return e

    def _walk(self, question: Any, parent: str, below: int) -> tuple[list[dict[str, Any]], int]:
        """What was found of this question's units, then of the parts of the highest; and the rows asked."""
        units, n = question.units, len(question.units)
        rng = stream("mexgen", self.seed, units.kind, parent)
        terms = _terms(n, self.radius, self.together)
        if self.estimator == "clime":
            sets = _subsets(n, self.together, self.per_unit * n, rng)
        else:
            sets = list(dict.fromkeys(s for _, *pair, _ in terms for s in pair))  # units share sets
        every = (np.arange(2**n)[:, None] >> np.arange(n)) & 1 == 1 if 2**n <= self.far else None
        far = rng.random((self.far, n)) < 0.5 if every is None else every
        near = ~_members(sets, n)
        v, rows = self._ask(question, np.concatenate([near, far]))
        spread = None
        if self.estimator == "clime":
            c, scores, spread = _clime(n, sets, v[: len(sets)], self.nonzeros)
        else:
            value = dict(zip(sets, v[: len(sets)], strict=True))
            c, scores = value[()], np.zeros(n)
            for u, t, t_and_u, weight in terms:
                scores[u] += weight * (value[t] - value[t_and_u])
        fit = {"near": _r2(v[: len(sets)], c - ~near @ scores), "far": _r2(v[len(sets) :], c - ~far @ scores)}
        found: list[dict[str, Any]] = [{
            "parent": parent, "level": units.kind, "units": list(units.labels), "scores": scores.tolist(),
            "spread": None if spread is None else spread.tolist(), "fit": {**fit, "n": len(far)},
        }]  # fmt: skip
        if below > 0 and "levels" in question.capabilities and len(question.levels) > 1:
            for i in _highest(scores, self.top):
                try:
                    inside = question.refine([i])
                except MethodError:  # a unit without parts is its own finest level
                    continue
                deeper, more = self._walk(inside, units.labels[i], below - 1)
                found, rows = found + deeper, rows + more
        return found, rows

    def _ask(self, question: Any, keep: NDArray[np.bool_]) -> tuple[NDArray[np.float64], int]:
        """v of keep[coalition, unit], each coalition asked once however often it is listed; and the rows asked."""
        rows, back = np.unique(keep, axis=0, return_inverse=True)
        if self.scalarizer == "log-prob":
            draws = 1 if "deterministic" in question.capabilities else self.draws
            each = question.ask_tokens(np.repeat(rows, draws, 0)).mean(1)
            return each.reshape(-1, draws).mean(1)[back.reshape(-1)], len(each)
        coalitions = Coalitions(question, self.draws)
        return coalitions.values(rows)[back.reshape(-1)], coalitions.rows

    def _check(self) -> None:
        for given, known in ((self.estimator, ESTIMATORS), (self.scalarizer, SCALARIZERS)):
            if given not in known:
                raise MethodError(f"mexgen with {given!r}", "no such estimator or scalarizer", ", ".join(known))
        for name in ("levels", "top", "together", "per_unit", "nonzeros", "radius", "far", "draws"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise MethodError(f"mexgen with {name}={value}", "not a positive number", f"{name}=1 or more")


def _subsets(n: int, together: int, budget: int, rng: np.random.Generator) -> list[Set]:
    """The empty set, all single units, and drawn sets of 2 to ``together`` units: about ``budget``, shared evenly among
    the sizes; what a size cannot use goes to the next."""
    found: list[Set] = [()]
    sizes = range(1, min(together, n) + 1)
    for k in sizes:
        every = list(combinations(range(n), k))
        want = n if k == 1 else min(len(every), max(1, budget // (sizes[-1] - k + 1)))
        found += [every[i] for i in np.sort(rng.choice(len(every), want, replace=False))]
        budget -= want
    return found


def _clime(
    n: int, sets: Sequence[Set], v: NDArray[np.float64], nonzeros: int | None
) -> tuple[float, NDArray[np.float64], NDArray[np.float64] | None]:
    """c, s[unit] and its standard error: weighted least squares, the sets of each size weighing 1 together."""
    size = np.array([len(s) for s in sets])
    w = 1 / np.bincount(size)[size]
    x, chosen = _members(sets, n).astype(float), np.arange(n)
    if nonzeros is not None and nonzeros < n:
        from sklearn.linear_model import lars_path

        root = np.sqrt(w)
        centred = root[:, None] * (x - np.average(x, 0, w))
        path = lars_path(centred, root * (v - np.average(v, weights=w)), max_iter=nonzeros, method="lar")
        chosen = np.sort(np.asarray(path[1], int))
    z = np.column_stack([np.ones(len(v)), -x[:, chosen]])
    inverse = np.linalg.pinv(z.T @ (w[:, None] * z))
    fitted = inverse @ z.T @ (w * v)
    scores = np.zeros(n)
    scores[chosen] = fitted[1:]
    spare = len(v) - z.shape[1]
    if nonzeros is not None or spare < 1:
        return float(fitted[0]), scores, None  # an error of units chosen by the same data would be too small
    # The weights are no variances, and where units interact the misfit differs between sets: the sandwich allows both.
    # A set that the line has to follow shows too small a misfit: 1 - its leverage makes up for that (HC3).
    leverage = w * np.einsum("si,ij,sj->s", z, inverse, z)
    off = w * (v - z @ fitted) / np.maximum(1 - leverage, 1e-6)
    sandwich = inverse @ (z.T * off**2) @ z @ inverse
    return float(fitted[0]), scores, np.sqrt(np.maximum(np.diag(sandwich)[1:], 0))


def _terms(n: int, radius: int, together: int) -> list[tuple[int, Set, Set, float]]:
    """L-SHAP's sum: (u, T, T and u, weight); sizes of T weigh the same, and so do the sets T of one size."""
    terms: list[tuple[int, Set, Set, float]] = []
    for u in range(n):
        near = [j for j in range(max(0, u - radius), min(n, u + radius + 1)) if j != u]
        most = min(together, len(near))
        for k in range(most + 1):
            weight = 1 / (most + 1) / comb(len(near), k)
            terms += [(u, t, tuple(sorted((*t, u))), weight) for t in combinations(near, k)]
    return terms


def _highest(scores: NDArray[np.float64], top: int) -> list[int]:
    """The ``top`` highest positive scores and those that equal the last of them: places must not choose."""
    x = scores.round(9)  # sums that are zero but for rounding open nothing
    order = [int(i) for i in np.argsort(-x, kind="stable") if x[i] > 0]
    return [i for i in order if x[i] >= x[order[min(top, len(order)) - 1]]]


def _members(sets: Sequence[Set], n: int) -> NDArray[np.bool_]:
    rows = np.zeros((len(sets), n), bool)
    for row, members in zip(rows, sets, strict=True):
        row[list(members)] = True
    return rows


def _r2(v: NDArray[np.float64], fitted: NDArray[np.float64]) -> float | None:
    around = float(((v - v.mean()) ** 2).sum())
    return None if around <= 1e-12 else 1 - float(((v - fitted) ** 2).sum()) / around
