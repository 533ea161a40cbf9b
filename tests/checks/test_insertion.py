"""Insertion on hand-wired functions of units, where every effect is known exactly."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from whence.checks.deletion import areas_of, curves, deletion, orders_of, scale_of
from whence.checks.insertion import insertion
from whence.engine.randomness import stream
from whence.errors import MethodError
from whence.question import Budget, Metered
from whence.units import Units
from whence.verdict import REFUTED, SUPPORTED, THIS_RUN, UNDECIDED

Values = Callable[[Any], Any]


class Wired:
    """``value(states[row, unit])``; observed states are 1, re-rendered ones are 0 or 1 with equal chance."""

    readout, capabilities = "value", frozenset[str]()

    def __init__(self, value: Values, n: int, name: object = "") -> None:
        self.value, self.rng = value, stream("wired", name)
        self.units = Units("unit", tuple(f"u{i}" for i in range(n)), tuple(((i,),) for i in range(n)))

    def ask(self, keep: np.ndarray) -> np.ndarray:
        return np.asarray(self.value(np.where(keep, 1, self.rng.integers(0, 2, keep.shape))), float)


WEIGHTS = np.zeros(12)
WEIGHTS[[2, 5, 9, 11]] = 8, 4, 2, 1
"""Effects of twelve units: 8, 4, 2, 1 and eight times nothing."""


def graded(s: Any) -> Any:
    return s @ WEIGHTS / WEIGHTS.sum()


def test_only_the_true_scores_are_supported() -> None:
    words: dict[str, list[str]] = {name: [] for name in ("truth", "random", "shuffled", "constant", "reversed")}
    effects = []
    for i in range(10):
        question = Wired(graded, 12, i)
        scale = scale_of(question, insert=True, seed=i)
        rng = stream("guesses", i)
        given = {
            "truth": WEIGHTS,
            "random": rng.normal(size=12),
            "shuffled": rng.permutation(WEIGHTS),
            "constant": np.ones(12),
            "reversed": -WEIGHTS,
        }
        found = {name: insertion(scores, question, scale=scale, seed=i) for name, scores in given.items()}
        effects.append(found["truth"].effect)
        for name, verdict in found.items():
            words[name].append(verdict.word)
            assert verdict.scope == THIS_RUN
    assert words["truth"].count(SUPPORTED) >= 9, words
    assert np.mean(effects) == pytest.approx(1, abs=0.1)
    # By luck one in forty orders does as well; twenty guesses, at most two by luck.
    assert words["random"].count(SUPPORTED) + words["shuffled"].count(SUPPORTED) <= 2, words
    assert SUPPORTED not in words["constant"] + words["reversed"], words
    assert words["reversed"] == [REFUTED] * 10


def test_over_several_questions_an_explainer_is_supported_and_its_guesses_are_not() -> None:
    questions = [Wired(graded, 12, i) for i in range(16)]
    guesses = stream("guesses")
    truth = insertion(lambda q: WEIGHTS, questions)
    assert truth.word == SUPPORTED, truth.line
    assert truth.replicate == "question"
    for guess in (
        lambda q: guesses.normal(size=12),
        lambda q: guesses.permutation(WEIGHTS),
        lambda q: np.ones(12),
        lambda q: np.arange(12.0),
    ):
        verdict = insertion(guess, questions)
        assert verdict.word != SUPPORTED, verdict.line


def test_the_number_falls_with_every_tenth_of_the_truth_that_is_replaced_by_noise() -> None:
    weights = np.linspace(0, 1, 20) ** 2
    question = Wired(lambda s: s @ weights / weights.sum(), 20, "degraded")
    scale = scale_of(question, insert=True)
    rng, means = stream("degrade"), []
    for replaced in range(0, 20, 2):
        orders = []
        for _ in range(150):
            scores = weights.copy()
            which = rng.permutation(20)[:replaced]
            scores[which] = rng.random(replaced)
            orders.append(orders_of(scores, 1, rng)[0])
        values = curves(question, np.stack(orders), scale.cuts, insert=True)
        means.append(float(scale.number(areas_of(values, scale.cuts, 20, insert=True)).mean()))
    assert means[0] > 0.9
    assert means[-1] < 0.25
    assert all(a > b for a, b in pairwise(means)), means


def test_deletion_asks_what_is_needed_and_insertion_what_suffices() -> None:
    """Naming one of two: enough for deletion where both are needed, for insertion where either will do."""
    one, pair = np.eye(10)[3], np.eye(10)[3] + np.eye(10)[7]
    found: dict[tuple[str, bool], float] = {}
    for structure, value in (
        ("and", lambda s: s[:, 3] * s[:, 7]),
        ("or", lambda s: np.maximum(s[:, 3], s[:, 7])),
    ):
        for insert in (False, True):
            question = Wired(value, 10, structure)
            scale = scale_of(question, insert=insert, draws=100)
            for name, scores in (("one", one), ("pair", pair)):
                orders = orders_of(scores, 600, stream("ties"))
                areas = areas_of(curves(question, orders, scale.cuts, insert), scale.cuts, 10, insert)
                found[f"{structure} {name}", insert] = float(scale.number(areas).mean())
    for insert in (False, True):
        for structure in ("and", "or"):
            assert found[f"{structure} pair", insert] == pytest.approx(1, abs=0.12), found
    assert found["and one", False] > found["and one", True] + 0.2, found
    assert found["or one", True] > found["or one", False] + 0.2, found


def test_the_verdict_does_not_hang_on_blocks_or_on_the_order_of_units(monkeypatch: pytest.MonkeyPatch) -> None:
    first = insertion(WEIGHTS, Wired(graded, 12), draws=64)
    moved = np.random.default_rng(0).permutation(12)
    turned = insertion(WEIGHTS[moved], Wired(lambda s: s @ WEIGHTS[moved] / 15, 12), draws=64)
    assert first.effect == pytest.approx(turned.effect, abs=0.1)
    monkeypatch.setattr("whence.checks.deletion.ROWS", 7)
    assert insertion(WEIGHTS, Wired(graded, 12), draws=64).record() == first.record()


def test_it_counts_what_it_asks() -> None:
    question = Metered(Wired(graded, 12), Budget(forwards=10_000))
    assert insertion(WEIGHTS, question).details["rows"] == question.spent.forwards


def test_where_no_unit_matters_there_is_no_verdict() -> None:
    verdict = insertion(np.arange(6.0), Wired(lambda s: np.zeros(len(s)), 6))
    assert (verdict.word, verdict.n) == (UNDECIDED, 0)


@pytest.mark.parametrize("scores", [np.ones(3), np.full(12, np.inf), None])
def test_scores_that_do_not_fit_are_refused(scores: Any) -> None:
    with pytest.raises(MethodError, match="would work"):
        insertion(scores, Wired(graded, 12))


def test_a_scale_of_deletion_is_refused() -> None:
    question = Wired(graded, 12)
    with pytest.raises(MethodError, match="deletion over 12"):
        insertion(WEIGHTS, question, scale=scale_of(question))
    assert deletion(WEIGHTS, question, scale=scale_of(question)).word == SUPPORTED
