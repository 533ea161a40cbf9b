"""Which straight line describes the output around this input? Fit one to random coalitions, the near ones first.

For coalitions z in {0, 1}^d drawn by fair coins, v(z) = E f(units of z kept, the others drawn anew) and the linear
explanation g(z) = w . z + c (Ribeiro, Singh and Guestrin 2016, eq. 1 and 2):

    minimise over g   sum over z of  pi_x(z) [ v(z) - g(z) ]^2  +  Omega(g),     pi_x(z) = exp( -D(x, z)^2 / sigma^2 )

with D the cosine distance from x (all ones). A unit's score is its weight. The fit is run a few times on coalitions of
its own; ``spread`` is the standard error over these runs.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING

from ..engine.attribution import Coalitions, everything, explanation_of, mean_and_error, require, seeded
from ..method import Card

if TYPE_CHECKING:
    from ..explanation import Explanation
    from ..question import Question

CARD = Card(
    name="lime",
    verb="LIME",
    paper="Ribeiro, Singh and Guestrin, Why Should I Trust You? Explaining the Predictions of Any Classifier, KDD 2016",
    systems=(),
    question="Which straight line over the units describes the output around this input?",
    units=("any unit",),
    works_on=("every model that answers a Question",),
    needs=("ask",),
    cost="runs x samples forwards: 921 at most",
    claim="The unit that decides the outcome scores higher than its twin that does nothing.",
    falsifier={
        "trial": "twins.single",
        "planted": "a keyed coin made one of two twin units decide the outcome; certified on the model by swaps",
        "expect": 0.9,
        "control": "random scores, and its own scores with the units shuffled",
        "seconds": 5,
    },
    departs="Removed units are drawn from the world's own conditional, not deleted. Omega is a small ridge penalty "
    "over all units; the paper keeps K of them by lasso first, which would score the others 0.",
    avoid="For what happens when a single unit is removed: half of the units are gone in a typical coalition, so the "
    "weights are about a neighbourhood, whose width is a free choice.",
)


@dataclass(frozen=True)
class LIME:
    """Settings: ``runs`` of the fit on ``samples`` coalitions each, every one asked ``draws`` times; ``width``: sigma;
    ``ridge``: weight of the penalty; ``batch`` rows at once."""

    runs: int = 4
    samples: int = 230
    draws: int = 1
    width: float = 0.75
    ridge: float = 0.1
    batch: int = 64
    seed: int = 0

    def rows(self, units: int) -> int:
        """Most rows sent forwards for so many units."""
        return 1 + self.runs * self.samples * self.draws

    def explain(self, question: Question) -> Explanation:
        """scores[unit]: weights of the line, in the readout's units."""
        from captum._utils.models.linear_model import SkLearnRidge
        from captum.attr import Lime as Estimator
        from captum.attr._core.lime import get_exp_kernel_similarity_function

        began = time.perf_counter()
        require(question, "lime")
        coalitions = Coalitions(question, self.draws)
        # captum's kernel is exp(-D^2 / (2 width^2)).
        near = get_exp_kernel_similarity_function("cosine", kernel_width=self.width / sqrt(2))
        estimator = Estimator(coalitions, interpretable_model=SkLearnRidge(alpha=self.ridge), similarity_func=near)
        samples = []
        for run in range(self.runs):
            with seeded("lime", self.seed, run):
                sample = estimator.attribute(
                    everything(question), baselines=0, n_samples=self.samples, perturbations_per_eval=self.batch
                )
            samples.append(sample[0].double().numpy())
        scores, spread = mean_and_error(samples)
        return explanation_of(question, "lime", self, scores, began, coalitions.rows, spread)
