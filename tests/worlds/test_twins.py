"""The world of twins on a table: what is planted is what the model does, and nothing without the model shows it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from arms_checks import auc, does_what_was_planted, every, swaps_do_what_the_recipe_says
from scipy import stats

from whence.engine.randomness import stream
from whence.errors import RunError
from whence.question import Budget, Metered
from whence.verdict import t_interval
from whence.worlds.ground import STILL, STRUCTURES, Planted, rows, trouble
from whence.worlds.scorers import SCORERS
from whence.worlds.twins import WORLD, tabular
from whence.worlds.twins.arms import COPIES, NOISE, Arms, lay_out
from whence.worlds.twins.asking import ArmsWorld, certified, exchanged

KEYS = [f"test {i}" for i in range(12)]
FRESH = KEYS[:3]
ALPHA = 0.01 / (len(SCORERS) * len(STRUCTURES))
"""Of one among so many looks; keys are fixed, so that a test that passes passes always."""


def counterparts(p: Planted) -> list[int]:
    """The twins of the causes."""
    return [t for a, t in zip(p.arm, p.twin, strict=True) if a in p.causes]


@pytest.fixture(scope="module")
def planted() -> dict[str, Any]:
    return {p.structure: p for p in WORLD.draw(FRESH[0]).planted}


@pytest.mark.parametrize("key", FRESH)
def test_the_model_does_what_was_planted_on_fresh_keys(key: str) -> None:
    does_what_was_planted(WORLD.draw(key))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_each_swap_of_arm_and_twin_does_what_the_recipe_says(structure: str, planted: dict[str, Any]) -> None:
    swaps_do_what_the_recipe_says(planted[structure], tabular.make(FRESH[0]).arms)


@pytest.mark.parametrize("structure", sorted(COPIES))
def test_a_copy_is_drawn_from_its_first_unit_and_a_first_unit_whatever_its_copy_is(structure: str) -> None:
    arms = lay_out(tuple(STRUCTURES), 4, stream("copies"))
    first, second = arms.arm[structure]
    n = len(arms.names)
    seen = np.ones(n, bool)
    drawn = stream("copies", "draws").standard_normal((4000, n, 2))
    cases = {(True, False): (1.0, 1 - NOISE), (False, True): (0.5, 1.0), (False, False): (0.5, 0.5)}
    for kept, (share_of_first, share_of_second) in cases.items():
        keep = np.ones((4000, n), bool)
        keep[:, [first, second]] = kept
        states = arms.render(drawn, keep, seen)
        assert abs(states[:, first].mean() - share_of_first) < 0.03
        assert abs(states[:, second].mean() - share_of_second) < 0.03
    follows = arms.opposite(seen, rows([[first], [second], [first, second]], n))[:, [first, second]]
    assert follows.tolist() == [[False, False], [True, False], [False, False]]


def chance(score: Callable[[Any], Any], questions: list[list[Any]]) -> tuple[float, float]:
    """The interval of a scorer's mean AUC on questions alone, one replicate a key."""
    per_key = [float(np.mean([auc(score(p.question), p.causes, p.twin) for p in of_key])) for of_key in questions]
    return t_interval(per_key, 0.01 / len(SCORERS))


def test_no_scorer_finds_a_cause_without_the_model() -> None:
    questions: list[list[Any]] = [list(WORLD.draw(key).planted) for key in KEYS]
    for name, score in SCORERS.items():
        low, high = chance(score, questions)
        assert low <= 0.5 <= high, f"{name}: {low:.3f} to {high:.3f}"
        for p in questions[0]:
            both = [auc(score(q.question), q.causes, counterparts(q)) for q in (p, p.mirrored())]
            assert sum(both) == 1, f"{name} on {p.name}"
    # The same test finds a leak: a world whose arm stands first in the list.
    places = {id(p.question): p.arm for of_key in questions for p in of_key}
    low, _ = chance(lambda q: np.isin(np.arange(len(q.units)), places[id(q)]).astype(float), questions)
    assert low > 0.5


def test_scorers_ask_no_model(planted: dict[str, Any]) -> None:
    class Mute:
        def __init__(self, question: Any) -> None:
            self.units, self.inputs, self.unit_of = question.units, question.inputs, question.unit_of
            self.background = question.background

    mute: Any = Mute(planted["and"].question)
    for score in SCORERS.values():
        assert np.isfinite(score(mute)).all()


