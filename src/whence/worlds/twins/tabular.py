"""Twins: a small network on a table of features, with one output for each structure, trained in a second.

A unit is two features, its state seen through jitter; where they stand is drawn by the key, like the rest. One network
learns all structures at once; the nulls are a network as it was before its first step, and one of the same recipe for
which the labels were dealt to other rows at every step.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from ...engine.randomness import stream, torch_stream
from ...units import Units
from ..ground import STRUCTURES, Oracle, Planted
from .arms import Arms, lay_out
from .asking import ArmsQuestion, ArmsWorld, exchanged

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .arms import Bools

DISTRACTORS = 4
MEAN, JITTER = (0.8, 0.6), 0.25
"""A unit's two features are +-MEAN, plus normal noise of this deviation."""
_HIDDEN, _STEPS, _BATCH, _BATCHES, _RATE = (64, 64), 400, 256, 100, 0.01
"""Layers; steps of training and their rows; different batches there are; the highest learning rate."""


def _features(states: Bools, jitter: NDArray[np.floating], columns: NDArray[np.int64]) -> NDArray[np.float32]:
    """features[row, column] of states[row, unit] and jitter[row, unit, 2] (or [unit, 2]) in standard deviations."""
    looks = np.where(states[..., None], 1, -1) * np.array(MEAN) + JITTER * jitter
    out = np.empty((len(states), columns.size), np.float32)
    out[:, columns.ravel()] = looks.reshape(len(states), -1)
    return out


class TabularQuestion(ArmsQuestion):
    """The probability of what one output said of one row of features."""

    capabilities = frozenset({"gradients"})
    details = len(MEAN)

    def __init__(
        self, made: Made, model: nn.Module, structure: str, seen: Bools, jitter: NDArray[np.float64],
        order: NDArray[np.int64], names: tuple[object, ...],
    ) -> None:  # fmt: skip
        """``order[unit]``: whose features the model gets in each unit's place (the sibling's are exchanged)."""
        super().__init__(made.arms, made.units, seen, *names)
        self._columns, self._jitter, self._model = made.columns, jitter, model
        self._output = list(made.arms.arm).index(structure)
        self._sign = 1.0 if made.arms.outcomes(seen)[self._output] else -1.0
        source = np.empty(made.columns.size, int)
        source[made.columns] = made.columns[order]
        self._source = torch.from_numpy(source)
        self.readout = f"probability of the observed outcome of output {self._output} (0..1)"

    @property
    def inputs(self) -> Tensor:
        """[1, feature]."""
        return torch.from_numpy(_features(self.seen[None], self._jitter, self._columns))

    @property
    def unit_of(self) -> Tensor:
        """Unit of each feature, [1, feature]."""
        owner = np.empty((1, self._columns.size), int)
        owner[0, self._columns] = np.arange(len(self._columns))[:, None]
        return torch.from_numpy(owner)

    def forward(self, inputs: Tensor) -> Tensor:
        """The readout, [batch, feature] -> [batch], differentiable."""
        logits: Tensor = self._model(inputs[:, self._source])
        return torch.sigmoid(self._sign * logits[:, self._output])

    def background(self, n: int) -> Tensor:
        """``n`` rows drawn from the world, [n, feature]; fewer are the beginning of more."""
        drawn = stream(*self.names, "background").standard_normal((n, len(self.units), 2 + self.details))
        return torch.from_numpy(_features(self.arms.render(drawn[..., :2]), drawn[..., 2:], self._columns))

    def _values(self, states: Bools, keep: Bools, drawn: NDArray[np.float64]) -> NDArray[np.float64]:
        jitter = np.where(keep[..., None], self._jitter, drawn)
        with torch.no_grad():
            value = self.forward(torch.from_numpy(_features(states, jitter, self._columns)))
        return value.double().numpy()


