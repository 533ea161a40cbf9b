"""The scan of sign bits, and the best and the worst of a stream of scores."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from whence.engine import scan
from whence.engine.codes import Signs
from whence.engine.randomness import stream, torch_stream
from whence.engine.scan import SMALL, TILE, Scan, top
from whence.errors import RunError

LAYOUTS = {
    "one row of bits": Signs({"all": (2048,)}, scaled=False),
    "eight layers": Signs({str(i): (128,) for i in range(8)}),
    "uneven layers": Signs({"a": (200,), "b": (7,), "c": (16, 16), "d": (1,)}),
    "three bits": Signs({"a": (3,)}, scaled=False),
    "three bits and a scale": Signs({"a": (3,)}),
    "longer than one sum": Signs({"a": (4097,), "b": (9000,)}),
    "many small layers": Signs({f"{i:02}": (21,) for i in range(48)}),
}
every_layout = pytest.mark.parametrize("codec", LAYOUTS.values(), ids=list(LAYOUTS))
eight = LAYOUTS["eight layers"]
kernel_only = pytest.mark.skipif(not scan.able(), reason="THE KERNEL WAS NOT TESTED: it needs llvmlite and AVX2")


def drawn(codec: Signs, n: int, *names: object) -> dict[str, Tensor]:
    return {k: torch.randn(n, *s, generator=torch_stream("scan", k, *names)) for k, s in codec.shapes.items()}


def oracle(codec: Signs, queries: dict[str, Tensor], codes: NDArray[np.uint8]) -> tuple[NDArray, NDArray]:
    """Exact scores [query, row] and the scales [row, layer], by numpy in float64."""
    found, scales = np.zeros((len(next(iter(queries.values()))), len(codes))), np.ones((len(codes), len(codec.shapes)))
    for i, (name, (at, k)) in enumerate(zip(codec.shapes, codec.spans, strict=True)):
        bits = np.unpackbits(codes[:, at:], axis=1, bitorder="little", count=k)
        if codec.scaled:
            words = codes[:, 2 * i].astype(np.uint32) + (codes[:, 2 * i + 1].astype(np.uint32) << 8)
            scales[:, i] = (words << 16).view(np.float32)
        found += queries[name].flatten(1).double().numpy() @ (bits * 2.0 - 1).T * scales[:, i]
    return found, scales


# -- truth --------------------------------------------------------------------------------------------------------


def test_the_example_that_shares_the_querys_cause_comes_first_and_its_opposite_last() -> None:
    examples, queries = drawn(eight, 9_000, "examples"), drawn(eight, 3, "queries")
    for k, g in examples.items():
        for row, sign in ((777, 1), (8_999, -1)):
            g[row] = 0.9 * g[row] + 0.4 * sign * queries[k][1]
    codes = eight.encode(examples)
    ends = top([(0, Scan(eight, queries).scores(codes))], 1)
    assert ends.worst is not None
    assert (ends.best.rows[1, 0], ends.worst.rows[1, 0]) == (777, 8_999)
    for other in (0, 2):
        assert ends.best.rows[other, 0] != 777
        assert ends.worst.rows[other, 0] != 8_999


@every_layout
@pytest.mark.parametrize("count", [1, 7])
def test_a_score_is_within_the_stated_error_of_the_exact_one(codec: Signs, count: int) -> None:
    for n in (1, TILE - 1, TILE, TILE + 1, 300):
        codes, queries = codec.encode(drawn(codec, n, "x")), drawn(codec, count, "q")
        held = Scan(codec, queries)
        want, scales = oracle(codec, queries, codes)
        wrong = np.abs(held.scores(codes) - want)
        assert (wrong <= held.error @ scales.T + 2e-6 * np.abs(want).max()).all()


@kernel_only
def test_the_error_is_a_small_part_of_the_scores_spread() -> None:
    for name in ("one row of bits", "eight layers", "longer than one sum"):
        codec = LAYOUTS[name]
        codes, queries = codec.encode(drawn(codec, 500, "x")), drawn(codec, 4, "q")
        want, _ = oracle(codec, queries, codes)
        assert 0 < (Scan(codec, queries).scores(codes) - want).std() < 0.03 * want.std()


@kernel_only
def test_the_largest_sums_do_not_overflow() -> None:
    codec = LAYOUTS["longer than one sum"]
    full = {k: torch.ones(1, *s) for k, s in codec.shapes.items()}
    spike = {k: torch.zeros(1, *s) for k, s in codec.shapes.items()}
    spike["b"][0, 5] = 1e6
    mixed = {k: torch.cat([full[k], -full[k], spike[k], 1e-20 * full[k]]) for k in full}
    for value in (0, 255, 0x0F, 0xAA):
        codes = np.full((40, codec.stride), value, np.uint8)
        codes[:, : codec.head] = codec.encode(full)[:, : codec.head]
        held = Scan(codec, mixed)
        want, scales = oracle(codec, mixed, codes)
        assert (np.abs(held.scores(codes) - want) <= held.error @ scales.T + 1e-6 * np.abs(want)).all()


GUARDED = """
import ctypes, mmap, numpy, torch
from whence.engine.codes import Signs
from whence.engine.scan import Scan
page = mmap.PAGESIZE
for shapes, scaled in (({"a": (3,)}, 0), ({"a": (128,), "b": (21,)}, 1), ({str(i): (1,) for i in range(9)}, 1)):
    codec = Signs(shapes, bool(scaled))
    held = Scan(codec, {k: torch.ones(1, *s) for k, s in codec.shapes.items()})
    assert held.compiled
    for n in (1, 31, 32, 33, 47, 48, 49, 64, 65, 300):
        size = n * codec.stride
        pages = -(-size // page)
        memory = mmap.mmap(-1, (pages + 1) * page)
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        assert not ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + pages * page), page, 0)
        rows = (ctypes.c_uint8 * size).from_address(start + pages * page - size)
        held.scores(numpy.frombuffer(rows, numpy.uint8).reshape(n, codec.stride))
