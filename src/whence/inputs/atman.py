"""Which parts of the prompt does this continuation depend on, if nothing is taken out and nothing differentiated?

AtMan (Deiseroth et al. 2023) lets the model read the whole prompt and turns down the attention that one unit i gets, in
all layers and heads. With the raw scores h = q k^T of a query, shifted so that the least one it may see is 0, and f
the share that is taken away (the paper fixes f = 0.9; ``factor`` is what is left, 1 - f):

    h_k  <-  h_k (1 - f_i,k),     f_i,k = f for the unit's own keys, 0 for all others                          (eq. 4)
    f_i,k = f cos(e_i, e_k)  where kappa <= cos(e_i, e_k), e the input embeddings: like words go together      (eq. 6)
    score of i = L(target | i turned down) - L(target) = sum over target tokens of  log p - log p with i turned down

so that what the continuation depends on is positive. Grouping is for redundancy: of two words that say the same, each
alone can be turned down without loss. "bias" is a variant: ln(1 - f) is added to the scaled scores, so that the odds of
each key are multiplied by 1 - f. Where a head is sure of a key, that takes less from it than "multiply" does.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ..engine.attribution import explanation_of, require
from ..errors import MethodError
from ..method import Card

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..explanation import Explanation
    from ..question import TextQuestion

CARD = Card(
    name="atman",
    verb="AtMan",
    paper="Deiseroth, Deb, Weinbach, Brack, Schramowski and Kersting, AtMan: Understanding Transformer Predictions "
    "Through Memory Efficient Attention Manipulation, NeurIPS 2023",
    systems=("S002-03",),
    question="Which parts of the prompt does this continuation depend on, if nothing is taken out and nothing is "
    "differentiated?",
    units=("part of a prompt: token, word, sentence, passage",),
    works_on=("causal language models whose attention transformers lets one replace",),
    needs=("suppression",),
    cost="units + 1 forwards, no backwards",
    claim="The sentence that the answer was read from scores higher than its twin, which the answer does not need.",
    falsifier={
        "trial": "facts.single",
        "planted": "one sentence of the context holds the answer; its twin has the same form and is not asked for",
        "expect": 0.9,
        "control": "random scores, and its own scores with the units shuffled",
        "seconds": 25,
    },
    departs="Units need not be tokens: all keys of a unit are turned down at once. Like units are found by the mean "
    "input embedding of their tokens, and only words and tokens are grouped: sentences of one form are alike whatever "
    "they say (in facts.single cause and twin have a cosine of 0.87; grouped they reach 0.71, each alone 1.00). The "
    "least score is taken over the keys that a query may see; the authors' code, as we read of it, takes it before the "
    "causal mask. A like unit keeps 1 - f cos of its score, as that code does; whether eq. 6 has the f there we could "
    "not check. Units of the prompt only: the paper also turns down earlier tokens of the target. Small-scale: no "
    "picture, and not the paper's benchmarks.",
    avoid="As what happens when a part is removed: the words stay, the model goes on from states that it never had in "
    "training, and the two answers can differ much. For models without attention, or with their own attention code.",
)

WAYS = ("multiply", "bias")
FINE = ("token", "word")
"""Kinds of units whose mean embeddings say whether they mean the same."""


@dataclass(frozen=True)
class AtMan:
    """Settings. ``factor``: what is left of a unit's attention, 1 - f, between 0 and 1; ``how`` it is applied (one of
    WAYS); ``kappa``: the least cosine of units that go together (None: each alone); ``grouped``: kinds of units for
    which that is done."""

    factor: float = 0.1
    how: str = "multiply"
    kappa: float | None = 0.7
    grouped: tuple[str, ...] = FINE

    def explain(self, question: TextQuestion) -> Explanation:
        """scores[unit], in nats of the target's log-probability, above 0 where the target became less likely.

        ``details["together"]``: for each unit that went with others, their labels and cosines. Raises MethodError for
        settings out of range and for a question without "suppression" (with ``kappa``: or "embeddings").
        """
        began = time.perf_counter()
        require(question, "atman", "suppression")
        self._check()
        n, labels = len(question.units), question.units.labels
        left, together = np.where(np.eye(n, dtype=bool), self.factor, 1.0), {}
        if self.kappa is not None and question.units.kind in self.grouped:
            cosine = self._cosines(question)
            like = cosine >= self.kappa
            left = np.where(like, 1 - (1 - self.factor) * cosine, 1.0)
            for i in np.flatnonzero(like.sum(1) > 1):
                together[labels[i]] = [(labels[k], float(cosine[i, k])) for k in np.flatnonzero(like[i]) if k != i]
        logp = question.suppress(np.concatenate([np.ones((1, n)), left]), self.how)
        scores = (logp[0] - logp[1:]).sum(1)
        details = {"together": together}
        e = explanation_of(question, "atman", self, scores, began, n + 1, None, details)
        e = replace(e, readout=f"{question.readout}: fall of the target's log-probability, nats")
        note = f"{len(together)} of {n} units were turned down with like ones: what they score is their group's"
        return replace(e, notes=(note,)) if together else e

    def _cosines(self, question: TextQuestion) -> NDArray[np.float64]:
        """cosine[unit, unit] of mean input embeddings, 1 with itself; of an embedding of zeros 0 with all others."""
        if "embeddings" not in question.capabilities:
            raise MethodError("atman with like units together", "this question has no embeddings", "AtMan(kappa=None)")
        e = np.asarray(question.embeddings(), np.float64)
        size = np.linalg.norm(e, axis=1, keepdims=True)
        e = e / np.where(size > 0, size, 1)
        cosine = np.clip((e @ e.T).round(9), -1, 1)  # rounded: the same word twice has the cosine 1
        np.fill_diagonal(cosine, 1)
        return np.asarray(cosine)

    def _check(self) -> None:
        if not 0 < self.factor < 1:
            raise MethodError(f"atman with factor={self.factor:g}", "what is left of attention", "between 0 and 1")
        if self.how not in WAYS:
            raise MethodError(f"atman by {self.how!r}", "no such way", ", ".join(WAYS))
        if self.kappa is not None and not 0 < self.kappa <= 1:
            raise MethodError(f"atman with kappa={self.kappa:g}", "a cosine", "above 0, at most 1; None: each alone")
