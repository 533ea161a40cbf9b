"""Training that can be stopped: modules, their optimiser and the average of their weights, all three on disk.

Checkpoints are safetensors, written to a temporary name and renamed. What a step draws should come from a stream named
by its number, so that a training that is gone on with goes on exactly as the uninterrupted one would.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import RunError
from .progress import progress


def save_tensors(path: Path, tensors: dict[str, Tensor], step: int) -> None:
    """Tensors and the number of steps, written whole or not at all."""
    fresh = path.with_suffix(".part")
    save_file({k: v.detach().contiguous() for k, v in tensors.items()} | {"step": torch.tensor(step)}, fresh)
    fresh.rename(path)


class Trainee:
    """Modules, their AdamW, the moving average of their weights, and all three on disk."""

    def __init__(self, modules: dict[str, nn.Module], path: Path, total: int, rate: float, every: float) -> None:
        self.modules = nn.ModuleDict(modules)
        self.path, self.total, self.rate, self.every = path, total, rate, every
        decayed = [p for p in self.modules.parameters() if p.ndim > 1]
        others = [p for p in self.modules.parameters() if p.ndim <= 1]
        self.optimiser = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}],
            lr=rate,
            betas=(0.9, 0.99),
            fused=True,
        )
        self.average = {k: v.detach().clone() for k, v in self.modules.state_dict().items()}
        self.step = 0
        self.saved = time.monotonic()
        if path.exists():
            self._load(load_file(path))

    def _load(self, tensors: dict[str, Tensor]) -> None:
        self.step = int(tensors.pop("step"))
        groups: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            kind, name = key.split("/", 1)
            groups.setdefault(kind, {})[name] = value
        self.modules.load_state_dict(groups["weight"])
        self.average = groups["average"]
        for name, p in self.modules.named_parameters():
            if name in groups.get("first", {}):
                # The fused kernel walks memory: moments must lie as their weights lie (channels last, here and there).
                first, second = (torch.empty_like(p).copy_(groups[k][name]) for k in ("first", "second"))
                self.optimiser.state[p] = {
                    "step": torch.tensor(float(self.step)),
                    "exp_avg": first.detach(),
                    "exp_avg_sq": second.detach(),
                }

    def save(self) -> None:
        out = {f"weight/{k}": v for k, v in self.modules.state_dict().items()}
        out |= {f"average/{k}": v for k, v in self.average.items()}
        for name, p in self.modules.named_parameters():
            if p in self.optimiser.state:
                out[f"first/{name}"] = self.optimiser.state[p]["exp_avg"]
                out[f"second/{name}"] = self.optimiser.state[p]["exp_avg_sq"]
        save_tensors(self.path, out, self.step)
        self.saved = time.monotonic()

    def update(self, loss: Tensor) -> None:
        done = self.step / self.total
        rate = self.rate * min(1.0, (self.step + 1) / 150) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
        self.optimiser.step()
        self.step += 1
        keep = min(0.999, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            now = dict(self.modules.state_dict())
            names = [k for k, v in now.items() if v.is_floating_point()]
            torch._foreach_lerp_([self.average[k] for k in names], [now[k] for k in names], 1 - keep)
        if time.monotonic() - self.saved > self.every:
            self.save()

    def use_average(self) -> None:
        self.modules.load_state_dict(self.average)


def same_settings(directory: Path, settings: Any, what: str) -> Path:
    """The record of a training in this directory, to be written by the caller; RunError where it is of another one."""
    directory.mkdir(parents=True, exist_ok=True)
    record = directory / "training.json"
    if record.exists() and (found := json.loads(record.read_text())) != asdict(settings):
        changed = ", ".join(f"{k} {found.get(k)!r}" for k, v in asdict(settings).items() if found.get(k) != v)
        asked = f"train {what} into {directory}"
        raise RunError(asked, f"a training with other settings: {changed}", "another --out directory")
    return record


def steps(t: Trainee, what: str, log: Any) -> Iterator[int]:
    began, first = time.monotonic(), t.step
    with progress(what, total=t.total, done=t.step, unit="steps") as advance:
        while t.step < t.total:
            step = t.step
            yield step
            advance()
            if t.step % 100 == 0:
                rate = (t.step - first) / (time.monotonic() - began)
                print(f"{what} {t.step}/{t.total}, {rate:.2f} steps/s", file=log, flush=True)
    t.save()
