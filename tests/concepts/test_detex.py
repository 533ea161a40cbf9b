"""DETEX: a thing and its pictures' ground, learned apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import whence
from whence.concepts.detex import DETEX, _Mappers
from whence.errors import PromptError, RunError
from whence.worlds.shapes import concepts, subjects


@pytest.fixture(scope="module")
def model() -> Any:
    return whence.load()


@pytest.fixture(scope="module")
def pictures() -> tuple[Any, Any]:
    return subjects.on_grounds("yellow", "triangle", "test", ["sand"] * 4)


def test_the_subject_word_leaves_the_ground_behind_and_the_attribute_words_bring_it_back(
    model: Any, pictures: tuple[Any, Any]
) -> None:
    learned = DETEX(steps=32).fit(model, *pictures)

    def drawn(prompt: str, words: Any) -> tuple[float, float]:
        with words.on(model):
            runs = model.generate_many(concepts._asked([prompt] * 3, "test"), batch=8)
        images = [r.images[0] for r in runs]
        here = [concepts.draws("yellow", "triangle", p) for p in images]
        return float(np.mean(here)), float(np.mean([subjects.read(p).background == "sand" for p in images]))

    thing, ground = drawn("a sks1 on night", learned.only("sks1"))
    assert thing >= 0.5 > ground
    assert drawn("a sks1 on night", learned.only("sks1").random())[0] == 0
    assert drawn("a pose1 sks1 on ground1", learned)[1] >= 0.5


def test_each_picture_has_attribute_words_of_its_own_and_a_training_goes_on(
    model: Any, pictures: tuple[Any, Any], tmp_path: Path
) -> None:
    before = model.fingerprint
    method = DETEX(steps=2, batch=2)
    whole = method.fit(model, *pictures)
    assert list(whole.vectors) == ["sks1", *(f"{a}{i}" for a in ("pose", "ground") for i in (1, 2, 3, 4))]
    calls = []

    def stop(n: int, _: str) -> None:
        calls.append(n)
        if len(calls) == 1:
            raise KeyboardInterrupt

    path = tmp_path / "words.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("whence.engine.descent.SAVED", -1.0)
        with pytest.raises(KeyboardInterrupt):
            method.fit(model, *pictures, path=path, advance=stop)
    again = method.fit(model, *pictures, path=path)
    assert all(torch.equal(again.vectors[w], v) for w, v in whole.vectors.items())
    assert model.fingerprint == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.pipeline.text_encoder.modules())


def test_mappers_begin_as_a_word_and_differ_by_picture() -> None:
    z = [torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    mappers = _Mappers(z, {"a": torch.arange(3.0)}, 5, 0)
    assert torch.equal(mappers()["a1"], torch.arange(3.0))
    with torch.no_grad():
        mappers.second["a"].add_(1)
    assert not torch.equal(mappers()["a1"], mappers()["a2"])


def test_bad_input_is_refused(model: Any, pictures: tuple[Any, Any]) -> None:
    images, masks = pictures
    with pytest.raises(RunError, match="0 pictures"):
        DETEX().fit(model, [], [])
    with pytest.raises(RunError, match="1 masks"):
        DETEX().fit(model, images, masks[:1])
    with pytest.raises(RunError, match="where the thing is"):
        DETEX().fit(model, images[:1], [np.zeros((64, 64), bool)])
    with pytest.raises(RunError, match="without ground"):
        DETEX(full="a {pose} {word}").fit(model, images, masks)
    with pytest.raises(PromptError, match="knows it already"):
        DETEX(word="circle").fit(model, images, masks)


def test_the_trial_gives_a_method_that_learns_nothing_nothing(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subjects, "TEACHING", {"steps": 1, "batch": 1})
    monkeypatch.setattr(concepts, "STEPS", 1)
    monkeypatch.setattr(subjects, "_prompts", lambda word, ground: [(f"a {word}", ""), (f"a {word} on fog", "fog")])
    found = subjects.decoupled(DETEX, 2, model)
    assert np.mean(found.values) == 0
    assert set(found.controls) == {"single word", "a random vector", "the initial word"}
    assert "its name" in found.details["means"]
