"""A small diffusion model of handwritten digits, and many of them trained on halves of its pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from whence.engine.randomness import stream, torch_stream
from whence.objective import Losses
from whence.worlds.retraining import Recipe, retrain

PICTURES, QUERIES, PIXELS, DRAWS = 64, 16, 64, 16
TIMES = 100
ALPHA = torch.cos(torch.linspace(0.02, 0.97, TIMES) * torch.pi / 2) ** 2
"""What is left of a picture at each timestep."""
SUBSETS = 32


class Denoiser(nn.Module):
    """Tells the noise in a noised picture: x[row, pixel], t[row] -> [row, pixel]."""

    def __init__(self, hidden: int = 48) -> None:
        super().__init__()
        self.time = nn.Embedding(TIMES, 16)
        self.body = nn.Sequential(nn.Linear(PIXELS + 16, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU())
        self.head = nn.Linear(hidden, PIXELS)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.head(self.body(torch.cat([x, self.time(t)], 1)))  # type: ignore[no-any-return]


def noised(x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    a = ALPHA[t][:, None]
    return a.sqrt() * x + (1 - a).sqrt() * noise


class DenoiserObjective:
    """As DiffusionObjective: a row for each picture and each timestep of a grid."""

    name = "a denoiser of digits"

    def __init__(self, module: nn.Module, output: str = "loss", places: int = 10) -> None:
        self.module, self.output = module, output
        self.grid = ((torch.arange(places) + 0.5) * TIMES / places).long()
        g = torch_stream("denoiser", "grid")
        self.noise = torch.randn(places, PIXELS, generator=g)

    def losses(self, examples: Sequence[Any]) -> Losses:
        n, k = len(examples), len(self.grid)
        x = torch.stack(list(examples)).repeat_interleave(k, 0)
        t, noise = self.grid.repeat(n), self.noise.repeat(n, 1)
        said = self.module(noised(x, t, noise), t)
        value = (said - noise) ** 2 if self.output == "loss" else said**2
        return Losses(value.mean(1) / k, torch.arange(n).repeat_interleave(k), torch.arange(k).repeat(n))

    def sampled(self, examples: Sequence[Any], seed: int) -> Losses:
        """The loss toward what the model itself would say: its own noise, with a normal deviate of variance 1."""
        n, k = len(examples), len(self.grid)
        x = torch.stack(list(examples)).repeat_interleave(k, 0)
        t, noise = self.grid.repeat(n), self.noise.repeat(n, 1)
        said = self.module(noised(x, t, noise), t)
        own = said.detach() + torch.randn(said.shape, generator=torch_stream("denoiser", "sampled", seed))
        value = (said - own) ** 2
        return Losses(value.mean(1) / k, torch.arange(n).repeat_interleave(k), torch.arange(k).repeat(n))

    def fingerprint(self) -> str:
        return f"denoiser-{self.output}"


@dataclass(frozen=True)
class Truth:
    """``keep[subset, picture]`` and the loss[subset, query] of models that were trained on them."""

    pictures: Tensor
    queries: Tensor
    model: nn.Module
    keep: np.ndarray
    loss: np.ndarray


@cache
def truth() -> Truth:
    """One model of all pictures, and SUBSETS of a random half of them each."""
    data = torch.tensor(load_digits().data, dtype=torch.float32) / 8 - 1
    order = torch.from_numpy(stream("denoiser", "pictures").permutation(len(data)))
    pictures, queries = data[order[:PICTURES]], data[order[PICTURES : PICTURES + QUERIES]]
    rng = stream("denoiser", "halves")
    keep = np.stack([rng.permutation(PICTURES) < PICTURES // 2 for _ in range(SUBSETS)])
    rows = torch.arange(PICTURES).repeat_interleave(DRAWS)
    g = torch_stream("denoiser", "draws")
    t = torch.randint(0, TIMES, (len(rows),), generator=g)
    noise = torch.randn(len(rows), PIXELS, generator=g)

    def build(seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return Denoiser()

    def loss_of(call: Any, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return (call(x, t) - noise).square().mean(1)

    every = np.concatenate([np.ones((1, PICTURES), bool), keep])
    stack = retrain(
        build, loss_of, [noised(pictures[rows], t, noise), t, noise], every[:, rows.numpy()], [0] * len(every),
        Recipe(steps=140, rate=5e-3, decay=0.0, batch=128), name="denoiser",
    )  # fmt: skip
    model = stack.module(0).requires_grad_(True)
    asked = DenoiserObjective(model, places=20)

    def of(call: Any) -> Tensor:
        k = len(asked.grid)
        t, eps = asked.grid.repeat(QUERIES), asked.noise.repeat(QUERIES, 1)
        said = call(noised(queries.repeat_interleave(k, 0), t, eps), t)
        return (said - eps).square().mean(1).view(QUERIES, k).mean(1)

    return Truth(pictures, queries, model, keep, stack.each(of).double().numpy()[1:])


def lds(scores: np.ndarray, found: Truth) -> np.ndarray:
    """For each query the rank correlation of summed scores with how little the retrained models lose."""
    from scipy.stats import spearmanr

    summed = found.keep.astype(float) @ scores.T  # [subset, query]
    return np.array([spearmanr(summed[:, q], -found.loss[:, q]).statistic for q in range(scores.shape[0])])
