"""A process that does named works when told to, from the side of the benchmark: see `peer_turns`, which runs in it."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers import ROOT, python_of

PATIENCE = 1_200.0
"""Seconds that one answer may take."""
ALONE = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
_NUMBERS = count()


class FailedError(Exception):
    """A side could not be installed, did not start or did not do its work; the reason in one line."""


def python_for(name: str) -> str:
    """The interpreter of a peer's own environment, made if need be; ours is this one. Raises FailedError."""
    if name == "whence":
        return sys.executable
    try:
        return str(python_of(name))
    except subprocess.CalledProcessError as error:
        raise FailedError(f"not installed: {' '.join(map(str, error.cmd[-3:]))}") from None


class Side:
    """``command`` [folder] runs :func:`benchmarks.peer_turns.serve`. ``package``: its name and version."""

    def __init__(self, name: str, folder: Path, command: Sequence[str], more: Mapping[str, str] | None = None) -> None:
        number = next(_NUMBERS)
        self._said = (folder / f"{name}-{number}.stderr").open("w+")
        self._out = folder / f"{name}-{number}.npz"
        self._process = subprocess.Popen(
            [*command, str(folder)], cwd=ROOT, env={**os.environ, **ALONE, **OFFLINE, **(more or {})},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True,
        )  # fmt: skip
        self.package = str(self._answer()["ready"])

    def turn(self, work: str, memory: bool = False) -> dict[str, Any]:
        """{"cpu", "wall", "mib" with memory, "found"} of one work; ``found`` holds the arrays it gave. Raises
        FailedError."""
        assert self._process.stdin
        self._process.stdin.write(json.dumps({"work": work, "memory": memory, "out": str(self._out)}) + "\n")
        self._process.stdin.flush()
        spent = self._answer()
        with np.load(self._out) as found:
            return {**spent, "found": dict(found)}

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        ready, _, _ = select.select([self._process.stdout], [], [], PATIENCE)
        if not ready:
            self._process.kill()
            raise FailedError(f"no answer within {PATIENCE:.0f} seconds")
        line = self._process.stdout.readline()
        if not line:
            self._said.seek(0)
            last = self._said.read().strip().splitlines()[-1:]
            raise FailedError(last[0] if last else f"it ended with {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "failed" in answer:
            raise FailedError(answer["failed"])
        return answer

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()
        self._said.close()

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
