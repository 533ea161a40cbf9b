"""Training again without a class of digits ends its recognition; without others it does not."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from whence.checks.leave_k_out import leave_k_out, near_duplicates
from whence.engine.randomness import stream
from whence.errors import RunError
from whence.verdict import SUPPORTED

N = 200


@cache
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    x, y = load_digits(return_X_y=True)
    order = stream("leave k out test").permutation(len(x))
    return torch.from_numpy((x[order] / 16).astype(np.float32)), torch.from_numpy(y[order])


def retrain_for(query: int) -> Any:
    """(keep, seed) -> probability of the query's own class after training on what is kept."""
    x, y = digits()

    def retrain(keep: np.ndarray, seed: int) -> float:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = nn.Linear(64, 10)
        kept = torch.from_numpy(np.flatnonzero(keep))
        optimiser = torch.optim.Adam(net.parameters(), lr=0.1)
        for _ in range(25):
            optimiser.zero_grad()
            nn.functional.cross_entropy(net(x[kept]), y[kept]).backward()
            optimiser.step()
        with torch.no_grad():
            return float(net(x[query]).softmax(-1)[y[query]])

    return retrain


def recognised(n: int) -> list[int]:
    everything = np.ones(N, bool)
    return [q for q in range(N, N + 40) if retrain_for(q)(everything, 0) > 0.8][:n]


def test_leaving_out_what_taught_it_is_supported_and_others_are_not() -> None:
    _, y = digits()
    dice = stream("leave k out test", "others")
    right, wrong = [], []
    for q in recognised(6):
        own = np.flatnonzero(y[:N].numpy() == int(y[q]))
        others = dice.choice(np.setdiff1d(np.arange(N), own), len(own), replace=False)
        right.append(leave_k_out(own, retrain_for(q), N, looks=(8,)).word)
        wrong.append(leave_k_out(others, retrain_for(q), N, looks=(8,)).word)
    assert np.mean([w == SUPPORTED for w in right]) >= 0.9
    assert np.mean([w == SUPPORTED for w in wrong]) <= 0.1


def test_near_duplicates_go_with_the_example_that_is_named() -> None:
    seen: list[int] = []

    def retrain(keep: np.ndarray, seed: int) -> float:
        seen.append(int((~keep).sum()))
        return float(keep[[1, 4]].any())  # either of two copies is enough

    alone = leave_k_out([1], retrain, 20, looks=(8,))
    assert alone.effect == 0
    together = leave_k_out([1], retrain, 20, groups=[[1, 4]], looks=(8,))
    assert together.effect == 1
    assert set(seen) == {0, 1, 2}


def test_copies_are_found_and_others_are_not() -> None:
    dice = stream("leave k out test", "features")
    x = dice.normal(size=(50, 16))
    x[7], x[30], x[12] = 2 * x[3], x[3] + 1e-3, x[44]
    assert sorted(map(sorted, near_duplicates(x))) == [[3, 7, 30], [12, 44]]


@pytest.mark.parametrize("named", [[], [500], list(range(150))])
def test_what_cannot_be_left_out_is_refused(named: list[int]) -> None:
    with pytest.raises(RunError):
        leave_k_out(named, lambda keep, seed: 0.0, N)
