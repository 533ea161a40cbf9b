"""Handwritten digits and a small net trained on some of them: what indexes are built of here."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

from whence.engine.randomness import stream
from whence.models.objectives import ClassifierObjective
from whence.objective import Listed

N = 300
"""Training examples."""


@cache
def world(order: str, hidden: int, steps: int, queries: int) -> tuple[ClassifierObjective, Listed, list[Any]]:
    """Objective, examples, and other digits to ask about. ``order``: the stream that shuffles the digits."""
    x, y = load_digits(return_X_y=True)
    rows = stream(order).permutation(len(x))
    x, y = (x[rows] / 16).astype(np.float32), y[rows]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 10))
        optimiser = torch.optim.SGD(net.parameters(), lr=0.3)
        for _ in range(steps):
            nn.functional.cross_entropy(net(torch.from_numpy(x[:N])), torch.from_numpy(y[:N])).backward()
            optimiser.step()
            optimiser.zero_grad()
    pairs = [(a, int(b)) for a, b in zip(x, y, strict=True)]
    return ClassifierObjective(net), Listed(tuple(pairs[:N]), tuple(map(str, y[:N]))), pairs[N : N + queries]
