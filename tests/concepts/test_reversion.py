"""A relation learned from pictures: the steering, the focus on noisy times, and the trial on `shapes`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

import whence
from whence.concepts.reversion import ReVersion, _Steering, _steering
from whence.engine.learned_token import Example, Teaching, _times, start
from whence.errors import RunError
from whence.worlds.shapes import relations


@pytest.fixture(scope="module")
def model() -> Any:
    return whence.load()


def test_steering_pulls_toward_prepositions_and_not_toward_one_that_is_taken_out(model: Any) -> None:
    pictures, captions = relations.exemplars("above", 0)

    def near(word: Any, other: str) -> float:
        return float(functional.cosine_similarity(word.vectors["sks1"], start(model, other), dim=0))

    def learned(steer: float, **settings: Any) -> Any:
        return ReVersion(steps=10, batch=1, rate=0.03, steer=steer, **settings).fit(model, pictures[:1], captions[:1])

    free, steered = learned(0.0), learned(1.0)
    without = learned(1.0, without=("above",))

    def pull(words: tuple[str, ...]) -> float:
        return float(np.mean([near(steered, w) - near(free, w) for w in words]))

    assert pull(("above", "below", "left", "right")) > max(pull(("circle", "cross", "red", "blue")), 0) + 0.1
    assert near(without, "above") < near(steered, "above")


def test_the_steering_loss_is_its_equation() -> None:
    P, N = torch.eye(4)[:2], torch.eye(4)[2:]
    R = torch.tensor([0.6, 0.0, 0.8, 0.0])
    loss = float(_Steering("r", 2.0, 0.5, P, N)({"r": 3 * R}, [], []))
    positive, negative = np.exp(1.2) + 1, np.exp(1.6) + 1
    assert loss == pytest.approx(-2 * np.log(positive / (positive + negative)))


def test_negatives_are_the_other_words_and_words_without_a_part_have_none(model: Any) -> None:
    examples = [Example("a red circle sks1 a blue cross", torch.zeros(4, 16, 16))]
    full, less = (_steering(ReVersion(without=w), model, examples) for w in ((), ("above", "left")))
    assert len(full.P) == 6  # above, below, left, of, on, right
    assert len(less.P) == 4
    assert len(full.N) == len(less.N) > 20


def test_noisier_times_come_more_often_and_as_the_density_says() -> None:
    u = (np.arange(4000) + 0.5) / 4000
    assert _times(Teaching(span=(0, 1)), u) == pytest.approx(u)
    counts = np.histogram(_times(Teaching(span=(0, 1), tilt=0.5), u), 4, (0, 1))[0] / 4000
    edges = np.linspace(0, 1, 5)
    assert counts == pytest.approx(np.diff(edges - 0.5 * np.sin(np.pi * edges) / np.pi), abs=2e-3)


def test_exemplars_share_a_relation_and_no_colour_with_what_is_asked() -> None:
    pictures, captions = relations.exemplars("left of", 3)
    asked = {t.colour for pair in relations.new_things(3) for t in pair}
    assert len(pictures) == len(captions) == relations.PICTURES
    assert all(c.count("{}") == 1 and "left" not in c for c in captions)
    assert not asked & {w for c in captions for w in c.split()}


def test_a_word_comes_back_the_same_and_leaves_nothing(model: Any) -> None:
    pictures, captions = relations.exemplars("below", 0)
    one, again = (ReVersion(steps=2, batch=2).fit(model, pictures, captions) for _ in range(2))
    assert torch.equal(one.vectors["sks1"], again.vectors["sks1"])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.denoiser.modules())


def test_the_trial_gives_a_word_that_learned_nothing_no_gain(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relations, "TEACHING", {"steps": 1, "batch": 1, "rate": 0.0})
    monkeypatch.setattr(relations, "STEPS", 3)
    monkeypatch.setattr(relations, "ASKED", 2)
    found = relations.inverted(ReVersion, 2, model)
    assert found.values == found.controls["the initial word"]
    assert set(found.controls) == {"the initial word", "a random vector", "learned from another relation"}


def test_bad_input_is_refused(model: Any) -> None:
    pictures, captions = relations.exemplars("above", 0)
    with pytest.raises(RunError, match="10 pictures"):
        ReVersion().fit(model, pictures, captions[:1])
    with pytest.raises(RunError, match="captions"):
        ReVersion().fit(model, pictures[:1], ["a red circle above a blue cross"])
    with pytest.raises(RunError, match="0 prepositions"):
        ReVersion(positives=("aboard",)).fit(model, pictures, captions)
