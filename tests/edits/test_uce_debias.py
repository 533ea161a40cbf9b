"""Debiasing: what a prompt that names no colour draws follows the strengths, and they follow what is drawn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import whence
from whence.change import Goal
from whence.edits.uce_debias import Debias
from whence.errors import MethodError, ModelError, PromptError
from whence.models.loading import load
from whence.models.tiny import tiny
from whence.worlds.shapes import debiasing, editing
from whence.worlds.shapes.scenes import COLOURS, Scene, Thing, render

OPTIONS = [f"{c} circle" for c in COLOURS]
GOAL = Goal("circle", " | ".join(OPTIONS))
BLUE = list(COLOURS).index("blue")


@pytest.fixture(scope="module")
def model() -> Any:
    return whence.load()


def test_the_colour_that_is_given_strength_is_drawn_and_named_ones_stay(model: Any) -> None:
    strengths = tuple(0.9 if k == BLUE else -0.18 for k in range(len(OPTIONS)))
    change = Debias(strengths=strengths).plan(model, GOAL)
    prompts = debiasing.examples(model, "circle")
    named = [editing.Probe(f"a {c} circle", 5 + i) for i, c in enumerate(("red", "green", "yellow", "purple"))]

    def blue() -> float:
        return float(np.mean([s == BLUE for s in debiasing.shares(model, OPTIONS, prompts, 8, "test")]))

    assert blue() <= 1 / 8
    with change.on(model):
        assert blue() >= 5 / 8
        assert sum(p.holds(x) for p, x in zip(named, editing.pictures(model, named), strict=True)) >= 3
    with editing.elsewhere(model, change, 0).on(model):
        assert blue() <= 2 / 8


def test_strengths_move_by_what_the_shares_lack_and_a_stopped_plan_goes_on(model: Any, tmp_path: Path) -> None:
    goal = Goal("circle", "red circle | blue circle", ("a circle", "a circle on sand"))
    method = Debias(rounds=2, pictures=4, steps=1, eta=0.4, shrink=0.5)
    asked: list[int] = []

    def always_red(image: Any) -> int | None:
        asked.append(0)
        return 0

    change = method.plan(model, goal, always_red, tmp_path / "journal")
    first, second = change.settings["found"]
    assert first == {"strengths": [0.0, 0.0], "shares": [1.0, 0.0]}
    assert second["strengths"] == pytest.approx([-0.2, 0.2])
    assert change.settings["strengths"] == pytest.approx([-0.3, 0.3])  # the last half of what was tried: what follows
    assert len(asked) == 8
    again = method.plan(model, goal, always_red, tmp_path / "journal")
    assert len(asked) == 8
    assert again.key == change.key == replace(method, strengths=(-0.3, 0.3)).plan(model, goal).key


def test_shares_are_counted_and_their_distance_is_known(model: Any) -> None:
    which = debiasing.judge(model, ["red circle", "blue circle"])

    def picture(*colours: str) -> Any:
        things = tuple(Thing(c, "circle", "large", 1, i, False) for i, c in enumerate(colours))
        return render(Scene("one", things, "", "", (), True, None, False, (0, 0)))[0]

    assert [which(picture(*c)) for c in (("red",), ("blue",), ("green",), ("red", "blue"))] == [0, 1, None, None]
    half = np.array([0.5, 0.5])
    assert debiasing.distance([0, 0, 0, 0], half) == 0.5
    assert debiasing.distance([None, None], half) == 0.5
    # Of ten pictures at a time drawn in shares of .8 and .2 the estimate is right on average: .18.
    rng = np.random.default_rng(0)
    found = [debiasing.distance(list(rng.choice(2, 10, p=(0.8, 0.2))), half) for _ in range(4000)]
    assert np.mean(found) == pytest.approx(0.18, abs=0.01)


def test_a_change_of_ones_own_is_tried_with_a_control(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(debiasing, "FEW", 2)
    strengths = tuple(0.9 if k == BLUE else -0.18 for k in range(len(OPTIONS)))
    wanted = tuple(0.95 if k == BLUE else 0.01 for k in range(len(OPTIONS)))
    change = Debias(strengths=strengths, wanted=wanted).plan(model, GOAL)
    tried = debiasing.try_shares(model, change, 8)
    assert set(tried.rates) == {*OPTIONS, "named"}
    assert tried.rates["blue circle"]["moved"] > 0.5
    assert tried.verdict.word == "supported"
    assert len(tried.images) == 6
    assert all((im["before"] != im["after"]).any() for im in tried.images)


def test_bad_input_is_refused(model: Any) -> None:
    with pytest.raises(PromptError, match="one attribute"):
        Debias().plan(model, "circle -> red circle")
    with pytest.raises(MethodError, match="wanted shares"):
        Debias(wanted=(0.5, 0.6)).plan(model, "circle -> red circle | blue circle")
    with pytest.raises(MethodError, match="1 strengths"):
        Debias(strengths=(0.5,)).plan(model, "circle -> red circle | blue circle")
    with pytest.raises(PromptError, match="names an attribute"):
        Debias().plan(model, Goal("circle", "red circle | blue circle", ("a red circle",)))
    with pytest.raises(PromptError, match="never saw"):
        Debias().plan(model, "circle -> red circle | pink circle")
    with pytest.raises(ModelError, match="judge of your own"):
        Debias().plan(load(tiny("sd")), Goal("circle", "red circle | blue circle", ("a circle",)))
