"""One word of a prompt exchanged: is the new there and everything else as it was? The trial of edits of pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ...run import Run, Settings
from ..measured import Measured
from .edits import EDITS, Edit, judged, right_before

if TYPE_CHECKING:
    from ...engine.progress import Advance

FIRST = 2000
"""Seeds from here on."""


def good(edit: Edit, before: Run, after: Run) -> float:
    """Success and preservation in one number: 0 where the new is not there, else the share of the rest that stayed."""
    found = judged(edit, before.images[0], after.images[0])
    return (found.preserved or 0.0) if found.success else 0.0


def measure(verb: Callable[..., Any], replicates: int, model: Any = None, advance: Advance | None = None) -> Measured:
    """Seed by seed, over the edits of colour and shape: the method; the new prompt with the same seed, and with
    another; the picture as it was. Seeds at which the first picture is wrong have nothing to edit."""
    if model is None:
        from ... import load

        model = load()
    edits = [e for e in EDITS if e.kind in ("color", "shape")]
    tall, wide = model.default_size

    def settings(prompt: str, seed: int) -> Settings:
        return Settings(prompt, seed, model.steps, model.guidance, tall, wide)

    seeds = range(FIRST, FIRST + replicates)
    arms: dict[str, list[list[float]]] = {}
    for edit in edits:
        many = [settings(edit.before, s) for s in seeds]
        before: Sequence[Run] = model.generate_many(many)
        there = [right_before(edit, run.images[0]) for run in before]
        found: dict[str, Sequence[Run]] = {
            "edited": verb().steer(model, many, [edit.after] * len(many)),
            "the new prompt, same seed": model.generate_many([settings(edit.after, s) for s in seeds]),
            "the new prompt, another seed": model.generate_many([settings(edit.after, s + 5000) for s in seeds]),
            "the picture as it was": before,
        }
        for arm, after in found.items():
            values = [good(edit, a, b) if ok else np.nan for a, b, ok in zip(before, after, there, strict=True)]
            arms.setdefault(arm, []).append(values)
        if advance:
            advance(0, edit.after)
    means = {arm: np.nanmean(values, 0) for arm, values in arms.items()}
    kept = np.isfinite(means["edited"])
    return Measured(
        "the new is there and the rest stayed", "share", "seed", tuple(means.pop("edited")[kept]),
        {name: tuple(values[kept]) for name, values in means.items()}, details={"edits": [e.after for e in edits]},
    )  # fmt: skip
