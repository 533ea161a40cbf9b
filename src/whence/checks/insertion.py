"""Does the output come back as fast as it could if units are kept from the highest score on?

The mirror of :mod:`deletion`: everything is re-rendered but the units with the highest scores,

    i(k) = v( {pi(1)..pi(k)} ),     B(pi) = sum over k of w_k i(k),   0 < k < n

with v(S) the value with the units S kept and all others drawn anew (`question.ask`); larger is better. On the same
scale as deletion, D(pi) = (B(pi) - B(random)) / (B(best) - B(random)): 0 as a random order, 1 as the best order found.

Deletion asks what the output *needs*, insertion what *suffices* for it. They differ where causes act together: of two
units that are both needed (AND), taking one ends the output, but only both bring it back; of two that can stand in for
each other (OR) it is the other way round. Scores that pass both are seldom lucky.

*This run* is deterministic at its seed; the replicates are the alternatives, re-renderings of all units that are not
kept. Controls, chance and *runs like this* are those of deletion.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..method import Card
from ..question import Question
from ..verdict import LOOKS, Verdict
from .deletion import DELTA, Scale, trial

CARD = Card(
    name="insertion",
    verb="insertion",
    paper="Petsiuk, Das and Saenko, RISE: Randomized Input Sampling for Explanation of Black-box Models, 2018 (the "
    "curve and its area); re-rendering instead of blurring, and the scale between random and best, are Whence's own",
    systems=(),
    question="Does the output come back as fast as it could if units are kept from the highest score on?",
    units=("any unit",),
    works_on=("every model that answers a Question",),
    needs=("ask",),
    cost="as deletion: about 440 curves of at most 9 steps, and a search; 32 curves from the second explanation on, "
    "with scale=scale_of(question, insert=True)",
    claim="The true scores are supported; random, shuffled and constant scores are not.",
    falsifier={
        "trial": "tests/checks/test_deletion.py::test_only_the_true_scores_are_supported",
        "planted": "hand-wired functions of units whose effects are known exactly",
        "expect": 0.9,
        "control": "random, shuffled and constant scores",
        "seconds": 10,
    },
    departs="Units that are not kept are drawn anew from the world instead of being blurred, several draws a step; "
    "the area is put on a scale from random (0) to the best order found (1).",
    avoid="Where causes stand in for each other (OR): one of them brings all back, so that scores naming only one of "
    "two pass. Where many explanations are tried and the best curve is kept: the number can be optimised by choosing, "
    "so choose on some questions and judge on others. Where nearly everything is needed, no small set brings the "
    "output back and all orders look alike.",
)


def insertion(
    given: Any,
    question: Question | Sequence[Question],
    *,
    delta: float = DELTA,
    scale: Scale | None = None,
    orders: int | None = None,
    draws: int = 16,
    steps: int = 10,
    looks: Sequence[int] = LOOKS,
    seed: int = 0,
) -> Verdict:
    """Does the output come back as fast as it could if units are kept from the highest score on, others re-rendered?

    For *this run*, ``given`` is an Answer, an Explanation or one number per unit, and ``question`` the one it answers.
    For *runs like this*, ``given`` is an explainer and ``question`` a sequence of questions, at least as many as the
    first of ``looks``. ``scale``: an earlier ``scale_of(question, insert=True)``. ``orders``: random orders (39; 20 for
    each of several questions); ``draws``: curves of the explanation's own order; ``steps``: steps of a curve;
    ``seed``: of the streams that deal out orders. The effect is D, without a unit; ``details`` as in deletion.

    Raises MethodError for scores that do not fit the units or are not finite, for fewer than 2 units or too few draws.
    """
    return trial(
        given, question, insert=True, delta=delta, scale=scale, orders=orders, draws=draws, steps=steps, looks=looks,
        seed=seed,
    )  # fmt: skip
