"""A step of training on examples that taught an outcome makes it likelier; on others it does not."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from whence.checks.tail_patch import tail_patch
from whence.engine.randomness import stream
from whence.errors import RunError
from whence.models.objectives import ClassifierObjective
from whence.objective import Listed
from whence.verdict import SUPPORTED


@cache
def trained() -> tuple[ClassifierObjective, Listed, list[Any], np.ndarray]:
    """A net trained on digits for a short while, its examples, queries, the examples' classes."""
    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype(np.float32)
    order = stream("tail patch test").permutation(len(x))
    x, y = x[order], y[order]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10))
        optimiser = torch.optim.SGD(net.parameters(), lr=0.3)
        for _ in range(60):
            nn.functional.cross_entropy(net(torch.from_numpy(x[:400])), torch.from_numpy(y[:400])).backward()
            optimiser.step()
            optimiser.zero_grad()
    examples = Listed(tuple((a, int(b)) for a, b in zip(x[:400], y[:400], strict=True)), tuple(map(str, y[:400])))
    queries = [(a, int(b)) for a, b in zip(x[400:430], y[400:430], strict=True)]
    return ClassifierObjective(net), examples, queries, y[:400]


def nearest(query: Any, examples: Listed, classes: np.ndarray, k: int = 6) -> list[int]:
    """Examples of the query's class that look most like it: what taught it, as far as anybody can say."""
    own = np.flatnonzero(classes == query[1])
    distance = [np.square(examples[int(i)][0] - query[0]).sum() for i in own]
    return [int(i) for i in own[np.argsort(distance)[:k]]]


def test_examples_that_teach_are_supported_and_others_are_not() -> None:
    objective, examples, queries, classes = trained()
    dice = stream("tail patch test", "random")
    right = [tail_patch(nearest(q, examples, classes), objective, examples, q).word for q in queries[:12]]
    wrong = [tail_patch(dice.choice(400, 6, replace=False), objective, examples, q).word for q in queries]
    assert np.mean([w == SUPPORTED for w in right]) >= 0.9
    assert np.mean([w == SUPPORTED for w in wrong]) <= 0.1


def test_examples_of_another_class_are_not_supported_in_place_of_the_right_ones() -> None:
    objective, examples, queries, classes = trained()
    other = [tail_patch(np.flatnonzero(classes == (q[1] + 1) % 10)[:6], objective, examples, q) for q in queries[:12]]
    own = [tail_patch(nearest(q, examples, classes), objective, examples, q) for q in queries[:12]]
    assert np.mean([v.word == SUPPORTED for v in other]) <= 0.1
    assert np.mean([a.effect > b.effect for a, b in zip(own, other, strict=True)]) >= 0.9


def test_the_weights_are_as_they_were_bit_for_bit() -> None:
    objective, examples, queries, classes = trained()
    before = {k: v.clone() for k, v in objective.module.state_dict().items()}
    flags = [p.requires_grad for p in objective.module.parameters()]
    tail_patch(nearest(queries[0], examples, classes), objective, examples, queries[0])
    assert all(torch.equal(v, before[k]) for k, v in objective.module.state_dict().items())
    assert [p.requires_grad for p in objective.module.parameters()] == flags


def test_the_verdict_does_not_hang_on_the_order_in_which_examples_are_named() -> None:
    objective, examples, queries, classes = trained()
    named = nearest(queries[1], examples, classes)
    one, other = (tail_patch(x, objective, examples, queries[1]) for x in (named, named[::-1]))
    assert one.effect == pytest.approx(other.effect, rel=0.2)


def test_too_few_examples_are_refused() -> None:
    objective, examples, queries, _ = trained()
    with pytest.raises(RunError, match="three or more"):
        tail_patch([1, 2], objective, examples, queries[0])
