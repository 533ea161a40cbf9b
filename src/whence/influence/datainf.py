"""Which training examples most caused this output, without an inverse? The mean of inverses for the inverse of a mean.

For each layer, with g_i the gradient of example i and d its number of weights (Kwon et al. 2024, eq. 5),

    H^-1 = ( (1/n) sum_i g_i g_i' + lambda I )^-1  ~  (1/n) sum_i ( g_i g_i' + lambda I )^-1
         = (1/lambda) (I - C),     C = (1/n) sum_i g_i g_i' / (lambda + |g_i|^2),     lambda = .1 mean_i |g_i|^2 / d
    score(q, i) = sum over layers g_q' H^-1 g_i

by Sherman and Morrison. C has a trace below 1, so what is left of a direction after it is never less than a share of
what an inner product of gradients gives it; the smaller the layer, the nearer it is to the true inverse. C is kept by
its leading r directions: what is left out has no eigenvalue above 1 / (r + 1).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..engine.codes import Numbers
from ..engine.curvature import truncated
from ..engine.schemes import Rows
from ..errors import RunError
from ..method import Card

if TYPE_CHECKING:
    from torch import Tensor

    from ..engine.influence import Fitted, Shelf
    from ..objective import Examples, Objective

CARD = Card(
    name="datainf",
    verb="DataInf",
    paper="Kwon, Wu, Wu & Zou 2024, DataInf: Efficiently Estimating Data Influence in LoRA-tuned LLMs and Diffusion "
    "Models",
    systems=(),
    question="Which training examples most caused this output, without inverting a curvature?",
    units=("training example",),
    works_on=("language models", "diffusion models", "classifiers", "graph nets", "adapters of any of these"),
    needs=("training examples",),
    cost="one forward and backward per training example, once, and five passes over what was kept; one forward and "
    "backward per query and a scan",
    claim="Examples that taught the model an outcome score above their twins, which carry the same label.",
    falsifier={
        "trial": "carriers.marks",
        "planted": "the carriers, whose mark goes with one label throughout",
        "expect": 0.9,
        "control": "random and shuffled scores, similarity of inputs, the label, the norm: about .5",
        "seconds": 5,
    },
    departs="C by its leading directions (singular), exact where that is not below the number of examples or weights; "
    "the paper sums over all examples at each query. Larger scores are proponents: the paper's sign is turned. A bias "
    "is a column of its layer. A projection (size) may come first. float16 rows.",
    avoid="For layers much larger than an adapter's: the swap of mean and inverse costs more the more weights a layer "
    "has, and scores tend to those of grad_dot (LDS on 400 digits .38 and .38, where logra has .67; on carriers.loud "
    "both are below chance).",
)


@dataclass(frozen=True)
class DataInf:
    """``damping``: lambda as a share of mean |g|^2 / d (the paper's: .1); ``singular``: r; ``size``: numbers per side
    of a random projection of each layer's gradient; None: whole gradients. ``layers``: name patterns; None: all."""

    damping: float = 0.1
    singular: int = 256
    size: int | None = None
    layers: tuple[str, ...] | None = None
    seed: int = 0

    def fit(self, objective: Objective, examples: Examples, shelf: Shelf | None = None) -> Fitted:
        """One pass over the examples, five over what was kept. Raises RunError, MethodError."""
        from ..engine.influence import fit

        if not self.damping > 0:
            raise RunError(f"DataInf with a damping of {self.damping}", "it divides by lambda", "a number above 0")
        return fit(
            self, CARD.name, self.scheme, objective, examples, shelf, self.size, "random", self.layers, self.seed
        )

    def scheme(self, shapes: Mapping[str, tuple[int, int]]) -> _Scheme:
        """What is kept and scored of gradients of these shapes."""
        return _Scheme(shapes, self)


class _Scheme(Rows):
    def __init__(self, shapes: Mapping[str, tuple[int, int]], settings: DataInf) -> None:
        super().__init__(Numbers(dict(shapes), "float16"))
        self.shapes, self.settings = dict(shapes), settings

    def finish(self, shelf: Shelf) -> None:
        """lambda and C of each layer, of the rows as they are kept."""
        n, squares = 0, dict.fromkeys(self.shapes, 0.0)
        for part in self._parts(shelf):
            n += len(next(iter(part.values())))
            for name, g in part.items():
                squares[name] += float(g.double().square().sum())
        for name, (out, inp) in self.shapes.items():
            d = out * inp
            damping = self.settings.damping * squares[name] / n / d

            def rows(name: str = name, damping: float = damping) -> Iterator[Tensor]:
                # C is the second moment of these.
                for part in self._parts(shelf):
                    g = part[name].flatten(1).double()
                    yield g / (n * (damping + g.square().sum(1, keepdim=True))).clamp_min(1e-300).sqrt()

            basis, s = truncated(rows, d, min(self.settings.singular, d), (self.settings.seed, name))
            self.keep(name, basis=basis, c=s.square(), damping=damping)

    def _parts(self, shelf: Shelf) -> Iterator[Mapping[str, Tensor]]:
        """All rows, some 32 million numbers at a time."""
        for _, codes in shelf.blocks("gradients", rows=max(1, 2**26 // self.codec.stride)):
            yield self.codec.decode(codes)

    def prepare(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """(I - C) g_q / lambda of each layer; nothing for a layer that no example moves."""
        found, dampings = {}, self.damping
        for name, g in gradients.items():
            basis, c, damping = self.learned[f"basis/{name}"], self.learned[f"c/{name}"], dampings[name]
            row = g.detach().flatten(1).float().cpu()
            left = row - row @ basis * c @ basis.T
            found[name] = (left / damping if damping else left * 0).view(g.shape)
        return found
