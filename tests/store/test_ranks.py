"""A model that two processes hold between them: its gradients, and the index that both write, are those of one."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import whence
from whence.engine import ranks
from whence.engine.gradients import GradientBank
from whence.errors import MethodError, RunError
from whence.models.objectives import ClassifierObjective
from whence.store import Index
from whence.store.training_index import build

N, HOW = 44, {"batch": 4, "per_shard": 8, "judge": False}
"""44 rows are six ranges: two ranks take three turns, the last range is shorter."""
PROGRAM = '''
"""Two ranks of a small net with a tied weight; run by torchrun with a folder."""

import json, os, sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from torch import nn
from whence.engine.gradients import GradientBank
from whence.engine.randomness import stream
from whence.errors import WhenceError
from whence.models.objectives import fingerprint_of
from whence.objective import Listed, Losses
from whence.store.training_index import build, opened

torch.set_num_threads(1)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(12), nn.Linear(12, 20), nn.Linear(20, 12)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Doubled(nn.Linear):
    """A layer that is not what it seems."""
    def forward(self, x):
        return 2 * super().forward(x)


class Net(nn.Module):
    def __init__(self, last=nn.Linear):
        super().__init__()
        self.words, self.places = nn.Embedding(30, 12), nn.Embedding(8, 12)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.last, self.head = last(12, 12), nn.Linear(12, 30, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids):
        x = self.words(ids) + self.places(torch.arange(ids.shape[1])[None])
        for block in self.blocks:
            x = block(x)
        return self.head(self.last(x))


class Texts:
    name, dies = "two ranks", None

    def __init__(self, module):
        self.module = module.eval()

    def losses(self, examples):
        if self.dies and list(Path(self.dies).glob("bits-*.rows")):
            os._exit(7)
        ids = torch.stack([torch.as_tensor(e[0]) for e in examples])
        logits = self.module(ids)[:, :-1].transpose(1, 2)
        loss = nn.functional.cross_entropy(logits, ids[:, 1:], reduction="none").sum(1)
        return Losses(loss * torch.tensor([e[1] for e in examples]))

    sampled = lambda self, examples, seed: self.losses(examples)

    def fingerprint(self):
        return fingerprint_of(self.module)


class Broken(Listed):
    place = None

    def __getitem__(self, number, /):
        if number == 30 and os.environ["RANK"] == "1" and Path(self.place, "manifest.json").exists():
            raise ValueError("example 30 cannot be read")
        return super().__getitem__(number)


def made(parted=False, kind=Listed, **how):
    ids = stream("ranks").integers(0, 30, (44, 8))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        net = Net(**how)
    if parted:
        from torch.distributed.fsdp import fully_shard
        for block in net.blocks:
            fully_shard(block)
        fully_shard(net)
    examples = tuple((row, float("nan") if i in (9, 31) else 1.0) for i, row in enumerate(ids))
    return Texts(net), kind(examples, tuple(map(str, range(44))))


def main(folder):
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank = torch.distributed.get_rank()
    how = {"batch": 4, "per_shard": 8, "judge": False}
    said = {}
    near, examples = made()
    far, _ = made(True)
    want = GradientBank(near).gradients([examples[i] for i in range(4)])
    bank = GradientBank(far)
    flags = [p.requires_grad for p in far.module.parameters()]
    for own in ((3, 1), (1, 3), (2, 4)):  # each rank has as many as it likes
        rows = [*range(own[rank])]
        got = bank.gradients([examples[i] for i in rows])
        said[str(own)] = all(torch.equal(got[k], want[k][rows]) for k in want)
    said["flags"] = flags == [p.requires_grad for p in far.module.parameters()] and all(flags)
    said["grads"] = [n for n, p in far.module.named_parameters() if p.grad is not None]
    odd = GradientBank(made(True, last=Doubled)[0])
    try:
        odd.check(examples[0])
    except WhenceError as error:
        said["odd"] = error.found
    with build(far, examples, folder + "/whole", **how) as index:
        said["skipped"] = index.fitted.skipped
        said["best"] = [f.numbers.tolist() for f in index.search([examples[5]], 5)]
    Broken.place = folder + "/broken"
    try:
        build(*made(True, Broken), folder + "/broken", **how)
    except WhenceError as error:
        said["broken"] = [str(error.found), str(error.would_work)]
    build(*made(True), folder + "/broken", resume=True, **how).index.close()
    Path(folder, f"{rank}.json").write_text(json.dumps(said))
    objective, examples = made(True)  # and at last rank 1 dies
    objective.dies = folder + "/dead" if rank == 1 else None
    build(objective, examples, folder + "/dead", **how)


if __name__ == "__main__":
    main(*sys.argv[1:])
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("ranks")
    (found / "ranks_subject.py").write_text(PROGRAM)
    return found


def launched(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    path = os.pathsep.join([str(Path(whence.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [*command, str(folder / "ranks_subject.py"), str(folder)], capture_output=True, text=True, timeout=200,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip


def subject(folder: Path) -> Any:
    """The program, as a module of this process."""
    spec = importlib.util.spec_from_file_location("ranks_subject", folder / "ranks_subject.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def said(folder: Path) -> list[dict[str, Any]]:
    """What each of the two ranks found."""
    done = launched(folder)
    assert (folder / "1.json").exists(), done.stderr[-3000:]
    assert done.returncode != 0
    assert "exitcode  : 7" in done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def same(one: Path, other: Path) -> bool:
    a, b = Index.open(one), Index.open(other)
    assert a.manifest == b.manifest
    assert a.missing() == b.missing() == []
    assert b.verify() == []
    assert set(a.tensors) == set(b.tensors)
    assert all(np.array_equal(a.tensors[k], b.tensors[k], equal_nan=True) for k in a.tensors)
    return all(np.array_equal(a.rows(p, np.arange(N)), b.rows(p, np.arange(N))) for p in (*a.manifest.planes, "ids"))


def test_gradients_of_a_sharded_model_are_those_of_the_whole_one(said: list[dict[str, Any]]) -> None:
    for rank in said:
        assert all(rank[str(own)] for own in ((3, 1), (1, 3), (2, 4)))
        assert rank["flags"]
        assert rank["grads"] == []


def test_a_layer_that_is_not_what_it_seems_is_found_on_a_sharded_model_too(said: list[dict[str, Any]]) -> None:
    for rank in said:
        assert "they differ from autograd's: last" in rank["odd"]


def test_the_index_that_two_ranks_write_is_that_of_one_process(said: list[dict[str, Any]], folder: Path) -> None:
    with build(*subject(folder).made(), folder / "alone", **HOW) as alone:
        best = [f.numbers.tolist() for f in alone.search([alone.fitted.examples[5]], 5)]
    assert same(folder / "alone", folder / "whole")
    for rank in said:
        assert rank["skipped"] == [9, 31]
        assert rank["best"] == best
    assert not list((folder / "whole").glob("skipped-*"))


def test_what_one_rank_cannot_read_is_said_on_all_and_the_build_goes_on_later(
    said: list[dict[str, Any]], folder: Path
) -> None:
    for rank in said:
        found, works = rank["broken"]
        assert "rank 1" in found
        assert "example 30 cannot be read" in found
        assert "--resume" in works
    build(*subject(folder).made(), folder / "undisturbed", **HOW).index.close()
    assert same(folder / "undisturbed", folder / "broken")


def test_a_rank_that_dies_ends_the_others_and_one_process_can_go_on(said: list[dict[str, Any]], folder: Path) -> None:
    objective, examples = subject(folder).made()
    left = Index.open(folder / "dead")
    assert left.missing()
    written = {p.name for p in (folder / "dead").glob("bits-*.rows")}
    assert written, "it was not in the midst of it"
    build(objective, examples, folder / "dead", resume=True, **HOW).index.close()
    build(objective, examples, folder / "another", **HOW).index.close()
    assert same(folder / "another", folder / "dead")


def test_weights_that_are_parted_otherwise_are_refused() -> None:
    kind = type("FullyShardedDataParallel", (torch.nn.Linear,), {})
    objective = ClassifierObjective(torch.nn.Sequential(kind(3, 2)))
    with pytest.raises(MethodError, match="one row of all weights"):
        GradientBank(objective)


def test_alone_there_is_nothing_to_agree_on() -> None:
    ranks.agree("anything")
    assert (ranks.count(), ranks.number(), ranks.on_any(True), ranks.on_any(False)) == (1, 0, True, False)
    with pytest.raises(RunError, match="it is late"):
        ranks.agree("anything", "it is late")
