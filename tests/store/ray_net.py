"""A small net and its examples, as Ray's workers load them on any host; a worker says on which node it is."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from whence.engine.randomness import stream
from whence.models.objectives import ClassifierObjective
from whence.objective import Listed, Losses

N = 120


class Waits(ClassifierObjective):
    """In the midst of its second range, until there is a file ``go``."""

    place, calls = "", 0

    def losses(self, examples: Sequence[Any]) -> Losses:
        self.calls += 1
        if self.place and self.calls > 8:
            Path(self.place, f"{os.getpid()}.waits").touch()
            while not Path(self.place, "go").exists():
                time.sleep(0.02)
        return super().losses(examples)


def load(folder: str, driver: int, waits: bool = False) -> tuple[Waits, Listed]:
    """``driver``: the process that does not wait and does not say where it is. The others begin when there are two."""
    draw = stream("ray hosts")
    x, y = draw.normal(size=(N, 12)).astype(np.float32), draw.integers(0, 3, N)
    x[37] = np.nan
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        net = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 3))
    objective = Waits(net)
    if os.getpid() != driver:
        import ray

        objective.place = folder if waits else ""
        Path(folder, f"{os.getpid()}.worker").write_text(ray.get_runtime_context().get_node_id())
        until = time.monotonic() + 60
        while len(list(Path(folder).glob("*.worker"))) < 2 and time.monotonic() < until:
            time.sleep(0.02)
    return objective, Listed(tuple((a, int(b)) for a, b in zip(x, y, strict=True)), tuple(map(str, range(N))))
