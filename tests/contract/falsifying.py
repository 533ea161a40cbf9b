"""Trials of Cards, as the contract tests run them. Those of text are a file of their own, so that two workers share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np

import whence
from whence import verbs
from whence.engine.randomness import stream
from whence.explanation import Explanation
from whence.method import Card, card_of, catalogue, load
from whence.proving import Ground, asks_questions, measured_by
from whence.run import Run
from whence.score import Score
from whence.worlds.controls import random_maps, shuffled
from whence.worlds.ground import Draw
from whence.worlds.trial import once, try_draw
from whence.worlds.trial import shuffled as scores_shuffled

PICTURES = 32
"""Per trial, unless the card's falsifier names its own ``pictures``."""

NAMES = tuple(catalogue())
SHOWN = tuple(
    n
    for n, c in catalogue().items()
    if c.falsifier.get("status") != "not shown" and "::" not in c.falsifier["trial"] and not measured_by(c)
)
MEASURED = tuple(n for n, c in catalogue().items() if measured_by(c) and c.falsifier.get("status") != "not shown")
"""What they do to a model is measured for minutes, by `whence prove`; their own tests ask it of fewer replicates."""
OF_TEXT = tuple(n for n in SHOWN if str(catalogue()[n].falsifier["trial"]).startswith("facts."))
NOT_SHOWN = tuple(n for n, c in catalogue().items() if c.falsifier.get("status") == "not shown")
TESTED = tuple(n for n in NAMES if n not in (*SHOWN, *NOT_SHOWN, *MEASURED))
"""Checks judge explanations and give none: their falsifier is a test, ``path::name``, run with all others and found to
exist by tests/layers/test_cards.py."""


@cache
def model() -> Any:
    return whence.load()


@cache
def explainer(name: str) -> Callable[[Run], Explanation]:
    """The method, asked once for each run: the shuffled control needs the same maps again."""
    method = load(name)()
    known: dict[int, tuple[Run, Explanation]] = {}

    def explain(run: Run) -> Explanation:
        if id(run) not in known:
            known[id(run)] = (run, method.explain(run))  # the run is kept, so that its id stays its own
        return known[id(run)][1]

    return explain


@cache
def answers(name: str) -> Callable[[Any], Any]:
    return once(verbs.explainer(name))  # the shuffled control needs the same answers again


@cache
def ground(draws: int) -> Ground:
    return Ground(draws)


DRAWS = 10
"""Fewer, and shuffled scores could reach what a card expects by chance."""


FEWER = {"facts": 7, "carriers": 5, "documents": 4, "drawn": 3}
"""Draws of worlds that ask several questions of one structure in each, or in which a question has many causes."""
NO_WORLD_ASKS = {
    "bilrp": "pairs of words behind a similarity",
    "counterfactual": "rewordings, not units",
    "nucleus": "how a token was chosen",
    "autocontrastive": "how a token was chosen",
    "empirical_explainer": "what another method would say",
    "implicit_attention": "a recurrence, which no world's model has",
    "pseudo_density": "how typical a sample is",
}
"""Methods whose answers are no scores of a world's units: each is tried by the test that its card names."""


def without_nulls(draw: Draw) -> Draw:
    return replace(draw, planted=tuple(replace(p, nulls=()) for p in draw.planted))


def trial(card: Card, explain: Callable[[Any], Any]) -> Score:
    if asks_questions(card):
        world, structure = card.falsifier["trial"].split(".")
        draws = ground(FEWER.get(world, DRAWS))[world][1]
        return Score.of(card.name, "AUC", [try_draw(explain, without_nulls(d), [structure]).mean("auc") for d in draws])
    world, name = card.falsifier["trial"].split(".")
    function = getattr(import_module(f"whence.worlds.{world}.trials"), name)
    score = function(explain, card.falsifier.get("pictures", PICTURES), model())
    assert isinstance(score, Score)
    return score


def must_reach(name: str) -> None:
    """The method reaches what its Card expects."""
    card = card_of(name)
    score = trial(card, answers(name) if asks_questions(card) else explainer(name))
    assert score.mean >= card.falsifier["expect"], f"{score}; the card expects {card.falsifier['expect']}"


def must_fail(name: str, control: str) -> None:
    """An explanation that knows nothing does not."""
    card = card_of(name)
    dice = stream("contract", "random", name)

    def random_scores(question: Any) -> Any:
        # Not the trial's own floor: that one knows labels only, so it is at 0.5 exactly on question and sibling.
        return dice.random(len(question.units))

    ignorant = random_scores if asks_questions(card) else random_maps
    if asks_questions(card):
        # On one cause and its twin a throw of dice is right or wrong: the mean of several says what dice are worth. So
        # it is with shuffles, which the last bit of a score decides: another machine has other ones.
        several = [ignorant if control == "random" else scores_shuffled(answers(name), throw) for throw in range(8)]
        score = Score.of(card.name, "AUC", np.mean([trial(card, one).values for one in several], axis=0))
    else:
        score = trial(card, ignorant if control == "random" else shuffled(explainer(name)))
    assert score.mean < card.falsifier["expect"]
    assert score.interval[1] < card.falsifier["expect"], f"{score} could still reach {card.falsifier['expect']}"
