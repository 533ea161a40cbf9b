"""An index that Ray's workers built is the one that a process alone builds, whoever dies; scoring there is the same."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from whence.engine.crew import SET, Workers
from whence.errors import RunError
from whence.store import Index
from whence.store.ray_workers import _builder, forget, gather
from whence.store.training_index import TrainingIndex, build, opened

pytest.importorskip("ray", reason='Ray is not installed: nothing of workers was tried (pip install "whence[ray]")')
os.environ.update(SET)

N, PER, BATCH, NAN = 240, 16, 8, (37, 201)
SUBJECT = '''
"""A small net and its examples, as a worker loads them: one that waits, or cannot read an example, if that is asked."""

import os, time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from whence.engine.randomness import stream
from whence.models.objectives import ClassifierObjective
from whence.objective import Listed


class Waits(ClassifierObjective):
    """In the midst of its second or third range, until there is a file ``go``."""
    place, calls = None, 0

    def losses(self, examples):
        self.calls += 1
        if self.place and self.calls > 7:
            Path(self.place, f"{os.getpid()}.waits").touch()
            while not Path(self.place, "go").exists():
                time.sleep(0.02)
        return super().losses(examples)


class Broken(Listed):
    place = None

    def __getitem__(self, number, /):
        if self.place and number == 100:
            with open(self.place, "a") as tries:
                tries.write("x")
            raise ValueError("example 100 cannot be read")
        return super().__getitem__(number)


def load(folder, driver, waits=False, broken=False, together=1):
    """``driver``: the process that is spared the wait and the damage. ``together``: workers that begin at once, so
    that a quick one does not do the work of a slow one."""
    draw = stream("ray workers")
    x, y = draw.normal(size=(240, 12)).astype(np.float32), draw.integers(0, 3, 240)
    x[[37, 201]] = np.nan
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        net = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 3))
    objective = Waits(net)
    examples = Broken(tuple((a, int(b)) for a, b in zip(x, y)), tuple(map(str, range(240))))
    if os.getpid() != driver:
        objective.place = folder if waits else None
        Path(folder, f"{os.getpid()}.worker").touch()
        until = time.monotonic() + 120
        while len(list(Path(folder).glob("*.worker"))) < together and time.monotonic() < until:
            time.sleep(0.02)
        if broken:
            object.__setattr__(examples, "place", str(Path(folder, "tries")))
    return objective, examples
'''


@pytest.fixture(scope="module", autouse=True)
def subject(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The module above, where workers find it too."""
    folder = tmp_path_factory.mktemp("subject")
    (folder / "ray_subject.py").write_text(SUBJECT)
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), *([before] if before else [])])
    sys.path.insert(0, str(folder))
    import ray_subject

    yield ray_subject
    sys.path.remove(str(folder))
    del sys.modules["ray_subject"]
    os.environ.pop("PYTHONPATH")
    if before:
        os.environ["PYTHONPATH"] = before


