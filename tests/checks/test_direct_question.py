"""The direct question, against attributions that are complete, linear and wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from whence.checks.direct_question import AGREES, CONTRADICTED, LOWERS, NOTHING, RAISES, direct_question, hold
from whence.engine.randomness import stream
from whence.errors import MethodError, PromptError
from whence.question import Answer, Budget, Metered
from whence.units import Units
from whence.verdict import LOOKS, REFUTED, SUPPORTED, THIS_RUN, UNDECIDED


class Wired:
    """``value(states[row, unit])``; observed states are 1, re-rendered ones are 0 or 1 with equal chance."""

    readout, capabilities = "value", frozenset[str]()

    def __init__(self, value: Callable[[Any], Any], n: int, name: object = "") -> None:
        self.value, self.rng = value, stream("wired", name)
        self.units = Units("unit", tuple(f"u{i}" for i in range(n)), tuple(((i,),) for i in range(n)))

    def ask(self, keep: np.ndarray) -> np.ndarray:
        return np.asarray(self.value(np.where(keep, 1, self.rng.integers(0, 2, keep.shape))), float)


# --- attributions that are complete and linear, and no better than a coin


class Bumps:
    """f(x) = (g_a(x_a) + g_b(x_b)) / 2 of four inputs, each uniform in -1..1 and observed at 0.9.

    g is 1 at the observed input whatever the coin. ``a``: 1 everywhere, or only close to 0 and to 0.9. ``b``: 0 only
    close to 0, or 1 only close to 0.9. So g(0.9) - g(0) is 0 for a and 1 for b on either side of either coin, and that
    is the integrated gradient from the baseline 0, the mean of this world; but drawing the input anew does next to
    nothing on one side and ends the output on the other.
    """

    readout, capabilities = "f", frozenset({"gradients"})

    def __init__(self, a_matters: bool, b_matters: bool, name: object = "") -> None:
        import torch

        self.a_matters, self.b_matters, self.rng = a_matters, b_matters, stream("bumps", name)
        self.inputs = torch.full((1, 4), 0.9, dtype=torch.float64)
        self.unit_of = torch.arange(4)[None]
        self.units = Units("unit", ("a", "b", "c", "d"), tuple(((i,),) for i in range(4)))

    def forward(self, x: Any) -> Any:
        import torch

        def near(t: Any, centre: float) -> Any:
            return torch.relu(1 - (t - centre).abs() / 0.05)

        a = near(x[:, 0], 0) + near(x[:, 0], 0.9) if self.a_matters else 1 + 0 * x[:, 0]
        b = near(x[:, 1], 0.9) if self.b_matters else 1 - near(x[:, 1], 0)
        return (a + b) / 2

    def background(self, n: int) -> Any:
        import torch

        return torch.as_tensor(self.rng.uniform(-1, 1, (n, 4)))

    def ask(self, keep: np.ndarray) -> np.ndarray:
        import torch

        return np.asarray(self.forward(torch.where(torch.as_tensor(keep), self.inputs, self.background(len(keep)))))


def integrated_gradients(question: Bumps, steps: int = 3600) -> np.ndarray:
    """(x - 0) times the mean gradient on the way from 0 to x (Sundararajan et al. 2017), by the midpoint rule."""
    import torch

    share = (torch.arange(steps, dtype=torch.float64)[:, None] + 0.5) / steps
    path = (share * question.inputs).requires_grad_()
    (gradient,) = torch.autograd.grad(question.forward(path).sum(), path)
    return np.asarray(question.inputs[0] * gradient.mean(0))


def test_equal_attributions_of_opposite_behaviour() -> None:
    import torch

    coins = stream("coins").integers(0, 2, (8, 2)).astype(bool)
    assert coins.any(0).all()
    assert (~coins).any(0).all()
    attributions, right = [], []
    for i, (a, b) in enumerate(coins.tolist()):
        question = Bumps(a, b, i)
        scores = integrated_gradients(question)
        zero = torch.zeros_like(question.inputs)
        complete = float((question.forward(question.inputs) - question.forward(zero))[0])
        assert scores.sum() == pytest.approx(complete, abs=1e-6)
        attributions.append(scores)
        for unit, matters in (("a", a), ("b", b)):
            verdict = direct_question(unit, question, delta=0.2)
            assert verdict.scope == THIS_RUN
            right.append(verdict.word == (SUPPORTED if matters else REFUTED))
    # The same four numbers for every coin: whoever reads them is right half of the time.
    assert np.allclose(attributions, [0, 0.5, 0, 0], atol=1e-6)
    assert np.mean(right) >= 0.9, right


def test_what_the_attribution_says_is_contradicted() -> None:
    question = Bumps(a_matters=True, b_matters=False)
    held = {h.unit: h for h in hold(integrated_gradients(question), question)}
    assert (held["a"].says, held["a"].word) == (NOTHING, CONTRADICTED)
    assert (held["b"].says, held["b"].word) == (LOWERS, CONTRADICTED)
    assert (held["c"].says, held["c"].word) == (NOTHING, AGREES)
    assert "contradicted" in str(held["a"])


# --- truth and error rates


def test_causes_are_supported_and_units_that_do_nothing_are_not() -> None:
    words = {"cause": [], "none": [], "shuffled": []}
    for i in range(20):
        question = Wired(lambda s: s[:, 3], 8, i)
        words["cause"].append(direct_question("u3", question).word)
        words["none"].append(direct_question("u5", question).word)
        shuffled = int(stream("shuffled", i).permutation([0, 1, 2, 4, 5, 6, 7])[0])
        words["shuffled"].append(direct_question(shuffled, question).word)
    assert words["cause"].count(SUPPORTED) >= 19, words
    assert words["none"] == words["shuffled"] == [REFUTED] * 20


def test_an_effect_of_half_of_delta_is_seldom_supported() -> None:
    words = [direct_question(0, Wired(lambda s: 0.2 * s[:, 0] + 0 * s[:, 1], 6, i)).word for i in range(40)]
    assert SUPPORTED not in words
    noisy = []
    for i in range(40):
        coins = stream("half of delta", i)
        question = Wired(lambda s, coins=coins: np.where(s[:, 0] == 1, 1.0, coins.random(len(s)) < 0.8), 6, i)
        noisy.append(direct_question(0, question))
    assert 0.05 < np.mean([v.effect for v in noisy]) < 0.15
    assert sum(v.word == SUPPORTED for v in noisy) <= 2


def test_units_that_stand_in_for_each_other_are_asked_about_together() -> None:
    question = Wired(lambda s: np.maximum(s[:, 1], s[:, 2]), 8)
    assert direct_question("u1", question).word == REFUTED
    assert direct_question("u2", question).word == REFUTED
    assert direct_question(("u1", "u2"), question, delta=0.1).word == SUPPORTED


def test_where_all_units_do_as_much_the_control_says_so() -> None:
    verdict = direct_question(0, Wired(lambda s: s[:, 0] * s[:, 1], 2))
    assert verdict.word == UNDECIDED
    assert verdict.effect > 0.3
    assert verdict.n == LOOKS[-1]


def test_a_unit_that_holds_the_value_down_raises_it() -> None:
    question = Wired(lambda s: 1 - s[:, 0], 6)
    assert direct_question(0, question).word == REFUTED
    verdict = direct_question(0, question, raises=True)
    assert verdict.word == SUPPORTED
    assert "raises" in verdict.claim


# --- explanations


def signed(s: Any) -> Any:
    return 0.8 * s[:, 0] - 0.8 * s[:, 1]


def test_a_true_explanation_agrees_and_wrong_ones_are_contradicted() -> None:
    truth = np.array([0.4, -0.4, 0, 0, 0, 0])
    held = hold(truth, Wired(signed, 6))
    assert [h.says for h in held] == [LOWERS, RAISES, *[NOTHING] * 4]
    assert [h.word for h in held] == [AGREES] * 6
    for wrong in (-truth, truth[::-1], np.full(6, 0.4)):
        words = [h.word for h in hold(wrong, Wired(signed, 6))]
        assert words.count(CONTRADICTED) >= 2, (wrong, words)
    shuffled = [hold(stream("shuffle", i).permutation(truth), Wired(signed, 6, i)) for i in range(6)]
    assert sum(h.word == AGREES for held in shuffled for h in held) < 30


def test_the_top_units_alone_are_claims_where_scores_have_no_scale() -> None:
    held = hold(np.array([90.0, 1, 80, 0, 0, 0]), Wired(signed, 6), top=2)
    assert [(h.unit, h.word) for h in held] == [("u0", AGREES), ("u2", CONTRADICTED)]


def test_an_answer_that_no_unit_did_it_is_held_against_all_of_them() -> None:
    nothing = Answer(np.zeros(6), nothing=True)
    assert [h.word for h in hold(nothing, Wired(lambda s: np.ones(len(s)), 6))] == [AGREES] * 6
    assert [h.word for h in hold(nothing, Wired(signed, 6))].count(CONTRADICTED) == 2


def test_many_claims_are_corrected_together() -> None:
    held = hold(np.full(20, 0.5), Wired(lambda s: s[:, 0], 20))
    assert [h.word for h in held] == [AGREES] + [CONTRADICTED] * 19
    assert {v.details["claims"] for h in held for v in h.verdicts} == {20}


# --- invariance, cost, errors


def test_the_order_of_the_units_does_not_matter() -> None:
    words = [direct_question(i, Wired(lambda s, i=i: s[:, i], 8)).word for i in range(8)]
    assert words == [SUPPORTED] * 8


def test_it_is_the_same_again_and_counts_what_it_asks() -> None:
    question = Metered(Wired(lambda s: s[:, 3], 8), Budget(forwards=1000))
    verdict = direct_question(3, question)
    assert verdict.details["rows"] == question.spent.forwards == 1 + 8 * verdict.n
    assert len(verdict.details["falls"]) == verdict.n
    assert direct_question(3, Wired(lambda s: s[:, 3], 8)).record() == verdict.record()


@pytest.mark.parametrize("scores", [np.ones(3), np.full(6, np.nan), "many"])
def test_scores_that_do_not_fit_are_refused(scores: Any) -> None:
    with pytest.raises(MethodError, match="would work"):
        hold(scores, Wired(signed, 6))


def test_what_cannot_be_asked_is_refused() -> None:
    question = Wired(signed, 6)
    with pytest.raises(PromptError, match="u9"):
        direct_question("u9", question)
    for wrong in (6, -1, (), (0, 17)):
        with pytest.raises(MethodError, match="would work"):
            direct_question(wrong, question)
    with pytest.raises(MethodError, match="no other unit"):
        direct_question(range(6), question)
    with pytest.raises(MethodError, match="1 draw at least"):
        direct_question(0, question, draws=0)
    with pytest.raises(MethodError, match="from 1 to 6"):
        hold(np.zeros(6), question, top=7)
