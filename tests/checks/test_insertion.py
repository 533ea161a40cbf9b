"""Insertion on hand-wired functions of units, where every effect is known exactly."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from wired import GRADED, Wired, weighted

from whence.checks.deletion import areas_of, curves, deletion, orders_of, scale_of
from whence.checks.insertion import insertion
from whence.engine.randomness import stream
from whence.errors import MethodError
from whence.question import Budget, Metered
from whence.verdict import SUPPORTED, UNDECIDED

graded = weighted(GRADED)


def test_over_several_questions_an_explainer_is_supported_and_its_guesses_are_not() -> None:
    questions = [Wired(graded, 12, i) for i in range(16)]
    guesses = stream("guesses")
    truth = insertion(lambda q: GRADED, questions)
    assert truth.word == SUPPORTED, truth.line
    assert truth.replicate == "question"
    for guess in (
        lambda q: guesses.normal(size=12),
        lambda q: guesses.permutation(GRADED),
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
    first = insertion(GRADED, Wired(graded, 12), draws=64)
    moved = np.random.default_rng(0).permutation(12)
    turned = insertion(GRADED[moved], Wired(lambda s: s @ GRADED[moved] / 15, 12), draws=64)
    assert first.effect == pytest.approx(turned.effect, abs=0.1)
    monkeypatch.setattr("whence.checks.deletion.ROWS", 7)
    assert insertion(GRADED, Wired(graded, 12), draws=64).record() == first.record()


def test_it_counts_what_it_asks() -> None:
    question = Metered(Wired(graded, 12), Budget(forwards=10_000))
    assert insertion(GRADED, question).details["rows"] == question.spent.forwards


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
        insertion(GRADED, question, scale=scale_of(question))
    assert deletion(GRADED, question, scale=scale_of(question)).word == SUPPORTED
