"""How are a million one-bit codes held against a query at the speed of memory?

The rows of an index lie one example after the other. The kernel takes 32 rows at once and 16 bytes of each; a
transposition in registers puts the same byte of the 32 examples side by side; one instruction (pshufb) then looks up a
nibble of each of them in a table of 16 numbers: the query's four coordinates summed with the signs that the nibble
says. Two lookups and three additions per byte and query. (FAISS's "fast scan" stores its codes transposed already; here
a row stays a row, so that a store can append and delete, and the transposition is shared by the queries.)

A table's numbers are 8-bit, small enough that four of them add up in a byte: T ~ base + step n. The sum of a layer is
exact in integers, so a score depends on nothing but its own row, whatever the blocks and the threads, and its distance
from the score of the unquantised query is at most half a step per lookup (``Scan.error``; typically a fiftieth of the
scores' spread, where taking signs alone has cost over half of it). The other way, RaBitQ's, counts the bits that a
code shares with binary planes of the query in 64-bit words: four planes took 2.5 times as long here and erred six
times more.

The kernel is compiled when it is first needed (llvmlite, a fraction of a second). Where there is no llvmlite or no
AVX2, and where the codes lie on an accelerator, the same scores come from a matrix product, unquantised.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import RunError
from .codes import Signs, side_by_side

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .codes import Rows, Scores

TILE = 32
"""Examples that the kernel takes at once."""
CHUNK = 16
"""Bytes of each of them that it takes at once: 32 lookups."""
LONGEST = 32
"""Chunks that are added up in 16 bits: 32 x 8 sums of at most 255."""
TOGETHER = 5
"""Queries that share one transposition: with more, the sums do not fit the registers."""
SMALL = 8192
"""Rows that are not worth a second thread."""


class Scan:
    """Queries, prepared to be held against any number of rows of sign bits.

    ``error``: by how much a score can differ from ``codec.score``, [query, layer], for examples whose scale is 1 (all
    zero where the scan is exact). ``compiled``: whether the kernel is used.
    """

    def __init__(self, codec: Signs, queries: Mapping[str, Tensor]) -> None:
        self.codec, self.queries = codec, dict(queries)
        flat = side_by_side(queries, codec.shapes)
        bad = (~torch.isfinite(flat)).any(1).nonzero()[:, 0].tolist()
        if bad:
            raise RunError(f"scan for query {bad[0]}", "NaN or infinite coordinates", "finite numbers")
        self.compiled = flat.device.type == "cpu" and flat.numel() > 0 and target() is not None
        self.error = np.zeros((len(flat), len(codec.shapes)), np.float32)
        if self.compiled:
            self._tables, self.error = _tables(flat.double().numpy(), codec)

    def scores(self, codes: Rows | Tensor) -> Scores:
        """[query, example] of rows [example, stride]."""
        if not self.compiled or (isinstance(codes, Tensor) and codes.device.type != "cpu"):
            return self.codec.score(self.queries, codes)
        rows = np.ascontiguousarray(codes.numpy() if isinstance(codes, Tensor) else codes)
        if rows.ndim != 2 or rows.shape[1] != self.codec.stride or rows.dtype != np.uint8:
            found = f"{rows.dtype} codes of shape {rows.shape}"
            raise RunError(f"scan rows of {self.codec.stride} bytes", found, f"uint8 [example, {self.codec.stride}]")
        n = len(rows)
        blocks, together = self._tables.steps.shape[::2]
        out = np.empty((blocks * together, -(-n // TILE) * TILE), np.float32)
        # The kernel reads up to a chunk past the start of a row's last byte: rows without as many bytes behind them are
        # scanned in a copy that has room.
        whole = max(n - -(-CHUNK // rows.shape[1]), 0) // TILE
        threads = torch.get_num_threads() if n > SMALL else 1
        bounds = [whole * i // threads for i in range(threads + 1)]
        if threads == 1:
            self._run(rows, 0, whole, out)
        else:
            pool = _pool(threads, os.getpid())
            list(pool.map(lambda start, stop: self._run(rows, start, stop, out), bounds[:-1], bounds[1:]))
        rest = np.zeros((2 * TILE + CHUNK, rows.shape[1]), np.uint8)
        rest[: n - whole * TILE] = rows[whole * TILE :]
        self._run(rest, 0, -(-n // TILE) - whole, out[:, whole * TILE :])
        return out[: len(self.error), :n]

    def _run(self, rows: Rows, start: int, stop: int, out: Scores) -> None:
        """Scan tiles ``start`` to ``stop``."""
        t = self._tables
        heads = -(-self.codec.head // CHUNK)
        scales = np.zeros((max(heads, 1) * CHUNK, TILE), np.uint8)
        scales[:2] = [[0x80], [0x3F]]  # 1 in bfloat16, for rows without scales
        arrays = (rows, t.numbers, t.steps, t.bases, t.ends, t.groups, t.offsets, scales, out)
        kernel(self.codec.stride, heads, t.steps.shape[2])(
            *(a.ctypes.data for a in arrays),
            start, stop, len(t.steps), len(t.ends), len(t.offsets), out.strides[0] // 4,
        )  # fmt: skip


@cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Threads of this process: those of a parent do not live on in a fork."""
    return ThreadPoolExecutor(threads)


