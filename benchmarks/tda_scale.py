"""How long does a query of an index of a million examples take, and how near is that to what the memory allows?

    python -m benchmarks.tda_scale [--quick | --full] [--json] [--write] [--threads N] [--repeats N]

A synthetic index: 256 bytes of sign bits per example (8 layers of 240 bits and a scale each) and 2,064 bytes of int8,
1,000,000 examples (10,000,000 with --full: 2.6 and 20.6 GB in the folder of temporary files). Contents are random;
nothing here is about quality.

* ``scan``: the bits in memory, held against 1 to 10 queries, beside the memory-read limit: adding up the same bytes as
  64-bit words with the same threads, compiled by the same compiler, in turn with the scans. ``ratio`` is that of the
  fastest of each, part by part; ``ratio_of_pairs`` the median over repeats, with its 95 % bootstrap interval;
  ``ratio_of_processor_seconds`` as ``ratio``, disturbed less by other programs. ``bare``: 2,048 bits without scales.
* ``growth``: seconds against the number of examples, with the fitted slope and the largest distance from the line.
* ``query``: an index of `whence.store` on disk, end to end: scan, both ends, int8 re-score of 2 per cent, half
  from each end; checked and mapped for the first time, then again. ``memory``: the most that is allocated meanwhile.
* ``cold``: the same after the kernel was told to forget the files (posix_fadvise), beside reading them in full.
* ``device``: the bits on a GPU, scanned by Triton's kernel, beside the GPU's own limit: adding up the same bytes as
  64-bit words; the fastest of as many turns. null where there is no GPU or no Triton.
* ``s3``: the same from a server that speaks S3 on this machine (moto, one Python process), fetched and then kept.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from benchmarks.recording import arguments, publish
from whence.engine.codes import Numbers, Signs
from whence.engine.progress import progress
from whence.engine.randomness import stream, torch_stream
from whence.engine.scan import Scan, able, compiled, on_gpu, top
from whence.store import Index, Manifest

BITS = Signs({f"layer {i}": (240,) for i in range(8)})
BARE = Signs({"all": (2048,)}, scaled=False)
INT8 = Numbers({f"layer {i}": (256,) for i in range(8)})
AIM = 1.5
SHARD = 65_536
PARTS = 8
"""Parts that the examples are timed in."""
BEST = 0.01
"""Share of the examples that is scored again, from each end of the ranking."""
AT_ONCE = 8192
"""Rows of int8 that are read at once: 17 MB."""

READ = """
define i64 @read(ptr %codes, i64 %bytes) {{
start:
  br label %next
next:
  %at = phi i64 [0, %start], [%further, %next]
{loop}
  %further = add i64 %at, 256
  %more = icmp ult i64 %further, %bytes
  br i1 %more, label %next, label %done
done:
{sums}
  %found = call i64 @llvm.vector.reduce.add.v4i64(<4 x i64> %u7)
  ret i64 %found
}}
declare i64 @llvm.vector.reduce.add.v4i64(<4 x i64>)
"""


def reader(threads: int) -> Callable[[np.ndarray], None]:
    """Adds up an array as 64-bit words with so many threads; in eight sums, so that only memory is waited for."""
    loop = [f"%s{i} = phi <4 x i64> [zeroinitializer, %start], [%t{i}, %next]" for i in range(8)]
    loop.append("%p = getelementptr i8, ptr %codes, i64 %at")
    for i in range(8):
        loop.append(f"%q{i} = getelementptr i8, ptr %p, i64 {32 * i}")
        loop.append(f"%w{i} = load <4 x i64>, ptr %q{i}, align 1")
        loop.append(f"%t{i} = add <4 x i64> %s{i}, %w{i}")
    sums = [f"%u{i} = add <4 x i64> {f'%u{i - 1}' if i > 1 else '%t0'}, %t{i}" for i in range(1, 8)]
    text = READ.format(loop="\n".join(loop), sums="\n".join(sums))
    call = compiled(text, "read", ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64)

    pool = ThreadPoolExecutor(threads)

    def read(codes: np.ndarray) -> None:
        part = codes.nbytes // threads // 256 * 256
        if threads == 1:
            call(codes.ctypes.data, part)
        else:
            list(pool.map(lambda i: call(codes.ctypes.data + i * part, part), range(threads)))

    return read


def codes_of(codec: Signs | Numbers, rows: int, *names: object) -> np.ndarray:
    """Random rows with scales near 1."""
    rng = stream("tda_scale", codec.stride, *names)
    codes = np.frombuffer(rng.bytes(rows * codec.stride), np.uint8).reshape(rows, -1).copy()
    if codec.head:
        scales = torch.from_numpy(rng.uniform(0.5, 2, (rows, codec.head // 2))).bfloat16().view(torch.uint8)
        codes[:, : codec.head] = scales.numpy()
    return codes


def queries_of(codec: Signs | Numbers, count: int) -> dict[str, torch.Tensor]:
    return {k: torch.randn(count, *s, generator=torch_stream("query", k)) for k, s in codec.shapes.items()}


Work = Callable[[int, int], object]
"""Something done to the rows from one to another."""


def in_turn(works: dict[str, tuple[Work, int]], part: int, repeats: int) -> dict[str, np.ndarray]:
    """name -> [repeat, part, (seconds, processor seconds)] of each work on its number of rows, ``part`` rows at a time;
    all works once in each repeat."""
    found: dict[str, list[list[tuple[float, float]]]] = {name: [] for name in works}
    for work, rows in works.values():
        work(0, rows)
    for _ in range(repeats):
        for name, (work, rows) in works.items():
            row = []
            for at in range(0, rows, part):
                began = time.perf_counter(), time.process_time()
                work(at, min(at + part, rows))
                row.append((time.perf_counter() - began[0], time.process_time() - began[1]))
            found[name].append(row)
    return {name: np.array(rows) for name, rows in found.items()}


def fastest(times: np.ndarray) -> np.ndarray:
    """Seconds and processor seconds, each part at its fastest: what other programs do spoils a part, not a repeat."""
    return times.min(0).sum(0)


def against(times: np.ndarray, limit: np.ndarray) -> dict[str, Any]:
    """Fastest, and ratios to the limit."""
    row: dict[str, Any] = {"seconds": fastest(times)[0], "limit_seconds": fastest(limit)[0]}
    row["ratio"], row["ratio_of_processor_seconds"] = fastest(times) / fastest(limit)
    pairs = times[..., 0].sum(1) / limit[..., 0].sum(1)
    drawn = np.median(stream("bootstrap").choice(pairs, (2000, len(pairs))), 1)
    row["ratio_of_pairs"] = np.median(pairs)
    row = {name: round(float(value), 5) for name, value in row.items()}
    return {**row, "interval": np.quantile(drawn, [0.025, 0.975]).round(3).tolist()}


def scans(n: int, threads: int, repeats: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Scans in memory beside the read limit, and their growth with the number of examples."""
    read, rows = reader(threads), []
    growth: dict[str, Any] = {}
    for name, codec, counts in (("8 layers with scales", BITS, (1, 2, 5, 10)), ("bare", BARE, (1, 10))):
        codes = codes_of(codec, n)

        def reads(start: int, stop: int, codes: np.ndarray = codes) -> None:
            read(codes[start:stop])

        def scan(held: Scan, codes: np.ndarray = codes) -> Work:
            return lambda start, stop: held.scores(codes[start:stop])

        held = {count: Scan(codec, queries_of(codec, count)) for count in counts}
        works = {"limit": (reads, n)} | {str(count): (scan(h), n) for count, h in held.items()}
        times = in_turn(works, n // PARTS, repeats)
        for count in counts:
            row = {
                "layout": name,
                "bytes": codec.stride,
                "queries": count,
                **against(times[str(count)], times["limit"]),
            }
            row["gigabytes_per_second"] = round(codes.nbytes / row["seconds"] / 1e9, 2)
            row["limit_gigabytes_per_second"] = round(codes.nbytes / row["limit_seconds"] / 1e9, 2)
            rows.append(row)
        if codec is BITS:
            sizes = [n // 8, n // 4, n // 2, 3 * n // 4, n]
            for count in (1, 10):
                parts = {str(size): (scan(held[count]), size) for size in sizes}
                best = [fastest(t)[0] for t in in_turn(parts, n // PARTS, repeats).values()]
                slope, rest = np.polyfit(sizes, best, 1)
                far = np.abs(np.array(best) / np.polyval([slope, rest], sizes) - 1).max()
                growth[f"{count} queries"] = {
                    "examples": sizes, "seconds": [round(float(t), 5) for t in best],
                    "nanoseconds_per_example": round(float(slope) * 1e9, 2),
                    "seconds_at_none": round(float(rest), 5), "farthest_from_the_line": round(float(far), 3),
                }  # fmt: skip
    return rows, growth


def on_device(n: int, repeats: int) -> dict[str, Any] | None:
    """Scans of codes that lie on a GPU, beside what its memory allows."""
    if not torch.cuda.is_available() or not on_gpu("cuda"):
        return None
    from whence.engine.scan_triton import TritonScan

    device, rows = torch.device("cuda"), []
    codes = torch.from_numpy(codes_of(BITS, n)).to(device)
    words = codes.view(-1)[: codes.numel() // 8 * 8].view(torch.int64)
    works: dict[int, Callable[[], object]] = {0: words.sum}
    for count in (1, 2, 5, 10):
        held = TritonScan(BITS, queries_of(BITS, count), device)
        works[count] = lambda held=held: held.scores(codes)  # type: ignore[misc]
    best = dict.fromkeys(works, float("inf"))
    for turn in range(repeats + 3):
        for count, work in works.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            torch.cuda.synchronize()
            if turn >= 3:  # before that it is compiled, and memory is found
                best[count] = min(best[count], start.elapsed_time(end) / 1e3)
    for count, seconds in list(best.items())[1:]:
        each = {"queries": count, "seconds": seconds, "gigabytes_per_second": round(codes.numel() / seconds / 1e9, 1)}
        rows.append({**each, "ratio": round(seconds / best[0], 3)})
    return {
        "name": torch.cuda.get_device_name(), "examples": n, "bytes": codes.numel(), "triton": version("triton"),
        "limit_seconds": best[0], "limit_gigabytes_per_second": round(codes.numel() / best[0] / 1e9, 1), "scan": rows,
    }  # fmt: skip


def build(place: str, n: int, planes: dict[str, Signs | Numbers], **how: Any) -> None:
    """Write the index. Only the bits are new in each shard: what int8 rows hold is the same time to read."""
    strides = {name: codec.stride for name, codec in planes.items()}
    made = Manifest(model="synthetic", data="random", examples=n, planes=strides)
    same = codes_of(INT8, min(SHARD, n)) if "int8" in planes else None
    with Index.create(place, made, rows_per_shard=SHARD, **how) as index, progress("index", total=n) as advance:
        for at in range(0, n, SHARD):
            rows = min(SHARD, n - at)
            whole = {"bits": codes_of(BITS, rows, at)} | ({} if same is None else {"int8": same[:rows]})
            index.append({name: whole[name] for name in planes})
            advance(rows)


def ask(index: Index, held: Scan, queries: dict[str, torch.Tensor]) -> dict[str, float]:
    """One query of the index: seconds of its stages."""
    k = max(1, int(len(index) * BEST))
    spent = {"scan and both ends": time.perf_counter()}
    ends = top(((at, held.scores(codes)) for at, codes in index.blocks("bits")), k)
    spent["scan and both ends"] -= time.perf_counter()
    if "int8" in index.manifest.planes:
        assert ends.worst
        chosen = np.union1d(ends.best.rows, ends.worst.rows)
        spent |= {"read int8 rows": 0.0, "score them again": 0.0}

        def again() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for part in np.array_split(chosen, -(-len(chosen) // AT_ONCE)):
                times = [time.perf_counter()]
                rows = index.rows("int8", part)
                times.append(time.perf_counter())
                scores = INT8.score(queries, rows)
                times.append(time.perf_counter())
                spent["read int8 rows"] += times[0] - times[1]
                spent["score them again"] += times[1] - times[2]
                yield part, scores

        top(again(), 20)
    spent = {name: round(-seconds, 5) for name, seconds in spent.items()}
    return {**spent, "all": round(sum(spent.values()), 5)}


@contextmanager
def allocated() -> Iterator[list[int]]:
    """[the most bytes of memory that was allocated over what was before]: mapped files are no part of it."""

    def now() -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon"):
                return int(line.split()[1]) * 1024
        return 0

    before, most, over = now(), [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.002):
            most[0] = max(most[0], now() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield most
    finally:
        over.set()
        watcher.join()


def forget(folder: Path) -> int:
    """Tell the kernel to drop these files from its cache; gives their bytes."""
    size = 0
    for path in folder.iterdir():
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        size += os.fstat(handle).st_size
        os.close(handle)
    return size


def read_files(folder: Path) -> None:
    buffer = bytearray(1 << 22)
    for path in sorted(folder.iterdir()):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def indexes(n: int, repeats: int, folder: Path) -> dict[str, Any]:
    """Queries of an index on disk: first, again, cold."""
    began = time.perf_counter()
    both, bits = folder / "both", folder / "bits"
    build(str(both), n, {"bits": BITS, "int8": INT8})
    build(str(bits), n, {"bits": BITS})
    found: dict[str, Any] = {"build_seconds": round(time.perf_counter() - began, 1)}
    rows = []
    for count in (1, 10):
        queries = queries_of(INT8, count)
        held = Scan(BITS, {k: q[:, :240] for k, q in queries.items()})
        index = Index.open(both)
        first = ask(index, held, queries)
        with allocated() as most:
            again = [ask(index, held, queries) for _ in range(repeats)]
        trusted = ask(Index.open(both, trust=True), held, queries)
        best = min(again, key=lambda row: row["all"])
        rows.append({"queries": count, "first": first, "first_unchecked": trusted, "again": best, "memory": most[0]})
    found["query"] = rows
    cold: dict[str, list[float]] = {"read": [], "checked": [], "unchecked": []}
    held = Scan(BITS, queries_of(BITS, 1))
    size = 0
    for _ in range(max(2, repeats // 4)):
        for name, work in (
            ("read", lambda: read_files(bits)),
            ("checked", lambda: ask(Index.open(bits), held, {})),
            ("unchecked", lambda: ask(Index.open(bits, trust=True), held, {})),
        ):
            size = forget(bits)
            start = time.perf_counter()
            work()
            cold[name].append(time.perf_counter() - start)
    found["cold"] = {"bytes": size, **{f"{k}_seconds": round(min(v), 4) for k, v in cold.items()}}
    return found


def from_s3(n: int, folder: Path) -> dict[str, Any]:
    """An index in an object store: fetched with the first query, from the local cache with the next."""
    if find_spec("moto") is None or find_spec("s3fs") is None:
        return {"left out": "needs moto[server] and s3fs"}
    serve = "from moto.server import ThreadedMotoServer as S; s = S('127.0.0.1', 0); s.start(); "
    serve += "print(s.get_host_and_port()[1], flush=True); input()"
    server = subprocess.Popen(
        [sys.executable, "-c", serve],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert server.stdout
        port = next(line.strip() for line in server.stdout if line.strip().isdigit())  # it says other things too
        options = {"key": "k", "secret": "s", "endpoint_url": f"http://127.0.0.1:{port}"}
        import s3fs

        s3fs.S3FileSystem(**options).mkdir("bucket")
        how = {"options": options, "cache": folder / "cache"}
        build("s3://bucket/ix", n, {"bits": BITS}, **how)
        held = Scan(BITS, queries_of(BITS, 1))
        how["cache"] = folder / "another cache"
        index = Index.open("s3://bucket/ix", **how)
        first, again = ask(index, held, {}), ask(index, held, {})
        return {"examples": n, "bytes": n * BITS.stride, "fetched": first["all"], "again": again["all"]}
    finally:
        server.kill()
        server.wait()


def measure(n: int, threads: int, repeats: int) -> dict[str, Any]:
    """All of it."""
    torch.set_num_threads(threads)
    loads = [os.getloadavg()[0]]
    rows, growth = scans(n, threads, repeats)
    device = on_device(n, repeats)
    with TemporaryDirectory(prefix="tda_scale") as name:
        folder = Path(name)
        found = indexes(n, max(repeats // 3, 2), folder)
        s3 = from_s3(min(n, 262_144), folder)
    loads.append(os.getloadavg()[0])
    one = rows[0]
    return {
        "schema": "whence.benchmark.tda_scale/1", "examples": n, "threads": threads, "repeats": repeats,
        "load_before_and_after": [round(x, 1) for x in loads], "llvmlite": version("llvmlite"),
        "aim": AIM, "reached": one["ratio"] <= AIM, "scan": rows, "growth": growth, "device": device, **found, "s3": s3,
        "bytes_per_example": {"bits": BITS.stride, "int8": INT8.stride, "LoGRA in float32": 4 * 2048},
    }  # fmt: skip


def print_tables(result: dict[str, Any]) -> None:
    """The result as a person reads it."""
    loads = result["load_before_and_after"]
    print(f"{result['examples']:,} examples, {result['threads']} threads, load {loads[0]} before and {loads[1]} after")
    print("layout                queries  scan ms  limit ms  ratio  of pairs (95 %)     of processor time")
    for r in result["scan"]:
        low, high = r["interval"]
        print(
            f"{r['layout']:21} {r['queries']:7} {1e3 * r['seconds']:8.1f} {1e3 * r['limit_seconds']:9.1f} "
            f"{r['ratio']:6.2f} {r['ratio_of_pairs']:6.2f} ({low:.2f}, {high:.2f}) "
            f"{r['ratio_of_processor_seconds']:10.2f}"
        )
    for name, g in result["growth"].items():
        print(
            f"growth, {name}: {g['nanoseconds_per_example']} ns per example and {1e3 * g['seconds_at_none']:.2f} ms; "
            f"farthest from the line {100 * g['farthest_from_the_line']:.0f} %"
        )
    print(f"on a GPU: {result['device'] or 'there is none here'}")
    for r in result["query"]:
        print(f"index on disk, {r['queries']} queries: {r['memory'] / 2**20:.0f} MiB of memory")
        for name in ("first", "first_unchecked", "again"):
            print(f"  {name:15} " + ", ".join(f"{k} {v:.3f} s" for k, v in r[name].items()))
    print(f"cold: {result['cold']}\ns3: {result['s3']}\naim {AIM}, reached: {result['reached']}")


def main() -> None:
    """Print the tables, or the JSON object alone."""
    parser = arguments(str(__doc__))
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="250,000 examples")
    size.add_argument("--full", action="store_true", help="10,000,000 examples")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="of the scan and of the read limit"
    )
    parser.add_argument("--repeats", type=int, help="turns of the scans (30; 10 with --quick or --full)")
    options = parser.parse_args()
    repeats = options.repeats or (10 if options.quick or options.full else 30)
    if options.threads < 1 or repeats < 2:
        parser.error("--threads must be at least 1, --repeats at least 2")
    if not able():
        parser.error("the scan's kernel needs llvmlite and AVX2; without them there is nothing to measure here")
    n = 250_000 if options.quick else 10_000_000 if options.full else 1_000_000
    start = time.perf_counter()
    result = measure(n, options.threads, repeats)
    result["seconds"] = round(time.perf_counter() - start, 1)
    if options.json or options.write:
        publish("tda_scale", result, options)
    else:
        print_tables(result)


if __name__ == "__main__":
    main()
