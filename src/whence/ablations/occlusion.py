"""What does the output lose when this unit and its neighbours are drawn anew? Slide a window over the units.

For units in an order and every window W of neighbouring units (Zeiler and Fergus 2014, section 4.1: a grey square is
slid over the picture and the class score watched), with f the readout:

    d_W = f(all kept) - E f(W drawn anew, the rest kept),      score_u = mean over windows W that contain u of d_W

The world's own conditional takes the place of the grey square. A window of one unit is leave-one-out; a wider one also
sees neighbours that stand in for each other, and smears each effect over the window. ``spread`` is the standard error
over the draws.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..engine.attribution import Coalitions, everything, explanation_of, mean_and_error, require
from ..errors import MethodError
from ..method import Card

if TYPE_CHECKING:
    from ..explanation import Explanation
    from ..question import Question

CARD = Card(
    name="occlusion",
    verb="Occlusion",
    paper="Zeiler and Fergus, Visualizing and Understanding Convolutional Networks, ECCV 2014",
    systems=(),
    question="What does the output lose when this unit and its neighbours are drawn anew?",
    units=("any unit",),
    works_on=("every model that answers a Question",),
    needs=("ask",),
    cost="windows x draws forwards: 370 for 24 units",
    claim="The unit that decides the outcome scores higher than its twin that does nothing.",
    falsifier={
        "trial": "twins.single",
        "planted": "a keyed coin made one of two twin units decide the outcome; certified on the model by swaps",
        "expect": 0.9,
        "control": "random scores, and its own scores with the units shuffled",
        "seconds": 5,
    },
    departs="Windows of units in their order instead of squares of pixels, drawn anew instead of painted grey.",
    avoid="Where the order of the units means nothing (window=1 then), and for units that act together from afar.",
)


@dataclass(frozen=True)
class Occlusion:
    """Settings: ``window`` units at a time, each window drawn ``draws`` times, ``batch`` rows at once."""

    window: int = 2
    draws: int = 16
    batch: int = 64

    def rows(self, units: int) -> int:
        """Rows sent forwards for so many units."""
        return 1 + self.draws * (units - self.window + 1)

    def explain(self, question: Question) -> Explanation:
        """scores[unit] in the readout's units: mean loss over the windows that contain the unit. Raises MethodError
        for a window wider than the units."""
        from captum.attr import Occlusion as Estimator

        began = time.perf_counter()
        require(question, "occlusion")
        if not 1 <= self.window <= len(question.units):
            raise MethodError(f"a window of {self.window}", f"{len(question.units)} units", "a window from 1 to these")
        coalitions = Coalitions(question)
        estimator = Estimator(coalitions)
        samples = [
            estimator.attribute(
                everything(question),
                sliding_window_shapes=(self.window,),
                baselines=0,
                perturbations_per_eval=self.batch,
            )[0].double().numpy()
            for _ in range(self.draws)
        ]  # fmt: skip
        scores, spread = mean_and_error(samples)
        return explanation_of(question, "occlusion", self, scores, began, coalitions.rows, spread)
