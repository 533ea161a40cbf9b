"""How are a million one-bit codes held against a query at the speed of memory?

The rows of an index lie one example after the other. The kernel takes 32 rows at once and 16 bytes of each; a
transposition in registers puts the same byte of the 32 examples side by side; one instruction (pshufb) then looks up a
nibble of each of them in a table of 16 numbers: the query's four coordinates summed with the signs that the nibble
says: two lookups and a few additions per byte and query. (FAISS's "fast scan" stores its codes transposed already; here
a row stays a row, so that a store can append and delete, and the transposition is shared by the queries.)

A table's numbers are 8-bit, small enough that four of them add up in a byte: T ~ base + step n. The sum of a layer is
exact in integers, so a score depends on nothing but its own row, whatever the blocks and the threads, and its distance
from the score of the unquantised query is at most half a step per lookup (``Scan.error``; typically a fiftieth of the
scores' spread, where taking signs alone has cost over half of it). The other way, RaBitQ's, counts the bits that a
code shares with binary planes of the query in 64-bit words: four planes took 2.5 times as long here and erred seven
times more, six planes 3.6 times as long and twice.

The kernel is compiled when it is first needed (llvmlite, a fraction of a second). Codes that lie on a GPU, or queries
that do, are for Triton's kernel (scan_triton.py), where there is Triton. Where there is none of them, no llvmlite or no
AVX2, the same scores come from a matrix product, unquantised.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import RunError
from .codes import Signs, side_by_side

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .codes import Rows, Scores
    from .scan_triton import TritonScan

TILE = 32
"""Examples that the kernel takes at once."""
CHUNK = 16
"""Bytes of each of them that it takes at once: 32 lookups."""
LONGEST = 32
"""Chunks that are added up in 16 bits: 32 x 8 sums of at most 255."""
TOGETHER = 5
"""Queries that share one transposition; more share nothing that still costs."""
SMALL = 8192
"""Rows that are not worth a second thread."""
SENT = 1 << 20
"""Rows that a GPU scans at once, and is sent at once where they are not there."""


class Scan:
    """Queries, prepared to be held against any number of rows of sign bits.

    ``error``: by how much a score can differ from ``codec.score``, [query, layer], for examples whose scale is 1 (zero
    where nothing is quantised; float32 rounding comes on top). ``compiled``: whether the processor's kernel is used.
    """

    def __init__(self, codec: Signs, queries: Mapping[str, Tensor]) -> None:
        self.codec, self.queries = codec, dict(queries)
        flat = side_by_side(queries, codec.shapes)
        bad = (~torch.isfinite(flat)).any(1).nonzero()[:, 0].tolist()
        if bad:
            raise RunError(f"scan for query {bad[0]}", "NaN or infinite coordinates", "finite numbers")
        self.device = flat.device
        self.compiled = flat.device.type == "cpu" and flat.numel() > 0 and able()
        self.error = np.zeros((len(flat), len(codec.shapes)), np.float32)
        self._held: dict[torch.device, TritonScan] = {}
        if on_gpu(self.device.type):
            self._on(self.device)
        if self.compiled:
            self._tables, self.error = _tables(flat.double().numpy(), codec)
            t = self._tables
            self._places = [a.ctypes.data for a in (t.numbers, t.steps, t.bases, t.ends, t.groups, t.offsets)]
            self._heads = -(-codec.head // CHUNK)
            self._kernel = kernel(codec.stride, self._heads, t.steps.shape[2])

    def scores(self, codes: Rows | Tensor) -> Scores:
        """[query, example] of rows [example, stride]."""
        device = codes.device if isinstance(codes, Tensor) and codes.device.type != "cpu" else self.device
        if on_gpu(device.type):
            return self._there(codes, device)
        if not self.compiled or device.type != "cpu":
            return self.codec.score({name: q.to(device) for name, q in self.queries.items()}, codes)
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

    def _on(self, device: torch.device) -> TritonScan:
        """The queries as that device needs them."""
        if device not in self._held:
            from .scan_triton import TritonScan

            self._held[device] = TritonScan(self.codec, self.queries, device)
            self.error = np.maximum(self.error, self._held[device].error)
        return self._held[device]

    def _there(self, codes: Rows | Tensor, device: torch.device) -> Scores:
        held, found = self._on(device), np.empty((len(self.error), len(codes)), np.float32)
        for at in range(0, max(len(codes), 1), SENT):
            part = codes[at : at + SENT]
            rows = part if isinstance(part, Tensor) else torch.from_numpy(np.array(part))
            found[:, at : at + len(rows)] = held.scores(rows.to(device)).cpu().numpy()
        return found

    def _run(self, rows: Rows, start: int, stop: int, out: Scores) -> None:
        """Scan tiles ``start`` to ``stop``."""
        t = self._tables
        scales = np.zeros((max(self._heads, 1) * CHUNK, TILE), np.uint8)
        scales[:2] = [[0x80], [0x3F]]  # 1 in bfloat16, for rows without scales
        self._kernel(
            rows.ctypes.data, *self._places, scales.ctypes.data, out.ctypes.data,
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


@cache
def on_gpu(kind: str) -> bool:
    """Whether codes on this kind of device are for Triton's kernel."""
    return kind == "cuda" and find_spec("triton") is not None


