"""Two-sided random projection of a layer's gradient: the matrix G [out, in] becomes P_out' G P_in, d_out x d_in.

Entries are +-1/sqrt(d) (Rademacher), so that inner products are kept in expectation. A side that is not larger than
its target stays as it is. Nothing is stored: a projection is its size and its seed.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from .randomness import torch_stream


@dataclass(frozen=True)
class Projection:
    """``size``: numbers per side; ``sizes``: other ones for some layers, (out, in) by layer name."""

    size: int = 16
    seed: int = 0
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)

    def target(self, layer: str, out: int, inp: int) -> tuple[int, int]:
        """What a gradient of [out, in] becomes."""
        want = self.sizes.get(layer, (self.size, self.size))
        return min(out, want[0]), min(inp, want[1])

    def side(self, layer: str, which: str, full: int, kept: int) -> Tensor | None:
        """[full, kept] of one side, "out" or "in"; None where the side stays as it is."""
        if kept >= full:
            return None
        g = torch_stream("projection", self.seed, layer, which)
        signs = torch.randint(0, 2, (full, kept), generator=g, dtype=torch.int8)
        side: Tensor = (signs.float() * 2 - 1) / kept**0.5
        return side

    def record(self) -> dict[str, Any]:
        """For an index's manifest."""
        return asdict(self)


@dataclass(frozen=True)
class EigenProjection:
    """Two-sided projection onto the leading eigenvectors of what goes into a layer and of what comes back to it
    (K-FAC's factors A and S), learned from examples; layers without such factors are projected at random."""

    size: int = 16
    seed: int = 0
    bases: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """layer -> (Q_S [out, d_out], Q_A [in, d_in]), columns by falling eigenvalue."""

    def target(self, layer: str, out: int, inp: int) -> tuple[int, int]:
        """What a gradient of [out, in] becomes."""
        return min(out, self.size), min(inp, self.size)

    def side(self, layer: str, which: str, full: int, kept: int) -> Tensor | None:
        """[full, kept] of one side, "out" or "in"; None where the side stays as it is."""
        if layer not in self.bases:
            return Projection(self.size, self.seed).side(layer, which, full, kept)
        if kept >= full:
            return None
        return self.bases[layer][which == "in"][:, :kept]

    def record(self) -> dict[str, Any]:
        """For an index's manifest; the bases themselves are among its tensors."""
        return {"size": self.size, "seed": self.seed, "eigen": sorted(self.bases)}


def subsampled_hadamard(rows: Tensor, size: int | None, *names: object) -> Tensor:
    """P' g of rows [example, parameter] for gradients that are one vector: random signs, a Hadamard transform, ``size``
    of its numbers. None: as they are."""
    from scipy.linalg import hadamard

    n, full = rows.shape
    if size is None or size >= full:
        return rows
    g = torch_stream(*names)
    width = 1 << (full - 1).bit_length()
    x = rows * (torch.randint(0, 2, (full,), generator=g, dtype=torch.int8) * 2 - 1)
    kept = torch.randperm(width, generator=g)[:size]
    x = torch.nn.functional.pad(x, (0, width - full))
    left = width
    while left > 1:
        # One factor of the transform on the last axis, which then becomes the first: at the end all are in their place.
        factor = min(left, 64)
        left //= factor
        x = (x.view(n, -1, factor) @ torch.tensor(hadamard(factor), dtype=x.dtype)).transpose(1, 2).reshape(n, width)
    projected: Tensor = x[:, kept] / size**0.5
    return projected