@dataclass(frozen=True)
class _Tables:
    """What the kernel looks up. A segment is a run of chunks of one layer.

    ``numbers`` [block, chunk, query, 2 x byte, nibble]; ``steps`` and ``bases`` [block, segment, query]; ``ends``
    [segment]: chunks up to its end; ``groups`` [segment]: the layer's place among the scales; ``offsets`` [chunk]:
    first byte in a row. A block is of queries that are looked up together; the last is filled up with zeros.
    """

    numbers: NDArray[np.uint8]
    steps: NDArray[np.float32]
    bases: NDArray[np.float32]
    ends: NDArray[np.int64]
    groups: NDArray[np.int64]
    offsets: NDArray[np.int64]


def _tables(flat: NDArray[np.float64], codec: Signs) -> tuple[_Tables, NDArray[np.float32]]:
    """Tables of queries [query, coordinates of all layers], and their error [query, layer]."""
    signs = 2.0 * (np.arange(16)[:, None] >> np.arange(4) & 1) - 1  # [nibble, coordinate]
    count = len(flat)
    blocks = -(-count // TOGETHER)
    together = -(-count // blocks)
    queries = blocks * together
    numbers, steps, bases, ends, groups, offsets = [], [], [], [], [], []
    error = np.zeros((queries, len(codec.spans)), np.float32)
    parts = np.split(flat, np.cumsum([bits for _, bits in codec.spans])[:-1], 1)
    for group, (x, (at, bits)) in enumerate(zip(parts, codec.spans, strict=True)):
        chunks = -(-bits // (8 * CHUNK))
        # Coordinates past the layer's end are 0: the neighbour's bits, read along, add nothing.
        padded = np.zeros((queries, chunks * CHUNK * 2, 4))
        padded.reshape(queries, -1)[:count, :bits] = x
        for start in range(0, chunks, LONGEST):
            stop = min(start + LONGEST, chunks)
            nibbles = padded[:, 2 * CHUNK * start : 2 * CHUNK * stop]
            reach = np.abs(nibbles).sum(-1)
            # Four lookups are added in a byte: their largest numbers, each rounded, must stay below 256.
            step = 2 * reach.reshape(queries, -1, 4).sum(-1).max(-1) / 253
            step = np.where(step > 0, step, 1)
            n = np.rint((nibbles @ signs.T + reach[..., None]) / step[:, None, None])
            numbers.append(n.astype(np.uint8).reshape(blocks, together, stop - start, 2 * CHUNK, 16))
            steps.append(step.reshape(blocks, together))
            bases.append(-reach.sum(-1).reshape(blocks, together))
            error[:, group] += step / 2 * (reach > 0).sum(-1)
            groups.append(group if codec.scaled else 0)
            offsets += [at + CHUNK * i for i in range(start, stop)]
            ends.append(len(offsets))
    tables = _Tables(
        np.concatenate(numbers, 2).swapaxes(1, 2).copy(),
        np.stack(steps, 1).astype(np.float32), np.stack(bases, 1).astype(np.float32),
        np.array(ends), np.array(groups), np.array(offsets),
    )  # fmt: skip
    return tables, error[:count]


# -- the kernel ---------------------------------------------------------------------------------------------------


@cache
def target() -> Any:
    """The machine to compile for; None where the kernel cannot run."""
    try:
        from llvmlite import binding  # type: ignore[import-untyped]
    except ImportError:
        return None
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    features = binding.get_host_cpu_features()
    if not features.get("avx2"):
        return None
    return binding.Target.from_default_triple().create_target_machine(
        cpu=binding.get_host_cpu_name(), features=features.flatten(), opt=3
    )


@cache
def kernel(stride: int, heads: int, queries: int) -> Callable[..., None]:
    """The compiled kernel for rows of ``stride`` bytes with ``heads`` chunks of scales, ``queries`` at a time."""
    from llvmlite import binding

    module = binding.parse_assembly(str(_program(stride, heads, queries)))
    module.verify()
    passes = binding.create_pass_builder(target(), binding.create_pipeline_tuning_options(speed_level=1))
    passes.getModulePassManager().run(module, passes)
    engine = binding.create_mcjit_compiler(module, target())
    engine.finalize_object()
    place = engine.get_function_address("scan")
    call = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 9, *[ctypes.c_int64] * 6)(place)
    call.engine = engine  # type: ignore[attr-defined]  # the code lives as long as this does
    return call


def _program(stride: int, heads: int, queries: int) -> Any:
    """LLVM's intermediate code of the kernel; arguments as in :meth:`Scan._run`."""
    from llvmlite import ir

    byte, short, long, pointer, real = ir.IntType(8), ir.IntType(16), ir.IntType(64), ir.PointerType(), ir.FloatType()
    row16, bytes32, shorts16 = ir.VectorType(byte, 16), ir.VectorType(byte, 32), ir.VectorType(short, 16)
    words32, reals32 = ir.VectorType(ir.IntType(32), 32), ir.VectorType(real, 32)
    zero, one = long(0), long(1)

    def every(kind: Any, value: float) -> Any:
        return ir.Constant(kind, [value] * kind.count)

    def order(places: Iterable[int]) -> Any:
        chosen = list(places)
        return ir.Constant(ir.VectorType(ir.IntType(32), len(chosen)), chosen)

    # Interleaving the low (high) halves of two vectors, in both 128-bit lanes.
    low = order(lane + x for lane in (0, 16) for i in range(8) for x in (i, 32 + i))
    high = order(lane + x for lane in (0, 16) for i in range(8, 16) for x in (i, 32 + i))

    module = ir.Module()
    look_up = ir.Function(module, ir.FunctionType(bytes32, [bytes32, bytes32]), "llvm.x86.avx2.pshuf.b")
    fetch = ir.Function(module, ir.FunctionType(ir.VoidType(), [pointer, *[ir.IntType(32)] * 3]), "llvm.prefetch.p0")
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [pointer] * 9 + [long] * 6), "scan")
    codes, tables, steps, bases, ends, groups, offsets, scales, out = function.args[:9]
    start, stop, blocks, segments, chunks, width = function.args[9:]
    for argument in function.args[:9]:
        argument.add_attribute("noalias")
    entry = function.append_basic_block()
    b = ir.IRBuilder(entry)

    def variable(kind: Any) -> Any:
        with b.goto_entry_block():
            return b.alloca(kind)

    @contextmanager
    def loop(first: Any, last: Any) -> Iterator[Any]:
        i = variable(long)
        b.store(first, i)
        head, body, done = (b.append_basic_block() for _ in range(3))
        b.branch(head)
        b.position_at_end(head)
        b.cbranch(b.icmp_signed("<", b.load(i, typ=long), last), body, done)
        b.position_at_end(body)
        yield b.load(i, typ=long)
        b.store(b.add(b.load(i, typ=long), one), i)
        b.branch(head)
        b.position_at_end(done)

    def at(base: Any, offset: Any, kind: Any = byte) -> Any:
        return b.gep(base, [offset], source_etype=kind)

    def item(base: Any, index: Any, kind: Any) -> Any:
        return b.load(at(base, index, kind), typ=kind)

    def chunk(source: Any, ahead: Any) -> Iterator[Any]:
        """The 16 bytes at ``source`` of 32 rows: 16 vectors, each one byte of all rows. The next tile is fetched."""

        def rows(r: int) -> Any:
            lanes = [b.load(at(source, long(stride * k)), typ=row16, align=1) for k in (r, r + 16)]
            return b.shuffle_vector(*lanes, order(range(32)))

        def interleave(x: list[Any]) -> list[Any]:
            for _ in range(2):
                x = [b.shuffle_vector(x[i], x[i + 2], half) for i in (0, 1) for half in (low, high)]
            return x

        between = []
        for i in range(4):
            between.append(interleave([rows(i + 4 * j) for j in range(4)]))
            for line in (2 * i, 2 * i + 1):
                b.call(fetch, [at(ahead, long(64 * line)), ir.IntType(32)(0), ir.IntType(32)(3), ir.IntType(32)(1)])
        for j in range(4):
            yield from interleave([x[j] for x in between])

    def nibbles(x: Any) -> tuple[Any, Any]:
        shifted = b.bitcast(b.lshr(b.bitcast(x, shorts16), every(shorts16, 4)), bytes32)
        return b.and_(x, every(bytes32, 15)), b.and_(shifted, every(bytes32, 15))

    def all_of(value: Any) -> Any:
        alone = b.insert_element(ir.Constant(reals32, ir.Undefined), value, ir.IntType(32)(0))
        return b.shuffle_vector(alone, alone, order([0] * 32))

    # Sums of the even and of the odd rows: a 16-bit lane holds the bytes of two rows, and the odd one is shifted out.
    sums = [[variable(shorts16) for _ in range(2)] for _ in range(queries)]
    totals = [variable(reals32) for _ in range(queries)]
    done = variable(long)
    with loop(start, stop) as tile:
        base = at(codes, b.mul(tile, long(stride * TILE)))
        ahead = at(base, long(stride * TILE))
        for h in range(heads):
            for i, x in enumerate(chunk(at(base, long(CHUNK * h)), at(ahead, long(512 * h)))):
                b.store(x, at(scales, long(512 * h + TILE * i)), align=1)
        with loop(zero, blocks) as block:
            numbers = at(tables, b.mul(b.mul(block, chunks), long(queries * 512)))
            for total in totals:
                b.store(every(reals32, 0.0), total)
            b.store(zero, done)
            with loop(zero, segments) as segment:
                for pair in sums:
                    for s in pair:
                        b.store(every(shorts16, 0), s)
                end = item(ends, segment, long)
                with loop(b.load(done, typ=long), end) as c:
                    table = at(numbers, b.mul(c, long(queries * 512)))
                    next_lines = at(ahead, b.mul(b.add(c, long(heads)), long(512)))
                    held: list[Any] = [None] * queries
                    for i, x in enumerate(chunk(at(base, item(offsets, c, long)), next_lines)):
                        for k, y in enumerate(nibbles(x)):
                            for q in range(queries):
                                t = b.load(at(table, long(512 * q + 16 * (2 * i + k))), typ=row16, align=1)
                                found = b.call(look_up, [b.shuffle_vector(t, t, order([*range(16)] * 2)), y])
                                held[q] = found if held[q] is None else b.add(held[q], found)
                        if i % 2:
                            for q, (even, odd) in enumerate(sums):
                                both = b.bitcast(held[q], shorts16)
                                b.store(b.add(b.load(even, typ=shorts16), both), even)
                                b.store(b.add(b.load(odd, typ=shorts16), b.lshr(both, every(shorts16, 8))), odd)
                                held[q] = None
                b.store(end, done)
                place = b.mul(item(groups, segment, long), long(2 * TILE))
                lower, upper = (
                    b.zext(b.load(at(scales, b.add(place, long(TILE * k))), typ=bytes32, align=1), words32)
                    for k in (0, 1)
                )
                bits = b.or_(b.shl(lower, every(words32, 16)), b.shl(upper, every(words32, 24)))
                scale = b.bitcast(bits, reals32)
                for q, (even, odd) in enumerate(sums):
                    o = b.load(odd, typ=shorts16)
                    e = b.sub(b.load(even, typ=shorts16), b.shl(o, every(shorts16, 8)))
                    n = b.uitofp(b.shuffle_vector(e, o, order(x for i in range(16) for x in (i, 16 + i))), reals32)
                    k = b.add(b.mul(b.add(b.mul(block, segments), segment), long(queries)), long(q))
                    value = b.fadd(b.fmul(n, all_of(item(steps, k, real))), all_of(item(bases, k, real)))
                    b.store(b.fadd(b.load(totals[q], typ=reals32), b.fmul(value, scale)), totals[q])
            for q, total in enumerate(totals):
                line = b.mul(b.add(b.mul(block, long(queries)), long(q)), width)
                place = at(out, b.add(line, b.mul(tile, long(TILE))), real)
                b.store(b.load(total, typ=reals32), place, align=4)
    b.ret_void()
    return module