# -- the kernel ---------------------------------------------------------------------------------------------------


@cache
def able() -> bool:
    """Whether the kernel can run here."""
    try:
        from llvmlite import binding
    except ImportError:
        return False
    features = binding.get_host_cpu_features()
    return bool(features.get("avx2") and features.get("fma"))


def compiled(program: str, name: str, *kinds: Any) -> Callable[..., Any]:
    """The function ``name`` of a text of LLVM's intermediate code, which returns and takes these kinds of ctypes."""
    from llvmlite import binding

    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    module = binding.parse_assembly(program)
    module.verify()
    # One for each engine, which takes it over and frees it.
    machine = binding.Target.from_default_triple().create_target_machine(
        cpu=binding.get_host_cpu_name(), features=binding.get_host_cpu_features().flatten(), opt=3
    )
    passes = binding.create_pass_builder(machine, binding.create_pipeline_tuning_options(speed_level=1))
    passes.getModulePassManager().run(module, passes)
    engine = binding.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    call = ctypes.CFUNCTYPE(*kinds)(engine.get_function_address(name))
    call.engine = engine  # type: ignore[attr-defined]  # its code lives as long as this does
    return call


@cache
def kernel(stride: int, heads: int, queries: int) -> Callable[..., None]:
    """The compiled kernel for rows of ``stride`` bytes with ``heads`` chunks of scales, ``queries`` at a time."""
    program = str(_program(stride, heads, queries))
    return compiled(program, "scan", None, *[ctypes.c_void_p] * 9, *[ctypes.c_int64] * 6)


