"""Empirical Explainer: a student learns an expensive explainer's answers, and says how far it is from them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from whence.ablations.empirical_explainer import EmpiricalExplainer, _rank_correlation
from whence.ablations.leave_one_out import LeaveOneOut
from whence.ablations.shapley_sampling import ShapleySampling
from whence.checks.stability import Reordered
from whence.engine.randomness import stream
from whence.errors import MethodError
from whence.question import Budget, Metered
from whence.units import Units
from whence.worlds import circuits

N = 6


class Sums:
    """f of 6 units, two entries each, around the mean 0.5 of the world; f is given."""

    readout, capabilities = "value of a known function", frozenset({"gradients"})

    def __init__(self, seed: int, f: Callable[[Tensor], Tensor], spread: float = 1.0) -> None:
        self.f, self.x = f, 0.5 + spread * stream("sums", seed).normal(size=(1, 2 * N))
        self.units = Units("unit", tuple(f"u{i}" for i in range(N)), tuple(((i,),) for i in range(N)))

    inputs = property(lambda self: torch.from_numpy(self.x).float())
    unit_of = property(lambda self: torch.arange(N).repeat_interleave(2)[None])

    def forward(self, inputs: Tensor) -> Tensor:
        return self.f(inputs)

    def background(self, n: int) -> Tensor:
        half = torch.from_numpy(stream("background").normal(size=(n // 2, 2 * N))).float()
        return 0.5 + torch.cat([half, -half])

    def ask(self, keep: np.ndarray) -> np.ndarray:
        """The expectation over what removed units could be, for a sum."""
        x = np.where(np.repeat(keep, 2, 1), self.x, 0.5)
        return self.f(torch.from_numpy(x).float()).double().numpy()


WEIGHTS = torch.linspace(-1, 2, 2 * N)


def weighted(x: Tensor) -> Tensor:
    return x @ WEIGHTS


class Says:
    """A teacher that asks as often as it likes and then says these maps, one after the other."""

    def __init__(self, maps: list[np.ndarray], asks: int = 0) -> None:
        self.maps, self.asks = iter(maps), asks

    def explain(self, question: Any) -> Any:
        if self.asks:
            question.ask(np.ones((self.asks, len(question.units)), bool))
        return next(self.maps)


def texts(key: str, attempts: range = range(2)) -> list[Any]:
    """Questions to hand-wired circuits of four kinds, of the first text also the sibling."""
    found: list[Any] = []
    for kind, structure in circuits.KINDS.items():
        for attempt in attempts:
            planted = circuits.make(key, kind).plant(structure, attempt)
            found += [planted.question, *([] if attempt else [planted.sibling])]
    return found


def test_on_questions_held_out_the_student_is_closer_to_the_teacher_than_places_and_chance() -> None:
    shapley = ShapleySampling(orders=25)
    student, places, chance, ratios = [], [], [], []
    for key in ("a", "b", "c"):
        questions = texts(key)
        maps = [shapley.explain(q).scores.astype(float) for q in questions]
        learned = EmpiricalExplainer(Says(maps, asks=shapley.rows(circuits.UNITS))).fit(questions)
        placed = EmpiricalExplainer(Says(maps), features=("place",)).fit(questions)
        dice = [stream("dice", key, i).random(len(m)) for i, m in enumerate(maps)]
        student.append(learned.facts["rank_correlation"])
        places.append(placed.facts["rank_correlation"])
        chance.append(float(np.mean([_rank_correlation(d, m) for d, m in zip(dice, maps, strict=True)])))
        ratios.append(learned.facts["ratio"])
        assert learned.facts["error"] < 0.8 * learned.facts["error_of_the_mean"]
        assert placed.facts["error"] > learned.facts["error"]
    assert np.mean(student) >= 0.5
    assert min(student) > max(*places, *chance)
    assert max(np.mean(places), np.mean(chance)) < 0.3
    assert min(ratios) >= 100


def test_the_error_shown_is_the_one_on_texts_that_were_not_in_the_fit() -> None:
    shapley = ShapleySampling(orders=25)
    fitted = EmpiricalExplainer(shapley).fit(texts("d"))
    fresh = texts("d", range(7, 8))
    off = [fitted.explain(q).scores - shapley.explain(q).scores for q in fresh]
    shown = fitted.explain(fresh[0]).spread
    assert shown is not None
    assert np.sqrt(np.mean(np.square(off))) == pytest.approx(float(shown[0]), rel=0.4)


def test_a_teacher_that_the_gradient_explains_is_learned_exactly() -> None:
    """Of a sum, a unit's Shapley value is its weights times how far it is from the mean."""
    fitted = EmpiricalExplainer(LeaveOneOut(draws=1), penalty=1e-6).fit([Sums(i, weighted) for i in range(10)])
    other = Sums(77, weighted)
    e = fitted.explain(other)
    exact = (WEIGHTS.numpy() * (other.x[0] - 0.5)).reshape(N, 2).sum(1)
    assert e.scores == pytest.approx(exact, abs=0.01)
    assert e.details["error"] < 0.01
    assert e.details["rank_correlation"] > 0.99
    assert e.spread == pytest.approx(np.full(N, e.details["error"]))


