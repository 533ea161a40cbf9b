"""How are one-bit codes scanned where they lie on an accelerator? As they are: a row's bytes become signs in registers.

A program takes 64 rows and all queries (up to 32). It reads 32 bytes of each row, makes of each bit a 16-bit -1 or 1
(a shift and two logical operations), and multiplies them with the queries on the tensor cores, one bit of each byte at
a time. So codes are read once, and nothing unpacked is ever written. Signs are exact in 16 bits; a query is not, and
goes in as two numbers of 16 bits, x ~ s (hi + lo / 2048), s a power of two for each layer: what is lost of it, at most
2^-24 of the layer's largest coordinate each, is ``error``. Sums are float32.

Layers may begin at any byte: chunks do not, so that reads stay aligned. A chunk in which two layers meet is taken once
for each, with nothing in the query where the other layer's bits are (and so for the scales at the start of a row).

Without a GPU it is tried in Triton's interpreter (TRITON_INTERPRET=1), which tells what it computes, not how fast.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # nobody asks for a scan then (scan.on_gpu); what lists all modules may still read this one
    triton = None

from ..errors import RunError
from .codes import side_by_side

if TYPE_CHECKING:
    from .codes import Signs

TILE = 64
"""Rows of a program."""
CHUNK = 32
"""Bytes of each of them that it takes at once."""
TOGETHER = 32
"""Queries that share one reading of the codes."""
PARTS = 2048.0
"""By how much the second number of a coordinate is larger than it counts."""


class TritonScan:
    """Queries, prepared to be held against sign bits on ``device``.

    ``error``: by how much a score can differ from ``codec.score`` beside float32 rounding, [query, layer], for examples
    whose scale is 1.
    """

    def __init__(self, codec: Signs, queries: Mapping[str, Tensor], device: torch.device) -> None:
        self.codec, self.device = codec, device
        flat = side_by_side(queries, codec.shapes).double().cpu()
        self.count = len(flat)
        self.together = max(8, 1 << (min(self.count, TOGETHER) - 1).bit_length())
        self.blocks = -(-self.count // self.together)
        first, stop, numbers, factors, error = [], [], [], [], []
        done = 0
        for x, (at, bits) in zip(torch.split(flat, [k for _, k in codec.spans], 1), codec.spans, strict=True):
            begin, end = (at // CHUNK, -(-(at + -(-bits // 8)) // CHUNK)) if bits else (0, 0)
            scale, hi, lo = _halves(x)
            both = torch.zeros(self.blocks * self.together, 8 * CHUNK * (end - begin), 2, dtype=torch.float16)
            start = 8 * (at - CHUNK * begin)
            both[: self.count, start : start + bits] = torch.stack([hi, lo], -1)
            # [block, chunk, bit, byte, query, half]
            both = both.view(self.blocks, self.together, end - begin, CHUNK, 8, 2).permute(0, 2, 4, 3, 1, 5)
            numbers.append(both)
            factor = torch.ones(self.blocks * self.together, 2, dtype=torch.float64)
            factor[: self.count] = scale
            factors.append((factor / torch.tensor([1, PARTS])).view(self.blocks, -1))
            error.append((x - scale * (hi.double() + lo.double() / PARTS)).abs().sum(1))
            # The chunk of a row that a layer begins with, less its place among all that are taken.
            first.append(begin - done)
            done += end - begin
            stop.append(done)
        self.error = torch.stack(error, 1).float().numpy()
        self._numbers = torch.cat(numbers, 1).contiguous().to(device)
        self._factors = torch.stack(factors, 1).float().contiguous().to(device)  # [block, layer, column]
        self._first, self._stop = (torch.tensor(x, dtype=torch.int32, device=device) for x in (first, stop))

    def scores(self, codes: Tensor) -> Tensor:
        """[query, example] of rows [example, stride] on the device; float32, there."""
        if codes.ndim != 2 or codes.shape[1] != self.codec.stride or codes.dtype != torch.uint8:
            found = f"{codes.dtype} codes of shape {tuple(codes.shape)}"
            raise RunError(f"scan rows of {self.codec.stride} bytes", found, f"uint8 [example, {self.codec.stride}]")
        codes = codes if codes.stride(1) == 1 else codes.contiguous()
        n = len(codes)
        out = torch.empty(self.blocks * self.together, n, device=self.device)
        if n:
            SCAN[(-(-n // TILE), self.blocks)](
                codes, self._numbers, self._factors, self._first, self._stop, out,
                n, codes.stride(0), self.codec.stride, len(self._first), self._numbers.shape[1],
                SCALED=self.codec.scaled, QUERIES=self.together, TILE=TILE, CHUNK=CHUNK,
            )  # fmt: skip
        return out[: self.count]


def _halves(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(s [query, 1], hi, lo [query, coordinate] in 16 bits) with x ~ s (hi + lo / PARTS)."""
    largest = x.abs().amax(1, keepdim=True) if x.shape[1] else x.new_zeros(len(x), 1)
    scale = torch.exp2(torch.frexp(largest).exponent.clamp(-126, 127).double())
    hi = (x / scale).half()
    lo = ((x / scale - hi.double()) * PARTS).half()
    return scale, hi, lo


