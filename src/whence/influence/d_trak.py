"""Which training pictures made a diffusion model's picture? TRAK with the squared norm of the prediction as its output.

For a picture x, noised to x_t at the timesteps t of a grid, and a random projection P (Zheng et al. 2024, D-TRAK):

    L_square(x) = E_{t, eps} | eps_theta(x_t, t) |^2,        phi(x) = P' grad L_square(x)
    tau(q)_i    = phi(q)' (Phi' Phi + lambda I)^-1 phi(x_i)

The gradient is of no loss: what the model ought to have predicted does not come into it. Theory says that it should be
worse than the loss's, and the paper finds that retraining agrees with it better. Take the objective
``DiffusionObjective(model, output="squared norm")``, for examples and queries alike; one that has ``of(output)`` is
asked for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..engine.influence import flat
from ..engine.project import subsampled_hadamard
from ..engine.schemes import Kernel
from ..errors import MethodError, RunError
from ..method import Card

if TYPE_CHECKING:
    from torch import Tensor

    from ..engine.influence import Fitted, Shelf
    from ..objective import Examples, Objective

CARD = Card(
    name="d_trak",
    verb="DTRAK",
    paper="Zheng, Pang, Du, Jiang & Lin 2024, Intriguing Properties of Data Attribution on Diffusion Models, "
    "arXiv 2311.00500",
    systems=(),
    question="Which training pictures made a diffusion model's picture?",
    units=("training example",),
    works_on=("diffusion models",),
    needs=("training examples",),
    cost="one forward and backward per training example and place of the grid, once; the same per query; 2 size bytes "
    "per example",
    claim="Pictures that taught a model to draw something score above their twins, the same pictures with other "
    "captions.",
    falsifier={
        "trial": "drawn.single",
        "planted": "the carriers, whose caption has the word that the model hears in the query's",
        "expect": 0.9,
        "control": "random and shuffled scores, likeness of pixels and captions: about .5",
        "seconds": 50,
    },
    departs="Each timestep's gradients are brought to one size before they are added (Xie et al. 2024); the paper adds "
    "them as they are. The grid's timesteps are the middles of equal parts, its noise is the same for all pictures. A "
    "Hadamard transform with random signs of which k numbers are kept, not a dense matrix, projects. lambda is half "
    "of the mean eigenvalue, where the paper tries many against retraining. One model, no mean over several. "
    "Small-scale: pictures of 8 x 8 pixels, asked about one corner of a scene that all of them show; in retraining on "
    "halves of 64 digits the LDS is .32 (standard error .04), with the loss's gradients .30, with cosines of the "
    "pixels .17.",
    avoid="Of a whole picture where one thing in it is meant: asked about all pixels and not the corner, the same "
    "carriers stand above their twins in .86 of the pairs, on some draws below them.",
)


@dataclass(frozen=True)
class DTRAK:
    """``size``: k, numbers that the whole gradient is projected to; None: it stays whole. ``damping``: lambda as a
    share of the mean of the min(k, N) eigenvalues that there can be; None: by held-out likelihood. ``side``: numbers
    per side that each layer's gradient is brought to first, for models too large for whole ones."""

    size: int | None = 1024
    damping: float | None = 0.5
    side: int | None = None
    layers: tuple[str, ...] | None = None
    seed: int = 0

    def fit(self, objective: Objective, examples: Examples, shelf: Shelf | None = None) -> Fitted:
        """One pass over the examples. Raises MethodError for an objective of another output, RunError."""
        from ..engine.influence import fit

        output = getattr(objective, "output", None)
        if output != "squared norm" and hasattr(objective, "of"):
            objective, output = objective.of("squared norm"), "squared norm"  # the same model, asked for it
        if output != "squared norm":
            raise MethodError(
                f"D-TRAK of {objective.name}", f"its gradients are of {output or 'a loss'}",
                'DiffusionObjective(model, output="squared norm"); trak, for other models',
            )  # fmt: skip
        if self.size is not None and self.size < 1:
            raise RunError(f"features of {self.size} numbers", "nothing would be kept", "1 or more, or None")
        return fit(
            self, CARD.name, self.scheme, objective, examples, shelf, self.side, "random", self.layers, self.seed
        )

    def scheme(self, shapes: Mapping[str, tuple[int, int]]) -> _Scheme:
        """What is kept and scored of gradients of these shapes."""
        return _Scheme(shapes, self)


class _Scheme(Kernel):
    def __init__(self, shapes: Mapping[str, tuple[int, int]], settings: DTRAK) -> None:
        self.settings, self.layers = settings, sorted(shapes)  # the projection hangs on the order
        whole = sum(out * inp for out, inp in shapes.values())
        super().__init__({"all": min(whole, settings.size or whole)}, settings.damping)

    def features(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """phi, "all" -> [example, k]."""
        rows = flat({n: gradients[n] for n in self.layers})
        return {"all": subsampled_hadamard(rows, self.settings.size, "d_trak", self.settings.seed)}
