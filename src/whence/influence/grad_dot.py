"""Which training examples pull the weights the way this output does? The plain inner product of gradients.

    score(q, i) = sum over layers <grad L(q), grad L(i)>

One step of gradient descent on example i lowers the query's loss by the learning rate times this (Charpiat et al. 2019;
the one-checkpoint case of TracIn). No curvature: directions in which all gradients are large count for most of it. The
honest baseline of everything with a curvature.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..method import Card

if TYPE_CHECKING:
    from ..engine.influence import Fitted, Shelf
    from ..objective import Examples, Objective

CARD = Card(
    name="grad_dot",
    verb="GradDot",
    paper="Charpiat et al. 2019, Input Similarity from the Neural Network Perspective",
    systems=(),
    question="Which training examples pull the weights the way this output does?",
    units=("training example",),
    works_on=("language models", "diffusion models", "classifiers", "graph nets"),
    needs=("training examples",),
    cost="one forward and backward per training example, once; one per query",
    claim="Examples that taught the model an outcome score above their twins, which carry the same label.",
    falsifier={
        "trial": "carriers.marks",
        "planted": "the carriers, whose mark goes with one label throughout",
        "expect": 0.9,
        "control": "random and shuffled scores, similarity of inputs, the label, the norm: about .5",
        "seconds": 5,
    },
    departs="Gradients may be projected (size); whole by default.",
    avoid="As the only answer: examples with large gradients score high for every query. Take one with a curvature.",
)


@dataclass(frozen=True)
class GradDot:
    """``size``: numbers per side of a random projection of each layer's gradient; None: whole gradients. ``layers``:
    name patterns of the layers to use; None: all."""

    size: int | None = None
    layers: tuple[str, ...] | None = None
    seed: int = 0

    def fit(self, objective: Objective, examples: Examples, shelf: Shelf | None = None) -> Fitted:
        """One pass over the examples. Raises RunError, MethodError."""
        from ..engine.codes import Numbers
        from ..engine.influence import fit
        from ..engine.schemes import Rows

        return fit(
            self, CARD.name, lambda shapes: Rows(Numbers(shapes, "float16")), objective, examples, shelf, self.size,
            "random", self.layers, self.seed,
        )  # fmt: skip
