"""Two-sided random projection of a layer's gradient: the matrix G [out, in] becomes P_out' G P_in, d_out x d_in.

Entries are +-1/sqrt(d) (Rademacher), so that inner products are kept in expectation. A side that is not larger than
its target stays as it is. Nothing is stored: a projection is its size and its seed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import lru_cache
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


@dataclass(frozen=True)
class Eigenbasis:
    """Gradients in the leading part of each layer's eigenbasis, where coordinates are to be whitened one by one: sides
    that are kept whole are turned, too. Embedding tables are whitened word by word: they stay as they are, or each row
    is divided by its root mean square before rows are put together at random, as rare words would drown among frequent
    ones. Layers without ``bases`` stay whole where that is small (norms) and are projected at random where not."""

    size: int
    seed: int = 0
    bases: dict[str, tuple[Tensor, Tensor] | None] = field(default_factory=dict)
    """layer -> (P_out [out, d_out], P_in [in, d_in]); None: the layer as it is."""

    def target(self, layer: str, out: int, inp: int) -> tuple[int, int]:
        """What a gradient of [out, in] becomes."""
        if layer in self.bases:
            sides = self.bases[layer]
            return (sides[0].shape[1], sides[1].shape[1]) if sides else (out, inp)
        return (out, inp) if out * inp <= self.size**2 else (min(out, self.size), min(inp, self.size))

    def side(self, layer: str, which: str, full: int, kept: int) -> Tensor | None:
        """[full, kept] of one side, "out" or "in"; None where the side stays as it is."""
        if layer in self.bases:
            sides = self.bases[layer]
            return sides[which == "in"] if sides else None
        return Projection(self.size, self.seed).side(layer, which, full, kept)

    def record(self) -> dict[str, Any]:
        """For an index's manifest; the bases themselves are among its tensors."""
        return {"size": self.size, "seed": self.seed, "eigen": sorted(self.bases)}


TABLE = 1 << 24
"""Numbers of the matrix that adds up a table's rows, at most."""
MOST = 1 << 18
"""Coordinates of an example's gradient at most, over all layers, where a size is chosen."""


def largest(shapes: Iterable[tuple[int, int]], tables: Iterable[tuple[int, int]] = ()) -> tuple[int, int]:
    """(numbers per side, rows of embedding tables) at which gradients of layers of these shapes, and of these
    ``tables``, have at most :data:`MOST` coordinates. What layers leave goes to the tables.

    >>> largest([(768, 768)] * 12), largest([(128, 128)] * 4, [(3072, 128)])
    ((128, 128), (1024, 1024))
    """
    sides, wide = list(shapes), list(tables)

    def total(size: int, rows: int) -> int:
        of_tables = sum(o * i if o <= rows else rows * min(i, size) for o, i in wide)
        return of_tables + sum(min(o, size) * min(i, size) for o, i in sides)

    sizes = [1 << e for e in range(10, 2, -1)]
    size = next((s for s in sizes if total(s, s) <= MOST), sizes[-1])
    rows, longest = size, max((o for o, _ in wide), default=0)
    while rows < longest and total(size, 2 * rows) <= MOST and 2 * rows * longest <= TABLE:
        rows *= 2
    return size, rows


def subsampled_hadamard(rows: Tensor, size: int | None, *names: object) -> Tensor:
    """P' g of rows [example, parameter] for gradients that are one vector: :func:`mixed`. None, or as many as there
    are: as they are."""
    return rows if size is None or size >= rows.shape[1] else mixed(rows, size, *names)


def mixed(rows: Tensor, size: int, *names: object) -> Tensor:
    """``size`` numbers of each row [example, coordinate], every one a sum of all coordinates: random signs, a Hadamard
    transform, so many of its numbers. Rows are made wider where more numbers are asked for than they have."""
    from scipy.linalg import hadamard

    n, full = rows.shape
    signs, kept = _draw(full, size, names)
    width = 1 << (max(full, size) - 1).bit_length()
    x = torch.nn.functional.pad(rows * signs.to(rows), (0, width - full))
    left = width
    while left > 1:
        # One factor of the transform on the last axis, which then becomes the first: at the end all are in their place.
        factor = min(left, 64)
        left //= factor
        x = (x.view(n, -1, factor) @ torch.tensor(hadamard(factor), dtype=x.dtype)).transpose(1, 2).reshape(n, width)
    projected: Tensor = x[:, kept] / size**0.5
    return projected


@lru_cache(maxsize=4)
def _draw(full: int, size: int, names: tuple[object, ...]) -> tuple[Tensor, Tensor]:
    """(signs [coordinate], which numbers are kept): drawn once for all rows, which come by the batch."""
    g = torch_stream(*names)
    width = 1 << (max(full, size) - 1).bit_length()
    signs = torch.randint(0, 2, (full,), generator=g, dtype=torch.int8) * 2 - 1
    return signs, torch.randperm(width, generator=g)[:size]


def folded(rows: Tensor, width: int, *names: object) -> Tensor:
    """Rows [example, coordinate] in ``width`` places: pieces of that width, each with random signs and turned round by
    a random number of places, are added up. Inner products are kept in expectation, at the cost of one addition for
    each coordinate; narrow rows stay as they are."""
    n, full = rows.shape
    if full <= width:
        return rows
    signs, turns = _folds(full, width, names)
    found = rows.new_zeros(n, width)
    for at, turn in zip(range(0, full, width), turns, strict=True):
        piece = rows[:, at : at + width] * signs[at : at + width].to(rows)
        there = min(width - turn, piece.shape[1])  # what does not reach round the end
        found[:, turn : turn + there] += piece[:, :there]
        found[:, : piece.shape[1] - there] += piece[:, there:]
    return found


@lru_cache(maxsize=4)
def _folds(full: int, width: int, names: tuple[object, ...]) -> tuple[Tensor, tuple[int, ...]]:
    """(signs [coordinate], by how many places each piece is turned)."""
    g = torch_stream("fold", *names)
    signs = torch.randint(0, 2, (full,), generator=g, dtype=torch.int8) * 2 - 1
    return signs, tuple(torch.randint(0, width, (-(-full // width),), generator=g).tolist())
