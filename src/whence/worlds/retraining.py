"""Retraining: many models of one build, trained side by side on chosen examples of one training set.

What a training example did is only known by training again without it. Models that differ in their seed, in which
examples they see or in what these examples are go through every step together: their weights are stacked,
weight[model, ...], and one batched product does the work of all. Nothing is shared between them, so that a model's
weights do not depend on which others stand beside it, but for the last bits of rounding.

Retraining is paired: a seed fixes the first weights and the order in which examples come. An example that is left out
keeps its place in that order and is given no weight, so that all others are met at the same step, in the same company.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from ..engine.randomness import stream

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..engine.progress import Advance

Call = Callable[..., Tensor]
LossOf = Callable[..., Tensor]
"""``loss_of(call, *data)``: the loss of each example, [example], where ``call(x)`` asks the model."""


@dataclass(frozen=True)
class Recipe:
    """How a model is trained: Adam at ``rate`` (warmed up for a tenth of the steps, then along half a cosine down to
    nothing), ``batch`` examples a step (0: all). ``decay`` times half the squared weights is added to the mean loss:
    an optimum that influence functions know, with ``decay`` as their damping."""

    steps: int
    rate: float
    decay: float
    batch: int = 0


@dataclass(frozen=True)
class Stack:
    """Trained models, ``weights[name][model, ...]``."""

    skeleton: nn.Module
    weights: dict[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.weights.values())))

    def module(self, number: int) -> nn.Module:
        """One of the models, a module of its own, in evaluation mode."""
        made = copy.deepcopy(self.skeleton)
        made.load_state_dict({k: v[number] for k, v in self.weights.items()})
        return made.requires_grad_(False).eval()

    def each(self, function: Callable[[Call], Tensor]) -> Tensor:
        """``function(call)`` of every model, stacked: [model, ...]."""
        with torch.no_grad():
            return vmap(lambda own: function(_caller(self.skeleton, own)))(self.weights)


def _caller(skeleton: nn.Module, own: dict[str, Tensor]) -> Call:
    return lambda *args: functional_call(skeleton, own, args)


def retrain(
    build: Callable[[int], nn.Module],
    loss_of: LossOf,
    data: Sequence[Tensor],
    keep: NDArray[np.bool_],
    seeds: Sequence[int],
    recipe: Recipe,
    *,
    name: str,
    own_data: bool = False,
    block: int = 256,
    advance: Advance | None = None,
) -> Stack:
    """Train one model for each row of ``keep[model, example]``, ``build(seed)`` being its first weights.

    ``data``: tensors [example, ...]; with ``own_data`` every model has its own, [model, example, ...]. ``name``: of the
    streams of what is drawn (the order of the examples). ``block``: models that go side by side.
    """
    firsts = {seed: build(seed) for seed in dict.fromkeys(seeds)}
    parts = []
    for start in range(0, len(seeds), block):
        rows = slice(start, start + block)
        mine = [t[rows] for t in data] if own_data else list(data)
        kept = torch.from_numpy(np.ascontiguousarray(keep[rows])).float()
        parts.append(_train(firsts, loss_of, mine, kept, seeds[rows], recipe, name, own_data, advance))
    skeleton = copy.deepcopy(firsts[seeds[0]]).requires_grad_(False).eval()
    return Stack(skeleton, {k: torch.cat([p[k] for p in parts]) for k in parts[0]})


def _train(
    firsts: dict[int, nn.Module], loss_of: LossOf, data: list[Tensor], keep: Tensor, seeds: Sequence[int],
    recipe: Recipe, name: str, own_data: bool, advance: Advance | None,
) -> dict[str, Tensor]:  # fmt: skip
    models, examples = keep.shape
    stacked, _ = stack_module_state([firsts[s] for s in seeds])
    weights = {k: v.detach().clone().requires_grad_() for k, v in stacked.items()}
    skeleton = firsts[seeds[0]]
    optimiser = torch.optim.Adam(weights.values(), lr=recipe.rate, fused=True)

    def loss(own: dict[str, Tensor], weight: Tensor, *batch: Tensor) -> Tensor:
        each = loss_of(_caller(skeleton, own), *batch)
        size = sum(w.square().sum() for w in own.values())
        return (weight * each).sum() / weight.sum().clamp_min(1) + 0.5 * recipe.decay * size

    batched = bool(recipe.batch) and recipe.batch < examples
    axis = 0 if batched or own_data else None
    together = vmap(loss, in_dims=(0, 0, *[axis] * len(data)))
    orders = _orders(seeds, examples, recipe.batch, name) if batched else None
    row = torch.arange(models)[:, None]
    with torch.enable_grad():
        for step in range(recipe.steps):
            batch, weight = data, keep
            if orders is not None:
                chosen = next(orders)
                batch = [t[row, chosen] if own_data else t[chosen] for t in data]
                weight = keep.gather(1, chosen)
            for group in optimiser.param_groups:
                group["lr"] = recipe.rate * _share(step, recipe.steps)
            optimiser.zero_grad(set_to_none=True)
            torch.autograd.backward(together(weights, weight, *batch).sum())
            optimiser.step()
            if advance:
                advance(models, "retraining")
    return {k: v.detach() for k, v in weights.items()}


def _share(step: int, steps: int) -> float:
    """Of the highest rate: up for a tenth of the steps, then down along half a cosine."""
    return min(1.0, 10 * (step + 1) / steps) * 0.5 * (1 + math.cos(math.pi * step / steps))


def _orders(seeds: Sequence[int], examples: int, batch: int, name: str) -> Iterator[Tensor]:
    """chosen[model, place] for each step: every seed goes through all examples in an order of its own, again and
    again; what is left over at the end of a pass waits for the next."""
    different = list(dict.fromkeys(seeds))
    which = torch.tensor([different.index(s) for s in seeds])
    generators = [stream(name, "order", s) for s in different]
    while True:
        order = torch.from_numpy(np.stack([g.permutation(examples) for g in generators]))
        for start in range(0, examples - batch + 1, batch):
            yield order[:, start : start + batch][which]


def fingerprint(weights: Any) -> str:
    """Hash of a state dict."""
    import hashlib

    found = hashlib.sha256()
    for key, value in weights.items():
        found.update(f"{key}{tuple(value.shape)}".encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]
