"""Methods for any Question, against functions whose causes are known exactly.

The world is fair coins: x in {0, 1}^n, a removed unit is tossed again. `Exact` answers with the expectation over all
tosses, so that Shapley values and leave-one-out have one right answer; `Tossed` tosses, as real questions do.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from math import factorial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from whence.ablations.attention_mass import AttentionMass
from whence.ablations.input_x_gradient import InputXGradient
from whence.ablations.integrated_gradients import IntegratedGradients
from whence.ablations.kernel_shap import KernelSHAP
from whence.ablations.leave_one_out import LeaveOneOut
from whence.ablations.lime import LIME
from whence.ablations.occlusion import Occlusion
from whence.ablations.saliency import Saliency
from whence.ablations.shapley_sampling import ShapleySampling
from whence.engine.attribution import by_unit
from whence.errors import BudgetError, MethodError
from whence.question import Answer, Budget, Metered
from whence.units import Units

F = Callable[[Tensor], Tensor]


class Tossed:
    """f of n coins, all observed as ``seen``; each coin is ``width`` equal entries of the input, after a constant."""

    readout = "value of a known function"
    capabilities = frozenset({"gradients"})

    def __init__(self, f: F, n: int, seen: Any = 1, seed: int = 0, width: int = 1) -> None:
        self.f, self.n, self.width = f, n, width
        self.x = np.broadcast_to(np.asarray(seen, float), (n,)).copy()
        self.rng = np.random.default_rng(seed)
        self.units = Units("unit", tuple(f"u{i}" for i in range(n)), tuple(((i,),) for i in range(n)))

    def ask(self, keep: np.ndarray) -> Any:
        tossed = self.rng.integers(0, 2, keep.shape).astype(float)
        return self.of(np.where(keep, self.x, tossed))

    def of(self, coins: np.ndarray) -> Any:
        return self.f(torch.from_numpy(coins)).numpy().astype(float)

    @property
    def inputs(self) -> Tensor:
        return self.entries(torch.from_numpy(self.x)[None])

    @property
    def unit_of(self) -> Tensor:
        return torch.cat([torch.tensor([-1]), torch.arange(self.n).repeat_interleave(self.width)])[None]

    def entries(self, coins: Tensor) -> Tensor:
        return torch.cat([torch.full((len(coins), 1), 7.0), coins.float().repeat_interleave(self.width, 1)], 1)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.f(inputs[:, 1:].reshape(len(inputs), self.n, self.width).mean(2))

    def background(self, n: int) -> Tensor:
        if n == 2**self.n:  # all there are
            return self.entries(((torch.arange(n)[:, None] >> torch.arange(self.n)) & 1).double())
        half = torch.from_numpy(np.random.default_rng(5).integers(0, 2, (n // 2, self.n)).astype(float))
        return self.entries(torch.cat([half, 1 - half]))  # every coin is fair in this sample, exactly


class Exact(Tossed):
    """The same, answered by the expectation over all tosses."""

    def ask(self, keep: np.ndarray) -> Any:
        states = (np.arange(2**self.n)[:, None] >> np.arange(self.n)) & 1
        values = self.of(states.astype(float))
        fits = ((states[None] == self.x) | ~keep[:, None]).all(2)
        return (fits * values).sum(1) / fits.sum(1)


WEIGHTS = np.array([0.5, -0.25, 0.0, 1.0, 0.125, 0.0])


def additive(z: Tensor) -> Tensor:
    return z @ torch.from_numpy(WEIGHTS).to(z)


def both(z: Tensor) -> Tensor:
    return z[:, 1] * z[:, 3]


def either(z: Tensor) -> Tensor:
    return 1 - (1 - z[:, 1]) * (1 - z[:, 3])


def one_of(z: Tensor) -> Tensor:
    return z[:, 1] + z[:, 3] - 2 * z[:, 1] * z[:, 3]


def tangled(z: Tensor) -> Tensor:
    return z[:, 0] * z[:, 1] * z[:, 2] - 0.5 * z[:, 3] * z[:, 4] + one_of(z) + 0.3 * z[:, 5]


def shapley(question: Exact) -> np.ndarray:
    """By enumeration of all coalitions, from the definition."""
    n = question.n
    out = np.zeros(n)
    for u in range(n):
        others = [i for i in range(n) if i != u]
        for k in range(n):
            for s in combinations(others, k):
                keep = np.zeros((2, n), bool)
                keep[:, s] = True
                keep[1, u] = True
                without, having = question.ask(keep)
                out[u] += factorial(k) * factorial(n - k - 1) / factorial(n) * (having - without)
    return out


def auc(scores: np.ndarray, causes: list[int]) -> float:
    """Area under the ROC curve of causes against all other units."""
    rest = np.delete(scores, causes)
    return float(np.mean([(scores[c] > rest).mean() + (scores[c] == rest).mean() / 2 for c in causes]))


READOUT_METHODS: list[Any] = [
    LeaveOneOut(draws=1),
    Occlusion(window=1, draws=1),
    ShapleySampling(orders=3),
    KernelSHAP(samples=60, runs=2),
    LIME(samples=150, ridge=0.01),
    IntegratedGradients(baselines=64, steps=6),
]
ALL: list[Any] = [
    Saliency(),
    InputXGradient(),
    IntegratedGradients(),
    Occlusion(),
    ShapleySampling(),
    KernelSHAP(),
    LIME(),
    LeaveOneOut(),
]
SAMPLED: list[Any] = [
    Occlusion(draws=4),
    ShapleySampling(orders=6),
    KernelSHAP(samples=60),
    LIME(samples=60),
    LeaveOneOut(draws=4),
]


def name_of(method: Any) -> str:
    return type(method).__name__


@pytest.mark.parametrize("method", READOUT_METHODS, ids=name_of)
def test_in_an_additive_function_a_unit_scores_what_it_adds_over_its_mean(method: Any) -> None:
    seen = np.array([1, 1, 1, 0, 0, 1])
    scores = method.explain(Exact(additive, 6, seen)).scores
    assert scores == pytest.approx(WEIGHTS * (seen - 0.5), abs=2e-3)


def test_gradients_are_the_weights_of_an_additive_function() -> None:
    seen = np.array([1, 1, 1, 0, 0, 1])
    question = Exact(additive, 6, seen)
    assert Saliency().explain(question).scores == pytest.approx(abs(WEIGHTS))
    assert InputXGradient().explain(question).scores == pytest.approx(WEIGHTS * seen)


@pytest.mark.parametrize("f", [both, either, one_of, tangled], ids=lambda f: f.__name__)
def test_sampled_shapley_values_agree_with_enumeration(f: F) -> None:
    question = Exact(f, 6, [1, 1, 1, 0, 0, 1] if f is one_of else 1)
    exact = shapley(question)
    sampled = ShapleySampling(orders=100).explain(question)
    kernel = KernelSHAP(runs=4, samples=120).explain(question)
    for e in (sampled, kernel):
        assert e.spread is not None
        assert (abs(e.scores - exact) <= 4 * e.spread + 0.02).all(), (e.scores, exact)
        assert abs(e.scores - exact).max() < 0.1
    assert abs(np.roll(exact, 1) - exact).max() > 0.1  # another unit's values would not pass


def test_units_needed_together_share_the_credit_and_spare_units_show_only_in_shares() -> None:
    together, spare = Exact(both, 6), Exact(either, 6)
    for method in (ShapleySampling(orders=60), KernelSHAP(samples=120), IntegratedGradients(64, 6)):
        for question, share in ((together, 0.375), (spare, 0.125)):
            scores = method.explain(question).scores
            assert scores[[1, 3]] == pytest.approx([share, share], abs=0.05)
            assert abs(np.delete(scores, [1, 3])).max() < 0.02
    assert LeaveOneOut().explain(together).scores[[1, 3]] == pytest.approx([0.5, 0.5])
    assert LeaveOneOut().explain(spare).scores == pytest.approx(np.zeros(6))  # the blind spot that the docstring names
    assert InputXGradient().explain(spare).scores == pytest.approx(np.zeros(6))  # saturated


def test_a_window_over_neighbours_sees_what_stands_in_for_each_other() -> None:
    def neighbours(z: Tensor) -> Tensor:
        return 1 - (1 - z[:, 2]) * (1 - z[:, 3])

    scores = Occlusion(window=2).explain(Exact(neighbours, 6)).scores
    assert scores == pytest.approx([0, 0, 0.125, 0.125, 0, 0])


@pytest.mark.parametrize("f", [both, either, tangled], ids=lambda f: f.__name__)
def test_shares_add_up_to_the_whole_difference(f: F) -> None:
    question = Exact(f, 6)
    whole, nothing = question.ask(np.array([[True] * 6, [False] * 6]))
    for method in (ShapleySampling(orders=5), KernelSHAP(samples=30)):
        e = method.explain(question)
        assert e.scores.sum() == pytest.approx(whole - nothing, abs=1e-3)
        assert e.details["difference"] == pytest.approx(whole - nothing, abs=1e-3)
    integrated = IntegratedGradients(steps=20).explain(question)
    difference = question.forward(question.inputs) - question.forward(question.background(20)).mean()
    assert integrated.scores.sum() == pytest.approx(float(difference), abs=1e-4)
    assert abs(integrated.details["gap"]) < 1e-4


def test_entries_of_a_unit_count_together_and_entries_of_none_are_left_out() -> None:
    one, wide = (Exact(tangled, 6, width=w) for w in (1, 3))
    for method in (InputXGradient(), IntegratedGradients()):
        assert method.explain(wide).scores == pytest.approx(method.explain(one).scores, abs=1e-5)
    rows = by_unit(torch.tensor([[9.0, 1, -2, 3], [9, 0, 0, 1]]), torch.tensor([[-1, 0, 0, 1]]), 3)
    assert rows.tolist() == [[-1, 3, 0], [0, 1, 0]]
    assert by_unit(torch.tensor([[9.0, 1, 2, 3]]), torch.tensor([[-1, 0, 0, 1]]), 2, "amax").tolist() == [[2, 3]]


def planted(seed: int, n: int = 24) -> tuple[Tossed, int]:
    """One unit decides; all others are only looked at. The place of the cause is random."""
    cause = int(np.random.default_rng(seed).integers(n))

    def f(z: Tensor) -> Tensor:
        return torch.sigmoid(8 * (z[:, cause] - 0.5)) + 0.02 * torch.sin(20 * z).mean(1)

    return Tossed(f, n, seed=seed), cause


@pytest.mark.parametrize("method", ALL, ids=name_of)
def test_a_method_finds_the_planted_cause_of_its_own_question_and_of_no_other(method: Any) -> None:
    own, crossed = [], []
    asked = list({cause: (question, cause) for question, cause in map(planted, range(6))}.values())
    assert len(asked) >= 4
    scores = [method.explain(question).scores for question, _ in asked]
    for i, (_, cause) in enumerate(asked):
        own.append(auc(scores[i], [cause]))
        crossed += [auc(of_another, [cause]) for j, of_another in enumerate(scores) if j != i]
    assert np.mean(own) >= 0.95
    assert np.mean(crossed) < 0.7


def test_the_planted_cause_scores_its_effect_within_the_spread() -> None:
    question, cause = planted(3)
    rest = np.random.default_rng(0).integers(0, 2, (4000, 24)).astype(float)
    rest[:, cause] = 1
    effect = float(question.of(question.x[None])[0] - (question.of(rest) + question.of(rest * 0)).mean() / 2)
    for method in (LeaveOneOut(), ShapleySampling(), KernelSHAP(), LIME()):
        e = method.explain(planted(3)[0])
        assert e.spread is not None
        assert abs(e.scores[cause] - effect) < 4 * e.spread[cause] + 0.05, name_of(method)
        assert 0 < e.spread.mean() < 0.1


@pytest.mark.parametrize("method", [m for m in READOUT_METHODS if not isinstance(m, LIME)], ids=name_of)
def test_permuting_the_units_permutes_the_scores(method: Any) -> None:
    order = np.array([3, 0, 5, 1, 4, 2])

    def permuted(z: Tensor) -> Tensor:
        out = torch.empty_like(z)
        out[:, torch.from_numpy(order)] = z
        return tangled(out)

    if isinstance(method, ShapleySampling | KernelSHAP):
        method = ShapleySampling(orders=100) if isinstance(method, ShapleySampling) else KernelSHAP(samples=120)
    here, there = method.explain(Exact(tangled, 6)), method.explain(Exact(permuted, 6))
    sampled = isinstance(method, ShapleySampling | KernelSHAP)  # the others are exact here: the sampling is of draws
    assert there.scores == pytest.approx(here.scores[order], abs=0.12 if sampled else 1e-5)
    assert there.scores != pytest.approx(here.scores, abs=0.2)


@pytest.mark.parametrize("method", SAMPLED, ids=name_of)
def test_the_same_seed_gives_the_same_scores_in_batches_of_any_size(method: Any) -> None:
    first = method.explain(Tossed(tangled, 6)).scores
    assert (method.explain(Tossed(tangled, 6)).scores == first).all()
    if hasattr(method, "batch"):
        settings = {k: getattr(method, k) for k in method.__dataclass_fields__}
        small = type(method)(**{**settings, "batch": 5}).explain(Tossed(tangled, 6)).scores
        assert small == pytest.approx(first, abs=1e-6)
    if hasattr(method, "seed"):
        other = type(method)(**{**settings, "seed": 1}).explain(Tossed(tangled, 6)).scores
        assert (other != first).any()
    assert (method.explain(Tossed(tangled, 6, seed=1)).scores != first).any()


def test_integrated_gradients_do_not_depend_on_the_batch() -> None:
    one, many = (IntegratedGradients(batch=b).explain(Exact(tangled, 6)).scores for b in (3, 64))
    assert one == pytest.approx(many, abs=1e-6)


def test_captum_leaves_the_global_random_numbers_as_they_were() -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    for method in SAMPLED:
        method.explain(Tossed(tangled, 6))
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("method", ALL, ids=name_of)
def test_a_method_spends_what_its_settings_say_and_no_more_than_a_thousand_rows(method: Any) -> None:
    metered = Metered(planted(0)[0], Budget(forwards=1000, backwards=500))
    e = method.explain(metered)
    spent = metered.spent.forwards
    assert spent == e.cost.runs
    assert spent <= method.rows(24) <= 1000
    if not isinstance(method, LIME):
        assert spent == method.rows(24)
    assert Answer.of(e, metered.units).scores == pytest.approx(e.scores)
    if spent > 1:
        with pytest.raises(BudgetError):
            method.explain(Metered(planted(0)[0], Budget(forwards=spent - 1)))


class Mute:
    """A question that can only be asked; it was not asked anything yet."""

    readout, capabilities = "nothing", frozenset[str]()
    units = Units("unit", ("a", "b"), (((0,),), ((1,),)))

    def ask(self, keep: np.ndarray) -> Any:
        raise AssertionError("work before the check")


@pytest.mark.parametrize("method", [Saliency(), InputXGradient(), IntegratedGradients(), AttentionMass()], ids=name_of)
def test_a_missing_capability_is_named_before_any_work(method: Any) -> None:
    with pytest.raises(MethodError, match=r"no (gradients|attention)[\s\S]*would work: .*leave_one_out"):
        method.explain(Mute())


def test_what_is_no_question_and_what_cannot_work_is_refused() -> None:
    for method in (*ALL, AttentionMass()):
        with pytest.raises(MethodError, match="would work: a Question"):
            method.explain("a red circle")
    with pytest.raises(MethodError, match="window of 9"):
        Occlusion(window=9).explain(Mute())
    with pytest.raises(MethodError, match="samples"):
        KernelSHAP(samples=3).explain(Mute())


def test_attention_mass_is_the_attention_and_says_nothing_of_causes() -> None:
    class Looked(Tossed):
        capabilities = frozenset({"attention"})

        def attention(self) -> np.ndarray:
            return np.array([0.1, 0.0, 0.6, 0.1, 0.1, 0.1])

    metered = Metered(Looked(both, 6))
    e = AttentionMass().explain(metered)
    assert e.scores == pytest.approx([0.1, 0, 0.6, 0.1, 0.1, 0.1])
    assert metered.spent.forwards == e.cost.runs == 1
    assert auc(e.scores, [1, 3]) < 0.5  # it looks at what does nothing, and the method must not hide that


@pytest.mark.parametrize("method", ALL, ids=name_of)
def test_an_explanation_names_its_units_readout_and_settings(method: Any) -> None:
    e = method.explain(Exact(tangled, 6))
    assert e.units.labels == ("u0", "u1", "u2", "u3", "u4", "u5")
    assert (e.axes, e.readout, e.scores.dtype) == (("unit",), Exact.readout, np.float32)
    assert set(e.settings) == set(method.__dataclass_fields__)
    assert (e.spread is not None) == (not isinstance(method, Saliency | InputXGradient))
