"""Which training examples lowered this output's loss while the model was trained? Gradients along the way.

With checkpoints theta_1 ... theta_T and the learning rates eta_t in use there (Pruthi et al. 2020, TracInCP):

    TracInCP(i, q) = sum_t eta_t < grad L(theta_t, i), grad L(theta_t, q) >

the first-order fall of the query's loss over all steps that were taken on example i, as far as the checkpoints tell. A
checkpoint is an objective of its own. An example's score for itself, its *self-influence*, is large where the model had
to learn it by heart: wrong labels, outliers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..engine.codes import Numbers
from ..engine.schemes import Rows
from ..engine.together import Together
from ..errors import RunError
from ..method import Card

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from ..engine.influence import Fitted, Shelf
    from ..objective import Examples, Objective

CARD = Card(
    name="tracin",
    verb="TracIn",
    paper="Pruthi et al. 2020, Estimating Training Data Influence by Tracing Gradient Descent",
    systems=(),
    question="Which training examples lowered this output's loss while the model was trained?",
    units=("training example",),
    works_on=("language models", "diffusion models", "classifiers", "graph nets"),
    needs=("training examples",),
    cost="one forward and backward per training example and checkpoint, once; one per query and checkpoint",
    claim="Examples that taught the model an outcome score above their twins, which carry the same label.",
    falsifier={
        "trial": "carriers.marks",
        "planted": "the carriers, whose mark goes with one label throughout",
        "expect": 0.9,
        "control": "random and shuffled scores, similarity of inputs, the label, the norm: about .5",
        "seconds": 5,
    },
    departs="TracInCP alone, not the sum over every step. Over all layers unless layers= names some; the paper takes "
    "the last. A projection (size) is two-sided and by layer. Each checkpoint counts once: neither how often an "
    "example was met between two of them, nor an optimiser that is no plain gradient descent, is known here.",
    avoid="With the last checkpoint alone it is grad_dot: examples with large gradients score high for every query "
    "(carriers.loud: below chance).",
)


@dataclass(frozen=True)
class TracIn:
    """``rates``: learning rate at each checkpoint (none: 1). ``size``: numbers per side of a random projection of each
    layer's gradient; None: whole gradients. ``layers``: name patterns of the layers to use; None: all."""

    rates: tuple[float, ...] = ()
    size: int | None = None
    layers: tuple[str, ...] | None = None
    seed: int = 0

    def fit(self, objective: Objective | Sequence[Objective], examples: Examples, shelf: Shelf | None = None) -> Fitted:
        """One pass over the examples; ``objective``: one for each checkpoint. Raises RunError, MethodError."""
        from ..engine.influence import fit

        checkpoints = tuple(objective) if isinstance(objective, Sequence) else (objective,)
        rates = self.rates or (1.0,) * len(checkpoints)
        if not checkpoints or len(rates) != len(checkpoints):
            raise RunError(
                f"{len(rates)} learning rates for {len(checkpoints)} checkpoints", "they do not pair",
                "one rate for each objective, of one or more",
            )  # fmt: skip
        layers = self.layers and tuple(f"{t}.{p}" for t in range(len(rates)) for p in self.layers)
        whole = Together(checkpoints, f"TracIn of {len(checkpoints)} checkpoints")
        return fit(
            self, CARD.name, lambda shapes: _Scheme(shapes, rates), whole, examples, shelf, self.size, "random", layers,
            self.seed,
        )  # fmt: skip


def self_influence(fitted: Fitted) -> NDArray[np.float32]:
    """TracInCP(i, i) of each example, from what was kept."""
    import numpy as np

    scheme: Any = fitted.scheme
    found = []
    for _, codes in fitted.shelf.blocks("gradients", rows=64):
        squares = {name: g.flatten(1).square().sum(1) for name, g in scheme.codec.decode(codes).items()}
        found.append(sum(scheme.rate(name) * square for name, square in squares.items()).numpy())
    return np.concatenate(found)


class _Scheme(Rows):
    def __init__(self, shapes: Mapping[str, tuple[int, int]], rates: tuple[float, ...]) -> None:
        super().__init__(Numbers(dict(shapes), "float16"))
        self.rates = rates

    def rate(self, layer: str) -> float:
        """The learning rate of a layer's checkpoint, whose number its name begins with."""
        return self.rates[int(layer.split(".")[0])]

    def prepare(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The query's gradients, each times its checkpoint's rate."""
        return {name: g * self.rate(name) for name, g in gradients.items()}
