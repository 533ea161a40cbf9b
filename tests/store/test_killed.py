"""A builder that is killed, that finds the disk full, or that is not alone: nothing is lost, nothing is half there."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import whence
from whence.errors import OutputError
from whence.store import Index

BUILDER = """
import sys
import numpy as np
from whence.errors import RunError
from whence.store import Index, Manifest

N = 230

def codes(a, b):
    rows = np.arange(a, b)[:, None]
    return {p: ((rows * 31 + np.arange(s) * 7) % 251).astype(np.uint8) for p, s in (("bits", 24), ("int8", 200))}

def ids(a, b):
    return np.arange(a, b) * 3

def opened(place):
    try:
        return Index.open(place)
    except RunError as error:
        assert "there is no manifest.json" in str(error), error
    made = Manifest(model="m", data="d", examples=N, planes={"bits": 24, "int8": 200})
    return Index.create(place, made, {"basis": np.arange(50.0)}, rows_per_shard=20)

def go_on(index, stop=N):
    for a in range(index.done, stop, 7):
        index.append(codes(a, min(a + 7, stop)), ids(a, min(a + 7, stop)))
"""

ON = """
index = opened(sys.argv[1])
print("on", flush=True)
with index:
    go_on(index)
"""

KILLING = """
import os, shutil, signal, time
from pathlib import Path

def found(place):
    return {p.name: p.read_bytes() for p in place.iterdir() if p.name != "writer.lock"}

def must_be_whole(place):
    reader = Index.open(place)
    assert not reader.verify(), (place, reader.verify())
    for plane, expected in codes(0, len(reader)).items():
        assert (reader.rows(plane, np.arange(len(reader))) == expected).all(), place
    return reader

def ended(child):
    status = os.waitpid(child, 0)[1]
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert killed or status == 0, status
    return killed

fsync, base = os.fsync, Path(sys.argv[1])
"""

RANDOM_MOMENTS = """
from whence.engine.randomness import stream

def build(place):
    with opened(place) as index:
        go_on(index, 110)

start = time.monotonic()
build(base / "once")
span, once = time.monotonic() - start, found(base / "once")
moments, kills, done = stream("kills"), 0, []
while kills < 24:
    place = base / f"{kills}-{len(done)}"
    opened(place).close()
    child = os.fork()
    if child == 0:
        try:
            build(place)
            os._exit(0)
        finally:
            os._exit(1)
    time.sleep(moments.uniform(0, span))
    os.kill(child, signal.SIGKILL)
    kills += ended(child)
    done.append(must_be_whole(place).done)
    os.fsync = lambda handle: None  # here, not in the processes that are killed
    build(place)  # the dead writer keeps nobody out
    os.fsync = fsync
    assert found(place) == once, set(found(place)) ^ set(once)
    shutil.rmtree(place)
print(kills, len(set(done)))
"""

EVERY_STEP = """
from whence.store import writing

left = [0]

def step():
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)

def stepping(call):
    def stepped(*args, **more):
        step()
        return call(*args, **more)
    return stepped

