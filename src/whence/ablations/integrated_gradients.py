"""How much of the way from an ordinary input to this one did each unit go? Integrate the gradient along the path.

For the input x, a baseline x' and the readout f (Sundararajan, Taly and Yan 2017, eq. 1), entry i scores

    IG_i(x, x') = (x_i - x'_i)  integral over a in 0..1 of  df/dx_i (x' + a (x - x')) da

and a unit the sum of its entries. *Completeness* (proposition 1): the scores add up to f(x) - f(x'). One baseline is
one story of what "not there" means, and a black picture or a zero vector is outside the distribution; so x' is drawn
from the world several times and the results averaged, E over x' of IG(x, x'), the expected gradients of Erion et al.
(2021), which add up to f(x) - E f(x'). ``spread`` is the standard error over baselines.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..engine.attribution import by_unit, explanation_of, mean_and_error, require
from ..method import Card

if TYPE_CHECKING:
    from ..explanation import Explanation
    from ..question import White

CARD = Card(
    name="integrated_gradients",
    verb="IntegratedGradients",
    paper="Sundararajan, Taly and Yan, Axiomatic Attribution for Deep Networks, ICML 2017; averaged over baselines as "
    "in Erion et al., Improving performance of deep learning models with axiomatic attribution priors, 2021",
    systems=(),
    question="How much of the way from ordinary inputs to this output did each unit go?",
    units=("any unit",),
    works_on=("every model that answers a Question and can be differentiated",),
    needs=("gradients",),
    cost="baselines x (steps + 1) forwards and baselines x steps backwards: 421 and 400",
    claim="The unit that decides the outcome scores higher than its twin that does nothing.",
    falsifier={
        "trial": "twins.single",
        "planted": "a keyed coin made one of two twin units decide the outcome; certified on the model by swaps",
        "expect": 0.9,
        "control": "random scores, and its own scores with the units shuffled",
        "seconds": 5,
    },
    departs="Baselines are drawn from the world instead of one zero input, and the integral is taken for each of them "
    "by Gauss-Legendre quadrature; Erion et al. draw one point of the path per baseline.",
    avoid="On discrete inputs the straight path leaves the distribution even between two ordinary inputs. A unit that "
    "most baselines share with x scores near 0 however much it matters.",
)


@dataclass(frozen=True)
class IntegratedGradients:
    """Settings: ``baselines`` drawn from the world, ``steps`` of the integral for each, ``batch`` rows at once."""

    baselines: int = 20
    steps: int = 20
    batch: int = 64

    def rows(self, units: int) -> int:
        """Rows sent forwards for so many units: the integrals, and f(x) and f(x') for the details."""
        return self.baselines * (self.steps + 1) + 1

    def explain(self, question: White) -> Explanation:
        """scores[unit] in the readout's units. ``details["gap"]``: how far their sum is from f(x) - mean f(x').
        Raises MethodError where there are no gradients."""
        import torch
        from captum.attr import IntegratedGradients as Estimator

        began = time.perf_counter()
        require(question, "integrated_gradients", "gradients")
        estimator, x = Estimator(question.forward), question.inputs.detach()
        drawn = question.background(self.baselines).detach()
        entries = [
            estimator.attribute(
                x, baselines=b[None], n_steps=self.steps, internal_batch_size=min(self.batch, self.steps)
            )
            for b in drawn
        ]
        with torch.no_grad():
            ends = torch.cat([x, drawn])
            values = [question.forward(ends[i : i + self.batch]) for i in range(0, len(ends), self.batch)]
        value = torch.cat(values).double()
        difference = float(value[0] - value[1:].mean())
        each = by_unit(torch.cat(entries), question.unit_of, len(question.units))
        scores, spread = mean_and_error(list(each))
        whole = float(torch.cat(entries).double().mean(0).sum())
        details = {"difference": difference, "gap": whole - difference}
        return explanation_of(
            question, "integrated_gradients", self, scores, began, self.rows(len(scores)), spread, details
        )
