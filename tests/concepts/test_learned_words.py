"""Words learned from pictures of a thing, and from one picture of several: the methods and their trial on `shapes`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import whence
from whence.concepts.concept_express import ConceptExpress, _Alignment, _Contrast, _otsu, finch
from whence.concepts.textual_inversion import TextualInversion
from whence.engine.attention import LayerMaps
from whence.engine.learned_token import Example
from whence.engine.self_attention import Places
from whence.errors import PromptError, RunError, WrongMapError
from whence.run import Settings
from whence.worlds.shapes import concepts
from whence.worlds.shapes.scenes import draw_scene, render


@pytest.fixture(scope="module")
def model() -> Any:
    return whence.load()


def test_a_learned_word_draws_its_thing_and_a_random_one_does_not(model: Any) -> None:
    word = TextualInversion(steps=36).fit(model, concepts.one_thing("red", "cross", "test"))

    def drawn(words: Any) -> float:
        with words.on(model):
            runs = model.generate_many([Settings("a sks1", s, 8, 2.0, 64, 64) for s in range(6)])
        return float(np.mean([concepts.draws("red", "cross", r.images[0]) for r in runs]))

    random = drawn(word.random())
    assert random <= 1 / 6
    assert drawn(word) >= random + 2 / 6


@pytest.mark.parametrize(("kind", "number"), [("two", 2), ("three", 3)])
def test_things_of_a_picture_are_found_and_random_clusters_miss_them(model: Any, kind: str, number: int) -> None:
    right, found, random = 0, [], []
    for i in range(6):
        picture, truth = render(draw_scene(2000 + i, kind, plain=True))
        masks = ConceptExpress().localise(model, picture)
        right += len(masks) == number
        for k in range(number):
            own = concepts.on_grid(truth[f"thing{k}"], masks.shape[1])
            found.append(max(concepts.overlap(m, own) for m in masks))
            random.append(max(concepts.overlap(m, own) for m in concepts.scattered(masks, i)))
    assert right >= 4
    assert np.mean(found) > 0.5 > 3 * np.mean(random)


def test_concepts_are_words_with_masks(model: Any) -> None:
    picture, _ = render(draw_scene(2000, "two", plain=True))
    method = ConceptExpress(split_steps=1, steps=2, batch=2)
    found = method.fit(model, picture)
    assert list(found.words.vectors) == ["sks1", "sks2"]
    assert len(found.masks) == 2
    again = method.fit(model, picture)
    assert all(torch.equal(again.words.vectors[w], v) for w, v in found.words.vectors.items())
    plain = ConceptExpress(split_steps=0, steps=1, batch=1, align=0.0, words="vok").fit(model, picture, found.masks[:1])
    assert list(plain.words.vectors) == ["vok1"]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.denoiser.modules())


def test_bad_input_is_refused(model: Any) -> None:
    flat = np.full((64, 64, 3), 236, np.uint8)
    with pytest.raises(RunError, match="masks of"):
        ConceptExpress().fit(model, flat, np.ones((1, 3, 3), bool))
    with pytest.raises(RunError, match="0 pictures"):
        TextualInversion().fit(model, [])
    with pytest.raises(RunError, match="captions"):
        TextualInversion(templates=("a thing",)).fit(model, [flat])
    with pytest.raises(PromptError, match="knows it already"):
        TextualInversion(word="circle").fit(model, [flat])
    with pytest.raises(WrongMapError, match="no layer has this grid"):
        _ = Places(7).self_maps


def test_finch_joins_each_row_with_its_first_neighbour() -> None:
    rows = np.array([[8, 1, 1, 1], [7, 1, 1, 1], [1, 1, 8, 8], [1, 1, 7, 8], [1, 1, 8, 7]], float)
    labels = finch(rows / rows.sum(1, keepdims=True))
    assert len(set(labels)) == 2
    assert labels[0] == labels[1] != labels[2] == labels[3] == labels[4]
    assert 0.2 < _otsu(np.array([0.1, 0.12, 0.15, 0.8, 0.9])) < 0.8


def test_losses_say_what_they_should() -> None:
    split = [["a", "b"], ["c", "d"]]
    e = torch.eye(4)
    together = {"a": e[0], "b": e[0], "c": e[1], "d": e[1]}
    apart = {"a": e[0], "b": e[1], "c": e[0], "d": e[1]}
    pull = _Contrast(split, 1.0, _Alignment(1.0))
    assert pull(together, [], []) < pull(apart, [], [])

    def away(column: int) -> float:
        values = torch.zeros(1, 1, 2, 4, 4)
        values[0, 0, 1, 1, column] = 1
        mask = torch.zeros(4, 4)
        mask[1, 0] = 1
        maps = [[LayerMaps("", "cross", 4, 4, values, (0,), "probability")]]
        return float(_Alignment(1.0)({"a": e[0]}, [Example("an a", torch.zeros(1, 4, 4), mask)], maps))

    assert away(0) == 0 < away(1) < away(3)


def test_the_trial_gives_a_method_that_learns_nothing_nothing(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(concepts, "TEACHING", {"steps": 1, "batch": 1})
    monkeypatch.setattr(concepts, "STEPS", 3)
    found = concepts.inverted(TextualInversion, 2, model)
    assert np.mean(found.values) == 0
    assert set(found.controls) == {"a random vector", "the initial word", "learned from other pictures"}
    assert found.chance == pytest.approx(1 / 24)