@dataclass(frozen=True)
class Made:
    """What a key makes: ``columns[unit, 2]`` of the table, the trained ``model`` and the nulls."""

    key: str
    arms: Arms
    columns: NDArray[np.int64]
    model: nn.Module
    nulls: tuple[nn.Module, ...]

    @property
    def units(self) -> Units:
        """Each unit and its columns."""
        return Units("unit", self.arms.names, tuple((tuple(map(int, c)),) for c in self.columns))

    def plant(self, structure: str, attempt: int, purpose: str = "asking") -> Planted:
        """See :class:`~whence.worlds.twins.asking.Plants`."""
        names = ("twins", self.key, structure, attempt)
        rng = stream(*names)
        seen = self.arms.asked(structure, rng)
        jitter = rng.standard_normal((len(seen), len(MEAN)))
        arm, twin = self.arms.arm[structure], self.arms.twin[structure]

        def ask(model: nn.Module, order: NDArray[np.int64]) -> Oracle:
            return TabularQuestion(self, model, structure, seen, jitter, order, (*names, purpose))

        as_is = np.arange(len(seen))
        return Planted(
            f"twins.{structure}, key {self.key}",
            structure,
            ask(self.model, as_is),
            arm,
            twin,
            ask(self.model, exchanged(len(seen), arm, twin)),
            tuple(ask(null, as_is) for null in self.nulls),
        )


def _network(weights: list[Tensor], which: int) -> nn.Module:
    layers: list[nn.Module] = []
    for w, b in zip(weights[::2], weights[1::2], strict=True):
        linear = nn.Linear(w.shape[1], w.shape[2])
        with torch.no_grad():
            linear.weight.copy_(w[which].T)
            linear.bias.copy_(b[which, 0])
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1]).requires_grad_(False).eval()


def _train(arms: Arms, columns: NDArray[np.int64], key: str) -> tuple[nn.Module, tuple[nn.Module, ...]]:
    """(model, nulls): two networks side by side, one with its labels and one with dealt ones, and the first untrained.

    Each output is a known function of the states, so there is no noise to fit and no test set to hold back; what was
    learned is certified question by question.
    """
    rng, generator = stream("twins", key, "training"), torch_stream("twins", key, "weights")
    n = _BATCH * _BATCHES
    states = rng.permutation(arms.training(rng.standard_normal((n, len(arms.names), 2), np.float32)))
    jitter = rng.standard_normal((n, len(arms.names), len(MEAN)), np.float32)
    features = torch.from_numpy(_features(states, jitter, columns))
    labels = torch.from_numpy(arms.lessons(states))
    sizes = [features.shape[1], *_HIDDEN, labels.shape[1]]
    weights: list[Tensor] = []
    for into, out in pairwise(sizes):
        for shape in ((into, out), (1, out)):  # torch's own first weights and biases of a linear layer
            first = (2 * torch.rand(1, *shape, generator=generator) - 1) / into**0.5
            weights.append(first.repeat(2, 1, 1).requires_grad_())
    untrained = _network(weights, 0)
    optimiser = torch.optim.AdamW(weights, lr=_RATE, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, _RATE, total_steps=_STEPS, pct_start=0.15)
    with torch.enable_grad():
        for step in range(_STEPS):
            rows = slice(step % _BATCHES * _BATCH, (step % _BATCHES + 1) * _BATCH)
            dealt = labels[rows][torch.randperm(_BATCH, generator=generator)]
            hidden = features[rows].expand(2, -1, -1)
            for w, b in zip(weights[:-2:2], weights[1:-2:2], strict=True):
                hidden = torch.relu(torch.baddbmm(b, hidden, w))
            logits = torch.baddbmm(weights[-1], hidden, weights[-2])
            loss = nn.functional.binary_cross_entropy_with_logits(logits, torch.stack([labels[rows], dealt]))
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
    return _network(weights, 0), (untrained, _network(weights, 1))


@lru_cache(maxsize=32)
def make(key: str) -> Made:
    """The world of a key, trained; nothing is certified yet."""
    rng = stream("twins", key, "units")
    arms = lay_out(tuple(STRUCTURES), DISTRACTORS, rng)
    columns = rng.permutation(len(MEAN) * len(arms.names)).reshape(-1, len(MEAN))
    model, nulls = _train(arms, columns, key)
    return Made(key, arms, columns, model, nulls)


WORLD = ArmsWorld("twins", make)
"""Features of a table, and a trained network."""
