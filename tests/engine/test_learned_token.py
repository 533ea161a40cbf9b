"""Words learned from pictures: found where one is planted, put on and taken off exactly, gone on with after a stop."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import whence
from whence.engine import descent
from whence.engine.learned_token import Example, Learned, Teaching, learn, spoken, start
from whence.errors import ModelError, PromptError, RunError
from whence.models.loading import load as load_pipeline
from whence.models.objectives import DiffusionObjective
from whence.models.tiny import tiny
from whence.run import Settings
from whence.worlds.shapes.concepts import one_thing


@pytest.fixture(scope="module")
def model() -> Any:
    return whence.load()


@pytest.fixture(scope="module")
def examples(model: Any) -> list[Example]:
    objective = DiffusionObjective(model)
    return [Example("a sks1", objective.latents(p)) for p in one_thing("red", "circle", "test")[:2]]


BRIEF = Teaching(steps=3, batch=2)


def learned(model: Any, examples: list[Example], **more: Any) -> Learned:
    return learn(model, DiffusionObjective(model), {"sks1": start(model, "square")}, examples, BRIEF, **more)


@pytest.fixture(scope="module")
def found(model: Any, examples: list[Example]) -> Learned:
    return learned(model, examples)


def test_the_vector_of_a_word_is_that_word(model: Any) -> None:
    words = Learned({"sks1": start(model, "circle")}, model.fingerprint, model.name)
    with words.on(model):
        said, meant = model.encode(["a red sks1", "a red circle"], "", False).condition
        assert torch.equal(said, meant)
        assert model.words("a red sks1 on sand").names[2] == "sks1"


def test_a_word_is_taken_off_exactly_also_after_an_error(model: Any, found: Learned) -> None:
    table = model.pipeline.text_encoder.get_input_embeddings()
    before = (model.pipeline.tokenizer, model.lexicon, table, table.weight.clone(), model.fingerprint)
    vocabulary, plain = model.pipeline.tokenizer.get_vocab(), model.generate(Settings("a circle", 1, 1, 2.0, 64, 64))
    with pytest.raises(KeyError), found.on(model):
        raise KeyError
    with found.on(model) as same:
        again = same.generate(Settings("a circle", 1, 1, 2.0, 64, 64))
    assert np.array_equal(again.latents, plain.latents)  # a prompt without the word is as it was
    assert model.pipeline.tokenizer is before[0]
    assert model.pipeline.tokenizer.get_vocab() == vocabulary
    assert model.lexicon is before[1]
    assert model.pipeline.text_encoder.get_input_embeddings() is table
    assert torch.equal(table.weight, before[3])
    assert model.fingerprint == before[4]
    assert not table._forward_hooks
    assert not table._forward_pre_hooks
    with pytest.raises(PromptError, match="never saw sks1"):
        model.words("a sks1")


def test_two_sets_of_words_stand_side_by_side(model: Any) -> None:
    one = Learned({"sks1": start(model, "circle")}, model.fingerprint, model.name)
    other = Learned({"sks2": start(model, "square")}, model.fingerprint, model.name)
    with one.on(model), other.on(model):
        said, meant = model.encode(["a sks2 above a sks1", "a square above a circle"], "", False).condition
        assert torch.equal(said, meant)
        with pytest.raises(PromptError, match="knows it already"), one.on(model):
            pass


def test_learning_is_deterministic_and_goes_on_after_a_stop(
    model: Any, examples: list[Example], found: Learned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(n: int = 1, note: str = "") -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(descent, "SAVED", -1.0)
    path = tmp_path / "word.safetensors"
    with pytest.raises(KeyboardInterrupt):
        learned(model, examples, path=path, advance=stop)
    again = learned(model, examples, path=path)
    assert torch.equal(again.vectors["sks1"], found.vectors["sks1"])
    assert again.losses == found.losses
    assert all(p.requires_grad for p in model.denoiser.parameters())
    with pytest.raises(RunError, match="other settings"):
        learned(model, examples, path=path, settings={"another": 1})


def test_saved_words_come_back_and_diffusers_reads_them_too(model: Any, found: Learned, tmp_path: Path) -> None:
    path = found.save(tmp_path / "word.safetensors")
    back = Learned.load(path)
    assert torch.equal(back.vectors["sks1"], found.vectors["sks1"])
    assert back.fingerprint == model.fingerprint
    theirs = copy.deepcopy(model.pipeline)
    theirs.load_textual_inversion(str(path))
    embeds, negative = theirs.encode_prompt(["a sks1"], "cpu", 1, True)
    with back.on(model):
        own = model.encode(["a sks1"], "", True)
    assert torch.allclose(embeds, own.condition, atol=1e-6)
    assert torch.allclose(negative, own.inputs["negative_prompt_embeds"], atol=1e-6)
    path.write_bytes(b"no tensors")
    with pytest.raises(RunError, match="cannot be read"):
        Learned.load(path)


def test_words_are_refused_where_they_would_be_wrong(model: Any, found: Learned, examples: list[Example]) -> None:
    with pytest.raises(ModelError, match="they were learned on"), replace(found, fingerprint="another").on(model):
        pass
    for word in ("circle", "two words", "S*"):
        with pytest.raises(PromptError), spoken(model, {word: start(model, "circle")}):
            pass
    with pytest.raises(ModelError, match="shape"), spoken(model, {"sks1": torch.zeros(3)}):
        pass
    with pytest.raises(PromptError, match="tokens"):
        start(model, "unheard")
    with pytest.raises(RunError, match="no caption says sks9"):
        learn(model, DiffusionObjective(model), {"sks9": start(model, "circle")}, examples, BRIEF)
    with pytest.raises(PromptError, match="no such word"):
        found.only("sks7")


def test_a_model_that_predicts_noise_learns_too() -> None:
    small = load_pipeline(tiny("sd"))
    objective = DiffusionObjective(small)
    assert objective.kind == "epsilon"
    z = torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(0))
    found = learn(small, objective, {"sks1": start(small, "cat")}, [Example("a sks1", z)], Teaching(steps=2, batch=2))
    assert len(found.losses) == 2
    assert not torch.equal(found.vectors["sks1"], start(small, "cat"))
