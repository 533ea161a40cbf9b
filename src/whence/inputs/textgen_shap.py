"""Which documents does the answer rest on, and which sentences inside them? Shapley or Banzhaf values, downwards.

With v(S) the readout with the units S kept, n units, TextGenSHAP (Enouen et al. 2023) scores documents first and then,
only inside the highest, their parts, down to words. Both indices are means of what a unit u adds, v(S and u) - v(S):

    Shapley    phi_u = mean over all n! orders of the units, S = those before u;   the phi_u add up to v(all) - v(none)
    Banzhaf    beta_u = mean over all 2^(n-1) sets S of the other units, each as likely;   they add up to nothing fixed

For few units all 2^n coalitions are asked and both are exact. For more, orders are drawn (n steps each), or masks of
fair coins, each asked again with every unit put the other way; ``spread`` is the standard error over these samples.
Inside unit p its parts play their own game w, all else kept: w(T) = v(all without p, and the parts T). Their Shapley
values add up to v(all) - v(all without p): what removing p alone loses. That is not p's own score, which averages over
what else is there.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from math import comb
from typing import TYPE_CHECKING, Any

import numpy as np

from ..engine.attribution import Coalitions, explanation_of, mean_and_error, require
from ..engine.enough import LEAST, held_out, stop
from ..engine.randomness import stream
from ..errors import MethodError
from ..method import Card

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..explanation import Explanation
    from ..question import Question

CARD = Card(
    name="textgen_shap",
    verb="TextGenSHAP",
    paper="Enouen, Nakhost, Ebrahimi, Arik, Liu and Pfister, TextGenSHAP: Scalable Post-hoc Explanations in Text "
    "Generation with Long Documents, Findings of ACL 2024 (arXiv 2312.01279, 2023)",
    systems=("S002-42",),
    question="Which documents does the answer rest on, and which sentences inside them?",
    units=("any unit",),
    works_on=("every model that answers a Question",),
    needs=("ask",),
    cost="2^units forwards up to 6 units, else samples x units (Banzhaf: samples x (units + 1)): at most 922 (1002) "
    "for 24 units; the same again for the parts of each unit that is refined",
    claim="The sentence that the answer was read from scores higher than its twin, which the answer does not need.",
    falsifier={
        "trial": "facts.single",
        "planted": "one sentence of the context holds the answer; its twin has the same form and is not asked for",
        "expect": 0.9,
        "control": "random scores, and its own scores with the units shuffled",
        "seconds": 25,
    },
    departs="The target is fixed and scored in one pass, so speculative decoding, which the paper needs to generate "
    "again for each mask, has no place here; sharing the encodings of unchanged documents, and block-sparse attention, "
    "are left to what answers the Question: the paper's speed is not reproduced, small-scale. The value is the "
    "Question's readout (how the paper turns a generated text into a number was not at hand). Inside a document all "
    "others are kept; as we read it, the paper's hierarchical values average over which others are there. For Banzhaf "
    "values each mask is asked again with every unit flipped. Exact values for few units are Whence's addition.",
    avoid="To look inside a document that another one can stand in for: without it alone nothing is lost, so its parts "
    "add up to 0. With many units and few samples: look at the spread.",
)

INDICES = ("shapley", "banzhaf")


@dataclass(frozen=True)
class TextGenSHAP:
    """Settings. ``index``: one of INDICES; ``samples``: orders or masks; ``exact_up_to`` so many units all coalitions
    are asked; ``levels`` from the Question's own downwards, of each the ``top`` units refined; ``draws`` of each
    coalition. ``tolerance``: fewer samples will do once the largest standard error is that share of the range of the
    scores; ``held_back``: coalitions of fair coins that the scores are held against."""

    index: str = "shapley"
    samples: int = 40
    exact_up_to: int = 6
    levels: int = 2
    top: int = 2
    draws: int = 1
    tolerance: float | None = None
    held_back: int = 0
    seed: int = 0

    def explain(self, question: Question) -> Explanation:
        """scores[unit] at the Question's own level, in the readout's units. ``spread``: None where all coalitions were
        asked (draws of a world still vary) and for a single sample.

        ``details``: "exact"; "samples", how many were drawn; "fit", where coalitions were held back: "r2", "spearman"
        of the sum of scores for ``n`` of them; "difference", v(all) - v(none); "levels": the same for refined units,
        each with its "parent" label, its "level", "units", "scores" and "spread"; "difference" is what removing it
        loses.
        Raises MethodError for an unknown index and for numbers that are not positive.
        """
        began = time.perf_counter()
        require(question, "textgen_shap")
        self._check()
        (top, *finer), rows = self._walk(question, "", self.levels - 1)
        scores, spread = np.array(top["scores"]), top["spread"] and np.array(top["spread"])
        details = {key: top[key] for key in ("exact", "samples", "fit", "difference") if key in top} | {"levels": finer}
        return explanation_of(question, "textgen_shap", self, scores, began, rows, spread, details)

    def _walk(self, question: Any, parent: str, below: int) -> tuple[list[dict[str, Any]], int]:
        """What was found of this question's units, then of the parts of the highest; and the rows asked."""
        units, coalitions = question.units, Coalitions(question, self.draws)
        scores, spread, difference, samples = self._index(coalitions, len(units), units.kind, parent)
        found: list[dict[str, Any]] = [{
            "parent": parent, "level": units.kind, "units": list(units.labels), "scores": scores.tolist(),
            "spread": None if spread is None else spread.tolist(), "exact": len(units) <= self.exact_up_to,
            "samples": samples, "difference": difference,
        }]  # fmt: skip
        if self.held_back:
            z = stream("textgen_shap", "held back", self.seed, units.kind, parent).random((self.held_back, len(units)))
            found[0]["fit"] = held_out((z < 0.5) @ scores, coalitions.values(z < 0.5))
        rows = coalitions.rows
        if below > 0 and "levels" in question.capabilities and len(question.levels) > 1:
            for i in _highest(scores, self.top):
                try:
                    inside = question.refine([i])
                except MethodError:  # a unit without parts is its own finest level
                    continue
                deeper, more = self._walk(inside, units.labels[i], below - 1)
                found, rows = found + deeper, rows + more
        return found, rows

    def _index(
        self, coalitions: Coalitions, n: int, *names: str
    ) -> tuple[NDArray[np.float64], NDArray[np.float64] | None, float, int]:
        """phi or beta of each unit, its standard error, v(all) - v(none), and the samples drawn."""
        rng, every = stream("textgen_shap", self.seed, *names), np.arange(n + 1)
        ends = np.array([[True] * n, [False] * n])
        if n <= self.exact_up_to:
            keep = (np.arange(2**n)[:, None] >> every[:n]) & 1 == 1
            v = _once(coalitions, np.concatenate([ends, keep]))
            return _exact(keep, v[2:], self.index), None, float(v[0] - v[1]), 0
        adds: list[NDArray[np.float64]] = []
        difference = 0.0
        while len(adds) < self.samples and not stop(adds, self.tolerance):
            some = self.samples - len(adds) if self.tolerance is None else min(LEAST, self.samples - len(adds))
            if self.index == "shapley":
                place = np.stack([rng.permutation(n) for _ in range(some)])  # place[order, unit]
                keep = (place[:, None] < every[:, None]).reshape(-1, n)  # the first k units of each order
            else:
                masks = rng.random((some, n)) < 0.5
                keep = (masks[:, None] ^ np.eye(n + 1, n, -1, dtype=bool)).reshape(-1, n)  # as drawn, one unit flipped
            asked = keep if adds else np.concatenate([ends, keep])
            v = _once(coalitions, asked)
            if not adds:
                difference, v = float(v[0] - v[1]), v[2:]
            by_sample = v.reshape(some, n + 1)
            if self.index == "shapley":
                adds += list(np.take_along_axis(np.diff(by_sample), place, 1))
            else:
                adds += list(np.where(masks, 1, -1) * (by_sample[:, :1] - by_sample[:, 1:]))
        return *mean_and_error(adds), difference, len(adds)

    def _check(self) -> None:
        if self.index not in INDICES:
            raise MethodError(f"textgen_shap with the index {self.index!r}", "no such index", ", ".join(INDICES))
        for name, least in (("samples", 1), ("levels", 1), ("top", 1), ("draws", 1), ("exact_up_to", 0)):
            if getattr(self, name) < least:
                found = f"less than {least}"
                raise MethodError(f"textgen_shap with {name}={getattr(self, name)}", found, f"{name}={least} or more")
        if self.held_back < 0 or (self.tolerance is not None and self.tolerance <= 0):
            found = f"held_back={self.held_back}, tolerance={self.tolerance}"
            raise MethodError("textgen_shap", found, "held_back=0 or more, a tolerance above 0, or None")
        if self.exact_up_to > 16:
            found = f"{2**self.exact_up_to} coalitions"
            raise MethodError(f"textgen_shap, exact up to {self.exact_up_to} units", found, "exact_up_to=16 or less")


