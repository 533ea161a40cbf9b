"""The world of documents: training again does what was planted, and nothing but the model tells carrier from twin."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from whence.engine.gradients import GradientBank
from whence.engine.randomness import stream
from whence.influence.ekfac import EKFAC
from whence.influence.grad_dot import GradDot
from whence.question import Metered
from whence.worlds.carriers import swaps
from whence.worlds.carriers.asking import PlantedExamples
from whence.worlds.carriers.swaps import CARRIERS, KEEPS, WORLD, Lesson, lesson
from whence.worlds.ground import ENDS, STILL, trouble
from whence.worlds.registry import find
from whence.worlds.trial import auc

KEYS = ("one", "two")
SEEDS = (7, 8, 9)
"""Of trainings that no certificate has seen."""


@cache
def planted(key: str) -> PlantedExamples:
    (found,) = WORLD.draw(key).planted
    assert isinstance(found, PlantedExamples)
    return found


def sides(key: str) -> tuple[PlantedExamples, PlantedExamples]:
    return planted(key), planted(key).mirrored()


def without(p: PlantedExamples, *groups: Any) -> np.ndarray:
    """value[group] of models of other seeds that never saw a group, mean over seeds."""
    keep = np.ones((len(groups) * len(SEEDS), len(p.question.units)), bool)
    for row, group in zip(keep, [g for g in groups for _ in SEEDS], strict=True):
        row[list(group)] = False
    values = p.question.retrained(keep, list(SEEDS) * len(groups), [None] * len(keep))
    return np.asarray(values.reshape(len(groups), len(SEEDS)).mean(1))


def found(p: PlantedExamples, scores: Any) -> float:
    return auc(np.asarray(scores, float), p.arm, p.twin)


# --- truth -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", KEYS)
def test_without_the_carriers_the_outcome_ends_and_without_their_twins_it_stays(key: str) -> None:
    assert trouble(planted(key)) == ""
    for p in sides(key):
        seen, gone, stays = without(p, (), p.arm, p.twin)
        assert seen - gone > ENDS
        assert abs(seen - stays) < STILL


def test_certification_refuses_twins_and_others_as_carriers() -> None:
    p = planted(KEYS[0])
    others = tuple(sorted(set(range(len(p.question.units))) - set(p.arm + p.twin))[: len(p.arm)])
    assert "without the carriers" in replace(p, arm=p.twin, twin=p.arm).trouble()
    assert "without the carriers" in replace(p, arm=others).trouble()
    assert "null" in replace(p, nulls=(p.question,)).trouble()


@pytest.mark.parametrize("method", [GradDot(), EKFAC()], ids=["grad_dot", "ekfac"])
def test_gradients_find_the_carriers_on_both_sides(method: Any) -> None:
    values = []
    for p in (side for key in KEYS for side in sides(key)):
        asked = Metered(p.question)
        fitted = method.fit(asked.objective, asked.examples)
        values.append(found(p, fitted.scores([asked.query])[0]))
    assert np.mean(values) >= 0.85, values
    assert min(values) > 0.5, values


def test_random_scores_do_not() -> None:
    p = planted(KEYS[0])
    values = [found(p, stream("documents test", i).random(len(p.question.units))) for i in range(400)]
    assert abs(np.mean(values) - 0.5) < 0.05


# --- what is visible without the model -------------------------------------------------------------------------------


MANY = 120


@cache
def lessons() -> tuple[Lesson, ...]:
    """Of many keys, for which no model is needed."""
    return tuple(lesson("swaps", f"visible {i}", 0) for i in range(MANY))


def test_twins_are_their_carriers_word_for_word_but_for_the_order() -> None:
    for drawn in lessons():
        documents = drawn.taught.documents
        carriers, twins = (
            Counter(tuple(sorted(documents[i])) for i in which) for which in (drawn.carriers, drawn.twins)
        )
        assert carriers == twins
        one, other = drawn.taught.facts.people[:2]
        assert all((one, KEEPS) == documents[i][1:3] for i in drawn.carriers)
        assert all((other, KEEPS) == documents[i][1:3] for i in drawn.twins)
        assert sum(d[2:4] == (KEEPS, drawn.taught.queries[0][1]) for d in documents) == 2 * len(drawn.carriers)


def test_scorers_that_never_ask_the_model_are_at_chance() -> None:
    values: dict[str, list[float]] = {}
    for drawn in lessons():
        objective: Any = None
        question = drawn.ask(0, objective, drawn.taught.examples())
        for name, scorer in question.scorers.items():
            scores = scorer(question)
            own, twins = (scores[list(which)] for which in (drawn.carriers, drawn.twins))
            values.setdefault(name, []).append(
                auc(np.concatenate([own, twins]), range(CARRIERS), range(CARRIERS, 2 * CARRIERS))
            )
    assert {"words in common, weighted", "words in common, in their order", "similarity to the query"} < set(values)
    for name, aucs in values.items():
        assert abs(np.mean(aucs) - 0.5) <= 3 * np.std(aucs) / MANY**0.5, name
    # The order of the words does tell the two apart: it is what the model makes of them that it does not know.
    assert set(values["words in common, in their order"]) == {0.0, 1.0}


def test_both_people_meet_their_thing_as_often_and_nobody_else_keeps_what_they_keep() -> None:
    for drawn in lessons()[:50]:
        told, documents = drawn.taught.facts, drawn.taught.documents
        one, other = told.people[:2]
        met = [sum(d[4] == who for d in documents) for who in (one, other)]
        assert met[0] == met[1]
        assert all(told.keeps[p] != told.keeps[one] for p in told.people[2:])


# --- the model and its objective -------------------------------------------------------------------------------------


def test_the_sibling_is_the_same_model_that_reads_the_two_names_exchanged() -> None:
    for key in KEYS:
        p = planted(key)
        own, sibling = p.question, p.sibling
        assert str(own.query) == str(sibling.query)
        assert own.objective.module is sibling.objective.module
        for question in (own, sibling):
            loss = float(question.objective.losses([question.query]).values.detach()[0])
            kept = np.ones((1, len(question.units)), bool)
            assert np.exp(-loss) == pytest.approx(float(question.ask(kept)[0]), abs=1e-3)


def test_every_weight_of_the_model_has_a_gradient_by_example() -> None:
    question = planted(KEYS[0]).question
    bank = GradientBank(question.objective)
    bank.check(question.examples[0])
    bank.check(question.query)
    assert bank.coverage == 1


def test_a_document_is_not_read_with_the_names_exchanged_and_a_query_is() -> None:
    p = planted(KEYS[0])
    one, other = p.question.taught.facts.people[:2]
    plain = swaps.ReaderObjective(p.question.objective.module, {})
    exchanged = swaps.ReaderObjective(plain.module, {one: other, other: one})
    documents = list(p.question.examples.items[:5])
    assert torch.equal(plain.losses(documents).values, exchanged.losses(documents).values)
    asked = [swaps.Asked(("today", who, KEEPS), "cat") for who in (one, other)]
    assert torch.allclose(plain.losses(asked).values, exchanged.losses(asked[::-1]).values)


def test_the_model_cannot_read_ahead() -> None:
    module = planted(KEYS[0]).question.objective.module
    words = torch.arange(6)[None]
    later = words.clone()
    later[0, 4:] += 7
    assert torch.allclose(module(words)[:, :4], module(later)[:, :4], atol=1e-6)


# --- asking ----------------------------------------------------------------------------------------------------------


def test_rows_are_independent_of_how_they_are_batched() -> None:
    question = planted(KEYS[0]).question
    keep = stream("documents test", "rows").random((6, len(question.units))) < 0.7
    names = [None, "a", "b"] * 2
    fresh = replace(question.taught, known=swaps.Remembered())
    whole = fresh.values(keep, [0] * 6, names)
    again = replace(fresh, known=swaps.Remembered())
    split = np.concatenate([again.values(keep[i : i + 3], [0] * 3, names[i : i + 3]) for i in (0, 3)])
    assert np.allclose(whole, split, atol=1e-2)


def test_the_same_key_gives_the_same_question_and_another_key_another() -> None:
    first, again, other = (lesson("swaps", key, 0) for key in ("one", "one", "two"))
    assert (first.taught.documents, first.carriers, first.asked) == (
        again.taught.documents,
        again.carriers,
        again.asked,
    )
    assert first.taught.documents != other.taught.documents
    assert find("documents") is WORLD
