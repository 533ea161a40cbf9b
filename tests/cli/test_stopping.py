"""A command that is stopped, by Ctrl-C or from outside, leaves no process behind and nothing that cannot go on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
from sentences import WORDS, tokenizer

import whence
from whence.cli import commands, run
from whence.store import Index

COMMAND = [sys.executable, "-c", "from whence.cli import main; main()"]


def begun(*arguments: object, **env: str) -> subprocess.Popen[str]:
    """The command in a session of its own, as a terminal starts it: a signal to the group reaches all who are in it."""
    path = os.pathsep.join([str(Path(whence.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **env},
    )  # fmt: skip


def family(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """All that it started, and they."""
    return psutil.Process(process.pid).children(recursive=True)


def wait_for(what: Callable[[], object], process: subprocess.Popen[str], seconds: float = 150) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.02)


def left(processes: list[psutil.Process], seconds: float = 20) -> list[str]:
    """Those that are still there after a while."""
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    return [" ".join(p.cmdline()) for p in alive if p.status() != psutil.STATUS_ZOMBIE]


def test_ctrl_c_ends_an_index_on_ray_and_it_goes_on_to_the_same_rows(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason='Ray is not installed: nothing was stopped (pip install "whence[ray]")')
    import transformers

    config = transformers.GPT2Config(
        vocab_size=WORDS, n_embd=16, n_layer=1, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=1
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    names = ("Anna", "Ben", "Clara", "the key", "the lamp", "the kitchen")
    texts = [{"text": f"{names[i % 6]} has {names[i // 6 % 6]} and {names[i // 36 % 6]}."} for i in range(240)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(t) + "\n" for t in texts))
    asked = ["index", tmp_path / "model", tmp_path / "texts.jsonl", "--batch", 4, "--format", "bits:256"]
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    process = begun(*asked, "-o", stopped, "--ray", "local:2")
    wait_for(lambda: list(stopped.glob("bits-*.rows")), process)
    others = family(process)
    assert any("raylet" in p.name() for p in others)
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(1)
    os.killpg(process.pid, signal.SIGINT)  # nobody waits for Ray to end
    out, err = process.communicate(timeout=100)
    assert (process.returncode, out) == (130, "")
    assert "Traceback" not in err
    assert left(others) == []
    there = Index.open(stopped)
    assert there.missing()
    assert there.verify() == []
    assert len(there) + len(list(stopped.glob("bits-*.rows"))) > 0
    kept = {p.name: p.stat().st_mtime_ns for p in stopped.glob("bits-*.rows")}
    assert run(commands.app, [*map(str, asked), "-o", str(stopped), "--resume"]) == 0
    assert all((stopped / name).stat().st_mtime_ns == at for name, at in kept.items()), "it began anew"
    assert run(commands.app, [*map(str, asked), "-o", str(whole)]) == 0
    a, b = Index.open(whole), Index.open(stopped)
    numbers = np.arange(len(texts))
    assert all(np.array_equal(a.rows(plane, numbers), b.rows(plane, numbers)) for plane in a.manifest.planes)
    assert set(a.tensors) == set(b.tensors)
    assert all(np.array_equal(a.tensors[k], b.tensors[k], equal_nan=True) for k in a.tensors)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_trial_in_several_processes_that_is_ended_takes_them_along(how: signal.Signals, tmp_path: Path) -> None:
    process = begun("prove", "leave_one_out", "kernel_shap", "--world", "twins", "--full", "--jobs", 2,
                    "--journal", tmp_path / "journal")  # fmt: skip
    wait_for(lambda: sum("spawn_main" in " ".join(p.cmdline()) for p in family(process)) >= 3, process)
    time.sleep(1)
    others = family(process)
    process.send_signal(how)
    out, _ = process.communicate(timeout=60)
    assert out == ""
    assert process.returncode != 0
    assert left(others) == []
