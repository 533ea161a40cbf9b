"""Which training examples most caused this output, by EK-FAC's own inner product, at a few hundred bytes each?

EK-FAC's score (Grosse et al. 2023, eq. 20) is an inner product of half-whitened gradients, all layers side by side:

    h_i = (Lambda + lambda)^(-1/2) * (Q_S' G_i Q_A)          elementwise, in the eigenbases of each layer's factors
    score(q, i) = <h_q, h_i>

There are as many coordinates as weights, and after whitening most of them count: to keep the leading ones loses the
rest. So all of them are mixed and a few are kept, h -> P'h, by a subsampled randomised Hadamard transform (Ailon &
Chazelle 2009), which keeps inner products in expectation with an error of 1/sqrt(numbers); as int8, or one sign bit
and a common scale for each (the query keeps its numbers).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..engine.codes import Numbers, Signs
from ..engine.schemes import Rows
from ..engine.stages import Both
from ..errors import RunError
from ..method import Card

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from ..engine.influence import Fitted, Shelf
    from ..objective import Examples, Objective

CARD = Card(
    name="sketch",
    verb="Sketch",
    paper="Grosse et al. 2023, Studying Large Language Model Generalization with Influence Functions (the scores); "
    "Ailon & Chazelle 2009, The Fast Johnson-Lindenstrauss Transform (what is kept of them)",
    systems=(),
    question="Which training examples most caused this output, by EK-FAC's scores from an index of a few hundred bytes "
    "per example?",
    units=("training example",),
    works_on=("language models", "diffusion models", "classifiers", "graph nets"),
    needs=("training examples",),
    cost="one forward and backward per training example and two more for a sample; numbers / 8 + 2 bytes (bits) or "
    "numbers + 2 (int8) per example; one forward and backward per query and a scan",
    claim="Examples that taught the model an outcome score above their twins, which carry the same label.",
    falsifier={
        "trial": "carriers.marks",
        "planted": "the carriers, whose mark goes with one label throughout",
        "expect": 0.9,
        "control": "random and shuffled scores, similarity of inputs, the label, the norm: about .5",
        "seconds": 5,
    },
    departs="No paper's method: EK-FAC's scores, sketched. Lambda is of the examples' own targets, over a sample. Of "
    "each side of a layer the leading `size` eigenvectors are kept. Rows of embedding tables are divided by their root "
    "mean square and, where there are too many, added up at random. lambda is a tenth of each layer's mean eigenvalue, "
    "as in EK-FAC's paper.",
    avoid="As the last word on the order of the best few: re-score these with EK-FAC (query --exact). Where some "
    "examples are louder than others for reasons of their own (carriers.loud): EK-FAC, sketched or not, does not take "
    "that out; logra and eogp do.",
)


@dataclass(frozen=True)
class Sketch:
    """``numbers`` kept of an example, over all layers, as ``keep``: "bits", "int8" or "float16"; ``size``: leading
    eigenvectors of each side of a layer, 0: as many as :data:`~whence.engine.project.MOST` coordinates in all allow;
    ``sample``: examples that bases and eigenvalues are learned from; ``damping``: lambda as a share of a layer's mean
    eigenvalue."""

    numbers: int = 2048
    keep: str = "bits"
    size: int = 0
    sample: int = 256
    damping: float = 0.1
    layers: tuple[str, ...] | None = None
    seed: int = 0

    def fit(self, objective: Objective, examples: Examples, shelf: Shelf | None = None) -> Fitted:
        """A pass over a sample and one over all examples. Raises RunError, MethodError."""
        from ..engine.influence import fit

        if self.keep not in ("bits", "int8", "float16"):
            raise RunError(f"a sketch kept as {self.keep!r}", "no such form", "bits, int8, float16")
        if self.numbers < 8:
            raise RunError(f"{self.numbers} numbers per example", "too few to order anything", "8 or more")
        return fit(self, CARD.name, self.scheme, objective, examples, shelf, self.size, "eigen", self.layers, self.seed)

    def scheme(self, shapes: Mapping[str, tuple[int, int]]) -> _Scheme:
        """What is kept and scored of gradients of these shapes."""
        return _Scheme(shapes, self)


FOLD = 8
"""Places, for each number that is kept, that all coordinates are added up in before they are mixed."""


class _Scheme(Rows):
    """``drawn``: numbers that the mixture is drawn with, of which the first are kept; None: no others."""

    def __init__(self, shapes: Mapping[str, tuple[int, int]], settings: Sketch, drawn: int | None = None) -> None:
        kept = {"all": (settings.numbers,)}
        super().__init__(Signs(kept) if settings.keep == "bits" else Numbers(kept, settings.keep))
        self.plane = "bits" if settings.keep == "bits" else "sketch"
        self.shapes, self.settings, self.sample = dict(shapes), settings, settings.sample
        self.drawn = drawn or settings.numbers

    def learn(self, gradients: Mapping[str, Tensor]) -> None:
        """Lambda, and from it what each coordinate is divided by."""
        for name in self.shapes:
            values = (gradients[name].detach().double() ** 2).mean(0)
            damping = self.settings.damping * float(values.mean())
            # A layer that no example reaches has nothing to divide, and nothing to keep.
            scale = (values + damping).rsqrt() if damping > 0 else values
            self.keep(name, scale=scale.float(), damping=damping)

    def features(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """P'h: "all" -> [example, number]."""
        return self.part(self.drawing(gradients))

    def part(self, drawing: Tensor) -> dict[str, Tensor]:
        """The numbers that are kept of a drawing."""
        numbers = self.settings.numbers
        return {"all": drawing[:, :numbers] * (self.drawn / numbers) ** 0.5}

    def drawing(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """All numbers of the mixture, [example, number]."""
        import torch

        from ..engine.project import folded, mixed

        parts = [gradients[n].detach().float().cpu() * self.learned[f"scale/{n}"] for n in self.shapes]
        rows = torch.cat([x.flatten(1) for x in parts], 1)
        seed = self.settings.seed
        return mixed(folded(rows, FOLD * self.drawn, "sketch", seed), self.drawn, "sketch", seed)

    def prepare(self, gradients: Mapping[str, Tensor]) -> Any:
        return self.ready(self.features(gradients))

    def ready(self, own: dict[str, Tensor]) -> Any:
        """The query's numbers; for bits, as tables of a scan."""
        from ..engine.scan import Scan

        return Scan(self.codec, own) if self.settings.keep == "bits" else own

    def score(self, prepared: Any, codes: Mapping[str, NDArray[np.uint8]]) -> NDArray[np.float32]:
        if self.settings.keep == "bits":
            found: NDArray[np.float32] = prepared.scores(codes[self.plane])
            return found
        return super().score(prepared, codes)


class Staged(Both):
    """One sketch kept twice: ``bits`` signs of it to scan all examples by, ``numbers`` of it in int8 for the best of
    them. Sketched once, with what is learned kept once."""

    small: _Scheme
    large: _Scheme

    def __init__(self, shapes: Mapping[str, tuple[int, int]], bits: int, numbers: int, seed: int = 0) -> None:
        drawn = max(bits, numbers)
        super().__init__(
            _Scheme(shapes, Sketch(bits, "bits", seed=seed), drawn),
            _Scheme(shapes, Sketch(numbers, "int8", seed=seed), drawn),
        )

    def learn(self, gradients: Mapping[str, Tensor]) -> None:
        self.small.learn(gradients)
        self.large.learned = self.small.learned

    def encode(self, gradients: Mapping[str, Tensor]) -> dict[str, NDArray[np.uint8]]:
        own = self.small.drawing(gradients)
        return {s.plane: s.codec.encode(s.part(own)) for s in (self.small, self.large)}

    def tensors(self) -> dict[str, NDArray[Any]]:
        return self.small.tensors()

    def restore(self, tensors: Mapping[str, NDArray[Any]]) -> None:
        self.small.restore(tensors)
        self.large.learned = self.small.learned

    def prepare(self, gradients: Mapping[str, Tensor]) -> tuple[Any, Any]:
        own = self.small.drawing(gradients)
        return self.small.ready(self.small.part(own)), self.large.ready(self.large.part(own))
