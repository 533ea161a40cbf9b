"""Several words from one picture, located by attention: the method and its trial on `shapes`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import whence
from whence.concepts.atten_craft import SAMPLING, AttenCraft, _Alignment
from whence.engine.attention import LayerMaps
from whence.engine.learned_token import Example
from whence.errors import PromptError, RunError
from whence.worlds.shapes import several
from whence.worlds.shapes.concepts import on_grid, overlap, scattered
from whence.worlds.shapes.scenes import render


@pytest.fixture(scope="module")
def model() -> Any:
    return whence.load()


@pytest.mark.parametrize("kind", ["two", "three"])
def test_nouns_find_their_things_and_random_clusters_miss_them(model: Any, kind: str) -> None:
    found, swapped, random = [], [], []
    for i in range(6):
        scene = several.scene(i, kind)
        picture, truth = render(scene)
        masks = AttenCraft().localise(model, picture, [t.shape for t in scene.things])
        assert masks.sum(0).max() <= 1
        own = [on_grid(truth[f"thing{k}"], 16) for k in range(len(masks))]
        found += [overlap(m, o) for m, o in zip(masks, own, strict=True)]
        swapped += [overlap(m, o) for m, o in zip(np.roll(masks, 1, 0), own, strict=True)]
        random += [overlap(m, o) for m, o in zip(scattered(masks, i), own, strict=True)]
    assert np.mean(found) > 0.4 > 3 * np.mean(random)
    assert np.mean(found) > 2 * np.mean(swapped)


def test_masks_follow_the_nouns_order(model: Any) -> None:
    scene = several.scene(1)
    picture, _ = render(scene)
    nouns = [t.shape for t in scene.things]
    one, other = AttenCraft().localise(model, picture, nouns), AttenCraft().localise(model, picture, nouns[::-1])
    assert overlap(one[0], other[1]) > 0.5 > overlap(one[0], other[0])


def test_each_word_gives_its_own_colour(model: Any) -> None:
    scene = several.scene(1)
    picture, _ = render(scene)
    found = AttenCraft(steps=16).fit(model, picture, [t.shape for t in scene.things])
    assert several.redrawn(model, found, scene, "test") >= 0.5 > several.redrawn(model, None, scene, "test")


@pytest.mark.parametrize("sampling", SAMPLING)
def test_words_and_masks_of_each_sampling(model: Any, sampling: str) -> None:
    scene = several.scene(0)
    picture, _ = render(scene)
    nouns = [t.shape for t in scene.things]
    method = AttenCraft(steps=2, batch=2, sampling=sampling)
    found = method.fit(model, picture, nouns)
    assert list(found.words.vectors) == ["sks1", "sks2"]
    assert found.phrases == tuple(f"a sks{i + 1} {n}" for i, n in enumerate(nouns))
    again = method.fit(model, picture, nouns, found.masks)
    assert all(torch.equal(again.words.vectors[w], v) for w, v in found.words.vectors.items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.denoiser.modules())


def test_the_attention_loss_falls_as_words_are_looked_for_in_their_masks() -> None:
    mask = torch.zeros(4, 4)
    mask[1, 0] = 1

    def loss(column: int) -> float:
        values = torch.zeros(1, 1, 3, 4, 4)
        values[0, 0, 1:, 1, column] = 1
        maps = [[LayerMaps("", "cross", 4, 4, values, (0,), "probability")]]
        return float(_Alignment(1.0, {"sks1": mask})({}, [Example("a sks1 circle", torch.zeros(1, 4, 4))], maps))

    assert loss(0) == 0 < loss(2)


def test_the_trial_of_words_gives_those_that_learned_nothing_nothing(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(several, "TEACHING", {"steps": 1, "batch": 1, "rate": 0.0})
    monkeypatch.setattr(several, "STEPS", 3)
    monkeypatch.setattr(several, "EACH", 1)
    found = several.crafted(AttenCraft, 2, model)
    assert set(found.controls) == {"random clusters", "the nouns alone"}
    assert found.values == found.controls["random clusters"]
    assert np.mean(found.values) < 0.5


def test_the_trial_of_masks_sees_through_masks_of_other_nouns(model: Any) -> None:
    class Swapped(AttenCraft):
        def localise(self, model: Any, picture: Any, nouns: Any) -> Any:
            return super().localise(model, picture, nouns)[::-1]

    found = several.located(Swapped, 4, model)
    assert np.mean(found.values) < np.mean(found.controls["another noun's mask"])


def test_bad_input_is_refused(model: Any) -> None:
    picture, _ = render(several.scene(0))
    with pytest.raises(RunError, match="two or more"):
        AttenCraft().localise(model, picture, ["circle"])
    with pytest.raises(PromptError, match="no single word"):
        AttenCraft().localise(model, picture, ["red circle", "cross"])
    masks = np.zeros((2, 16, 16), bool)
    masks[0] = True
    with pytest.raises(RunError, match="no place for cross"):
        AttenCraft().fit(model, picture, ["circle", "cross"], masks)
    with pytest.raises(RunError, match="sampling 'all'"):
        AttenCraft(sampling="all").fit(model, picture, ["circle", "cross"])
