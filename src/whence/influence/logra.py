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
from typing import TYPE_CHECKING, Any

from ..errors import RunError
from ..method import Card

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
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


class _Scheme:
    sample = 0

    def __init__(self, shapes: Mapping[str, tuple[int, int]], settings: LoGRA) -> None:
        from ..engine.codes import Numbers

        self.settings, self.codec = settings, Numbers(dict(shapes), settings.keep)
        self.eigen: dict[str, tuple[Tensor, Tensor]] = {}
        self.damping: dict[str, float] = {}

    @property
    def planes(self) -> dict[str, int]:
        return {"gradients": self.codec.stride}

    def learn(self, gradients: Mapping[str, Tensor]) -> None:
        """Nothing is wanted of a sample."""

    def encode(self, gradients: Mapping[str, Tensor]) -> dict[str, NDArray[np.uint8]]:
        return {"gradients": self.codec.encode(gradients)}

    def finish(self, shelf: Shelf) -> None:
        """F of each layer, of the rows as they are kept."""
        from ..engine.curvature import Moments

        moments = Moments()
        for _, codes in shelf.blocks("gradients", rows=4096):
            moments.add(self.codec.decode(codes))
        self.eigen = {name: (v.float(), q.float()) for name, (v, q) in moments.eigen().items()}
        chosen = moments.damping() if self.settings.damping is None else {}
        self.damping = {
            name: chosen[name] if chosen else float(self.settings.damping or 0) * float(v.mean())
            for name, (v, _) in self.eigen.items()
        }

    def tensors(self) -> dict[str, NDArray[Any]]:
        import numpy as np

        found: dict[str, NDArray[Any]] = {}
        for name, (values, vectors) in self.eigen.items():
            found[f"values/{name}"], found[f"vectors/{name}"] = values.numpy(), vectors.numpy()
            found[f"damping/{name}"] = np.array(self.damping[name])
        return found

    def restore(self, tensors: Mapping[str, NDArray[Any]]) -> None:
        import torch

        for name in self.codec.shapes:
            if f"values/{name}" in tensors:
                pair = [torch.from_numpy(tensors[f"{kind}/{name}"].copy()) for kind in ("values", "vectors")]
                self.eigen[name], self.damping[name] = (pair[0], pair[1]), float(tensors[f"damping/{name}"])

    def prepare(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """(F + lambda I)^-1 of the query's gradient."""
        found = {}
        for name, g in gradients.items():
            values, vectors = self.eigen[name]
            inner = g.detach().flatten(1).float().cpu() @ vectors
            found[name] = (inner / (values + max(self.damping[name], 1e-30)) @ vectors.T).view(g.shape)
        return found

    def score(self, prepared: dict[str, Tensor], codes: Mapping[str, NDArray[np.uint8]]) -> NDArray[np.float32]:
        return self.codec.score(prepared, codes["gradients"])