def _scan(
    codes: tl.tensor, numbers: tl.tensor, factors: tl.tensor, first: tl.tensor, stop: tl.tensor, out: tl.tensor,
    n: tl.tensor, step: tl.tensor, stride: tl.tensor, layers: tl.tensor, chunks: tl.tensor,
    SCALED: tl.constexpr, QUERIES: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
) -> None:  # fmt: skip
    """Scores of TILE rows of ``codes`` [row, byte], ``step`` bytes apart, of which the first ``stride`` are a row's."""
    COLUMNS: tl.constexpr = 2 * QUERIES
    block = tl.program_id(1)
    rows = tl.program_id(0) * TILE + tl.arange(0, TILE)
    here = rows < n
    base = codes + rows.to(tl.int64) * step
    byte, column = tl.arange(0, CHUNK), tl.arange(0, COLUMNS)
    table = byte[:, None] * COLUMNS + column[None, :]
    total = tl.zeros((TILE, COLUMNS), tl.float32)
    chunk = 0
    for layer in range(layers):
        found = tl.zeros((TILE, COLUMNS), tl.float32)
        shift, end = tl.load(first + layer), tl.load(stop + layer)
        for c in range(chunk, end):
            at = (c + shift) * CHUNK + byte
            inside = here[:, None] & (at < stride)[None, :]
            x = tl.load(base[:, None] + at[None, :], mask=inside, other=0).to(tl.int16)
            line = numbers + (block * chunks + c).to(tl.int64) * (8 * CHUNK * COLUMNS)
            for bit in tl.static_range(8):
                # The bit at the place of the sign: of 1 where it is set, of -1 where it is not.
                signs = (((x << (15 - bit)) & -32768) ^ -17408).to(tl.float16, bitcast=True)
                found = tl.dot(signs, tl.load(line + bit * CHUNK * COLUMNS + table), found)
        chunk = end
        found *= tl.load(factors + (block * layers + layer) * COLUMNS + column)[None, :]
        if SCALED:
            low = tl.load(base + 2 * layer, mask=here, other=0).to(tl.int32)
            high = tl.load(base + 2 * layer + 1, mask=here, other=0).to(tl.int32)
            found *= ((low | (high << 8)) << 16).to(tl.float32, bitcast=True)[:, None]
        total += found
    scores = tl.sum(tl.reshape(total, (TILE, QUERIES, 2)), 2)
    query = block * QUERIES + tl.arange(0, QUERIES)
    tl.store(out + query[None, :].to(tl.int64) * n + rows[:, None], scores, mask=here[:, None])


SCAN: Any = triton and triton.jit(_scan)
