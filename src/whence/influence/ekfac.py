"""Which training examples most caused this output, by the best curvature that is affordable? EK-FAC influences.

With the Fisher's factors of each layer, A = E[x x'] and S = E[d d'] (targets drawn from the model), their eigenbases
Q_A and Q_S, and Lambda = E[(Q_S' G Q_A)^2] in them (Grosse et al. 2023, eq. 18 to 21):

    score(q, i) = sum over layers <Q_S [(Q_S' G_q Q_A) / (Lambda + lambda)] Q_A', G_i>

Nothing is kept of an example: each query batch takes the gradients of all (or of the chosen) examples anew. This is the
measure that cheaper forms are held against, and the last stage of a query over an index.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..method import Card

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..engine.curvature import KroneckerFisher
    from ..engine.gradients import GradientBank
    from ..explanation import Explanation
    from ..objective import Examples, Objective

CARD = Card(
    name="ekfac",
    verb="EKFAC",
    paper="Grosse et al. 2023, Studying Large Language Model Generalization with Influence Functions",
    systems=(),
    question="Which training examples most caused this output, by the best curvature that is affordable?",
    units=("training example",),
    works_on=("language models", "diffusion models", "classifiers", "graph nets"),
    needs=("training examples",),
    cost="three forwards and backwards per training example for the factors; then one per example for each query batch",
    claim="Examples that taught the model an outcome score above their twins, which carry the same label.",
    falsifier={
        "trial": "carriers.marks",
        "planted": "the carriers, whose mark goes with one label throughout",
        "expect": 0.9,
        "control": "random and shuffled scores, similarity of inputs, the label, the norm: about .5",
        "seconds": 5,
    },
    departs="Biases are a column of their layer. Norms and embeddings get the diagonal of their Fisher. lambda is a "
    "tenth of each layer's mean eigenvalue, as in the paper.",
    avoid="For many queries over many examples: every query batch costs a pass over the data. Use an index.",
)


@dataclass(frozen=True)
class EKFAC:
    """``sampled``: targets drawn from the model (the Fisher), else the examples' own. ``sample``: examples that the
    factors are taken over; None: all."""

    sampled: bool = True
    sample: int | None = None
    layers: tuple[str, ...] | None = None

    def fit(self, objective: Objective, examples: Examples, shelf: Any = None) -> FittedEKFAC:
        """Two passes over the examples; nothing is kept on a shelf. Raises RunError, MethodError."""
        from ..engine.curvature import KroneckerFisher
        from ..engine.influence import BATCH, bank_of, spread

        began = time.monotonic()
        bank = bank_of(objective, examples, self.layers, None)
        chosen = spread(examples, self.sample or len(examples))
        curvature = KroneckerFisher(bank, self.sampled)
        curvature.fit(lambda: (chosen[i : i + BATCH] for i in range(0, len(chosen), BATCH)), len(chosen))
        return FittedEKFAC(asdict(self), curvature, bank, examples, time.monotonic() - began)


@dataclass(frozen=True)
class FittedEKFAC:
    """Factors of the curvature; ``explain`` answers queries."""

    settings: dict[str, Any]
    curvature: KroneckerFisher
    bank: GradientBank
    examples: Examples
    seconds: float

    def scores(self, queries: Sequence[Any], numbers: Sequence[int] | None = None) -> NDArray[np.float32]:
        """score[query, example] of all examples, or of those of these ``numbers``."""
        from ..engine.influence import exact_scores
        from ..engine.progress import progress

        chosen = self.examples if numbers is None else [self.examples[int(i)] for i in numbers]
        with progress("exact scores", total=len(chosen), unit="examples") as advance:
            return exact_scores(self.curvature, queries, chosen, advance)

    def explain(self, query: Any) -> Explanation:
        """Scores of all examples for one query."""
        from ..engine.influence import explanation_of

        began = time.monotonic()
        scores = self.scores([query])[0]
        return explanation_of(CARD.name, self.settings, self.examples, scores, time.monotonic() - began)
