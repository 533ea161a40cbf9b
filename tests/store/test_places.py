"""An index in an object store is the index in a folder: the same rows, the same refusals."""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import whence
from whence.engine.randomness import stream
from whence.errors import OutputError, RunError
from whence.store import Index, Manifest

N = 90
ROWS = stream("places").integers(0, 256, (N, 2000), dtype=np.uint8)
MADE = Manifest(model="m", data="d", examples=N, planes={"bits": 2000})
BASIS = np.arange(5.0)


@dataclass
class Somewhere:
    url: str
    cache: Path
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def how(self) -> dict[str, Any]:
        return {"options": self.options, "cache": self.cache}

    def create(self) -> Index:
        return Index.create(self.url, MADE, {"basis": BASIS}, 16, **self.how)

    def open(self, **more: Any) -> Index:
        return Index.open(self.url, **self.how, **more)


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, Any]]:
    """A server that speaks S3, on this machine."""
    pytest.importorskip("s3fs", reason="NOT TRIED against S3: pip install 's3fs' 'moto[server]'")
    server = pytest.importorskip("moto.server", reason="NOT TRIED against S3: pip install 's3fs' 'moto[server]'")
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    running.start()
    host, port = running.get_host_and_port()
    options = {"key": "k", "secret": "s", "endpoint_url": f"http://{host}:{port}"}
    import s3fs

    s3fs.S3FileSystem(**options).mkdir("bucket")
    yield options
    running.stop()


STORES = pytest.mark.parametrize("somewhere", ["memory", "s3"], indirect=True)
"""What holds for a folder too is shown of folders elsewhere, or does not: a folder is not fetched."""


@pytest.fixture(params=["memory", "file", "s3"])
def somewhere(request: pytest.FixtureRequest, tmp_path: Path) -> Somewhere:
    if request.param == "file":
        return Somewhere(f"file://{tmp_path}/ix", tmp_path / "cache")
    name = tmp_path.name.replace("_", "-")
    if request.param == "memory":
        return Somewhere(f"memory://{name}/ix", tmp_path / "cache")
    return Somewhere(f"s3://bucket/{name}/ix", tmp_path / "cache", request.getfixturevalue("s3"))


def test_a_remote_index_is_the_local_one(somewhere: Somewhere, tmp_path: Path) -> None:
    local = Index.create(tmp_path / "local", MADE, {"basis": BASIS}, 16)
    for index in (local, somewhere.create()):
        with index:
            for at in range(0, N, 25):
                index.append({"bits": ROWS[at : at + 25]}, np.arange(N)[at : at + 25] + 5)
            index.delete([7, 50])
    local, remote = Index.open(tmp_path / "local"), somewhere.open(model="m", data="d")
    assert remote.manifest == local.manifest
    assert remote._contents == local._contents  # the checksums of every byte are in there
    assert (remote.ids == local.ids).all()
    assert (remote.alive == local.alive).all()
    for (a, mine), (b, other) in zip(local.blocks("bits", 7), remote.blocks("bits", 7), strict=True):
        assert a == b
        assert (mine == other).all()
    numbers = stream("numbers").integers(0, N, 50)
    assert (remote.rows("bits", numbers) == ROWS[numbers]).all()
    assert (remote.tensors["basis"] == BASIS).all()
    assert remote.nbytes == local.nbytes
    assert remote.verify() == []


def test_a_remote_build_goes_on_where_it_was(somewhere: Somewhere) -> None:
    with somewhere.create() as index:
        index.append({"bits": ROWS[:40]})
    with somewhere.open() as index:
        assert index.done == 40
        index.append({"bits": ROWS[40:]})
    with somewhere.open() as index:
        assert (np.concatenate([rows for _, rows in index.blocks("bits")]) == ROWS).all()
        index.delete([])
    assert sorted(c for _, c in ((e.first, e.count) for e in index._contents.entries)) == [10, 16, 16, 16, 16, 16]
    with pytest.raises(OutputError, match="there is one already"):
        somewhere.create()
    with pytest.raises(RunError, match="built of the model m"):
        somewhere.open(model="another")