@pytest.fixture(scope="module")
def alone(subject: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The index of one process."""
    place = tmp_path_factory.mktemp("alone") / "ix"
    made(place, subject.load(place.parent, os.getpid()))
    return place


@pytest.fixture(scope="module")
def three(subject: Any) -> Iterator[Any]:
    """One Ray of three cores for several tests."""
    import ray

    ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False, object_store_memory=80 << 20,
             logging_level="ERROR")  # fmt: skip
    yield ray
    ray.shutdown()


def made(place: Path | str, what: Any, workers: Workers | None = None, resume: bool = False) -> TrainingIndex:
    index = build(*what, place, "auto", batch=BATCH, per_shard=PER, judge=False, workers=workers, resume=resume)
    index.index.close()
    return index


def contents(place: Path) -> dict[str, bytes]:
    """Every file of an index that counts: the manifest, which lists the shards, and these, and the tensors."""
    body = json.loads((place / "manifest.json").read_text())
    listed = ["manifest.json", body["tensors"]["file"], body["learned"]["file"]]
    for first, count, sums in body["shards"]:
        listed += [f"{plane}-{first:012d}-{count:07d}-*-{crc}.rows" for plane, crc in sums.items()]
    return {name: next(place.glob(name)).read_bytes() for name in listed}


def same_rows(one: Path, other: Path) -> bool:
    """Whether two indexes have the same rows, however these are cut into shards."""
    a, b = Index.open(one), Index.open(other)
    numbers = np.arange(N)
    assert len(a) == len(b) == N
    assert set(a.tensors) == set(b.tensors)
    assert np.array_equal(a.tensors["skipped"], b.tensors["skipped"])
    return all(np.array_equal(a.rows(plane, numbers), b.rows(plane, numbers)) for plane in (*a.manifest.planes, "ids"))


@pytest.mark.parametrize(
    ("address", "says"), [("here", "no such address"), ("ray://head:10001", "no such address"), ("[::1]:no", "no such")]
)
def test_what_is_no_address_is_refused(address: str, says: str, subject: Any) -> None:
    with pytest.raises(RunError, match=says):
        Workers.of(address, subject.load)


def test_an_address_where_nobody_answers_is_refused_before_any_work(subject: Any, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    load = partial(subject.load, tmp_path, os.getpid())
    began = time.monotonic()
    with pytest.raises(RunError, match="nobody answers"):
        made(tmp_path / "ix", load(), Workers(address, load))
    assert time.monotonic() - began < 5
    assert not list(tmp_path.iterdir())


def test_an_address_where_something_else_answers_is_refused(subject: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            line, _ = server.accept()
            line.sendall(b"HTTP/1.1 400 Bad Request")
            line.close()

        web = threading.Thread(target=answer)
        web.start()
        with pytest.raises(RunError, match="something else than Ray"):
            Workers.of(f"127.0.0.1:{server.getsockname()[1]}", subject.load)
        web.join()


def test_one_process_names_the_examples_without_a_gradient_wherever_they_are(alone: Path) -> None:
    assert tuple(Index.open(alone).tensors["skipped"]) == NAN


def test_what_a_worker_wrote_before_everybody_died_stays_and_its_examples_without_a_gradient_are_known(
    subject: Any, alone: Path, tmp_path: Path
) -> None:
    """As when machines fail all at once: rows that nobody listed, and beside them a gap."""
    load = partial(subject.load, tmp_path, os.getpid())
    objective, examples = load()

    class Stops(type(examples)):  # type: ignore[misc]
        left = 0

        def __getitem__(self, number: int, /) -> Any:
            Stops.left -= 1
            if not Stops.left:
                raise KeyboardInterrupt
            return super().__getitem__(number)

    stops = Stops(examples.items, examples.labels)
    made(tmp_path / "counted", (objective, stops))
    Stops.left = -Stops.left - 12 * BATCH  # twelve batches before the end of the last pass
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path / "ix", (objective, stops))
    index = Index.open(tmp_path / "ix")
    assert 0 < len(index) < 192
    assert "skipped" not in index.tensors or 201 not in index.tensors["skipped"]
    work = _builder(str(tmp_path / "ix"), load, ("0", "2"), BATCH)
    for first in (192, 208):
        work(first, first + PER)
    made(tmp_path / "ix", load(), resume=True)
    assert same_rows(tmp_path / "ix", alone)
    assert opened(tmp_path / "ix", objective, examples).fitted.skipped == NAN
    assert not list((tmp_path / "ix").glob("skipped-*"))


def test_a_note_of_another_index_in_the_same_folder_is_not_believed(subject: Any, alone: Path, tmp_path: Path) -> None:
    load = partial(subject.load, tmp_path, os.getpid())
    made(tmp_path / "ix", load())
    stale = b'{"manifest": {"model": "another"}, "skipped": [5]}'
    (tmp_path / "ix" / "skipped-000000000000-000000000016.json").write_bytes(stale)
    with Index.open(tmp_path / "ix") as index:
        gather(index, str(tmp_path / "ix"))
        assert tuple(index.tensors["skipped"]) == NAN
    forget(str(tmp_path / "ix"))
    assert contents(tmp_path / "ix") == contents(alone)


def test_workers_write_the_bytes_of_one_process_and_a_ray_that_was_started_is_ended(
    subject: Any, alone: Path, tmp_path: Path
) -> None:
    import ray

    load = partial(subject.load, tmp_path, os.getpid(), together=2)
    index = made(tmp_path / "ix", load(), Workers("local", load, count=2))
    assert not ray.is_initialized()
    assert len(list(tmp_path.glob("*.worker"))) == 2
    assert index.fitted.skipped == NAN
    assert contents(tmp_path / "ix") == contents(alone)
    assert Index.open(tmp_path / "ix").verify() == []


def test_two_of_three_workers_are_killed_midway_and_the_index_is_whole(
    subject: Any, alone: Path, three: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load = partial(subject.load, tmp_path, os.getpid(), waits=True)
    killed: list[int] = []
    written: list[str] = []

    def kill() -> None:
        until = time.monotonic() + 300
        while time.monotonic() < until and len(list(tmp_path.glob("*.waits"))) < 3:
            time.sleep(0.05)
        written.extend(p.name for p in (tmp_path / "ix").glob("bits-*.rows"))
        for place in list(tmp_path.glob("*.waits"))[:2]:
            os.kill(int(place.stem), signal.SIGKILL)
            killed.append(int(place.stem))
        (tmp_path / "go").touch()

    killer = threading.Thread(target=kill)
    killer.start()
    index = made(tmp_path / "ix", load(), Workers("local", load))
    killer.join()
    assert len(killed) == 2
    assert 3 <= len(written) <= 12, "they were not in the midst of it"
    assert len(list(tmp_path.glob("*.worker"))) >= 3
    assert three.is_initialized(), "a Ray that was joined is left alone"
    assert capsys.readouterr().out == "", "Ray's news may not stand where JSON stands"
    assert index.fitted.skipped == NAN
    assert contents(tmp_path / "ix") == contents(alone)


def test_an_example_that_always_fails_is_named_and_everything_else_is_kept(
    subject: Any, alone: Path, three: Any, tmp_path: Path
) -> None:
    load = partial(subject.load, tmp_path, os.getpid(), broken=True)
    with pytest.raises(RunError, match=r"examples 96\.\.111 failed 3 times.*example 100 cannot be read") as caught:
        made(tmp_path / "ix", load(), Workers("local", load, count=1))
    assert "--resume" in caught.value.would_work
    assert (tmp_path / "tries").read_text() == "xxx"
    index = Index.open(tmp_path / "ix")
    assert index.missing() == [(96, 112)]
    with pytest.raises(RunError, match="holds 96 of 240"):
        opened(tmp_path / "ix", *load())
    made(tmp_path / "ix", load(), resume=True)  # in this process, where the example can be read
    assert contents(tmp_path / "ix") == contents(alone)


def test_a_place_that_workers_cannot_reach_is_refused_with_the_reason(subject: Any, three: Any, tmp_path: Path) -> None:
    load = partial(subject.load, tmp_path, os.getpid())
    with pytest.raises(RunError, match="it is not there") as caught:
        made("memory://ray-workers/ix", load(), Workers("local", load, count=1))
    assert "a folder that all hosts see" in caught.value.would_work


def test_scores_by_workers_are_those_of_one_process(subject: Any, alone: Path, three: Any, tmp_path: Path) -> None:
    load = partial(subject.load, tmp_path, os.getpid())
    objective, examples = load()
    queries = [examples[3], examples[50]]
    build(objective, examples, tmp_path / "int8", "int8", judge=False).index.close()
    for place in (alone, tmp_path / "int8"):
        with opened(place, objective, examples) as index:
            near = index.search(queries, 7)
            far = index.search(queries, 7, workers=Workers("local", load, count=1))
        for a, b in zip(near, far, strict=True):
            assert np.array_equal(a.numbers, b.numbers)
            assert np.array_equal(a.scores, b.scores)
            assert np.array_equal(a.low_numbers, b.low_numbers)
            assert (a.recall, a.scanned) == (b.recall, b.scanned)
    assert not list(tmp_path.glob("*.worker")), "no model is loaded to score"