@pytest.mark.parametrize("structure", STRUCTURES)
def test_arm_and_twin_have_the_same_statistics(structure: str, planted: dict[str, Any]) -> None:
    p, made = planted[structure], tabular.make(FRESH[0])
    features = p.question.background(4000).numpy()
    arm, twin = ([features[:, made.columns[i]] for i in side] for side in (p.arm, p.twin))
    for a, b in zip(arm, twin, strict=True):
        for k in range(a.shape[1]):
            assert stats.ks_2samp(a[:, k], b[:, k]).pvalue > ALPHA
            assert stats.ks_2samp(a[:, k] + 0.2, b[:, k]).pvalue < ALPHA  # it would see a small shift
    if len(arm) == 2:
        patterns = [np.bincount(2 * (x[:, 0] > 0) + (y[:, 0] > 0), minlength=4) for x, y in (arm, twin)]
        assert stats.chi2_contingency(patterns).pvalue > ALPHA
        together = [stats.pearsonr(x[:, 0], y[:, 0]).statistic for x, y in (arm, twin)]
        assert abs(together[0] - together[1]) < 0.06
        assert (min(together) > 0.3) == (structure in COPIES)


def test_the_coin_is_fair_and_places_are_permuted() -> None:
    layouts = [lay_out(tuple(STRUCTURES), 4, stream("layout", i)) for i in range(300)]
    for structure in STRUCTURES:
        earlier = sum(a.arm[structure][0] < a.twin[structure][0] for a in layouts)
        earlier_name = sum(a.names[a.arm[structure][0]] < a.names[a.twin[structure][0]] for a in layouts)
        assert stats.binomtest(earlier, 300).pvalue > ALPHA
        assert stats.binomtest(earlier_name, 300).pvalue > ALPHA


def exchange(made: tabular.Made, p: Planted, features: Any) -> Any:
    out = features.clone()
    order = exchanged(len(made.units), p.arm, p.twin)
    out[:, made.columns.ravel()] = features[:, made.columns[order].ravel()]
    return out


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_sibling_is_the_model_with_roles_swapped(structure: str, planted: dict[str, Any]) -> None:
    p, made = planted[structure], tabular.make(FRESH[0])
    x = p.question.background(64)
    assert not torch.equal(p.question.forward(x), p.sibling.forward(x))
    assert torch.equal(p.question.forward(x), p.sibling.forward(exchange(made, p, x)))
    assert torch.equal(p.question.inputs, p.sibling.inputs)
    assert torch.equal(p.question.background(9), p.sibling.background(9))
    sure = p.question.ask(every(p))[0], p.sibling.ask(every(p))[0]
    assert min(sure) > 1 - STILL
    some = p.ends[0]
    assert p.question.swap(rows([some], len(made.units)))[0] < STILL
    assert p.sibling.swap(rows([some], len(made.units)))[0] > 1 - STILL


@pytest.mark.parametrize("structure", STRUCTURES)
def test_nulls_are_still_but_no_constants(structure: str, planted: dict[str, Any]) -> None:
    p = planted[structure]
    units = len(p.question.units)
    assert len(p.nulls) == 2
    for null in p.nulls:
        moved = np.abs(null.swap(np.eye(units, dtype=bool)) - null.ask(every(p)))
        assert 1e-4 < moved.max() <= STILL
        assert (moved > 0).sum() > units / 2


def test_the_same_key_gives_the_same_bits_twice() -> None:
    first = WORLD.draw(FRESH[1])
    keep = np.zeros((5, len(first.planted[0].question.units)), bool)
    before = [(p.question.ask(keep), p.sibling.ask(keep), p.nulls[1].ask(keep), p.arm) for p in first.planted]
    tabular.make.cache_clear()
    ArmsWorld.attempts.cache_clear()
    second = WORLD.draw(FRESH[1])
    for (ask, sibling, null, arm), p in zip(before, second.planted, strict=True):
        np.testing.assert_array_equal(ask, p.question.ask(keep))
        np.testing.assert_array_equal(sibling, p.sibling.ask(keep))
        np.testing.assert_array_equal(null, p.nulls[1].ask(keep))
        assert arm == p.arm
    assert any(p.arm != q.arm for p, q in zip(first.planted, WORLD.draw(FRESH[2]).planted, strict=True))