def test_a_teacher_whose_maps_are_dealt_to_other_units_cannot_be_learned_and_that_is_shown() -> None:
    questions = [Sums(i, weighted) for i in range(12)]
    true = [LeaveOneOut(draws=1).explain(q).scores.astype(float) for q in questions]
    dealt = [stream("dealt", i).permutation(m) for i, m in enumerate(true)]
    facts = EmpiricalExplainer(Says(dealt)).fit(questions).facts
    assert facts["rank_correlation"] < 0.2
    assert facts["error"] > 0.9 * facts["error_of_the_mean"]


def test_it_costs_one_forward_and_one_backward_and_says_the_teacher_s_cost_beside() -> None:
    questions = [Sums(i, weighted) for i in range(8)]
    fitted = EmpiricalExplainer(ShapleySampling(orders=5)).fit(questions)
    metered = Metered(questions[0], Budget(forwards=1, backwards=1))
    e = fitted.explain(metered)
    assert (metered.spent.forwards, metered.spent.backwards) == (1, 1)
    assert e.cost.runs == 1
    assert e.details["teacher_runs"] == {"forwards": 31, "backwards": 0}
    assert e.details["student_runs"] == {"forwards": 1, "backwards": 1}
    assert e.details["ratio"] == 15.5
    assert "shapley_sampling" in str(e)
    assert "8 questions held out, 1/16 of its model runs" in str(e)
    assert e.settings["teacher"] == "shapley_sampling"


def test_the_same_fit_says_the_same_and_the_order_of_units_does_not_matter() -> None:
    questions = [Sums(i, weighted) for i in range(8)]
    one, two = (EmpiricalExplainer(LeaveOneOut(draws=1)).fit(questions) for _ in range(2))
    other = Sums(9, weighted)
    assert (one.explain(other).scores == two.explain(other).scores).all()
    order = np.array([3, 0, 5, 1, 2, 4])
    moved = one.explain(Reordered(other, order))  # type: ignore[arg-type]
    assert moved.scores == pytest.approx(one.explain(other).scores[order], abs=1e-6)
    assert moved.units.labels == other.units.subset(order.tolist()).labels


def test_questions_of_other_numbers_of_units_count_alike() -> None:
    few = texts("e")[:4]  # 8 units each
    fitted = EmpiricalExplainer(LeaveOneOut(draws=2)).fit([*few, *(Sums(i, weighted) for i in range(6))])
    assert fitted.explain(few[0]).scores.shape == (8,)
    assert fitted.explain(Sums(20, weighted)).scores.shape == (N,)


def test_a_question_unlike_those_of_the_fit_says_so() -> None:
    fitted = EmpiricalExplainer(LeaveOneOut(draws=1)).fit([Sums(i, weighted) for i in range(20)])
    far = fitted.explain(Sums(3, weighted, spread=50.0))
    assert far.details["outside"] > 0.5
    assert "unlike any of the fit" in str(far)
    assert "unlike" not in str(fitted.explain(Sums(3, weighted)))


def test_too_few_questions_a_missing_gradient_and_an_unknown_feature_are_refused() -> None:
    asked: list[Any] = []

    class Counted(LeaveOneOut):
        def explain(self, run: Any, image: int = 0) -> Any:
            asked.append(run)
            return super().explain(run, image)

    class Closed(Sums):
        capabilities = frozenset()

    eight = [Sums(i, weighted) for i in range(8)]
    with pytest.raises(MethodError, match="8 or more"):
        EmpiricalExplainer(Counted()).fit(eight[:7])
    with pytest.raises(MethodError, match="no gradients"):
        EmpiricalExplainer(Counted()).fit([*eight, Closed(9, weighted)])
    with pytest.raises(MethodError, match="gradient norm"):
        EmpiricalExplainer(Counted(), features=("colour",)).fit(eight)
    assert not asked
    with pytest.raises(MethodError, match=r"fit\(questions\)"):
        EmpiricalExplainer(Counted()).explain(eight[0])
    with pytest.raises(MethodError, match="no gradients"):
        EmpiricalExplainer(LeaveOneOut(draws=1)).fit(eight).explain(Closed(9, weighted))


def test_a_teacher_that_says_something_else_is_refused() -> None:
    eight = [Sums(i, weighted) for i in range(8)]
    with pytest.raises(MethodError, match="one number for each of 6 units"):
        EmpiricalExplainer(Says([np.ones(3)])).fit(eight)
