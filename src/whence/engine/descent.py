"""A short training by Adam that can be stopped: what is taught, its moments and its losses, in one safetensors file."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..errors import RunError
from .progress import Advance
from .training import save_tensors

SAVED = 30.0
"""Seconds between two states of a training on disk."""


def cosine(rate: float, steps: int) -> Callable[[int], float]:
    """A rate that falls to a tenth along half a cosine, by the number of the step."""
    return lambda step: rate * (0.1 + 0.45 * (1 + math.cos(math.pi * (step / steps))))


def descend(
    taught: Mapping[str, Tensor],
    loss: Callable[[int], Tensor],
    steps: int,
    rate: float | Callable[[int], float],
    about: int,
    *,
    still: bool = False,
    path: Path | None = None,
    advance: Advance | None = None,
) -> list[float]:
    """Change the tensors ``taught``, in place, by ``steps`` steps down ``loss(step)``; the losses.

    ``still``: what a step has no gradient of at all stands still, as if it had no moments. ``path``: a safetensors file
    that a stopped training goes on from; ``about``: what that training is, a hash. Nothing else gets a gradient. Raises
    RunError where ``path`` is of another training, or cannot be read.
    """
    parts = list(taught.values())
    optimiser = torch.optim.Adam(parts, lr=rate if isinstance(rate, float) else rate(0))
    losses = _resumed(path, taught, optimiser, about) if path and path.exists() else []
    saved = time.perf_counter()
    try:
        for step in range(len(losses), steps):
            optimiser.param_groups[0]["lr"] = rate if isinstance(rate, float) else rate(step)
            now = loss(step)
            for p, grad in zip(parts, torch.autograd.grad(now, parts, allow_unused=True), strict=True):
                p.grad = None if still and grad is not None and not bool(grad.any()) else grad
            optimiser.step()
            losses.append(float(now.detach()))
            if path and (time.perf_counter() - saved > SAVED or step + 1 == steps):
                _save(path, taught, optimiser, losses, about)
                saved = time.perf_counter()
            if advance:
                advance(1, f"loss {losses[-1]:.4f}")
    finally:
        for p in parts:
            p.grad = None
    return losses


def _save(
    path: Path, taught: Mapping[str, Tensor], optimiser: torch.optim.Adam, losses: list[float], about: int
) -> None:
    out = {"about": torch.tensor(about), "losses": torch.tensor(losses, dtype=torch.float64)}
    for name, x in taught.items():
        out[f"taught/{name}"] = x.detach()
        if x in optimiser.state:
            state = optimiser.state[x]
            out |= {f"first/{name}": state["exp_avg"], f"second/{name}": state["exp_avg_sq"]}
            out[f"count/{name}"] = state["step"]
    save_tensors(path, out, len(losses))


def _resumed(path: Path, taught: Mapping[str, Tensor], optimiser: torch.optim.Adam, about: int) -> list[float]:
    """Puts tensors and optimiser where a stopped training left them; its losses so far."""
    try:
        kept = load_file(path)
    except (OSError, SafetensorError) as error:
        raise RunError(f"go on with {path}", f"cannot be read: {error}", "another file") from None
    if int(kept.get("about", torch.tensor(0))) != about:
        raise RunError(f"go on with {path}", "a training of other settings, pictures or model", "another file")
    with torch.no_grad():
        for name, x in taught.items():
            x.copy_(kept[f"taught/{name}"])
            if f"first/{name}" in kept:
                first, second = kept[f"first/{name}"].to(x), kept[f"second/{name}"].to(x)
                optimiser.state[x] = {"step": kept[f"count/{name}"], "exp_avg": first, "exp_avg_sq": second}
    return [float(x) for x in kept["losses"]]
