"""How well does the embedded model know its pictures? The numbers of its card.

A picture is made from a caption and looked for among all the world's pictures, by the root of the mean squared
difference of pixels. At its own caption's picture: *found* (nearest of all), *rank* (how many are nearer, and one), and
*nearer* (nearer than one other training picture, drawn at random). The training pictures are those of the model; for a
caption that was held out, its picture is one that no training saw.

    python -m whence.worlds.emoji.recall [DIRECTORY]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...engine.progress import progress
from ...engine.randomness import stream
from ...run import Settings
from . import model_directory
from .pictures import Emoji, everything, held_out, training_set
from .train import DEFAULTS


def draw(model: Any, captions: list[str], steps: int = int(DEFAULTS["steps"])) -> NDArray[np.uint8]:
    """A picture for each caption, [caption, y, x, rgb], each with the seed that its caption gives it."""
    asked = [
        Settings(c, int(stream("emoji", "recall", c).integers(2**31)), steps, DEFAULTS["guidance"], 64, 64)
        for c in captions
    ]
    drawn = []
    with progress("pictures", total=len(asked), unit="pictures") as advance:
        for i in range(0, len(asked), 16):
            drawn += [run.images[0] for run in model.generate_many(asked[i : i + 16])]
            advance(len(asked[i : i + 16]))
    return np.stack(drawn)


def distances(drawn: NDArray[np.uint8], among: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Root mean squared difference of pixels, 0..255: [drawn, among]."""
    a, b = (np.asarray(x, np.float32).reshape(len(x), -1) for x in (drawn, among))
    squares = (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T
    return np.sqrt(np.maximum(squares, 0) / a.shape[1]).astype(np.float32)  # type: ignore[no-any-return]


def recall(drawn: NDArray[np.uint8], asked: Emoji) -> dict[str, Any]:
    """How near the pictures drawn for the captions of ``asked`` lie to its pictures. Intervals are 95 %."""
    among = everything()
    own = np.array([among.captions.index(c) for c in asked.captions])
    away = distances(drawn, among.pictures)
    mine = away[np.arange(len(own)), own]
    rank = 1 + (away < mine[:, None]).sum(1)
    known = np.array([among.captions.index(c) for c in training_set().captions])
    rng = stream("emoji", "recall", "others")
    other = np.array([rng.choice(known[known != i]) for i in own])
    nearer = mine < away[np.arange(len(own)), other]
    return {
        "captions": len(own),
        "found": _share(rank == 1),
        "among the nearest ten": _share(rank <= 10),
        "nearer": _share(nearer),
        "median rank": float(np.median(rank)),
        "median distance": float(np.median(mine)),
        "median distance of another": float(np.median(away[np.arange(len(own)), other])),
    }


def _share(hits: NDArray[np.bool_]) -> tuple[float, float, float]:
    """A share and its Clopper-Pearson interval."""
    from scipy import special

    k, n = int(hits.sum()), len(hits)
    low = float(special.betaincinv(k, n - k + 1, 0.025)) if k else 0.0
    high = float(special.betaincinv(k + 1, n - k, 0.975)) if k < n else 1.0
    return k / n, low, high


def sample(examples: Emoji, n: int) -> Emoji:
    """``n`` of the examples, the same ones each time."""
    which = np.sort(stream("emoji", "recall", len(examples)).permutation(len(examples))[:n])
    return Emoji(tuple(examples.captions[i] for i in which), examples.pictures[which])


def main(directory: str | None = None) -> None:
    from ...models.loading import load

    model = load(Path(directory) if directory else model_directory())
    for name, asked in (("trained", sample(training_set(), 120)), ("held out", held_out())):
        print(json.dumps({name: recall(draw(model, list(asked.captions)), asked)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
