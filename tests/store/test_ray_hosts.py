"""Ray on several nodes: who writes an index, when a whole node dies, and where it lies in an object store."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from whence.engine.crew import SET, Workers
from whence.store import Index
from whence.store.lock import started
from whence.store.training_index import TrainingIndex, build

pytest.importorskip("ray", reason='Ray is not installed: nothing of hosts was tried (pip install "whence[ray]")')
os.environ.update(SET)

import ray_net

BUCKET = "s3://ray-hosts"
QUICK = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 3,
         "health_check_timeout_ms": 1000}  # fmt: skip
"""A head that finds out in two seconds that a node is gone; by itself it takes its time."""


@dataclass
class Hosts:
    """A head without cores and two nodes of one core each: raylets of their own, as on three machines."""

    cluster: Any
    nodes: list[Any]

    def ids(self) -> set[str]:
        return {n.node_id for n in self.nodes}


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pytest.MonkeyPatch]:
    """What the processes on all nodes find: this folder to import from, a server that speaks S3, and its keys."""
    server = pytest.importorskip("moto.server", reason="NOT TRIED against S3: pip install 's3fs' 'moto[server]'")
    s3fs = pytest.importorskip("s3fs", reason="NOT TRIED against S3: pip install 's3fs' 'moto[server]'")
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    running.start()
    host, port = running.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "anybody")
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
        s3fs.S3FileSystem().mkdir(BUCKET)
        yield patch
    running.stop()


@pytest.fixture(scope="module")
def hosts(environment: pytest.MonkeyPatch) -> Iterator[Hosts]:
    from ray.cluster_utils import Cluster

    how = {"object_store_memory": 80 << 20}
    cluster = Cluster(True, head_node_args={"num_cpus": 0, "include_dashboard": False, "_system_config": QUICK, **how})
    nodes = [cluster.add_node(num_cpus=1, **how) for _ in range(2)]
    yield Hosts(cluster, nodes)
    cluster.shutdown()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("alone") / "ix"
    made(place, ray_net.load(str(place.parent), os.getpid()))
    return place


def made(place: Path | str, what: Any, workers: Workers | None = None) -> TrainingIndex:
    index = build(*what, place, "auto", batch=4, per_shard=12, judge=False, workers=workers)
    index.index.close()
    return index


def same(one: Path | str, other: Path | str) -> bool:
    """Whole, and equal in every row and tensor."""
    a, b = Index.open(one), Index.open(other)
    assert a.manifest == b.manifest
    assert b.missing() == []
    assert b.verify() == []
    assert set(a.tensors) == set(b.tensors)
    assert all(np.array_equal(a.tensors[k], b.tensors[k]) for k in a.tensors)
    numbers = np.arange(ray_net.N)
    return all(np.array_equal(a.rows(plane, numbers), b.rows(plane, numbers)) for plane in (*a.manifest.planes, "ids"))


def test_two_nodes_write_one_index_in_an_object_store_though_one_dies_with_all_on_it(
    hosts: Hosts, alone: Path, tmp_path: Path
) -> None:
    load = partial(ray_net.load, str(tmp_path), os.getpid(), waits=True)
    place, gone = f"{BUCKET}/ix", hosts.nodes[1]
    killed: list[int] = []
    written: list[str] = []

    def kill() -> None:
        until = time.monotonic() + 100
        while time.monotonic() < until and len(list(tmp_path.glob("*.waits"))) < 2:
            time.sleep(0.05)
        written.extend(n for n in Index.open(place)._place.files() if n.startswith("bits-"))
        killed.extend(int(p.stem) for p in tmp_path.glob("*.worker") if p.read_text() == gone.node_id)
        hosts.cluster.remove_node(gone, allow_graceful=False)
        (tmp_path / "go").touch()

    killer = threading.Thread(target=kill)
    killer.start()
    made(place, load(), Workers.of(hosts.cluster.address, load))
    killer.join()
    assert {p.read_text() for p in tmp_path.glob("*.worker")} == hosts.ids(), "one node did it all"
    assert 2 <= len(written) < 10, "they were not in the midst of it"
    assert len(killed) == 1
    assert same(alone, place)
    until = time.monotonic() + 10
    while started(killed[0]) and time.monotonic() < until:
        time.sleep(0.1)
    assert not started(killed[0]), "the worker outlived its node"
