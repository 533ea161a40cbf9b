"""The scan of sign bits by Triton's kernel: what it computes, in Triton's interpreter, and that it compiles."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from whence.engine import scan
from whence.engine.codes import Signs
from whence.engine.randomness import stream, torch_stream
from whence.engine.scan import Scan

if find_spec("triton") is None:
    pytest.skip("TRITON'S KERNEL WAS NOT TESTED: pip install triton (Linux)", allow_module_level=True)

CASES: dict[str, tuple[dict[str, tuple[int, ...]], bool, int, int]] = {
    "one row of bits": ({"all": (1024,)}, False, 70, 1),
    "eight layers": ({str(i): (128,) for i in range(8)}, True, 130, 3),
    "uneven layers": ({"a": (200,), "b": (7,), "c": (16, 16), "d": (1,)}, True, 65, 5),
    "three bits": ({"a": (3,)}, False, 63, 9),
    "three bits and a scale": ({"a": (3,)}, True, 64, 2),
    "a layer of nothing": ({"a": (40,), "b": (0,), "c": (300,)}, True, 10, 2),
    "many small layers": ({f"{i:02}": (21,) for i in range(9)}, True, 1, 4),
    "more queries than are taken at once": ({"a": (100,), "b": (50,)}, True, 20, 40),
}
"""Layers, whether they have scales, examples, queries."""

INTERPRETED = """
import json, sys
import numpy as np, torch
from whence.engine import scan
from whence.engine.codes import Signs
from whence.engine.scan_triton import TritonScan
scan.on_gpu = lambda kind: True
folder, cases = sys.argv[1], json.loads(sys.argv[2])
for i, (shapes, scaled) in enumerate(cases):
    codec = Signs({k: tuple(s) for k, s in shapes.items()}, scaled)
    given = np.load(f"{folder}/{i}.npz")
    queries = {k: torch.from_numpy(given[f"q/{k}"]) for k in codec.shapes}
    codes, held = torch.from_numpy(given["codes"]), TritonScan(codec, queries, torch.device("cpu"))
    out = {"scores": held.scores(codes).numpy(), "error": held.error}
    if i == 2:
        apart = torch.nn.functional.pad(codes, (1, 2))[:, 1:-2]
        chosen = scan.Scan(codec, queries)
        scan.SENT = 40
        out |= {"apart": held.scores(apart).numpy(), "none": held.scores(codes[:0]).numpy(), "stated": chosen.error,
            "here": chosen.scores(codes), "sent": chosen.scores(given["codes"])}
    np.savez(f"{folder}/{i}.out.npz", **out)
"""


@cache
def drawn(name: str) -> tuple[Signs, dict[str, torch.Tensor], NDArray[np.uint8]]:
    shapes, scaled, n, count = CASES[name]
    codec = Signs(shapes, scaled)
    q, x = (
        {k: torch.randn(many, *s, generator=torch_stream("triton", k, many, who)) for k, s in codec.shapes.items()}
        for who, many in (("q", count), ("x", n))
    )
    for i, value in enumerate(q.values()):  # layers of very different sizes, and coordinates within them
        value *= 10.0 ** (3 * i % 7 - 3)
        value.view(count, -1)[:, ::3] *= 1e-4
    return codec, q, codec.encode(x)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the interpreter computes for each case."""
    folder = tmp_path_factory.mktemp("triton")
    for i, name in enumerate(CASES):
        _, queries, codes = drawn(name)
        np.savez(folder / f"{i}.npz", codes=codes, **{f"q/{k}": q.numpy() for k, q in queries.items()})
    cases = json.dumps([(shapes, scaled) for shapes, scaled, *_ in CASES.values()])
    run(INTERPRETED, folder, str(folder), cases, TRITON_INTERPRET="1")
    return {name: np.load(folder / f"{i}.out.npz") for i, name in enumerate(CASES)}


