"""How fast a closed-form edit is: matrices of Stable Diffusion 1.5's shapes, and against fine-tuning at its effect.

    python -m benchmarks.edit_speed --json [--no-shapes] [--steps 200]

First part: 32 key and value projections (768 inputs, 320, 640 and 1280 outputs), solved with one shared factorisation
and each matrix by itself, by the same formula in the same precision. Second part: one change on `shapes`, by
Diff-QuickFix, UCE and TIME and by fine-tuning (`erase`): seconds of processor time to plan, and the share of pictures
that then show the new colour. Where fine-tuning has not reached the closed form's share, the ratio is a lower bound.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import whence
from whence.change import Goal
from whence.engine.weights import Matrix, least_squares
from whence.method import load
from whence.worlds.shapes import editing

from .recording import arguments, publish

OUTS = (320, 320, 640, 640, 1280, 1280, 1280, 1280, 1280, 1280, 640, 640, 640, 320, 320, 320)
"""Channels of the 16 attentions over text, in the order in which they run; each has a key and a value projection."""
INPUTS = 768
AIMS = {"ratio": 0.25, "seconds": 1.0, "times faster than fine-tuning": 1000}


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Median processor time, one thread."""
    found = []
    for _ in range(repeats):
        began = time.process_time()
        work()
        found.append(time.process_time() - began)
    return statistics.median(found)


def alone(m: Tensor, k: Tensor, v: Tensor, keep: Tensor, lam: float) -> Tensor:
    """The formula as it stands in the papers, for one matrix: both sums, then a solve for all of its rows."""
    w, kd, rd = m.double(), k.double(), keep.double()
    right = lam * torch.eye(INPUTS, dtype=torch.float64) + kd.T @ kd + rd.T @ rd
    left = lam * w + v.double().T @ kd + (w @ rd.T) @ rd
    return torch.linalg.solve(right, left.T).T.to(m.dtype)


def stable_diffusion(repeats: int) -> dict[str, Any]:
    """Shared against one by one, for a bare concept and for one with prompts and all their tokens."""
    g = torch.Generator().manual_seed(0)
    layers = [nn.Linear(INPUTS, out, bias=False) for out in OUTS for _ in range(2)]
    both = [Matrix(f"{i}", layer, layer) for i, layer in enumerate(layers)]
    rows = {}
    for name, n, kept in (("a concept, 40 kept", 4, 40), ("4 prompts of 77 tokens, 1,000 kept", 308, 1000)):
        k, keep = (torch.randn(count, INPUTS, generator=g) for count in (n, kept))
        values = [torch.randn(n, m.weight.shape[0], generator=g) for m in both]
        shared = seconds(lambda k=k, v=values, r=keep: least_squares(both, k, v, 0.5, r), repeats)  # type: ignore[misc]

        def each(k: Tensor = k, values: list[Tensor] = values, keep: Tensor = keep) -> list[Tensor]:
            return [alone(m.weight.detach(), k, v, keep, 0.5) for m, v in zip(both, values, strict=True)]

        one_by_one = seconds(each, repeats)
        apart = max(
            float((a - b).abs().max())
            for a, b in zip(least_squares(both, k, values, 0.5, keep)[0], each(), strict=True)
        )
        rows[name] = {
            "shared_seconds": round(shared, 4), "one_by_one_seconds": round(one_by_one, 4),
            "ratio": round(shared / one_by_one, 4), "largest_difference": apart,
        }  # fmt: skip
    return {"matrices": len(both), "numbers": sum(m.weight.numel() for m in both), "rows": rows}


def on_shapes(steps: int, n: int) -> dict[str, Any]:
    """Seconds to plan one change, and what it reaches on n pictures."""
    model, goal = whence.load(), Goal("red", "blue")
    drawn = editing.probes(goal, n, "speed")
    methods = {name: load(name)() for name in ("diff_quickfix", "uce", "time")}
    methods["erase"] = load("erase")(steps=steps)
    both = drawn["target"] + drawn["neighbours"]
    was = [p.holds(x) for p, x in zip(both, editing.pictures(model, both), strict=True)]
    rows: dict[str, Any] = {"unedited": {"target": sum(was[:n]) / n, "others": sum(was[n:]) / n, "n": n}}
    editing.examples(model, goal.old)  # captions are drawn once, for all
    for name, method in methods.items():
        began = time.process_time()
        change = method.plan(model, goal)
        spent = time.process_time() - began
        with change.on(model):
            made = editing.pictures(model, both)
        held = [p.holds(x) for p, x in zip(both, made, strict=True)]
        rows[name] = {"seconds": round(spent, 3), "target": sum(held[:n]) / n, "others": sum(held[n:]) / n, "n": n}
    slow = rows["erase"]
    for name in ("diff_quickfix", "uce", "time"):
        rows[name]["times_faster"] = round(slow["seconds"] / rows[name]["seconds"], 1)
        rows[name]["at_equal_effect"] = slow["target"] >= rows[name]["target"]
    return {"change": str(goal), "fine_tuning_steps": steps, "rows": rows}


def main() -> None:
    parser = arguments(str(__doc__))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200, help="steps of fine-tuning")
    parser.add_argument("--pictures", type=int, default=16)
    parser.add_argument("--no-shapes", action="store_true", help="the solver alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {"aims": AIMS, "stable_diffusion_1_5_shapes": stable_diffusion(options.repeats)}
    if not options.no_shapes:
        result["shapes"] = on_shapes(options.steps, options.pictures)
    publish("edit_speed", result, options)


if __name__ == "__main__":
    main()
