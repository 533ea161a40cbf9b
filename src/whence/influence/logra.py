"""Which training examples most caused this output? Influence functions on two-sidedly projected gradients.

For each layer with inputs x_t and output gradients d_t (Choe et al. 2024, eq. 4 and 5):

    G_i = sum_t (P_out' d_t)(P_in' x_t)'             d_out x d_in, kept for each example
    F   = (1/N) sum_i vec G_i vec G_i'               a block for each layer
    score(q, i) = sum over layers vec G_q' (F + lambda I)^-1 vec G_i

The projection is applied to the factors before they are multiplied, so a gradient is never made in full. Here the
inverse is applied to the query alone; lambda is chosen for each layer by the likelihood of held-out gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..engine.codes import Numbers
from ..engine.schemes import Rows
from ..errors import RunError
from ..method import Card

if TYPE_CHECKING:
    from torch import Tensor

    from ..engine.influence import Fitted, Shelf
    from ..objective import Examples, Objective

CARD = Card(
    name="logra",
    verb="LoGRA",
    paper="Choe et al. 2024, What is Your Data Worth to GPT? LLM-Scale Data Valuation with Influence Functions",
    systems=(),
    question="Which training examples most caused this output, by influence functions on projected gradients?",
    units=("training example",),
    works_on=("language models", "diffusion models", "classifiers", "graph nets"),
    needs=("training examples",),
    cost="one forward and backward per training example, once; one per query, then a scan of size^2 numbers per layer",
    claim="Examples that taught the model an outcome score above louder ones, whose gradients are larger.",
    falsifier={
        "trial": "carriers.loud",
        "planted": "the carriers of the mark that decides; the other mark's examples have larger gradients",
        "expect": 0.9,
        "control": "random and shuffled scores, similarity of inputs, the label, the norm: about .5; grad_dot .32",
        "seconds": 5,
    },
    departs="Biases, embeddings and norms are projected too, not linear layers alone. Rademacher entries. lambda by "
    "held-out likelihood (damping=), where the paper leaves it to the user. Rows are int8 or float16, not float32.",
    avoid="Where a few kilobytes per example are too much (lorif, eogp), or a small model allows EK-FAC (ekfac).",
)


@dataclass(frozen=True)
class LoGRA:
    """``size``: numbers per side of each layer. ``damping``: lambda as a share of the block's mean eigenvalue; None:
    by held-out likelihood. ``keep``: "float16" or "int8" rows. ``init``: "pca" (the paper's other choice: eigenvectors
    of what goes in and comes back) or "random" projections."""

    size: int = 16
    damping: float | None = None
    keep: str = "int8"
    init: str = "pca"
    layers: tuple[str, ...] | None = None
    seed: int = 0

    def fit(self, objective: Objective, examples: Examples, shelf: Shelf | None = None) -> Fitted:
        """One pass over the examples. Raises RunError, MethodError."""
        from ..engine.influence import fit

        if self.keep not in ("float16", "int8"):
            raise RunError(f"rows kept as {self.keep!r}", "no such form", "float16, int8")
        return fit(
            self, CARD.name, self.scheme, objective, examples, shelf, self.size, self.init, self.layers, self.seed
        )

    def scheme(self, shapes: Mapping[str, tuple[int, int]]) -> _Scheme:
        """What is kept and scored of gradients of these shapes."""
        return _Scheme(shapes, self)


class _Scheme(Rows):
    def __init__(self, shapes: Mapping[str, tuple[int, int]], settings: LoGRA) -> None:
        super().__init__(Numbers(dict(shapes), settings.keep))
        self.settings = settings

    def finish(self, shelf: Shelf) -> None:
        """F of each layer, of the rows as they are kept."""
        moments, given = self.moments(shelf), self.settings.damping
        chosen = moments.damping() if given is None else {}
        for name, (values, vectors) in moments.eigen().items():
            damping = chosen[name] if given is None else given * float(values.float().mean())
            self.keep(name, values=values.float(), vectors=vectors.float(), damping=damping)

    def prepare(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """(F + lambda I)^-1 of the query's gradient."""
        found, damping = {}, self.damping
        for name, g in gradients.items():
            values, vectors = self.learned[f"values/{name}"], self.learned[f"vectors/{name}"]
            inner = g.detach().flatten(1).float().cpu() @ vectors
            found[name] = (inner / (values + max(damping[name], 1e-30)) @ vectors.T).view(g.shape)
        return found