def _program(stride: int, heads: int, queries: int) -> Any:
    """LLVM's intermediate code of the kernel; arguments as in :meth:`Scan._run`."""
    from llvmlite import ir

    byte, short, long, pointer, real = ir.IntType(8), ir.IntType(16), ir.IntType(64), ir.PointerType(), ir.FloatType()
    row16, bytes32, shorts16 = ir.VectorType(byte, 16), ir.VectorType(byte, 32), ir.VectorType(short, 16)
    words16, reals16 = ir.VectorType(ir.IntType(32), 16), ir.VectorType(real, 16)
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
    fma = ir.Function(module, ir.FunctionType(reals16, [reals16] * 3), "llvm.fma.v16f32")
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
                b.call(fetch, [at(ahead, long(64 * line)), *(ir.IntType(32)(k) for k in (0, 0, 1))])  # read, once, data
        for j in range(4):
            yield from interleave([x[j] for x in between])

    def nibbles(x: Any) -> tuple[Any, Any]:
        shifted = b.bitcast(b.lshr(b.bitcast(x, shorts16), every(shorts16, 4)), bytes32)
        return b.and_(x, every(bytes32, 15)), b.and_(shifted, every(bytes32, 15))

    def all_of(value: Any) -> Any:
        alone = b.insert_element(ir.Constant(reals16, ir.Undefined), value, ir.IntType(32)(0))
        return b.shuffle_vector(alone, alone, order([0] * 16))

    def halves(x: Any) -> tuple[Any, Any]:
        """The bytes of the even and of the odd rows, each in 16 bits."""
        both = b.bitcast(x, shorts16)
        return b.and_(both, every(shorts16, 255)), b.lshr(both, every(shorts16, 8))

    # A 16-bit lane holds the bytes of an even and of an odd row; they stay apart until the end.
    sums = [[variable(shorts16) for _ in range(2)] for _ in range(queries)]
    totals = [[variable(reals16) for _ in range(2)] for _ in range(queries)]
    done = variable(long)
    with loop(start, stop) as tile:
        base = at(codes, b.mul(tile, long(stride * TILE)))
        ahead = at(base, long(stride * TILE))
        for h in range(heads):
            for i, x in enumerate(chunk(at(base, long(CHUNK * h)), at(ahead, long(512 * h)))):
                b.store(x, at(scales, long(512 * h + TILE * i)), align=1)
        with loop(zero, blocks) as block:
            numbers = at(tables, b.mul(b.mul(block, chunks), long(queries * 512)))
            for pair in totals:
                for total in pair:
                    b.store(every(reals16, 0.0), total)
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
                    halves(b.load(at(scales, b.add(place, long(TILE * k))), typ=bytes32, align=1)) for k in (0, 1)
                )
                scale = []
                for x, y in zip(lower, upper, strict=True):  # a bfloat16 is the upper half of a float32
                    whole = b.zext(b.or_(x, b.shl(y, every(shorts16, 8))), words16)
                    scale.append(b.bitcast(b.shl(whole, every(words16, 16)), reals16))
                for q, (even, odd) in enumerate(sums):
                    o = b.load(odd, typ=shorts16)
                    e = b.sub(b.load(even, typ=shorts16), b.shl(o, every(shorts16, 8)))
                    k = b.add(b.mul(b.add(b.mul(block, segments), segment), long(queries)), long(q))
                    step, least = all_of(item(steps, k, real)), all_of(item(bases, k, real))
                    for n, one_scale, total in zip((e, o), scale, totals[q], strict=True):
                        value = b.call(fma, [b.uitofp(n, reals16), step, least])
                        b.store(b.call(fma, [value, one_scale, b.load(total, typ=reals16)]), total)
            for q, pair in enumerate(totals):
                line = b.mul(b.add(b.mul(block, long(queries)), long(q)), width)
                place = at(out, b.add(line, b.mul(tile, long(TILE))), real)
                turns = order(x for i in range(16) for x in (i, 16 + i))
                b.store(b.shuffle_vector(*(b.load(t, typ=reals16) for t in pair), turns), place, align=4)
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
    [query, row]). All rows, where there are fewer than k. Keeps at most 4 k rows per query and end, and one block.

    Raises RunError for a score that is not finite, and for no block at all.
    """
    if k < 1:
        raise RunError(f"the best {k} rows", "less than one", "k of 1 or more")
    kept: list[list[_End]] = []
    for first, block in stream:
        scores = np.asarray(block.cpu() if isinstance(block, Tensor) else block, np.float32)
        rows = np.arange(first, first + scores.shape[1]) if isinstance(first, int | np.integer) else np.asarray(first)
        if not kept:
            kept = [[_End(k, sign) for _ in scores] for sign in ((1, -1) if both_ends else (1,))]
        for q, values in enumerate(scores if len(rows) else []):
            ends = values.max(), values.min()  # a NaN is both
            if not np.isfinite(ends).all():
                wrong = int(rows[~np.isfinite(values)][0])
                raise RunError(f"rank the scores of query {q}", f"row {wrong} scores NaN or infinity", "finite scores")
            for side, end in zip(kept, ends, strict=False):
                if side[q].sign * end >= side[q].edge:
                    side[q].see(rows, values)
    if not kept:
        raise RunError(f"the best {k} rows", "no scores at all", "an index with examples")
    found = [Ranked(*map(np.stack, zip(*(end.ranked() for end in side), strict=True))) for side in kept]
    return Ends(found[0], found[1] if both_ends else None)


class _End:
    """The k rows with the largest ``sign`` times score so far, and some that may yet be among them."""

    def __init__(self, k: int, sign: int) -> None:
        self.k, self.sign = k, sign
        self.edge = np.float32(-np.inf)
        """What a row needs to be among the k seen so far; one that ties may still win by its number."""
        self.rows = np.empty(0, np.int64)
        self.values = np.empty(0, np.float32)

    def see(self, rows: NDArray[np.int64], values: NDArray[np.float32]) -> None:
        near = np.flatnonzero(values >= self.edge if self.sign > 0 else values <= -self.edge)
        self.rows = np.concatenate([self.rows, rows[near]])
        self.values = np.concatenate([self.values, self.sign * values[near]])
        if len(self.rows) > 4 * self.k:
            self._keep_k()

    def _keep_k(self) -> None:
        """Let go of all but k, by selection: sorting what is let go would be in vain."""
        at = len(self.values) - self.k
        self.edge = np.partition(self.values, at)[at]
        above, ties = np.flatnonzero(self.values > self.edge), np.flatnonzero(self.values == self.edge)
        left = self.k - len(above)
        first = ties[np.argpartition(self.rows[ties], left - 1)[:left]]
        chosen = np.concatenate([above, first])
        self.rows, self.values = self.rows[chosen], self.values[chosen]

    def ranked(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        order = np.lexsort((self.rows, -self.values))[: self.k]
        return self.rows[order], self.sign * self.values[order]