# -- the best and the worst ---------------------------------------------------------------------------------------


class Ranked(NamedTuple):
    """``rows`` [query, place] and their ``scores``, the most extreme first; of equal scores the lower row is first."""

    rows: NDArray[np.int64]
    scores: NDArray[np.float32]


class Ends(NamedTuple):
    """Both ends of the ranking: ``best`` from the highest score down, ``worst`` from the lowest up."""

    best: Ranked
    worst: Ranked | None


def top(stream: Iterable[tuple[int | NDArray[np.int64], Scores | Tensor]], k: int, both_ends: bool = True) -> Ends:
    """The ``k`` rows with the highest scores, and the k with the lowest, of blocks (first row or row numbers, scores
    [query, row]). All rows, where there are fewer than k. Keeps no more than k rows per query and one block.

    Raises RunError for a score that is not finite, and for no block at all.
    """
    if k < 1:
        raise RunError(f"the best {k} rows", "less than one", "k of 1 or more")
    signs = (1, -1) if both_ends else (1,)
    kept: list[list[tuple[NDArray[np.int64], NDArray[np.float32]]]] = []
    for first, block in stream:
        scores = np.asarray(block.cpu() if isinstance(block, Tensor) else block, np.float32)
        rows = np.arange(first, first + scores.shape[1]) if isinstance(first, int | np.integer) else np.asarray(first)
        if not kept:
            kept = [[(np.empty(0, np.int64), np.empty(0, np.float32)) for _ in scores] for _ in signs]
        for q, values in enumerate(scores):
            if not len(values):
                continue
            ends = values.max(), values.min()  # a NaN is both
            if not np.isfinite(ends).all():
                wrong = int(rows[~np.isfinite(values)][0])
                raise RunError(f"rank the scores of query {q}", f"row {wrong} scores NaN or infinity", "finite scores")
            for side, sign in enumerate(signs):
                old = kept[side][q]
                if len(old[0]) < k or sign * ends[side] >= sign * old[1][-1]:
                    kept[side][q] = _merged(old, rows, values, k, sign)
    if not kept:
        raise RunError(f"the best {k} rows", "no scores at all", "an index with examples")
    found = [Ranked(np.stack([r for r, _ in side]), np.stack([s for _, s in side])) for side in kept]
    return Ends(found[0], found[1] if both_ends else None)


def _merged(
    old: tuple[NDArray[np.int64], NDArray[np.float32]],
    rows: NDArray[np.int64],
    values: NDArray[np.float32],
    k: int,
    sign: int,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The first k of what was kept and a block."""
    if len(old[0]) == k:
        rows, values = _at_least(rows, values, old[1][-1], sign)
    if len(values) > k:
        edge = np.partition(values, len(values) - k if sign > 0 else k - 1)[len(values) - k if sign > 0 else k - 1]
        rows, values = _at_least(rows, values, edge, sign)
    rows, values = np.concatenate([old[0], rows]), np.concatenate([old[1], values])
    chosen = np.lexsort((rows, -sign * values))[:k]
    return rows[chosen], values[chosen]


def _at_least(
    rows: NDArray[np.int64], values: NDArray[np.float32], edge: np.float32, sign: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    near = np.flatnonzero(values >= edge if sign > 0 else values <= edge)
    return rows[near], values[near]
