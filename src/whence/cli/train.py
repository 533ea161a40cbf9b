"""`whence train`: a world's model, from nothing or (`emoji`) from another's codec."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

from ..errors import OutputError, RunError, nearest

WORLDS = ("emoji", "facts", "shapes")


def train(
    world: str, out: Path | None, seed: int, steps: int | None, start: Path | None = None, data: Path | None = None,
    twin: bool = False,
) -> None:  # fmt: skip
    """Train and print the folder of the finished model. Raises RunError for another world or settings."""
    if world not in WORLDS:
        raise RunError(f"train {world!r}", "no such world", nearest(world, WORLDS))
    if steps is not None and steps < 1:
        raise RunError(f"--steps {steps}", "nothing to train", "1 or more")
    if seed < 0:
        raise RunError(f"--seed {seed}", "not a seed", "0 or more")
    if twin and world != "facts":
        raise RunError(f"train {world} --twin", "the memory-free twin is of facts", "train facts --twin")
    directory = out or Path("training") / (f"{world}-twin" if twin else world)
    try:
        if world == "facts":
            if start:
                raise RunError("train facts --start", "it is always trained from nothing", "no --start")
            print(_facts(directory, seed, steps, data, twin))
            return
        if data:
            found = "its pictures are in the package" if world == "emoji" else "its world is drawn, it reads no data"
            raise RunError(f"train {world} --data", found, "no --data")
        print((_emoji if world == "emoji" else _shapes)(directory, seed, steps, start))
    except OSError as error:
        raise OutputError(f"train into {directory}", str(error), "--out with a directory of yours") from None


def _shapes(directory: Path, seed: int, steps: int | None, start: Path | None) -> Path:
    from ..worlds.shapes.train import Training
    from ..worlds.shapes.train import train as train_shapes

    settings = Training(seed=seed, start=str(start or ""))
    return train_shapes(directory, settings if steps is None else replace(settings, steps=steps), log=sys.stderr)


def _emoji(directory: Path, seed: int, steps: int | None, start: Path | None) -> Path:
    from ..worlds.emoji.train import Training
    from ..worlds.emoji.train import train as train_emoji

    settings = Training(seed=seed, start=str(start or ""))
    return train_emoji(directory, settings if steps is None else replace(settings, steps=steps), log=sys.stderr)


def _facts(directory: Path, seed: int, steps: int | None, data: Path | None, twin: bool = False) -> Path:
    from ..worlds.facts.train import Training
    from ..worlds.facts.train import train as train_facts

    if data is not None and not data.is_dir():
        raise RunError(f"--data {data}", "no such folder", "a folder with ordinary text, or no --data")
    folder = data or Path(os.environ.get("WHENCE_DATA", Path("..") / "shared" / "data"))
    if twin:
        from ..worlds.facts.without_memory import SETTINGS, train_twin

        own = replace(SETTINGS, seed=seed)
        own = own if steps is None else replace(own, steps=steps)
        return train_twin(directory, own, folder, sys.stderr)
    settings = Training(seed=seed)
    return train_facts(directory, settings if steps is None else replace(settings, steps=steps), folder, sys.stderr)
