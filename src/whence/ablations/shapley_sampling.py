"""What does each unit add, on average over all orders in which the units could arrive? Shapley values, sampled.

With v(S) = E f(units of S kept, the others drawn anew), n units and O the set of their n! orders (Castro, Gomez and
Tejada 2009, eq. 1; Pre_u(o) are the units before u in the order o):

    phi_u = 1/n!  sum over o in O of  [ v(Pre_u(o) and u) - v(Pre_u(o)) ]

estimated by the mean over a few random orders. The values add up to v(all) - v(none) and are shared fairly: units that
are needed together, or that stand in for each other, get equal parts. v is itself a mean over draws; each step of an
order draws once, as more orders with one draw each are better than fewer orders with more. ``spread`` is the standard
error over orders.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..engine.attribution import Coalitions, everything, explanation_of, mean_and_error, require, seeded
from ..engine.enough import held_out, stop
from ..engine.randomness import stream
from ..method import Card

if TYPE_CHECKING:
    from ..explanation import Explanation
    from ..question import Question

CARD = Card(
    name="shapley_sampling",
    verb="ShapleySampling",
    paper="Castro, Gomez and Tejada, Polynomial calculation of the Shapley value based on sampling, 2009",
    systems=(),
    question="What does each unit add, averaged over all orders in which the units could arrive?",
    units=("any unit",),
    works_on=("every model that answers a Question",),
    needs=("ask",),
    cost="orders x units forwards: 961 for 24 units",
    claim="Where two units are needed together, each of them scores higher than its twin that does nothing.",
    falsifier={
        "trial": "twins.and",
        "planted": "a keyed coin made one of two twin pairs decide the outcome together; certified by swaps",
        "expect": 0.9,
        "control": "random scores, and its own scores with the units shuffled",
        "seconds": 5,
    },
    departs="The game's value is the mean over re-renderings of the units that have not arrived.",
    avoid="For local counterfactuals: fair shares need not be what the output loses without the unit. With many units "
    "and few orders: look at the spread.",
)


@dataclass(frozen=True)
class ShapleySampling:
    """Settings: ``orders`` of the units, each step asked ``draws`` times, ``batch`` rows at once. ``tolerance``: fewer
    orders will do once the largest standard error is that share of the range of the scores; ``held_back``: coalitions
    of fair coins that the scores are held against."""

    orders: int = 40
    draws: int = 1
    batch: int = 64
    tolerance: float | None = None
    held_back: int = 0
    seed: int = 0

    def rows(self, units: int) -> int:
        """Rows sent forwards for so many units."""
        return 1 + self.orders * self.draws * units + self.held_back * self.draws

    def explain(self, question: Question) -> Explanation:
        """scores[unit] in the readout's units; they add up to v(all) - v(none), ``details["difference"]``.

        ``details`` also: "orders", how many were drawn; "fit", where coalitions were held back: "r2" and "spearman" of
        the sum of scores for ``n`` of them."""
        from captum.attr import ShapleyValueSampling as Estimator

        began = time.perf_counter()
        require(question, "shapley_sampling")
        coalitions = Coalitions(question, self.draws)
        estimator, x = Estimator(coalitions), everything(question)
        samples = []
        for order in range(self.orders):
            with seeded("shapley_sampling", self.seed, order):
                sample = estimator.attribute(x, baselines=0, n_samples=1, perturbations_per_eval=self.batch)
            samples.append(sample[0].double().numpy())
            if stop(samples, self.tolerance):
                break
        scores, spread = mean_and_error(samples)
        details: dict[str, Any] = {"difference": float(scores.sum()), "orders": len(samples)}
        if self.held_back:
            z = stream("shapley_sampling", "held back", self.seed).random((self.held_back, len(scores))) < 0.5
            details["fit"] = held_out(z @ scores, coalitions.values(z))
        return explanation_of(question, "shapley_sampling", self, scores, began, coalitions.rows, spread, details)
