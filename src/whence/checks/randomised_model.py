"""Does the explanation change when the model knows nothing?

A method that gives much the same scores for a trained model and for one with random weights, or one trained on shuffled
labels, explains the input, not the model (Adebayo et al. 2018: the model parameter and the data randomisation test).
With s the explanation on the model, t_i that on null i, asked about the same units, and rho Spearman's rank correlation
(ties shared, scores rounded to a tenth of the largest, see :mod:`stability`), the one primary number is the mean of

    change_i = 1 - | rho( s_i, t_i ) |

0: the same order of units, or the same turned round; about 1: unrelated. s_i is asked anew for each null. Many methods
draw at random, so that even on the same model two explanations differ; the control is that,

    control_i = 1 - | rho( s_i, s'_i ) |,     s'_i the same question explained once more

and noise that never repeats changes as much without any null: it is not supported.

*This run*: one question. The replicates are the nulls; below 3 of them there is no verdict.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from ..errors import MethodError
from ..method import Card
from ..question import Answer, Explainer, Question
from ..verdict import THIS_RUN, Verdict, judge_run, unmeasured
from .stability import GRAIN, likeness

if TYPE_CHECKING:
    from numpy.typing import NDArray

CARD = Card(
    name="randomised_model",
    verb="randomised_model",
    paper="Adebayo, Gilmer, Muelly, Goodfellow, Hardt and Kim, Sanity Checks for Saliency Maps, 2018",
    systems=(),
    question="Does the explanation change when the model is replaced by one that knows nothing?",
    units=("any unit",),
    works_on=("every explainer of a Question, with nulls: the same question asked of untrained or permuted models",),
    needs=("ask",),
    cost="three explanations per null",
    claim="An explainer that asks the model is supported; one that looks at the input only is refuted.",
    falsifier={
        "trial": "tests/checks/test_randomised_model.py::test_only_an_explainer_that_asks_the_model_is_supported",
        "planted": "a hand-wired model and nulls with random weights over the same units",
        "expect": 0.9,
        "control": "input-only, constant and random explainers",
        "seconds": 5,
    },
    departs="Whole models are exchanged for nulls instead of randomising layer after layer; similarity is the "
    "absolute rank correlation of rounded scores; explanations of the same model, asked twice, are the control.",
    avoid="As evidence of truth: weights also change a wrong explanation, and scores made of the weights alone pass. "
    "Where input and task are so made that the input alone shows the answer, an honest explanation may not change "
    "(Yona and Greenfeld 2021). With very few units, where even unrelated orders agree by chance.",
)

LEAST_UNITS = 4
DELTA = 0.3
"""Smallest change worth having."""
READOUT = "change of the explanation when the model is replaced by a null"
UNIT = "1 - |Spearman's rank correlation|, 0..1"
CLAIM = "the explanation depends on what the model learned"


def randomised_model(
    explain: Explainer | Sequence[Explainer],
    question: Question,
    nulls: Sequence[Question],
    *,
    delta: float = DELTA,
    grain: float = GRAIN,
) -> Verdict:
    """Does the explanation change when the model is replaced by ``nulls``, the same question asked of models that know
    nothing (`Planted.nulls`)?

    ``explain``: an explainer, or several that differ by their seeds only, taken in turn. ``grain``: scores closer than
    this share of the largest are held to be equal. The effect is the mean change; ``details["changes"]`` has it for
    each null, ``details["repeats"]`` that of the model's own repeats.

    Raises MethodError for nulls over other units, and for explanations that do not fit the units or are not finite.
    """
    units = question.units
    for i, null in enumerate(nulls):
        if null.units.labels != units.labels:
            raise MethodError(
                f"randomised_model with null {i}", f"units {', '.join(null.units.labels[:6])}...",
                "the same question asked of another model, over the same units in the same order",
            )  # fmt: skip
    if len(units) < LEAST_UNITS:
        why = f"of fewer than {LEAST_UNITS} units even unrelated orders agree"
        return unmeasured(CLAIM, THIS_RUN, why, delta, readout=READOUT, unit=UNIT)
    if not nulls:
        return unmeasured(CLAIM, THIS_RUN, "no null was handed", delta, readout=READOUT, unit=UNIT, needed_n=3)
    explainers = [explain] if callable(explain) else list(explain)

    def scores(explain_one: Explainer, of: Question) -> NDArray[np.float64]:
        answer = Answer.of(explain_one(of), units)
        return np.zeros(len(units)) if answer.nothing else answer.scores

    def change(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
        return 1 - abs(likeness(a, b, grain))

    changes, repeats = [], []
    for i, null in enumerate(nulls):
        # The null and the repeat by the same explainer, or seeds alone would make a difference.
        one, other = explainers[2 * i % len(explainers)], explainers[(2 * i + 1) % len(explainers)]
        own = scores(one, question)
        changes.append(change(own, scores(other, null)))
        repeats.append(change(own, scores(other, question)))
    verdict = judge_run(
        changes,
        {"the same model, explained again": repeats},
        claim=CLAIM,
        delta=delta,
        readout=READOUT,
        unit=UNIT,
        evidence="an explainer, asked of the model and of its nulls",
        intervention=f"the model replaced by {len(nulls)} that know nothing",
        control_name="the same model, explained again",
        changes=changes,
        repeats=repeats,
        explanations=3 * len(nulls),
    )
    return replace(verdict, replicate="null")
