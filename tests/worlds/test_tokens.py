"""The world of twins in sequences: a trained transformer does what is planted; its inputs do not show it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from arms_checks import auc, does_what_was_planted, every, swaps_do_what_the_recipe_says
from scipy import stats

from whence.engine.randomness import stream
from whence.verdict import t_interval
from whence.worlds.ground import ENDS, STILL, STRUCTURES, rows, trouble
from whence.worlds.scorers import SCORERS
from whence.worlds.tokens import WORLD, sentences

FRESH = ["test 0", "test 1"]
KEYS = [f"test {i}" for i in range(12)]


def untrained(key: str) -> list[Any]:
    """Questions of a key as they are before any training: inputs are those of the trained model."""
    made = sentences.make(key, steps=(0,))
    return [made.plant(s, 0) for s in STRUCTURES]


@pytest.fixture(scope="module")
def planted() -> dict[str, Any]:
    return {p.structure: p for p in WORLD.draw(FRESH[0]).planted}


@pytest.mark.parametrize("key", FRESH)
def test_the_model_does_what_was_planted_on_fresh_keys(key: str) -> None:
    does_what_was_planted(WORLD.draw(key))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_each_swap_of_arm_and_twin_does_what_the_recipe_says(structure: str, planted: dict[str, Any]) -> None:
    swaps_do_what_the_recipe_says(planted[structure], sentences.make(FRESH[0]).arms)


def test_training_leaves_inputs_as_they_were(planted: dict[str, Any]) -> None:
    attempts = WORLD.attempts(FRESH[0])
    before: Any = sentences.make(FRESH[0], steps=(0,))
    for structure, p in planted.items():
        q = before.plant(structure, attempts[structure])
        assert torch.equal(p.question.inputs, q.question.inputs)
        assert torch.equal(p.question.background(5), q.question.background(5))
        assert torch.equal(p.question.unit_of, q.question.unit_of)


def test_no_scorer_finds_a_cause_without_the_model() -> None:
    # Two questions of a key have almost the same units, so a key is one replicate.
    questions = [untrained(key) for key in KEYS]

    def found(score: Any, of_key: list[Any]) -> float:
        return float(np.mean([auc(score(p.question), p.causes, p.twin) for p in of_key]))

    def interval(values: Any) -> tuple[float, float]:
        return t_interval(values, 0.01 / len(SCORERS))

    for name, score in SCORERS.items():
        own = np.array([found(score, k) for k in questions])
        mirrored = np.array([found(score, [p.mirrored() for p in k]) for k in questions])
        for low, high in (interval(own), interval((own + mirrored) / 2)):
            assert low <= 0.5 <= high, f"{name}: {low:.3f} to {high:.3f}"
    places = {id(p.question): p.arm for of_key in questions for p in of_key}
    liar = [found(lambda q: np.isin(np.arange(len(q.units)), places[id(q)]) * 1.0, k) for k in questions]
    assert interval(liar)[0] > 0.5


def test_words_are_equally_long_and_orthogonal() -> None:
    table = sentences.make(FRESH[0], steps=(0,)).model.get_input_embeddings().weight.double()
    torch.testing.assert_close(table @ table.T, torch.eye(len(table), dtype=torch.double))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_words_of_arm_and_twin_are_used_alike(structure: str) -> None:
    arms = sentences.make(FRESH[0], steps=(0,)).arms
    states = arms.render(stream("used alike").standard_normal((8000, len(arms.names), 2)))
    patterns = []
    for side in (arms.arm, arms.twin):
        places = 2 ** np.arange(len(side[structure]))
        patterns.append(np.bincount(states[:, list(side[structure])] @ places, minlength=2 ** len(places)))
    assert stats.chi2_contingency(patterns).pvalue > 0.01 / len(STRUCTURES)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_sibling_is_the_model_with_roles_swapped(structure: str, planted: dict[str, Any]) -> None:
    p = planted[structure]
    x = p.question.inputs
    order = np.arange(x.shape[1])
    for a, t in zip(p.arm, p.twin, strict=True):
        here, there = (p.question.units.members[i][0][0] for i in (a, t))
        order[[here, there]] = there, here
    # As arm and twin are in the same states, exchanging their codes is exchanging their words; the input shows neither.
    assert torch.equal(x, p.sibling.inputs)
    torch.testing.assert_close(p.question.forward(x[:, order]), p.sibling.forward(x))
    torch.testing.assert_close(p.question.forward(x), p.sibling.forward(x[:, order]))
    assert not torch.equal(x, x[:, order])
    some = rows([p.ends[0]], len(p.question.units))
    for oracle, left in ((p.question, False), (p.sibling, True)):
        assert oracle.ask(every(p))[0] > 1 - STILL
        assert (oracle.swap(some)[0] > ENDS) == left


@pytest.mark.parametrize("structure", STRUCTURES)
def test_nulls_are_still_but_no_constants(structure: str, planted: dict[str, Any]) -> None:
    p = planted[structure]
    assert len(p.nulls) == 2
    for null in p.nulls:
        moved = np.abs(null.swap(np.eye(len(null.units), dtype=bool)) - null.ask(every(p)))
        assert 1e-5 < moved.max() <= STILL


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_model_that_does_something_else_is_refused(structure: str, planted: dict[str, Any]) -> None:
    p = planted[structure]
    assert "planted were" in trouble(replace(p, question=p.sibling))
    assert trouble(replace(p, sibling=p.question)).startswith("sibling: ")
    assert "not sure" in trouble(replace(p, question=p.nulls[0]))
    assert trouble(replace(p, nulls=(p.question,))).startswith("null 0 moves")


def test_forward_is_differentiable_and_says_what_ask_says(planted: dict[str, Any]) -> None:
    for p in planted.values():
        question: Any = p.question
        x = question.inputs.requires_grad_()
        value = question.forward(x)
        value.sum().backward()
        assert x.grad is not None
        assert torch.isfinite(x.grad).all()
        assert (x.grad[torch.isin(question.unit_of, torch.tensor(p.arm))] != 0).any()
        np.testing.assert_allclose(value.detach().numpy(), question.ask(every(p)), rtol=1e-4)


def test_unit_of_says_which_tokens_a_swap_changes(planted: dict[str, Any]) -> None:
    question: Any = planted["and"].question
    assert question.unit_of.shape == question.inputs.shape
    assert (question.unit_of[:, [0, -1]] == -1).all()
    for unit in range(4):
        token = question.units.members[unit][0][0]
        assert (question.unit_of[0, token] == unit).all()
        states = question.seen[None].copy()
        states[0, unit] ^= True
        changed = (question._embed(states) != question.inputs).any(-1)[0].nonzero().ravel()
        assert changed.tolist() == [token]


def test_attention_is_what_the_tokens_of_units_get(planted: dict[str, Any]) -> None:
    for p in planted.values():
        mass = p.question.attention()
        assert mass.shape == (len(p.question.units),)
        assert (mass > 0).all()
        assert mass.sum() < 1
    question: Any = planted["xor"].question
    out = question._model(inputs_embeds=question.inputs, output_attentions=True).attentions
    unit = planted["xor"].arm[0]
    token = question.units.members[unit][0][0]
    assert question.attention()[unit] == pytest.approx(torch.stack(out)[..., token].mean().item(), rel=1e-5)


def test_the_same_key_gives_the_same_bits_twice() -> None:
    def few() -> Any:
        return sentences.make("bits", steps=(4,)).plant("xor", 0)

    first = few()
    keep = np.zeros((3, len(first.question.units)), bool)
    before = first.question.ask(keep), first.nulls[1].ask(keep)
    assert len(np.unique(before[0])) == 3
    sentences.make.cache_clear()
    second = few()
    np.testing.assert_array_equal(before[0], second.question.ask(keep))
    np.testing.assert_array_equal(before[1], second.nulls[1].ask(keep))