"""


@kernel_only
def test_nothing_is_read_behind_the_rows() -> None:
    """Rows that end where a forbidden page begins; a process of its own, for a wrong read kills it."""
    subprocess.run([sys.executable, "-c", GUARDED], check=True, timeout=120)


@kernel_only
def test_a_query_of_a_few_values_is_scored_without_error() -> None:
    codec = LAYOUTS["one row of bits"]
    codes = codec.encode(drawn(codec, 500, "x"))
    queries = {"all": torch.where(torch.rand(2, 2048, generator=torch_stream("coin")) > 0.5, 0.5, -0.5)}
    want, _ = oracle(codec, queries, codes)
    np.testing.assert_allclose(Scan(codec, queries).scores(codes), want, atol=8.2 / 253 * 512 / 2)
    nothing = Scan(codec, {"all": torch.zeros(2, 2048)})
    assert not nothing.scores(codes).any()
    assert not nothing.error.any()


# -- invariance ---------------------------------------------------------------------------------------------------


@kernel_only
@every_layout
def test_a_score_is_the_same_bit_for_bit_whatever_the_blocks_the_threads_and_the_other_queries(codec: Signs) -> None:
    n = SMALL + 1000 if codec is eight else 700
    codes = codec.encode({k: g[:n] for k, g in drawn(codec, n, "x").items()})
    queries = drawn(codec, 7, "q")
    held = Scan(codec, queries)
    assert held.compiled
    whole = held.scores(codes)
    for size in (1, 31, 33, 500):
        starts = range(0, n if size > 1 else 40, size)
        parts = np.concatenate([held.scores(codes[s : s + size]) for s in starts], 1)
        assert (parts == whole[:, : parts.shape[1]]).all()
    for some in ([3], [6, 0], [5, 4, 3, 2, 1, 0], [0, 1, 2, 3, 4]) if codec is eight else ([3],):
        assert (Scan(codec, {k: q[some] for k, q in queries.items()}).scores(codes) == whole[some]).all()
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert (held.scores(codes) == whole).all()
    finally:
        torch.set_num_threads(threads)


def test_rows_may_lie_anywhere_and_stay_unwritten(tmp_path: Path) -> None:
    codes = eight.encode(drawn(eight, 200, "x"))
    codes.tofile(tmp_path / "plane")
    held = Scan(eight, drawn(eight, 2, "q"))
    whole = held.scores(codes)
    mapped = np.memmap(tmp_path / "plane", np.uint8, mode="r", shape=codes.shape)
    assert (held.scores(mapped[5:150]) == whole[:, 5:150]).all()
    assert (held.scores(codes[::3]) == whole[:, ::3]).all()
    assert (held.scores(torch.from_numpy(codes)) == whole).all()
    padded = np.zeros((200, eight.stride + 3), np.uint8)
    padded[:, 1:-2] = codes
    assert (held.scores(padded[:, 1:-2]) == whole).all()
    assert held.scores(codes[:0]).shape == (2, 0)


def test_without_the_kernel_the_scores_are_the_codecs(monkeypatch: pytest.MonkeyPatch) -> None:
    codes, queries = eight.encode(drawn(eight, 300, "x")), drawn(eight, 3, "q")
    monkeypatch.setattr(scan, "able", lambda: False)
    held = Scan(eight, queries)
    assert not held.compiled
    assert not held.error.any()
    assert (held.scores(codes) == eight.score(queries, codes)).all()


def test_what_cannot_be_scanned_is_refused() -> None:
    queries = drawn(eight, 2, "q")
    with pytest.raises(RunError, match="rows of 144 bytes"):
        Scan(eight, queries).scores(np.zeros((5, 143), np.uint8))
    with pytest.raises(RunError, match="128"):
        Scan(eight, {k: q[:, :5] for k, q in queries.items()})
    queries["3"][1, 7] = float("nan")
    with pytest.raises(RunError, match="query 1"):
        Scan(eight, queries)


# -- the best and the worst ---------------------------------------------------------------------------------------


def blocks(scores: NDArray[np.float32], size: int) -> Iterator[tuple[int, NDArray[np.float32]]]:
    for at in range(0, scores.shape[1], size):
        yield at, scores[:, at : at + size]


@pytest.mark.parametrize("size", [1, 7, 100, 1000])
def test_the_ends_are_those_of_the_whole_sorted_with_the_lower_row_first_among_equals(size: int) -> None:
    rng = stream("top", size)
    scores = rng.integers(-6, 6, (3, 500)).astype(np.float32)
    scores[2] = rng.normal(size=500)
    for k in (1, 5, 60, 500):
        ends = top(blocks(scores, size), k)
        assert ends.worst is not None
        for side, sign in ((ends.best, -1), (ends.worst, 1)):
            order = np.argsort(sign * scores, axis=1, kind="stable")[:, :k]
            assert (side.rows == order).all()
            assert (side.scores == np.take_along_axis(scores, order, 1)).all()
    assert top(blocks(scores, size), 3, both_ends=False).worst is None


def test_blocks_may_name_their_rows_and_come_in_any_order() -> None:
    scores = stream("rows").integers(-3, 3, (2, 90)).astype(np.float32)
    kept = np.flatnonzero(stream("alive").random(90) < 0.7)
    parts = np.array_split(kept, 4)
    found = top(((p, scores[:, p]) for p in reversed(parts)), 10)
    assert (found.best.rows == kept[np.argsort(-scores[:, kept], axis=1, kind="stable")[:, :10]]).all()
    as_tensors = top(((p, torch.from_numpy(scores[:, p])) for p in parts), 10)
    assert (as_tensors.best.rows == found.best.rows).all()


def test_fewer_rows_than_asked_for_are_all_given() -> None:
    ends = top(blocks(np.float32([[3, 1, 2]]), 2), 10)
    assert ends.best.rows.tolist() == [[0, 2, 1]]
    assert ends.worst is not None
    assert ends.worst.rows.tolist() == [[1, 2, 0]]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_score_that_is_no_number_is_refused_with_its_row(bad: float) -> None:
    scores = np.zeros((2, 50), np.float32)
    scores[1, 33] = bad
    with pytest.raises(RunError, match="row 33"):
        top(blocks(scores, 20), 3)


def test_nothing_to_rank_is_refused() -> None:
    with pytest.raises(RunError, match="no scores"):
        top(iter(()), 3)
    with pytest.raises(RunError, match="less than one"):
        top(blocks(np.zeros((1, 5), np.float32), 5), 0)