def test_remote_workers_fill_one_index(somewhere: Somewhere) -> None:
    with somewhere.create() as index:
        for a, b in index.missing():
            if a != 32:
                somewhere.open().put(a, {"bits": ROWS[a:b]})
        assert index.adopt() == N - 16
        assert index.missing() == [(32, 48)]
        index.put(32, {"bits": ROWS[32:48]})
        index.adopt()
    assert (somewhere.open().rows("bits", np.arange(N)) == ROWS).all()


@STORES
def test_what_was_fetched_is_read_from_this_machine_the_next_time(somewhere: Somewhere, tmp_path: Path) -> None:
    with somewhere.create() as index:
        index.append({"bits": ROWS})
    assert not list(somewhere.cache.rglob("*.rows"))
    for _ in somewhere.open().blocks("bits"):
        pass
    fetched = sorted(somewhere.cache.rglob("bits-*.rows"))
    assert len(fetched) == 6
    stamps = [p.stat().st_mtime_ns for p in fetched]
    # A copy that was cut short is fetched again, the others are not.
    fetched[0].write_bytes(fetched[0].read_bytes()[:-1])
    assert (somewhere.open().rows("bits", np.arange(N)) == ROWS).all()
    assert [p.stat().st_mtime_ns for p in fetched][1:] == stamps[1:]
    # One that rotted is refused, and `verify` looks at what the store has, which mends the copy.
    rotten = fetched[3].read_bytes()
    fetched[3].write_bytes(rotten[:-1] + bytes([rotten[-1] ^ 1]))
    with pytest.raises(RunError, match=fetched[3].name):
        somewhere.open().rows("bits", np.arange(N))
    assert somewhere.open().verify() == []
    assert (somewhere.open().rows("bits", np.arange(N)) == ROWS).all()


def read_all(somewhere: Somewhere) -> None:
    found = somewhere.open()
    assert found.ids.size
    assert found.tensors["basis"].size
    assert list(found.blocks("bits"))


