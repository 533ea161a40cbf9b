"""`whence train`: a world's model from nothing."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from ..errors import OutputError, RunError, nearest

WORLDS = ("shapes",)


def train(world: str, out: Path | None, seed: int, steps: int | None, start: Path | None = None) -> None:
    """Train and print the folder of the finished pipeline. Raises RunError for another world or settings."""
    if world not in WORLDS:
        raise RunError(f"train {world!r}", "no such world", nearest(world, WORLDS))
    if steps is not None and steps < 1:
        raise RunError(f"--steps {steps}", "nothing to train", "1 or more")
    if seed < 0:
        raise RunError(f"--seed {seed}", "not a seed", "0 or more")
    directory = out or Path("training") / world
    from ..worlds.shapes.train import Training
    from ..worlds.shapes.train import train as train_shapes

    settings = Training(seed=seed, start=str(start or ""))
    settings = settings if steps is None else replace(settings, steps=steps)
    try:
        print(train_shapes(directory, settings, log=sys.stderr))
    except OSError as error:
        raise OutputError(f"train into {directory}", str(error), "--out with a directory of yours") from None
