"""In how few bytes can an example's gradient be kept so that it can still be scored?

A codec turns the numbers of one example (layer -> its coordinates) into one row of ``stride`` bytes. All codecs obey
one law, which is all that a score means here:

    score(q, encode(x)) = sum over layers of <q, decode(encode(x))>        (up to float32 rounding)

* :class:`Signs`: one bit per coordinate, one scale per layer. x ~ a sign(x) with a = mean |x|, the least squares fit.
  All of an index is scored with it (``scan.py`` does that at the speed of memory).
* :class:`Numbers`: int8, x ~ a c with a = max |x| / 127, or float16 with a = max |x|. For scoring the best few per
  cent again.
* :class:`Factors`: a gradient matrix G [out, in] as U V' of rank c in bfloat16 (LoRIF). A query is a matrix M, already
  preconditioned, and the score is sum_c u_c' M v_c: c times out times in multiplications, however fine the curvature.

Scales are bfloat16, not float16, for gradients of 1e-9 as of 1e9. Scoring is decoding in blocks that fit the cache and
a float32 matrix product, on the device of the queries: on an AVX2 CPU the fastest that torch has for int8 rows (one
thread, 1 and 10 queries: 2.0 and 1.2 GB/s; with bfloat16 products 1.0 and 0.1, with int8 ones 0.1 and 0.1). A score
does not depend on the rows beside it, in no bit; on the number of torch's threads it does in the last ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding

from ..errors import RunError
from .randomness import torch_stream

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Rows = NDArray[np.uint8]
    Scores = NDArray[np.float32]

Shapes = Mapping[str, tuple[int, ...]]
"""layer -> shape of one example's numbers."""
KINDS = {"int8": torch.int8, "float16": torch.float16}
BLOCK = 512
"""Rows decoded at once on a CPU: 2,048 coordinates of them take 4 MB."""
WIDE = 8192
"""Rows decoded at once on an accelerator."""


class Codec(Protocol):
    """A way to keep examples in rows of bytes."""

    @property
    def shapes(self) -> Shapes: ...

    @property
    def stride(self) -> int:
        """Bytes per example."""
        ...

    def encode(self, gradients: Mapping[str, Tensor]) -> Rows:
        """layer -> [example, ...] to rows [example, stride]. Raises RunError for layers, shapes or numbers that do not
        fit, a NaN among them."""
        ...

    def decode(self, codes: Rows | Tensor) -> dict[str, Tensor]:
        """What is left of them, layer -> float32 [example, ...]."""
        ...

    def score(self, queries: Mapping[str, Tensor], codes: Rows | Tensor) -> Scores:
        """[query, example], for queries layer -> [query, ...]."""
        ...


