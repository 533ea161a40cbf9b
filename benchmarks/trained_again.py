"""What benchmarks of training examples share: trainings that are kept as they are made, and what was named left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np


def once(path: Path, make: Callable[[], np.ndarray]) -> np.ndarray:
    """What ``make`` gives, made once: kept at ``path`` (.npy), written whole or not at all."""
    if not path.exists():
        part = path.with_suffix(".part.npy")
        np.save(part, make())
        part.rename(path)
    found: np.ndarray = np.load(path)
    return found


def without(named: Mapping[str, np.ndarray], examples: int) -> np.ndarray:
    """keep[training, example] of trainings without what each form named, [query, example number], one after the other;
    the last training has all."""
    rows = np.concatenate(list(named.values()))
    keep = np.ones((len(rows) + 1, examples), bool)
    for row, numbers in zip(keep, rows, strict=False):
        row[numbers] = False
    return keep


def of_each(named: Mapping[str, np.ndarray], outputs: np.ndarray) -> dict[str, np.ndarray]:
    """From output[training, query] of these trainings: each form's, [query], every query without what was named for
    it."""
    asked = len(next(iter(named.values())))
    return {name: np.diagonal(outputs[k * asked : (k + 1) * asked]) for k, name in enumerate(named)}