def run(program: str, folder: Path, *arguments: str, **env: str) -> str:
    """In a process of its own: Triton is interpreted or compiled for good."""
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "TRITON_CACHE_DIR": str(folder / "cache"), "OMP_NUM_THREADS": "1", **env},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def exact(codec: Signs, queries: dict[str, torch.Tensor], codes: NDArray[np.uint8]) -> tuple[NDArray, NDArray]:
    """Scores [query, row], and what they are sums of in absolute values, by numpy in float64."""
    total, size = np.zeros((2, len(next(iter(queries.values()))), len(codes)))
    for i, (name, (at, k)) in enumerate(zip(codec.shapes, codec.spans, strict=True)):
        bits = np.unpackbits(codes[:, at:], axis=1, bitorder="little", count=k)
        scale = np.ones(len(codes))
        if codec.scaled:
            words = codes[:, 2 * i].astype(np.uint32) + (codes[:, 2 * i + 1].astype(np.uint32) << 8)
            scale = (words << 16).view(np.float32)
        q = queries[name].flatten(1).double().numpy()
        total += q @ (bits * 2.0 - 1).T * scale
        size += np.abs(q).sum(1)[:, None] * scale
    return total, size


@pytest.mark.parametrize("name", CASES)
def test_scores_are_those_of_the_codec_and_those_of_shuffled_codes_are_not(name: str, found: dict[str, Any]) -> None:
    codec, queries, codes = drawn(name)
    scores, (want, size) = found[name]["scores"], exact(codec, queries, codes)
    # Half of float32's rounding of each sum at most, and 2^-23 of a coordinate by its two halves.
    assert (np.abs(scores - want) <= 3e-7 * size).all()
    np.testing.assert_allclose(scores, codec.score(queries, codes), atol=1e-6 * float(size.max()))
    shuffled = codes.copy()
    stream("shuffled", name).shuffle(shuffled[:, codec.head :], axis=0)
    if len(codes) > 60 and codec.stride > 8:
        wrong = np.abs(exact(codec, queries, shuffled)[0] - scores)
        assert (wrong > 1e-3 * size).mean() > 0.9


def test_the_stated_error_is_one_of_rounding_alone(found: dict[str, Any]) -> None:
    for name in CASES:
        _, queries, _ = drawn(name)
        largest = np.stack([q.flatten(1).abs().sum(1).numpy() for q in queries.values()], 1)
        assert (found[name]["error"] <= 2**-22 * largest).all()


def test_rows_may_lie_anywhere_and_be_sent_in_parts(found: dict[str, Any]) -> None:
    codec, queries, codes = drawn("uneven layers")
    f, (want, size) = found["uneven layers"], exact(codec, queries, codes)
    for how in ("apart", "here", "sent"):  # the interpreter's products round by the place of a row
        assert (np.abs(f[how] - want) <= 3e-7 * size).all(), how
    assert f["none"].shape == (len(want), 0)
    assert (f["stated"] >= f["error"]).all()


COMPILED = """
import sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from whence.engine.scan_triton import CHUNK, SCAN, TILE
kinds = dict(codes="*u8", numbers="*fp16", factors="*fp32", first="*i32", stop="*i32", out="*fp32")
signature = {name: kinds.get(name, "constexpr" if name.isupper() else "i32") for name in SCAN.arg_names}
fixed = {"SCALED": True, "QUERIES": 8, "TILE": TILE, "CHUNK": CHUNK}
made = triton.compile(ASTSource(SCAN, signature, fixed), target=GPUTarget("cuda", int(sys.argv[1]), 32))
assert len(made.asm["cubin"]) > 1000
print(made.asm["ttir"])
"""


def test_it_compiles_for_a_gpu_and_stores_nothing_but_scores(tmp_path: Path) -> None:
    text = run(COMPILED, tmp_path, "90", TRITON_INTERPRET="0")
    stored = [line for line in text.splitlines() if "tt.store" in line]
    assert len(stored) == 1
    assert "x8x!tt.ptr<f32>" in stored[0]
    assert text.count("tt.dot") == 8


def test_without_triton_codes_on_a_device_are_for_the_matrix_product(monkeypatch: pytest.MonkeyPatch) -> None:
    scan.on_gpu.cache_clear()
    assert scan.on_gpu("cuda")
    assert not scan.on_gpu("cpu")
    monkeypatch.setattr(scan, "find_spec", lambda name: None)
    scan.on_gpu.cache_clear()
    assert not scan.on_gpu("cuda")
    scan.on_gpu.cache_clear()
    codec, queries, codes = drawn("eight layers")
    asked: list[torch.device] = []

    class Elsewhere(torch.Tensor):
        device = torch.device("cuda")

    monkeypatch.setattr(Signs, "score", lambda self, q, c: asked.append(c.device) or np.zeros((3, 300)))
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device: self)
    Scan(codec, queries).scores(torch.from_numpy(codes).as_subclass(Elsewhere))
    assert asked == [torch.device("cuda")]
