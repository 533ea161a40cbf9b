"""LDS on outputs whose making is known."""

from __future__ import annotations

import numpy as np
import pytest

from whence.checks.lds import correlations, lds, score
from whence.engine.randomness import stream
from whence.errors import RunError
from whence.verdict import SUPPORTED


def world(noise: float = 0.2) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Effects [query, example], random halves, and outputs that are the sums of the kept effects, with noise."""
    dice = stream("lds test")
    effects = dice.normal(size=(20, 80))
    kept = np.stack([dice.permutation(80) < 40 for _ in range(60)])
    sums = effects @ kept.T
    return effects, kept, (sums + noise * sums.std() * dice.normal(size=sums.shape)).T


def test_true_effects_score_high_and_shuffled_ones_do_not() -> None:
    effects, kept, outputs = world()
    assert score(effects, kept, outputs).mean > 0.9
    assert lds(effects, kept, outputs).word == SUPPORTED
    shuffled = effects[:, stream("lds test", "shuffled").permutation(80)]
    assert abs(score(shuffled, kept, outputs).mean) < 0.1
    assert lds(shuffled, kept, outputs).word != SUPPORTED


def test_effects_of_the_wrong_sign_are_refuted() -> None:
    effects, kept, outputs = world()
    assert lds(-effects, kept, outputs).word == "refuted"


def test_a_worse_estimate_scores_lower() -> None:
    effects, kept, outputs = world()
    dice = stream("lds test", "worse")
    means = [score(effects + s * dice.normal(size=effects.shape), kept, outputs).mean for s in (0.0, 0.5, 1.0, 2.0)]
    assert means == sorted(means, reverse=True)


def test_neither_the_order_of_subsets_nor_scale_matters_and_constant_scores_are_worth_nothing() -> None:
    effects, kept, outputs = world()
    turned = correlations(7 * effects, kept[::-1], outputs[::-1])
    assert np.allclose(turned, correlations(effects, kept, outputs))
    assert (correlations(np.ones_like(effects), kept, outputs) == 0).all()


def test_shapes_that_do_not_fit_are_refused() -> None:
    effects, kept, outputs = world()
    with pytest.raises(RunError, match="subset, query"):
        lds(effects, kept, outputs.T)
    with pytest.raises(RunError, match="8 subsets"):
        lds(effects, kept[:5], outputs[:5])