@dataclass(frozen=True)
class Signs:
    """One bit per coordinate; ``scaled``: with a scale for each layer and example, two bytes each. Every layer starts a
    new byte; many small layers are better put together by the caller, one scale and one row of bits for them all."""

    shapes: Shapes
    scaled: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "shapes", in_order(self.shapes))

    @property
    def head(self) -> int:
        """Bytes of scales at the start of a row."""
        return 2 * len(self.shapes) * self.scaled

    @property
    def spans(self) -> list[tuple[int, int]]:
        """(first byte in a row, bits) of each layer."""
        sizes = widths(self.shapes)
        return [(self.head + sum(-(-k // 8) for k in sizes[:i]), k) for i, k in enumerate(sizes)]

    @property
    def stride(self) -> int:
        return self.head + sum(-(-k // 8) for k in widths(self.shapes))

    def encode(self, gradients: Mapping[str, Tensor]) -> Rows:
        parts = layers_of(gradients, self.shapes)
        scales = [x.abs().mean(1) if x.shape[1] else x.new_zeros(len(x)) for x in parts]
        return np.concatenate([*_head(scales if self.scaled else []), *map(pack_signs, parts)], 1)

    def flat(self, codes: Tensor) -> Tensor:
        """float32 [example, coordinates of all layers]."""
        signs = unpack_signs(codes[:, self.head :])
        if any(k % 8 for _, k in self.spans):  # bits that fill up a layer's last byte
            signs = torch.cat([signs[:, 8 * (at - self.head) :][:, :k] for at, k in self.spans], 1)
        return _scaled(signs, codes[:, : self.head], self.shapes) if self.scaled else signs

    def decode(self, codes: Rows | Tensor) -> dict[str, Tensor]:
        return _split(self.flat(_tensor(codes, self.stride)), self.shapes)

    def score(self, queries: Mapping[str, Tensor], codes: Rows | Tensor) -> Scores:
        return _products(self, queries, codes)


@dataclass(frozen=True)
class Numbers:
    """``kind`` "int8" or "float16", with a scale for each layer and example."""

    shapes: Shapes
    kind: str = "int8"

    def __post_init__(self) -> None:
        object.__setattr__(self, "shapes", in_order(self.shapes))
        if self.kind not in KINDS:
            raise RunError(f"numbers kept as {self.kind!r}", "no such kind", ", ".join(KINDS))

    @property
    def head(self) -> int:
        """Bytes of scales at the start of a row."""
        return 2 * len(self.shapes)

    @property
    def stride(self) -> int:
        return self.head + KINDS[self.kind].itemsize * sum(widths(self.shapes))

    def encode(self, gradients: Mapping[str, Tensor]) -> Rows:
        parts = layers_of(gradients, self.shapes)
        full = 127 if self.kind == "int8" else 1
        # Divided by the scale as it will be read, so that its own rounding is no further error.
        scales = [(_largest(x) / full).bfloat16().float() for x in parts]
        tiny = torch.finfo(torch.float32).tiny
        units = torch.cat([x / s.clamp_min(tiny)[:, None] for x, s in zip(parts, scales, strict=True)], 1)
        if self.kind == "int8":
            units = units.round().clamp(-full, full)
        return np.concatenate([*_head(scales), units.to(KINDS[self.kind]).numpy().view(np.uint8)], 1)

    def flat(self, codes: Tensor) -> Tensor:
        """float32 [example, coordinates of all layers]."""
        return _scaled(_as(codes[:, self.head :], KINDS[self.kind]), codes[:, : self.head], self.shapes)

    def decode(self, codes: Rows | Tensor) -> dict[str, Tensor]:
        return _split(self.flat(_tensor(codes, self.stride)), self.shapes)

    def score(self, queries: Mapping[str, Tensor], codes: Rows | Tensor) -> Scores:
        return _products(self, queries, codes)


@dataclass(frozen=True)
class Factors:
    """Rank ``rank`` factors of matrices [out, in]: u [out, c] with the singular values in it, v [in, c], bfloat16."""

    shapes: Shapes
    rank: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "shapes", in_order(self.shapes))
        if self.rank < 1 or any(len(shape) != 2 for shape in self.shapes.values()):
            raise RunError(
                f"rank-{self.rank} factors of {self.shapes}", "no matrices, or no rank", "[out, in] of each layer"
            )

    @property
    def _spans(self) -> dict[str, tuple[int, int, int, int]]:
        """layer -> (first number in a row, out, in, rank)."""
        found, at = {}, 0
        for name, (o, i) in self.shapes.items():
            c = min(self.rank, o, i)
            found[name] = (at, o, i, c)
            at += c * (o + i)
        return found

    @property
    def stride(self) -> int:
        return 2 * sum(c * (o + i) for _, o, i, c in self._spans.values())

    def encode(self, gradients: Mapping[str, Tensor]) -> Rows:
        parts = layers_of(gradients, self.shapes)
        rows = []
        for x, (_, o, i, c) in zip(parts, self._spans.values(), strict=True):
            rows += [f.flatten(1).bfloat16() for f in factors(x.view(-1, o, i), c)]
        return torch.cat(rows, 1).view(torch.uint8).numpy()

    def factors(self, codes: Rows | Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """layer -> (u [example, out, c], v [example, in, c])."""
        numbers = _as(_tensor(codes, self.stride), torch.bfloat16)
        return {
            name: (
                numbers[:, at : at + o * c].view(-1, o, c),
                numbers[:, at + o * c : at + (o + i) * c].view(-1, i, c),
            )
            for name, (at, o, i, c) in self._spans.items()
        }

    def decode(self, codes: Rows | Tensor) -> dict[str, Tensor]:
        return {name: u @ v.mT for name, (u, v) in self.factors(codes).items()}

    def score(self, queries: Mapping[str, Tensor], codes: Rows | Tensor) -> Scores:
        flat = side_by_side(queries, self.shapes)
        matrices = _split(flat, self.shapes)

        def block(rows: Tensor) -> Tensor:
            found = flat.new_zeros(len(flat), len(rows))
            for name, (u, v) in self.factors(rows).items():
                c = v.shape[2]
                mapped = matrices[name].flatten(0, 1) @ v.mT.flatten(0, 1).T  # [query x out, row x c]
                found += (mapped.view(len(flat), -1, len(rows), c) * u.transpose(0, 1)).sum((1, 3))
            return found

        return _scores(len(flat), codes, self.stride, flat.device, block)


def factors(matrices: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """u [n, out, c] and v [n, in, c] with u v' near each matrix [n, out, in]: block power iteration, 8 rounds for one
    component and 16 for more, as LoRIF has it. The columns of v are orthonormal, so u = G v is the best for this v."""
    scale = matrices.abs().amax((1, 2), keepdim=True)
    g = torch.where(scale > 0, matrices / scale, matrices)  # G' G of small numbers would be nothing
    start = torch.randn(g.shape[2], rank, generator=torch_stream("factors", g.shape[2], rank)).to(g)
    v = torch.linalg.qr(start.expand(len(g), -1, -1))[0]
    for _ in range(8 if rank == 1 else 16):
        v = torch.linalg.qr(g.mT @ (g @ v))[0]
    return g @ v * scale, v


def pack_signs(x: Tensor) -> Rows:
    """x [n, k] to its sign bits [n, ceil(k / 8)], the first coordinate in the lowest bit; 1 where x >= 0."""
    return np.packbits((x >= 0).numpy(), axis=1, bitorder="little")


def unpack_signs(codes: Tensor) -> Tensor:
    """-1 and 1 [n, 8 x byte] of sign bits."""
    every = torch.arange(256, device=codes.device)[:, None] >> torch.arange(8, device=codes.device) & 1
    return embedding(codes.int(), every.float() * 2 - 1).flatten(1)


def in_order(shapes: Mapping[str, Sequence[int]]) -> Shapes:
    """By name: a row means the same whatever order the layers were named in, and after a journey through JSON."""
    return {name: tuple(shapes[name]) for name in sorted(shapes)}


def widths(shapes: Shapes) -> list[int]:
    """Coordinates of each layer."""
    return [math.prod(shape) for shape in shapes.values()]


def layers_of(gradients: Mapping[str, Tensor], shapes: Shapes) -> list[Tensor]:
    """Each layer's numbers [n, coordinate] in the codec's order, float32 on the CPU. Raises RunError."""
    flat = side_by_side(gradients, shapes).cpu()
    bad = (~torch.isfinite(flat)).any(1).nonzero()[:, 0].tolist()
    if bad:
        named = ", ".join(map(str, bad[:10])) + (" ..." if len(bad) > 10 else "")
        raise RunError(
            f"keep gradients of {len(flat)} examples", f"NaN or infinite numbers in rows {named}", "finite numbers"
        )
    return list(torch.split(flat, widths(shapes), 1))


def side_by_side(gradients: Mapping[str, Tensor], shapes: Shapes) -> Tensor:
    """float32 [n, coordinates of all layers]. Raises RunError for other layers or shapes."""
    found = {name: tuple(g.shape) for name, g in gradients.items()}
    if {name: shape[1:] for name, shape in found.items()} != shapes or len({s[0] for s in found.values()}) != 1:
        raise RunError(
            "codes of gradients", f"shapes {found}", f"[example, ...] of {shapes}, as many examples in each layer"
        )
    return torch.cat([gradients[name].detach().flatten(1).float() for name in shapes], 1)


def _split(flat: Tensor, shapes: Shapes) -> dict[str, Tensor]:
    parts = torch.split(flat, widths(shapes), 1)
    return {name: p.reshape(len(p), *shape) for (name, shape), p in zip(shapes.items(), parts, strict=True)}


def _largest(x: Tensor) -> Tensor:
    return x.abs().amax(1) if x.shape[1] else x.new_zeros(len(x))


def _head(scales: list[Tensor]) -> Iterator[Rows]:
    """Scales [n] of each layer as bfloat16 bytes."""
    for scale in scales:
        yield scale.bfloat16()[:, None].view(torch.uint8).numpy()


def _scaled(units: Tensor, head: Tensor, shapes: Shapes) -> Tensor:
    """Each layer's coordinates times its scale, in place."""
    for part, scale in zip(torch.split(units, widths(shapes), 1), _as(head, torch.bfloat16).T, strict=True):
        part *= scale[:, None]
    return units


def _as(codes: Tensor, kind: torch.dtype) -> Tensor:
    """Bytes [n, width] as numbers of that kind, in float32."""
    if kind.itemsize > 1:  # a copy: torch reads wider numbers only where they are aligned
        n, width = codes.shape
        return (
            codes.clone(memory_format=torch.contiguous_format)
            .flatten()
            .view(kind)
            .float()
            .view(n, width // kind.itemsize)
        )
    return codes.view(kind).float()


def _tensor(codes: Rows | Tensor, stride: int, device: torch.device | None = None) -> Tensor:
    if codes.ndim != 2 or codes.shape[1] != stride:
        raise RunError(f"read rows of {stride} bytes", f"codes of shape {tuple(codes.shape)}", f"[example, {stride}]")
    # torch wants memory that it could write to; a memory-mapped block is not, and is copied.
    found = codes if isinstance(codes, Tensor) else torch.from_numpy(np.require(codes, np.uint8, ["C", "W"]))
    return found.to(device) if device else found


def _products(codec: Signs | Numbers, queries: Mapping[str, Tensor], codes: Rows | Tensor) -> Scores:
    q = side_by_side(queries, codec.shapes)
    return _scores(len(q), codes, codec.stride, q.device, lambda block: q @ codec.flat(block).T)


def _scores(
    queries: int, codes: Rows | Tensor, stride: int, device: torch.device, block: Callable[[Tensor], Tensor]
) -> Scores:
    """``block`` over all rows, a few at a time. Always as many: products of one shape add up in one order, so that a
    row's score does not depend on the rows beside it."""
    found = np.empty((queries, len(codes)), np.float32)
    many = BLOCK if device.type == "cpu" else WIDE
    for at in range(0, max(len(codes), 1), many):
        rows = _tensor(codes[at : at + many], stride, device)
        n = len(rows)
        if n < many:
            rows = torch.cat([rows, rows.new_zeros(many - n, stride)])
        found[:, at : at + n] = block(rows)[:, :n].cpu().numpy()
    return found