@STORES
def test_damage_in_the_store_is_refused(somewhere: Somewhere) -> None:
    with somewhere.create() as index:
        index.append({"bits": ROWS})
        index.delete([3])
    fs, root = index._place._fs, index._place._root  # type: ignore[attr-defined]
    for name, size in index._place.files().items():
        if name == "writer.lock":
            continue
        data = fs.cat_file(f"{root}/{name}")
        for at in (size // 3,) if somewhere.options else (0, size // 3, size - 1):
            fs.pipe_file(f"{root}/{name}", data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
            fresh = Somewhere(somewhere.url, somewhere.cache / f"{name}-{at}", somewhere.options)
            with pytest.raises(RunError) as caught:
                read_all(fresh)
            assert name in str(caught.value)
        fs.pipe_file(f"{root}/{name}", data)
    assert somewhere.open().verify() == []
    for name in (n for n in index._place.files() if n.endswith((".safetensors", ".bits")) or n.startswith("bits-")):
        data = fs.cat_file(f"{root}/{name}")
        fs.rm_file(f"{root}/{name}")
        # The copy that was fetched is here still; what counts is the store.
        assert [d.file for d in index.verify()] == [name]
        fs.pipe_file(f"{root}/{name}", data)


@STORES
def test_a_second_writer_of_a_store_is_refused_and_a_dead_one_is_succeeded(somewhere: Somewhere) -> None:
    index = somewhere.create()
    lock, fs = f"{index._place._root}/writer.lock", index._place._fs  # type: ignore[attr-defined]
    with pytest.raises(OutputError, match="through another Index"):
        somewhere.open().delete([])
    index.close()
    assert not fs.exists(lock)
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    note = {"host": socket.gethostname(), "pid": int(dead.stdout), "started": "1", "since": "then"}
    for change, refused in (
        ({"host": "elsewhere"}, "process .* of host elsewhere has been writing to it since then"),
        ({"pid": os.getppid(), "started": started(os.getppid())}, f"process {os.getppid()} of host"),
    ):
        fs.pipe_file(lock, json.dumps({**note, **change}).encode())
        with pytest.raises(OutputError, match=refused):
            somewhere.open().delete([])
    fs.pipe_file(lock, b"?")
    with pytest.raises(OutputError, match="another process is writing"):
        somewhere.open().delete([])
    for gone in ({}, {"pid": os.getppid()}):  # nobody has this number, or somebody else has it by now
        fs.pipe_file(lock, json.dumps({**note, **gone}).encode())
        with somewhere.open() as index:
            index.delete([])
    index = somewhere.open()
    index.delete([])
    del index
    gc.collect()
    assert not fs.exists(lock)


def started(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]


def test_killing_a_real_builder_of_an_s3_index_leaves_one_that_goes_on(s3: dict[str, Any], tmp_path: Path) -> None:
    somewhere = Somewhere("s3://bucket/killed/ix", tmp_path / "cache", s3)
    program = f"""
import json, sys, time
import numpy as np
from whence.store import Index
index = Index.open("{somewhere.url}", options=json.loads(sys.argv[1]), cache="{tmp_path}/other")
for at in range(index.done, {N}, 4):
    index.append({{"bits": np.full((4, 2000), at, np.uint8)[: {N} - at]}})
    print(index.done, flush=True)
    time.sleep(0.02)
"""
    somewhere.create().close()
    env = {**os.environ, "PYTHONPATH": str(Path(whence.__file__).parents[1])}
    command = [sys.executable, "-c", program, json.dumps(s3)]
    done = 0
    for rounds in range(3):
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=env, text=True) as process:
            assert process.stdout
            while done <= 16 * rounds + 8:
                done = int(process.stdout.readline())
            process.send_signal(signal.SIGKILL)
        index = somewhere.open()
        assert index.verify() == []
        assert index.done >= done
    with somewhere.open() as index:
        for at in range(index.done, N, 4):
            index.append({"bits": np.full((4, 2000), at, np.uint8)[: N - at]})
    found = np.concatenate([rows for _, rows in somewhere.open().blocks("bits")])
    assert (found[:, 0] == np.arange(N) // 4 * 4).all()


def test_a_store_that_cannot_be_reached_is_told_as_one_clear_error(tmp_path: Path, s3: dict[str, Any]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}"
    gone = {**s3, "endpoint_url": nobody, "config_kwargs": {"retries": {"max_attempts": 0}, "connect_timeout": 1}}
    with pytest.raises(RunError, match=r"read s3://bucket/ix/manifest\.json"):
        Index.open("s3://bucket/ix", options=gone, cache=tmp_path)
    with pytest.raises(OutputError, match="write to s3://bucket/ix"):
        Index.create("s3://bucket/ix", MADE, options=gone, cache=tmp_path)
    with pytest.raises(OutputError):
        Index.create("s3://no-such-bucket-here/ix", MADE, options=s3, cache=tmp_path)


def test_a_url_that_nothing_serves_is_told_as_one_clear_error(tmp_path: Path) -> None:
    for where in ("nonsense://x/ix", "file:///dev/null/ix"):
        with pytest.raises(RunError):
            Index.open(where, cache=tmp_path)
    with pytest.raises(RunError, match="there is no manifest"):
        Index.open("memory://nowhere/ix", cache=tmp_path)


def test_a_url_that_went_through_a_path_is_still_a_url(tmp_path: Path) -> None:
    Index.create(Path("memory://through/a/path"), MADE, cache=tmp_path).close()
    assert Index.open("memory://through/a/path", cache=tmp_path).done == 0
    assert not Path("memory:").exists()