class Both:
    """An oracle of which arm and twin must both be as they are."""

    def __init__(self, one: Any, other: Any) -> None:
        self.one, self.other, self.units = one, other, one.units

    def ask(self, keep: Any) -> Any:
        return np.minimum(self.one.ask(keep), self.other.ask(keep))

    def swap(self, which: Any) -> Any:
        return np.minimum(self.one.swap(which), self.other.swap(which))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_model_that_does_something_else_is_refused(structure: str, planted: dict[str, Any]) -> None:
    p = planted[structure]
    assert "planted were" in trouble(replace(p, question=p.sibling))
    assert "planted were" in trouble(replace(p, question=Both(p.question, p.sibling)))
    assert trouble(replace(p, sibling=p.question)).startswith("sibling: ")
    assert "not sure" in trouble(replace(p, question=p.nulls[0]))
    assert trouble(replace(p, nulls=(p.question,))).startswith("null 0 moves")


def test_a_question_under_another_structures_name_is_refused(planted: dict[str, Any]) -> None:
    for name, other in (("or", "and"), ("and", "or"), ("mediation", "confounder"), ("confounder", "mediation")):
        assert trouble(replace(planted[name], structure=other))


def test_a_key_whose_model_did_not_learn_is_an_error() -> None:
    class Wrong:
        arms: Arms = tabular.make(FRESH[0]).arms

        def plant(self, structure: str, attempt: int, purpose: str = "asking") -> Planted:
            p = tabular.make(FRESH[0]).plant(structure, attempt, purpose)
            return replace(p, question=p.sibling)

    with pytest.raises(RunError, match=r"twins\.\w+ for the key 'k'"):
        certified("twins", "k", Wrong())


def test_forward_is_differentiable_and_says_what_ask_says(planted: dict[str, Any]) -> None:
    for p in planted.values():
        question: Any = p.question
        x = question.inputs.requires_grad_()
        value = question.forward(x)
        value.sum().backward()
        assert x.grad is not None
        assert torch.isfinite(x.grad).all()
        assert (x.grad[:, torch.isin(question.unit_of[0], torch.tensor(p.arm))] != 0).any()
        np.testing.assert_allclose(value.detach().numpy(), question.ask(every(p)), rtol=1e-5)


def test_unit_of_says_which_features_a_swap_changes(planted: dict[str, Any]) -> None:
    question: Any = planted["and"].question
    alone = np.setdiff1d(np.arange(len(question.units)), tabular.make(FRESH[0]).arms.parent)
    for unit in alone[:8]:
        own = question.unit_of[0] == unit
        assert own.nonzero().ravel().tolist() == sorted(question.units.members[unit][0])
        x = question.inputs.repeat(1, 1)
        sign = 1 if question.seen[unit] else -1
        for column, mean in zip(question.units.members[unit][0], tabular.MEAN, strict=True):
            x[0, column] -= 2 * sign * mean
        swapped = question.swap(rows([[unit]], len(question.units)))
        np.testing.assert_allclose(question.forward(x).numpy(), swapped, rtol=1e-4)


def test_draws_differ_within_a_call_and_do_not_depend_on_how_rows_are_batched() -> None:
    def question() -> Any:
        return WORLD.draw(FRESH[0]).planted[1].question

    units = len(question().units)
    keep = stream("rows").random((40, units)) < 0.5
    keep[::2] = keep[0]
    whole = question().ask(keep)
    assert len(np.unique(whole[::2])) > 10
    parts, alone = question(), question()
    np.testing.assert_allclose(whole, np.concatenate([parts.ask(keep[:7]), parts.ask(keep[7:])]), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(whole[1::2], alone.ask(keep[1::2]), rtol=1e-4, atol=1e-6)


def test_a_metered_question_counts(planted: dict[str, Any]) -> None:
    metered = Metered(planted["or"].question, Budget(forwards=100))
    metered.ask(np.ones((3, len(metered.units)), bool))
    torch.autograd.backward(metered.forward(metered.inputs.requires_grad_()).sum())
    assert (metered.spent.forwards, metered.spent.backwards) == (4, 1)
