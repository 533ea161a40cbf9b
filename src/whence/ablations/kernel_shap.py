"""Which fair shares explain random coalitions best? Shapley values as one weighted regression.

With z in {0, 1}^M a coalition of the M units, v(z) = E f(units of z kept, the others drawn anew) and |z| its size
(Lundberg and Lee 2017, theorem 2), the Shapley values are the phi that minimise

    sum over z of  pi(z) [ v(z) - phi_0 - sum over i of phi_i z_i ]^2,   pi(z) = (M - 1) / ( C(M, |z|) |z| (M - |z|) )

with v(none) = phi_0 and v(all) = sum of all phi held (pi is infinite there). Coalitions are drawn in proportion to pi
and regressed without weights. v(none) is the one value that every score leans on, so it is drawn more often than the
rest. The regression is run a few times on coalitions of its own; ``spread`` is the standard error over these runs.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..engine.attribution import Coalitions, everything, explanation_of, mean_and_error, require, seeded
from ..errors import MethodError
from ..method import Card

if TYPE_CHECKING:
    from ..explanation import Explanation
    from ..question import Question

CARD = Card(
    name="kernel_shap",
    verb="KernelSHAP",
    paper="Lundberg and Lee, A Unified Approach to Interpreting Model Predictions, NeurIPS 2017",
    systems=(),
    question="Which fair shares of the units explain random coalitions best?",
    units=("any unit",),
    works_on=("every model that answers a Question, with two units or more",),
    needs=("ask",),
    cost="runs x samples forwards: about 950",
    claim="Where either of two units suffices, each of them scores higher than its twin that does nothing.",
    falsifier={
        "trial": "twins.or",
        "planted": "a keyed coin made either unit of one of two twin pairs suffice for the outcome; certified by swaps",
        "expect": 0.9,
        "control": "random scores, and its own scores with the units shuffled",
        "seconds": 5,
    },
    departs="Units not in the coalition are drawn from the world's own conditional; the paper's estimate takes them "
    "from other inputs as if features were independent.",
    avoid="With fewer samples per run than twice the units. For local counterfactuals: fair shares need not be what "
    "the output loses without the unit.",
)


@dataclass(frozen=True)
class KernelSHAP:
    """Settings: ``runs`` of the regression on ``samples`` coalitions each, every one asked ``draws`` times, the empty
    one ``empty`` times; ``batch`` rows at once."""

    runs: int = 4
    samples: int = 220
    draws: int = 1
    empty: int = 16
    batch: int = 64
    seed: int = 0

    def rows(self, units: int) -> int:
        """Rows sent forwards for so many units."""
        return 1 + self.runs * (self.empty + (self.samples - 2) * self.draws)

    def explain(self, question: Question) -> Explanation:
        """scores[unit] in the readout's units; they add up to v(all) - v(none), ``details["difference"]``. Raises
        MethodError for one unit or too few samples."""
        from captum.attr import KernelShap as Estimator

        began = time.perf_counter()
        require(question, "kernel_shap")
        n = len(question.units)
        if n < 2 or self.samples < n + 2:
            found = f"{n} units and {self.samples} samples per run"
            raise MethodError("kernel_shap", found, f"2 units or more and {max(n, 2) + 2} samples or more")
        coalitions = Coalitions(question, self.draws, self.empty)
        estimator, x = Estimator(coalitions), everything(question)
        samples = []
        for run in range(self.runs):
            with seeded("kernel_shap", self.seed, run):
                sample = estimator.attribute(x, baselines=0, n_samples=self.samples, perturbations_per_eval=self.batch)
            samples.append(sample[0].double().numpy())
        scores, spread = mean_and_error(samples)
        details = {"difference": float(scores.sum())}
        return explanation_of(question, "kernel_shap", self, scores, began, coalitions.rows, spread, details)
