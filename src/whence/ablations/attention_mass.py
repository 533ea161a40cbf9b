"""Which units did the model look at? Add up its attention.

With A_{l,h}[q, k] the attention that query q of head h in layer l gives key k (each row adds up to 1), L layers, H
heads and Q queries, a unit u with keys k scores

    a_u = 1/(L H Q)  sum over l, h, q and k in u of  A_{l,h}[q, k]

the share of all attention that fell on it. This is the explanation that Jain and Wallace (2019) doubt: heavy attention
need not be use, and a model can use what it hardly looks at, through what other positions carried along. It is here to
be held against the methods that ask. The score is a share, not an amount of the readout, and is never negative.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..engine.attribution import explanation_of, require
from ..method import Card

if TYPE_CHECKING:
    from ..explanation import Explanation

CARD = Card(
    name="attention_mass",
    verb="AttentionMass",
    paper="Jain and Wallace, Attention is not Explanation, NAACL 2019 (who put it on trial)",
    systems=(),
    question="Which units did the model look at?",
    units=("any unit",),
    works_on=("every model that answers a Question and lays open its attention",),
    needs=("attention",),
    cost="one forward",
    claim="The token that decides the outcome gets more attention than its twin that does nothing.",
    falsifier={
        "status": "not shown",
        "reason": "over 20 draws of the world tokens the token that decides gets more attention less often than "
        "expected, what it foretells of effects is poor, and it names causes in models that learned nothing",
        "trial": "tokens.single",
        "planted": "a keyed coin made one of two twin tokens decide the outcome; certified on the model by swaps",
        "expect": 0.9,
        "control": "random scores, and its own scores with the units shuffled",
        "seconds": 90,
    },
    departs="The mean over all layers, heads and queries; the paper looks at the one attention layer of a recurrent "
    "model.",
    avoid="For what a unit caused, by how much, or which way: attention is where a model looks. Nothing but a trial "
    "tells whether that goes with what it uses.",
)


@dataclass(frozen=True)
class AttentionMass:
    """Settings: there are none."""

    def rows(self, units: int) -> int:
        """Rows sent forwards for so many units."""
        return 1

    def explain(self, question: Any) -> Explanation:
        """scores[unit]: shares of attention, 0..1. Raises MethodError for a question without attention."""
        began = time.perf_counter()
        require(question, "attention_mass", "attention")
        scores = np.asarray(question.attention(), np.float64)
        details = {"unit": "share of attention"}
        return explanation_of(question, "attention_mass", self, scores, began, 1, details=details)