def _once(coalitions: Coalitions, keep: NDArray[np.bool_]) -> NDArray[np.float64]:
    """v of keep[coalition, unit]: the same coalition comes in many samples, and is asked once."""
    rows, back = np.unique(keep, axis=0, return_inverse=True)
    return coalitions.values(rows)[back.reshape(-1)]


def _exact(keep: NDArray[np.bool_], v: NDArray[np.float64], index: str) -> NDArray[np.float64]:
    """phi or beta from all coalitions: each S weighs |S|! (n - |S| - 1)! / n!, or 1 / 2^(n-1)."""
    n = keep.shape[1]
    # A coalition counts for each of its units as "S and u" and for each other unit as S.
    sizes = keep.sum(1)[:, None] - keep
    weight = np.array([1 / (n * comb(n - 1, k)) if index == "shapley" else 0.5 ** (n - 1) for k in range(n)])
    return np.asarray((np.where(keep, 1, -1) * weight[sizes] * v[:, None]).sum(0))


def _highest(scores: NDArray[np.float64], top: int) -> list[int]:
    """The ``top`` highest positive scores and those that equal the last of them: places must not choose."""
    x = scores.round(9)  # sums that are zero but for rounding open nothing
    order = [int(i) for i in np.argsort(-x, kind="stable") if x[i] > 0]
    return [i for i in order if x[i] >= x[order[min(top, len(order)) - 1]]]
