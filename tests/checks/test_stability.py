"""Explainers whose noise is known exactly: who stays the same over what should not matter."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from whence.checks.stability import Reordered, likeness, stability
from whence.engine.randomness import stream
from whence.errors import MethodError
from whence.question import Metered
from whence.units import Units
from whence.verdict import REFUTED, SUPPORTED, THIS_RUN, UNDECIDED

N = 10
WEIGHTS = np.array([0, 0, 3, 0, 1, 0, 0, 2, 0, 0]) / 6


class Weighted:
    """states @ weights; observed states are 1, re-rendered ones are 0 or 1 with equal chance."""

    readout, capabilities = "value", frozenset[str]()

    def __init__(self, weights: np.ndarray = WEIGHTS, name: object = "") -> None:
        self.weights, self.rng = weights, stream("weighted", name)
        self.units = Units("unit", tuple(f"u{i}" for i in range(N)), tuple(((i,),) for i in range(N)))

    def ask(self, keep: np.ndarray) -> np.ndarray:
        return np.asarray(np.where(keep, 1, self.rng.integers(0, 2, keep.shape)) @ self.weights, float)


def leave_one_out(question: Any, seed: int = 0, draws: int = 64, batch: int = 0) -> np.ndarray:
    n = len(question.units)
    seen = question.ask(np.ones((1, n), bool))[0]
    return np.asarray(seen - question.ask(np.repeat(~np.eye(n, dtype=bool), draws, 0)).reshape(n, draws).mean(1))


def named(question: Any) -> np.ndarray:
    """The planted effects, by the units' labels, whatever their order."""
    return np.array([WEIGHTS[int(label[1:])] for label in question.units.labels])


def noisy(sd: float) -> Any:
    return lambda q, seed: named(q) + stream("noise", sd, seed).normal(0, sd, N)


def test_only_what_stays_the_same_is_supported() -> None:
    explainers = {
        "exact": lambda q, seed: named(q),
        "sampled": leave_one_out,
        "random": lambda q, seed: stream("random", seed).normal(size=N),
        "shuffled": lambda q, seed: stream("shuffled", seed).permutation(named(q)),
        "constant": lambda q, seed: np.ones(N),
        "place": lambda q, seed: np.arange(float(N)),
    }
    found = {name: stability(e, Weighted()) for name, e in explainers.items()}
    words = {name: v.word for name, v in found.items()}
    assert words["exact"] == words["sampled"] == SUPPORTED, words
    assert words["random"] == words["shuffled"] == words["place"] == REFUTED, words
    assert words["constant"] == UNDECIDED
    assert "the control does as much" in found["constant"].line
    assert found["exact"].effect == 1
    assert (found["exact"].scope, found["exact"].replicate, found["exact"].n) == (THIS_RUN, "pair", 6)


def test_the_number_falls_as_noise_grows() -> None:
    effects = [stability(noisy(sd), Weighted(), seeds=range(60)).effect for sd in (0.0, 0.03, 0.1, 0.3, 2.0)]
    assert effects[0] == 1
    assert all(a > b for a, b in pairwise(effects)), effects
    assert effects[-1] < 0.3


def test_a_place_bound_method_is_caught_by_another_question_too() -> None:
    """Where units cannot be put in another order, their explanations of other questions tell."""
    others = [Weighted(np.roll(WEIGHTS, k), k) for k in (1, 2, 3)]
    place = stability(lambda q, seed: np.arange(float(N)), Weighted(), reorder=False, others=others)
    assert place.word == UNDECIDED
    assert place.details["control_name"] == "the explanation of another question"
    honest = stability(lambda q, seed: leave_one_out(q), Weighted(), reorder=False, others=others)
    assert honest.word == SUPPORTED, honest.line


def test_a_stable_lie_is_supported() -> None:
    """What the card's ``avoid`` says: stable is not true."""
    assert stability(lambda q, seed: np.roll(WEIGHTS, 1)[[int(u[1:]) for u in q.units]], Weighted()).word == SUPPORTED


def test_settings_that_matter_are_named() -> None:
    settings = ({"draws": 64}, {"draws": 64, "batch": 1}, {"draws": 1})
    verdict = stability(leave_one_out, Weighted(), seeds=range(24), settings=settings)
    by = verdict.details["by_setting"]
    assert by["{'draws': 1}"] < 0.8 < min(v for k, v in by.items() if k != "{'draws': 1}"), by


def test_likeness_is_spearman_with_ties_and_rounding() -> None:
    from scipy.stats import spearmanr

    rng = stream("likeness")
    for _ in range(20):
        a, b = rng.integers(0, 6, (2, 12)).astype(float)
        assert likeness(a, b, grain=0) == pytest.approx(spearmanr(a, b).statistic, abs=1e-9)
    one = np.eye(N)[3]
    assert likeness(one + rng.normal(0, 0.01, N), 7 * one + rng.normal(0, 0.07, N)) == 1
    assert likeness(np.ones(N), np.zeros(N)) == 1
    assert likeness(np.ones(N), one) == 0


def test_a_reordered_question_is_the_same_question() -> None:
    order = stream("order").permutation(N)
    moved = Reordered(Metered(Weighted()), order)
    assert moved.units.labels == tuple(f"u{i}" for i in order)
    keep = stream("keep").integers(0, 2, (5, N)).astype(bool)
    assert (moved.ask(keep[:, order]) == Weighted().ask(keep)).all()
    assert moved.readout == "value"
    assert moved.capabilities == frozenset()


def test_a_reordered_white_question_moves_its_unit_of() -> None:
    import torch

    question = Weighted()
    question.unit_of = torch.tensor([[-1, 0, 1, 2, 2]])  # type: ignore[attr-defined]
    moved = Reordered(question, np.array([2, 0, 1, *range(3, N)]))
    assert moved.unit_of.tolist() == [[-1, 1, 2, 0, 0]]
    assert [moved.units.labels[u] for u in moved.unit_of[0, 1:]] == ["u0", "u1", "u2", "u2"]


@pytest.mark.parametrize("scores", [np.ones(3), np.full(N, np.nan), "many"])
def test_explanations_that_do_not_fit_are_refused(scores: Any) -> None:
    with pytest.raises(MethodError, match="would work"):
        stability(lambda q, seed: scores, Weighted())


def test_too_few_seeds_and_other_units_are_refused() -> None:
    with pytest.raises(MethodError, match="6 seeds"):
        stability(leave_one_out, Weighted(), seeds=(1, 1, 1, 1, 1, 1))
    other = Weighted()
    other.units = other.units.subset([0, 1])
    with pytest.raises(MethodError, match="2 units of 10"):
        stability(leave_one_out, Weighted(), others=[other])


def test_scores_on_either_side_of_a_rounding_edge_are_not_apart() -> None:
    noise = stream("edge")
    rhos = [likeness(*(np.array([1.0, *(0.05 + noise.normal(0, 0.001, 9))]) for _ in range(2))) for _ in range(20)]
    assert np.mean(rhos) > 0.95
