"""The world of hand-wired circuits: their sources are known exactly, and the texts do not show which one is read."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from math import factorial
from typing import Any

import numpy as np
import pytest
import torch
from arms_checks import auc, every, swaps_do_what_the_recipe_says
from scipy import stats

from whence.engine.randomness import stream
from whence.errors import BudgetError, RunError
from whence.method import load
from whence.question import Budget, Metered
from whence.verdict import t_interval
from whence.worlds.circuits import ASKS, FIRST, KINDS, UNITS, WORLD, _attempt, _write, additive, make
from whence.worlds.ground import ENDS, STILL, rows, trouble
from whence.worlds.scorers import SCORERS
from whence.worlds.trial import random_scores, try_draw

KEYS = [f"test {i}" for i in range(12)]
FRESH = KEYS[:3]


def uncertified(key: str, kind: str) -> Any:
    return make(key, kind).plant(KINDS[kind], 0)


def words_of(question: Any) -> list[int]:
    """The text as word numbers, from its codes alone."""
    return [int(i) for i in (question.inputs[0] @ question._table.T).argmax(1)]


@pytest.fixture(scope="module")
def planted() -> dict[str, Any]:
    return dict(zip(KINDS, WORLD.draw(FRESH[0]).planted, strict=True))


@pytest.mark.parametrize("key", FRESH)
def test_every_circuit_does_what_was_planted_on_fresh_keys(key: str) -> None:
    draw = WORLD.draw(key)
    assert [p.structure for p in draw.planted] == list(KINDS.values())
    assert [trouble(p) for p in draw.planted] == [""] * len(KINDS)
    assert len({p.name for p in draw.planted}) == len(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_each_swap_of_arm_and_twin_does_what_the_recipe_says(kind: str, planted: dict[str, Any]) -> None:
    swaps_do_what_the_recipe_says(planted[kind], make(FRESH[0], kind).arms)


@pytest.mark.parametrize("kind", ["copy", "induction"])
@pytest.mark.parametrize("key", KEYS)
def test_what_followed_the_earlier_occurrence_of_the_current_word_is_said(key: str, kind: str) -> None:
    p = uncertified(key, kind)
    for side in (p, p.mirrored()):
        question: Any = side.question
        words, circuit = words_of(question), question.circuit
        current = words[circuit.read]
        earlier = words[: circuit.read].index(current)
        assert question._said == words[earlier + 1]
        assert question._text.owner[earlier + 1] == side.arm[-1]
        assert circuit.read >= len(words) - 2


@pytest.mark.parametrize("key", KEYS)
def test_a_lookup_says_the_value_behind_the_key_that_is_meant(key: str) -> None:
    p = uncertified(key, "lookup")
    words = words_of(p.question)
    assert words[-1] == ASKS
    for side, meant in ((p, FIRST + 1), (p.mirrored(), FIRST + 2)):
        question: Any = side.question
        assert question._said == words[words.index(meant) + 1]
        assert question._text.owner[words.index(meant) + 1] == side.arm[0]


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_layer_looks_at_the_source_from_where_it_is_read(kind: str) -> None:
    for key in FRESH:
        p = uncertified(key, kind)
        for side in (p, p.mirrored()):
            question: Any = side.question
            looks = question.circuit.attention(question.inputs)[-1][0, :, question.circuit.read]
            torch.testing.assert_close(looks.sum(1), torch.ones(len(looks)))
            for head, unit in zip(looks, side.arm if kind == "both" else side.arm[-1:], strict=True):
                assert head[question.units.members[unit][0][0]] > 0.98


def follows_what_ends_the_text(question: Any) -> np.ndarray:
    """A reader who knows what an induction head is, and asks no model: units after, or at, the earlier occurrence of
    the last word; and every unit less, the later it stands."""
    words, owner = words_of(question), question._text.owner
    out = -1e-3 * np.arange(len(question.units))
    for i, word in enumerate(words[:-2]):
        if word == words[-1]:
            out[[u for u in owner[i : i + 2] if u >= 0]] += 1
    return out


def test_no_scorer_finds_a_cause_without_the_model() -> None:
    scorers = {**SCORERS, "knows induction": follows_what_ends_the_text}
    questions = [[uncertified(key, kind) for kind in KINDS] for key in [f"scored {i}" for i in range(24)]]

    def interval(score: Any) -> tuple[float, float]:
        found = [np.mean([auc(score(p.question), p.causes, p.twin) for p in of_key]) for of_key in questions]
        return t_interval(found, 0.01 / len(scorers))

    for name, score in scorers.items():
        low, high = interval(score)
        assert low <= 0.5 <= high, f"{name}: {low:.3f} to {high:.3f}"
        for p in questions[0]:
            assert auc(score(p.question), p.causes, p.twin) + auc(score(p.sibling), p.twin, p.causes) == 1
    places = {id(p.question): p.arm for of_key in questions for p in of_key}
    assert interval(lambda q: np.isin(np.arange(len(q.units)), places[id(q)]) * 1.0)[0] > 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_arm_and_twin_stand_in_the_same_places_equally_often(kind: str) -> None:
    texts = [_write(kind, stream("places", kind, i)) for i in range(300)]
    assert stats.binomtest(sum(t.arms[0][0] < t.arms[1][0] for t in texts), 300).pvalue > 0.0025
    if kind in ("copy", "induction"):  # nor does it show which of the last two words is read
        assert stats.binomtest(sum(t.calls[0] > t.calls[1] for t in texts), 300).pvalue > 0.0025


def test_words_are_equally_long_and_orthogonal() -> None:
    for kind in KINDS:
        table = make(FRESH[0], kind).table.double()
        torch.testing.assert_close(table @ table.T, torch.eye(len(table), dtype=torch.double))
        assert len(table.abs().unique()) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_sibling_is_the_same_text_with_the_twin_read(kind: str, planted: dict[str, Any]) -> None:
    p = planted[kind]
    for other in (p.sibling, *p.nulls):
        assert torch.equal(p.question.inputs, other.inputs)
        assert torch.equal(p.question.unit_of, other.unit_of)
        assert torch.equal(p.question.background(4), other.background(4))
        assert p.question.units == other.units
        assert p.question.readout == other.readout
    some = rows([p.ends[0]], len(p.question.units))
    for oracle, left in ((p.question, False), (p.sibling, True)):
        assert oracle.ask(every(p))[0] > 1 - STILL
        assert (oracle.swap(some)[0] > ENDS) == left


@pytest.mark.parametrize("kind", KINDS)
def test_nulls_are_still_but_no_constants_and_one_is_sure_of_what_it_says(kind: str) -> None:
    for key in KEYS:
        p = uncertified(key, kind)
        for null in p.nulls:
            moved = np.abs(null.swap(np.eye(len(null.units), dtype=bool)) - null.ask(every(p)))
            assert 1e-5 < moved.max() <= STILL
        assert p.nulls[0].ask(every(p))[0] > 1 - STILL


@pytest.mark.parametrize("kind", KINDS)
def test_a_circuit_that_does_something_else_is_refused(kind: str, planted: dict[str, Any]) -> None:
    p = planted[kind]
    assert "planted were" in trouble(replace(p, question=p.sibling))
    assert trouble(replace(p, sibling=p.question)).startswith("sibling: ")
    assert trouble(replace(p, nulls=(p.question,))).startswith("null 0 moves")
    if p.structure == "and":
        assert trouble(replace(p, structure="or"))


def test_where_earlier_words_can_be_drawn_anew_no_single_unit_is_the_cause(planted: dict[str, Any]) -> None:
    p = planted["induction"]
    alone = replace(p, structure="single", arm=p.arm[-1:], twin=p.twin[-1:])
    assert trouble(alone) == "nothing keep the outcome, planted were " + str(p.arm[-1])


def test_forward_is_differentiable_and_says_what_ask_says(planted: dict[str, Any]) -> None:
    for p in planted.values():
        question: Any = p.question
        x = question.inputs.requires_grad_()
        value = question.forward(x)
        value.sum().backward()
        steep = x.grad.norm(dim=-1)[0]
        units = question._text.owner
        assert torch.isfinite(x.grad).all()
        others = [steep[units == u].item() for u in range(UNITS) if u not in p.arm]
        assert min(steep[units == u].item() for u in p.arm) > 2 * max(others)
        np.testing.assert_allclose(value.detach().numpy(), question.ask(every(p)), rtol=1e-5)


def test_unit_of_says_which_tokens_a_swap_changes(planted: dict[str, Any]) -> None:
    for p in planted.values():
        question: Any = p.question
        assert question.unit_of.shape == question.inputs.shape
        for unit in range(UNITS):
            token = question.units.members[unit][0][0]
            assert (question.unit_of[0, token] == unit).all()
            states = question.seen[None].copy()
            states[0, unit] ^= True
            changed = (question._embed(states) != question.inputs).any(-1)[0].nonzero().ravel()
            assert changed.tolist() == [token]
        assert question.unit_of.unique().tolist() == list(range(-1, UNITS))


def test_attention_tells_the_cause_where_its_twin_is_not_looked_up(planted: dict[str, Any]) -> None:
    for kind, p in planted.items():
        mass = p.question.attention()
        assert mass.shape == (UNITS,)
        assert (mass > 0).all()
        assert mass.sum() < 1
        arm, twin = mass[list(p.arm)].sum(), mass[list(p.twin)].sum()
        if kind in ("copy", "induction"):  # both are looked up alike, one by a token that is not read
            assert arm == pytest.approx(twin, rel=0.1)
            np.testing.assert_array_equal(mass, p.sibling.attention())
        else:
            assert arm > 1.5 * twin


def test_an_honest_method_finds_the_sources_and_dice_do_not() -> None:
    draws = [WORLD.draw(key) for key in FRESH[:2]]
    draws = [replace(d, planted=tuple(replace(p, nulls=()) for p in d.planted)) for d in draws]
    for name in ("leave_one_out", "saliency"):
        assert [try_draw(load(name)().explain, d).mean("auc") for d in draws] == [1.0] * len(draws)
    assert np.mean([try_draw(random_scores, d).mean("auc") for d in draws]) < 0.75


def test_the_same_key_gives_the_same_bits_twice() -> None:
    first = WORLD.draw(FRESH[1])
    keep = np.zeros((5, UNITS), bool)
    before = [(p.question.ask(keep), p.sibling.ask(keep), p.nulls[1].ask(keep), p.arm) for p in first.planted]
    make.cache_clear()
    _attempt.cache_clear()
    second = WORLD.draw(FRESH[1])
    for (ask, sibling, null, arm), p in zip(before, second.planted, strict=True):
        np.testing.assert_array_equal(ask, p.question.ask(keep))
        np.testing.assert_array_equal(sibling, p.sibling.ask(keep))
        np.testing.assert_array_equal(null, p.nulls[1].ask(keep))
        assert arm == p.arm


def test_a_metered_question_counts_and_stops(planted: dict[str, Any]) -> None:
    metered = Metered(planted["copy"].question, Budget(forwards=5))
    metered.ask(np.ones((3, UNITS), bool))
    torch.autograd.backward(metered.forward(metered.inputs.requires_grad_()).sum())
    metered.attention()
    assert (metered.spent.forwards, metered.spent.backwards) == (5, 1)
    with pytest.raises(BudgetError):
        metered.ask(np.ones((1, UNITS), bool))


# --- the sum ---------------------------------------------------------------------------------------------------------


def averages(question: Any) -> dict[frozenset[int], float]:
    """v of each coalition by going through all states of all units, each as often."""
    n = len(question.units)
    states = ((np.arange(2**n)[:, None] >> np.arange(n)) & 1).astype(bool)
    said = question._values(states, np.ones_like(states), np.empty((2**n, n, 0)))
    agree = states == question.seen
    sets = [frozenset(c) for k in range(n + 1) for c in combinations(range(n), k)]
    return {s: float(said[agree[:, sorted(s)].all(1)].mean()) for s in sets}


@pytest.mark.parametrize("key", FRESH)
def test_the_sum_has_exactly_the_shapley_values_and_effects_that_it_names(key: str) -> None:
    a = additive(key, 6)
    n = 6
    v = averages(a.question)
    for s, value in v.items():
        assert a.value(rows([s], n))[0] == pytest.approx(value, abs=1e-5)
    shares = np.zeros(n)
    for u in range(n):
        for s in (s for s in v if u not in s):
            shares[u] += factorial(len(s)) * factorial(n - len(s) - 1) / factorial(n) * (v[s | {u}] - v[s])
    np.testing.assert_allclose(shares, a.shapley, atol=1e-5)
    fall = a.question.ask(np.ones((1, n), bool)) - a.question.swap(np.eye(n, dtype=bool))
    np.testing.assert_allclose(fall, a.swapped, atol=1e-5)
    assert np.abs(a.shapley).min() > 1e-4


def test_estimators_come_near_the_sums_shapley_values() -> None:
    from whence.ablations.leave_one_out import LeaveOneOut
    from whence.ablations.shapley_sampling import ShapleySampling

    a = additive("estimators")
    for method in (LeaveOneOut(draws=120), ShapleySampling(orders=60)):
        e: Any = method.explain(a.question)
        error = np.abs(e.scores - a.shapley)
        assert (error < 4 * e.spread + 1e-5).all()
        assert np.corrcoef(e.scores, a.shapley)[0, 1] > 0.95
    assert len(a.question.units) == UNITS


def test_a_sum_of_more_units_than_there_are_words_for_is_refused() -> None:
    with pytest.raises(RunError, match="1 to 8 units"):
        additive("many", UNITS + 1)
