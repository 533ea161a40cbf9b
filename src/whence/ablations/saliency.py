"""Which units would move the output most if they were nudged? Ask the gradient.

With x the input, f the readout and w = df/dx at x (Simonyan, Vedaldi and Zisserman 2014, section 3: the class score is
nearly w . x close by), a unit u with entries i scores

    M_u = max over i in u of |w_i|

as the paper does over colour channels. The score is a *rate*, the readout per unit of input, not an amount of the
readout: it has no sign, does not add up, and must not be read as what the output loses without the unit. A unit that
matters but sits where the model is saturated scores near zero.
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
    name="saliency",
    verb="Saliency",
    paper="Simonyan, Vedaldi and Zisserman, Deep Inside Convolutional Networks, ICLR workshop 2014",
    systems=(),
    question="Which units would move the output most if they were nudged?",
    units=("any unit",),
    works_on=("every model that answers a Question and can be differentiated",),
    needs=("gradients",),
    cost="one forward and one backward",
    claim="The gradient is larger on the unit that decides the outcome than on its twin that does nothing.",
    falsifier={
        "trial": "twins.single",
        "planted": "a keyed coin made one of two twin units decide the outcome; certified on the model by swaps",
        "expect": 0.9,
        "control": "random scores, and its own scores with the units shuffled",
        "seconds": 5,
    },
    departs="Entries of a unit (the width of an embedding) take the place of colour channels.",
    avoid="For how much, or which way: it is a rate without sign. Where the model is saturated, or a unit counts by a "
    "jump that the gradient at x does not see.",
)


@dataclass(frozen=True)
class Saliency:
    """Settings: there are none."""

    def rows(self, units: int) -> int:
        """Rows sent forwards (and as many backwards) for so many units."""
        return 1

    def explain(self, question: White) -> Explanation:
        """scores[unit] >= 0, readout per unit of input. Raises MethodError where there are no gradients."""
        from captum.attr import Saliency as Estimator

        began = time.perf_counter()
        require(question, "saliency", "gradients")
        slopes = Estimator(question.forward).attribute(question.inputs.detach().requires_grad_(), abs=True)
        scores = by_unit(slopes, question.unit_of, len(question.units), reduce="amax")[0]
        return explanation_of(question, "saliency", self, scores, began, 1, details={"unit": "readout per input"})
