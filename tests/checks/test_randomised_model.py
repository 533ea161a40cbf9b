"""Nulls of a hand-wired model: who asks the model, and who only looks at the input."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from whence.checks.randomised_model import randomised_model
from whence.engine.randomness import stream
from whence.errors import MethodError
from whence.question import Answer
from whence.units import Units
from whence.verdict import REFUTED, SUPPORTED, THIS_RUN, UNDECIDED

N = 10


class Weighted:
    """states @ weights; observed states are 1, re-rendered ones are 0 or 1 with equal chance."""

    readout, capabilities = "value", frozenset[str]()

    def __init__(self, weights: np.ndarray, name: object, prefix: str = "u") -> None:
        self.weights, self.rng = weights, stream("weighted", name)
        n = len(weights)
        self.units = Units("unit", tuple(f"{prefix}{i}" for i in range(n)), tuple(((i,),) for i in range(n)))

    def ask(self, keep: np.ndarray) -> np.ndarray:
        return np.asarray(np.where(keep, 1, self.rng.integers(0, 2, keep.shape)) @ self.weights, float)


def model(i: int, causes: int = 3) -> Weighted:
    weights = np.zeros(N)
    weights[stream("causes", i).permutation(N)[:causes]] = 1 / causes
    return Weighted(weights, i)


def nulls(i: int, count: int = 5) -> list[Weighted]:
    return [Weighted(stream("null", i, k).normal(0, 0.1, N), (i, k)) for k in range(count)]


def leave_one_out(question: Any, draws: int = 24) -> np.ndarray:
    n = len(question.units)
    seen = question.ask(np.ones((1, n), bool))[0]
    return np.asarray(seen - question.ask(np.repeat(~np.eye(n, dtype=bool), draws, 0)).reshape(n, draws).mean(1))


def test_only_an_explainer_that_asks_the_model_is_supported() -> None:
    noise = stream("noise")
    places = np.sin(np.arange(N))
    explainers = {
        "asks": leave_one_out,
        "input only": lambda q: places,
        "input only, scaled by the model": lambda q: places * (0.1 + abs(q.ask(np.zeros((1, N), bool))[0])),
        "input only, a little noise": lambda q: places + noise.normal(0, 0.05, N),
        "input only, turned round": lambda q: places * np.sign(q.weights[0] - 0.05),
        "constant": lambda q: np.ones(N),
        "random": lambda q: noise.normal(size=N),
    }
    words = {name: [randomised_model(e, model(i), nulls(i)).word for i in range(10)] for name, e in explainers.items()}
    assert words.pop("asks").count(SUPPORTED) >= 9
    # Noise differs from itself as much as from its nulls: one time in twenty by luck.
    assert words.pop("random").count(SUPPORTED) <= 1
    for name, found in words.items():
        assert found == [REFUTED] * 10, name


def test_one_cause_is_enough_and_the_verdict_is_of_this_run() -> None:
    verdict = randomised_model(leave_one_out, model(0, causes=1), nulls(0))
    assert verdict.word == SUPPORTED, verdict.line
    assert (verdict.scope, verdict.replicate, verdict.n) == (THIS_RUN, "null", 5)
    assert verdict.control < 0.1  # rounding makes the ranks of units that do nothing equal
    assert verdict.details["explanations"] == 15


def test_nulls_that_do_not_move_at_all_change_the_explanation() -> None:
    dead = [Weighted(np.zeros(N), ("dead", k)) for k in range(4)]
    verdict = randomised_model(leave_one_out, model(1), dead)
    assert verdict.word == SUPPORTED
    assert verdict.effect == 1
    said = randomised_model(
        lambda q: Answer(leave_one_out(q), nothing=not q.weights.any()), model(1), dead
    )  # "no unit did it" of a null is as good as zeros
    assert said.effect == 1


def test_a_wrong_explanation_that_depends_on_the_weights_passes() -> None:
    """What the card's ``avoid`` says: this check is no evidence of truth."""
    verdict = randomised_model(lambda q: np.roll(q.weights, 1), model(2), nulls(2))
    assert verdict.word == SUPPORTED


def test_several_explainers_take_turns() -> None:
    seeds = [lambda q, s=s: leave_one_out(q) + stream("seed", s).normal(0, 0.001, N) for s in range(3)]
    assert randomised_model(seeds, model(3), nulls(3)).word == SUPPORTED


@pytest.mark.parametrize("several", [1, 2, 3, 4])
def test_explainers_that_differ_by_their_seeds_alone_do_not_pass(several: int) -> None:
    def of(seed: int) -> Any:
        return lambda question: stream("never asks", seed).random(N)

    words = []
    for i in range(30):
        seeds = [of(10 * i + k) for k in range(several)]
        words.append(randomised_model(seeds, model(3), nulls(3, 5)).word)
    assert words.count(SUPPORTED) <= 3, words


def test_of_two_or_three_units_nothing_is_said() -> None:
    few = Units("unit", ("a", "b", "c"), (((0,),), ((1,),), ((2,),)))

    class Few:
        units, readout, capabilities = few, "value", frozenset[str]()

    verdict = randomised_model(lambda q: np.arange(3.0), Few(), [Few()] * 4)  # type: ignore[list-item, arg-type]
    assert verdict.word == UNDECIDED
    assert "fewer than 4 units" in verdict.line or "fewer than 4 units" in str(verdict.details)


def test_the_order_of_units_does_not_matter() -> None:
    moved = np.random.default_rng(1).permutation(N)
    exact = randomised_model(lambda q: q.weights, model(4), nulls(4)).effect
    turned = randomised_model(lambda q: q.weights[moved], model(4), nulls(4)).effect
    assert turned == pytest.approx(exact)


def test_below_three_nulls_there_is_no_verdict() -> None:
    for count in (0, 2):
        verdict = randomised_model(leave_one_out, model(5), nulls(5, count))
        assert (verdict.word, verdict.n) == (UNDECIDED, count)
        assert verdict.needed_n


@pytest.mark.parametrize("scores", [np.ones(3), np.full(N, np.nan), None])
def test_explanations_that_do_not_fit_are_refused(scores: Any) -> None:
    with pytest.raises(MethodError, match="would work"):
        randomised_model(lambda q: scores, model(6), nulls(6))


def test_nulls_over_other_units_are_refused() -> None:
    with pytest.raises(MethodError, match="same units"):
        randomised_model(leave_one_out, model(7), [Weighted(np.zeros(N), 0, "v")])
    assert randomised_model(leave_one_out, Weighted(np.ones(1), 0), []).word == UNDECIDED
