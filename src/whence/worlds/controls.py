"""Explanations that must fail: random maps, shuffled labels, guesses that never ask the model.

A trial that one of these passes tests nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage

from ..engine.randomness import stream
from ..explanation import Cost, Explanation

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..run import Run

Explainer = Callable[["Run"], Explanation]
"""Anything that gives word maps for a run."""


def _maps(run: Run, name: str, scores: NDArray[np.float64]) -> Explanation:
    return Explanation(
        method=name,
        units=run.words,
        scores=scores.astype(np.float32),
        axes=("word", "y", "x"),
        readout="nothing: a control",
        kind="control",
        settings={},
        cost=Cost(0, 0.0),
        run=run,
    )


def _smooth(rng: np.random.Generator, height: int, width: int) -> NDArray[np.float64]:
    field = ndimage.gaussian_filter(rng.normal(size=(height, width)), height / 10, mode="wrap")
    return np.asarray((field - field.min()) / np.ptp(field))


def random_maps(run: Run) -> Explanation:
    """Smooth random maps, one per word, drawn from the run's seed and prompt."""
    rng = stream("control", "random", run.settings.prompt, run.settings.seed)
    height, width = run.images.shape[1:3]
    return _maps(run, "random", np.stack([_smooth(rng, height, width) for _ in run.words.names]))


def shuffled(explain: Explainer) -> Explainer:
    """The same maps under permuted labels."""

    def explain_shuffled(run: Run) -> Explanation:
        explanation = explain(run)
        order = stream("control", "shuffled", run.settings.prompt, run.settings.seed).permutation(
            len(explanation.units)
        )
        return replace(explanation, method=f"{explanation.method}, shuffled", scores=explanation.scores[order])

    return explain_shuffled


def centre(run: Run) -> Explanation:
    """Every word in the middle of the picture, earlier words a little stronger."""
    y, x = (np.linspace(-1, 1, n) for n in run.images.shape[1:3])
    bump = np.exp(-2 * (y[:, None] ** 2 + x[None, :] ** 2))
    return _maps(run, "centre", np.stack([bump / (1 + i) for i in range(len(run.words))]))


def reading_order(run: Run) -> Explanation:
    """Words painted from left to right in the order of the prompt: position without the model."""
    n = len(run.words)
    x = np.linspace(0, n - 1, run.images.shape[2])
    stripes = [np.exp(-((x - i) ** 2))[None].repeat(run.images.shape[1], 0) for i in range(n)]
    return _maps(run, "reading order", np.stack(stripes))


CONTROLS: dict[str, Explainer] = {"random": random_maps, "centre": centre, "reading order": reading_order}
