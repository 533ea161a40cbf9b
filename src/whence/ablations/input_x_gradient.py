"""How much of the output would be gone if the units were zero and the model a straight line? Input times gradient.

With x the input, f the readout and w = df/dx at x (Shrikumar et al. 2016, section 3; the first-order Taylor term of
going from x to zero), a unit u with entries i scores

    s_u = sum over i in u of  x_i w_i

which is exact where f is linear and zero means "not there"; elsewhere it inherits both faults: the slope at x is not
the slope on the way, and an input whose value happens to be 0 scores 0 even if it decides everything.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..engine.attribution import by_unit, explanation_of, require
from ..method import Card

if TYPE_CHECKING:
    from ..explanation import Explanation
    from ..question import White

CARD = Card(
    name="input_x_gradient",
    verb="InputXGradient",
    paper="Shrikumar, Greenside, Shcherbina and Kundaje, Not Just a Black Box, 2016",
    systems=(),
    question="How much of the output is each unit's value times the slope there?",
    units=("any unit",),
    works_on=("every model that answers a Question and can be differentiated",),
    needs=("gradients",),
    cost="one forward and one backward",
    claim="The unit that decides the outcome scores higher than its twin that does nothing.",
    falsifier={
        "trial": "twins.single",
        "planted": "a keyed coin made one of two twin units decide the outcome; certified on the model by swaps",
        "expect": 0.9,
        "control": "random scores, and its own scores with the units shuffled",
        "seconds": 5,
    },
    departs="Entries of a unit are added up.",
    avoid="Where a unit's value 0 says something (an absence can never score), and where the model is saturated.",
)


@dataclass(frozen=True)
class InputXGradient:
    """Settings: there are none. The baseline is zero, by the method's own definition."""

    def rows(self, units: int) -> int:
        """Rows sent forwards (and as many backwards) for so many units."""
        return 1

    def explain(self, question: White) -> Explanation:
        """scores[unit], in the readout's units where f is linear. Raises MethodError where there are no gradients."""
        from captum.attr import InputXGradient as Estimator

        began = time.perf_counter()
        require(question, "input_x_gradient", "gradients")
        products = Estimator(question.forward).attribute(question.inputs.detach().requires_grad_())
        scores = by_unit(products, question.unit_of, len(question.units))[0]
        return explanation_of(question, "input_x_gradient", self, scores, began, 1)