def half(path, head, rows):
    data = head + rows.tobytes()
    with path.open("wb") as handle:
        handle.write(data[: len(data) // 2])
        handle.flush()
        step()
        handle.write(data[len(data) // 2 :])

def build(place):
    with opened(place) as index:
        go_on(index, 8)
    with opened(place) as index:
        go_on(index, 25)
        index.delete([3, 60])
        index.delete([66])
        index.keep({"spectrum": np.ones(3)})
    with opened(place) as index:
        index.keep({"spectrum": np.ones(4)})
    with opened(place) as index:
        index.delete([66])

os.fsync = lambda handle: None
build(base / "once")
once = found(base / "once")
for step_number in range(1, 1000):
    place = base / str(step_number)
    child = os.fork()
    if child == 0:
        try:
            os.replace, os.unlink, os.open, os.fsync = map(stepping, (os.replace, os.unlink, os.open, os.fsync))
            writing.write_shard = half
            left[0] = step_number
            build(place)
            os._exit(0)
        finally:
            os._exit(1)
    killed = ended(child)
    if (place / "manifest.json").exists():
        must_be_whole(place)
    build(place)
    assert found(place) == once, (step_number, set(found(place)) ^ set(once))
    if not killed:
        print(step_number - 1)
        break
"""

FULL_DISK = """
import resource
from whence.errors import OutputError

def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

index = opened(sys.argv[1])
with index:
    index.append(codes(0, 50), ids(0, 50))
    for size in (100, 2500):  # not even the smaller plane fits, then only that one does
        limit(size)
        try:
            index.append(codes(50, 70), ids(50, 70)) if size == 100 else index.flush()
        except OutputError as error:
            print(error)
        assert index.done == 40 == len(Index.open(sys.argv[1]))
        assert not Index.open(sys.argv[1]).verify()
    limit(resource.RLIM_INFINITY)
    index.flush()
    assert index.done == 70
index.append(codes(70, 75), ids(70, 75))
limit(100)
try:
    index.close()
except OutputError as error:
    limit(resource.RLIM_INFINITY)
    index.close()
assert Index.open(sys.argv[1]).done == 75
try:
    with Index.open(sys.argv[1]) as index:
        index.append(codes(75, 79), ids(75, 79))
        limit(100)
        raise KeyError("something else")
except KeyError:
    pass  # what ended the work is what is told
limit(resource.RLIM_INFINITY)
with Index.open(sys.argv[1]) as index:
    assert index.done == 75
    go_on(index)
"""

HOLDER = """
import time
index = opened(sys.argv[1])
index.append(codes(0, 5), ids(0, 5))
print("on", flush=True)
time.sleep(60)
"""

FORKED = """
import os
from whence.errors import OutputError
index = opened(sys.argv[1])
index.append(codes(0, 5), ids(0, 5))
child = os.fork()
if child == 0:
    refused = 0
    append, other = lambda: index.append(codes(5, 6), ids(5, 6)), Index.open(sys.argv[1])
    for write in (append, index.flush, lambda: other.delete([])):
        try:
            write()
        except OutputError:
            refused += 1
    del index
    os._exit(refused)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
try:
    Index.open(sys.argv[1]).delete([])
except OutputError:
    index.close()
    print(Index.open(sys.argv[1]).done)
"""

MEMORY = """
import re
from pathlib import Path

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

size, stride, per = int(sys.argv[2]), 2048, 2048
made = Manifest(model="m", data="d", examples=size // stride, planes={"int8": stride})
rng = np.random.default_rng(0)
before = peak()
with Index.create(sys.argv[1], made, rows_per_shard=per) as index:
    for _ in range(0, size, per * stride):
        index.append({"int8": rng.integers(0, 256, (per, stride), dtype=np.uint8)})
built = peak() - before
index = Index.open(sys.argv[1], resident=8 << 20)
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
before, total = peak(), 0
for start, rows in index.blocks("int8"):
    total += int(rows.sum(dtype=np.int64))
index.rows("int8", rng.integers(0, len(index), 2000))
print(built, peak() - before, total)
"""


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(whence.__file__).parents[1]), "OMP_NUM_THREADS": "1"}


def start(program: str, *args: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", BUILDER + program, *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())


def output(program: str, *args: object) -> str:
    with start(program, *args) as process:
        out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return out


def wait_for_on(process: subprocess.Popen[str]) -> None:
    assert process.stdout
    assert process.stderr
    assert process.stdout.readline() == "on\n", process.stderr.read()


def files(place: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in place.iterdir() if p.name != "writer.lock"}


def builder() -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(BUILDER, names)
    return names


def test_killing_a_builder_at_random_moments_and_going_on_gives_the_bytes_of_an_uninterrupted_build(
    tmp_path: Path,
) -> None:
    kills, places = map(int, output(KILLING + RANDOM_MOMENTS, tmp_path).split())
    assert kills == 24
    assert places >= 2, "it was killed at one and the same moment"


def test_a_builder_killed_before_any_single_step_leaves_an_index_that_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    assert int(output(KILLING + EVERY_STEP, tmp_path)) > 60


def test_a_full_disk_is_told_with_what_is_kept_and_what_waits_and_nothing_is_lost(tmp_path: Path) -> None:
    told = output(FULL_DISK, tmp_path / "ix")
    assert told.count("File too large (40 rows are kept, 30 more wait in memory)") == 2
    assert "would work: a folder that can be written, with space left; then `flush`" in told
    output(ON, tmp_path / "once")
    Index.open(tmp_path / "ix").delete([])
    assert files(tmp_path / "ix") == files(tmp_path / "once")


def test_a_second_writer_is_refused_while_the_first_lives_and_readers_are_not(tmp_path: Path) -> None:
    output(ON, tmp_path / "ix")
    with start(HOLDER, tmp_path / "ix") as process:
        try:
            wait_for_on(process)
            assert Index.open(tmp_path / "ix").done == 230
            with pytest.raises(OutputError, match=rf"process {process.pid} of host .* has been writing to it since"):
                Index.open(tmp_path / "ix").delete([3])
        finally:
            process.kill()
    Index.open(tmp_path / "ix").delete([3])
    assert not Index.open(tmp_path / "ix").alive[1]


def test_one_process_writes_through_one_index_at_a_time(tmp_path: Path) -> None:
    build = builder()
    first = build["opened"](tmp_path / "ix")
    with pytest.raises(OutputError, match="through another Index"):
        Index.open(tmp_path / "ix").delete([])
    first.close()
    second = Index.open(tmp_path / "ix")
    second.append(build["codes"](0, 5), build["ids"](0, 5))
    with pytest.raises(OutputError, match="through another Index"):
        first.delete([])
    second.close()
    first.delete([3])  # it takes up what the second wrote
    assert len(first) == 5
    del first
    gc.collect()  # dropped without being closed
    Index.open(tmp_path / "ix").delete([6])
    assert Index.open(tmp_path / "ix").alive.tolist() == [True, False, False, True, True]


def test_a_forked_child_does_not_write_in_its_parents_place(tmp_path: Path) -> None:
    assert output(FORKED, tmp_path / "ix") == "5\n"


def test_an_index_made_anew_under_a_writer_is_not_written_to(tmp_path: Path) -> None:
    build = builder()
    build["opened"](tmp_path / "ix").close()
    index = Index.open(tmp_path / "ix")
    path = tmp_path / "ix" / "manifest.json"
    path.unlink()
    made = json.loads(json.dumps({"model": "other", "data": "d", "examples": 1, "planes": {"bits": 1}}))
    Index.create(tmp_path / "ix", build["Manifest"](**made)).close()
    with pytest.raises(whence.WhenceError, match="another index was put in its place"):
        index.append(build["codes"](0, 5))
    Index.open(tmp_path / "ix").delete([])  # and the lock is free again


def test_memory_stays_bounded_while_a_plane_is_built_and_scanned(tmp_path: Path) -> None:
    size = 96 << 20
    built, scanned, total = map(int, output(MEMORY, tmp_path / "ix", size).split())
    assert total > 100 * size  # it was read: random bytes are 127.5 on average
    assert built < 40 << 20  # 4 MiB a shard: the caller's, the waiting one, and the allocator's
    assert scanned < 24 << 20  # 8 MiB of shards stay mapped, one more is read
