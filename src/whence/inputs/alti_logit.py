"""Which words of the prompt were added up into this token rather than that one? Take the logit apart, exactly.

With the final norm's statistics held as they were, the logit of token w is linear in the residual stream (Ferrando et
al. 2023, section 2; `engine/decompose.py` has the algebra): the part that layer l adds by reading position j is

    dlogit^l_{w <- x_j} = sum over heads h of  A^{l,h}[t, j] (W_O^h W_V^h norm(x_j^{l-1})) . U_w

and embedding, MLPs and biases add the rest. A foil f is held against w by U_w - U_f in place of U_w. But position j of
layer l has by then mixed many tokens. ALTI (Ferrando et al. 2022) says in what shares: part T_i(x_j) of the output y_i
of attention and residual counts by how near it comes, and shares multiply over layers:

    C^l[i, j] ~ max(0, |y_i|_1 - |y_i - T_i(x_j)|_1),  rows adding up to 1;     M^l = C^l C^{l-1} ... C^1
    score_s = sum over l, j of  dlogit^l_{w <- x_j} M^{l-1}[j, s]     (M^0 = 1), and the embedding term for s = t

A unit scores the sum over its tokens, in logits, above 0 where it speaks for w and against f. What MLPs and biases
added is no token's and stays apart.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..engine.attribution import explanation_of, require
from ..method import Card

if TYPE_CHECKING:
    from ..explanation import Explanation

CARD = Card(
    name="alti_logit",
    verb="AltiLogit",
    paper="Ferrando, Gallego, Tsiamas and Costa-jussa, Explaining How Transformers Use Context to Build Predictions, "
    "ACL 2023; with ALTI of Ferrando, Gallego and Costa-jussa, Measuring the Mixing of Contextual Information in the "
    "Transformer, EMNLP 2022",
    systems=("S002-40",),
    question="Which words of the prompt were added up into this token rather than that one?",
    units=("any part of a prompt",),
    works_on=("Llama, Mistral, Qwen2, Qwen3 and GPT-2 decoders of transformers",),
    needs=("logit parts",),
    cost="one forward, with attention written out in full",
    claim="The sentence that made the model write its answer scores higher than its twin.",
    falsifier={
        "trial": "facts.single",
        "planted": "one of two twin sentences holds the fact that the answer needs; certified on the model by swaps",
        "expect": 0.9,
        "control": "random scores, and its own scores with the units shuffled",
        "seconds": 25,
    },
    departs="What biases add to the values is the same whoever is attended to, and is counted with the biases, not "
    "with the position that was read. The shares C are of blocks that norm before they read, y_i = x_i + attention_i, "
    "with biases in y_i and in no part. Several target tokens are added up. Without a foil the logit itself is taken "
    "apart, whose level means nothing; the paper's main results are contrastive. Small-scale: shown on a grammar of "
    "38 words and Llamas of 20 thousand weights.",
    avoid="Where MLPs do the work: their terms, often more than half of the logit, belong to no token (see details "
    "'mlp'). To say that a unit is needed: the parts are exact sums, the shares C are a heuristic, and neither tells "
    "what the model would do without the unit. To pick one cause out of all tokens: function words can score higher "
    "than the word that decides.",
)


@dataclass(frozen=True)
class AltiLogit:
    """Settings. ``foil``: the token held against the target, as the question takes it, a number or its text (None: what
    the question holds against it, if anything)."""

    foil: int | str | None = None

    def rows(self, units: int) -> int:
        """Rows sent forwards for so many units."""
        return 1

    def explain(self, question: Any) -> Explanation:
        """scores[unit]: each unit's part of the logit (less the foil's), in logits, pulled back to the input tokens.

        ``details``: "logit" (all parts together), "elsewhere" (parts of tokens that belong to no unit), "mlp" (by
        layer), "bias" (by layer, then final norm and unembedding), "embedding" (of the last token read), and "direct"
        (by unit, what was read from its positions, not pulled back). Raises MethodError for a question without
        "logit parts".
        """
        began = time.perf_counter()
        require(question, "alti_logit", "logit parts")
        parts, n = question.logit_parts(self.foil), len(question.units)
        pulled = parts.pulled()
        scores = parts.by_unit(pulled, n)
        details = {
            "unit": "logits",
            "logit": parts.total,
            "elsewhere": float(pulled.sum() - scores.sum()),
            "mlp": parts.mlp.tolist(),
            "bias": parts.bias.tolist(),
            "embedding": float(parts.embedding.sum()),
            "direct": parts.by_unit(parts.tokens(), n).tolist(),
        }
        return explanation_of(question, "alti_logit", self, scores, began, 1, details=details)
