"""What methods keep of gradients, as far as they are alike: rows of one codec, and tensors that were learned of them.

:class:`Rows` learns nothing and scores by inner products. A method overrides what differs: ``features`` (what is kept
of an example), ``learn`` (from a sample), ``finish`` (from all rows), ``prepare`` (the query's side). What it sets in
``learned`` goes to other processes as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import RunError
from .codes import Numbers
from .curvature import Moments

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .influence import Shelf

    Codes = NDArray[np.uint8]

BLOCK = 4096
"""Rows that are read at once to learn of them."""
LARGEST = 8192
"""Numbers of a feature; its kernel has as many each way."""


class Rows:
    """A :class:`~whence.engine.influence.Scheme` of one plane, named ``plane``, in the form of ``codec``."""

    plane = "gradients"
    sample = 0

    def __init__(self, codec: Any) -> None:
        self.codec = codec
        self.learned: dict[str, Tensor] = {}

    @property
    def planes(self) -> dict[str, int]:
        return {self.plane: self.codec.stride}

    @property
    def damping(self) -> dict[str, float]:
        """Block -> lambda, where a method learns one."""
        return {k.removeprefix("damping/"): float(v) for k, v in self.learned.items() if k.startswith("damping/")}

    def keep(self, block: str, **found: Tensor | float) -> None:
        """Take over what was learned of a block: kind=value."""
        for kind, value in found.items():
            tensor = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
            self.learned[f"{kind}/{block}"] = tensor.contiguous()

    def features(self, gradients: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What the codec keeps of examples with these gradients."""
        return gradients

    def learn(self, gradients: Mapping[str, Tensor]) -> None:
        """Nothing is wanted of a sample."""

    def encode(self, gradients: Mapping[str, Tensor]) -> dict[str, Codes]:
        return {self.plane: self.codec.encode(self.features(gradients))}

    def finish(self, shelf: Shelf) -> None:
        """Nothing is learned of the rows."""

    def tensors(self) -> dict[str, NDArray[Any]]:
        return {name: x.numpy() for name, x in self.learned.items()}

    def restore(self, tensors: Mapping[str, NDArray[Any]]) -> None:
        self.learned |= {name: torch.from_numpy(np.array(x)) for name, x in tensors.items()}

    def prepare(self, gradients: Mapping[str, Tensor]) -> Any:
        return self.features(gradients)

    def score(self, prepared: Any, codes: Mapping[str, Codes]) -> NDArray[np.float32]:
        found: NDArray[np.float32] = self.codec.score(prepared, codes[self.plane])
        return found

    def moments(self, shelf: Shelf) -> Moments:
        """Second moments of the rows as they are kept."""
        found = Moments()
        for _, codes in shelf.blocks(self.plane, rows=BLOCK):
            found.add(self.codec.decode(codes))
        return found


class Kernel(Rows):
    """Features phi of blocks (models, say), ``widths``[block] numbers each, and the kernel (Phi' Phi + lambda I)^-1 of
    each: a query is phi(q)' times it, divided by the number of blocks. ``share``: lambda as a share of the mean of the
    min(k, N) eigenvalues that there can be; None: by held-out likelihood. Raises RunError where k is beyond LARGEST."""

    plane = "features"

    def __init__(self, widths: Mapping[str, int], share: float | None) -> None:
        if max(widths.values()) > LARGEST:
            found = f"{max(widths.values()):,} numbers, and a kernel of as many each way"
            raise RunError("features of this size", found, f"size= of {LARGEST:,} or less")
        super().__init__(Numbers({block: (k,) for block, k in widths.items()}, "float16"))
        self.share = share

    def finish(self, shelf: Shelf) -> None:
        """The kernels, of the rows as they are kept."""
        moments = self.moments(shelf)
        chosen = moments.damping() if self.share is None else {}
        for block, (values, vectors) in moments.eigen().items():
            mean = float(values.sum()) / min(len(values), moments.seen)
            damping = chosen[block] if self.share is None else self.share * mean
            # Moments are means over the examples, Phi' Phi is a sum. What is never seen and not damped counts nothing.
            scale = moments.seen * (values + damping)
            inverse = torch.where(scale > 1e-12 * scale[0], 1 / scale, torch.zeros_like(scale))
            self.keep(block, inverse=(vectors * inverse @ vectors.T).float(), damping=damping)

    def prepare(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        n = len(self.codec.shapes)
        return {m: phi @ self.learned[f"inverse/{m}"] / n for m, phi in self.features(gradients).items()}
