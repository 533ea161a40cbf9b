"""DisenBooth and the low-rank factors it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import whence
from whence.change import Change
from whence.concepts.disenbooth import DisenBooth
from whence.engine.low_rank import Factors, attention_matrices
from whence.errors import PromptError, RunError
from whence.worlds.shapes import concepts, subjects


@pytest.fixture(scope="module")
def model() -> Any:
    return whence.load()


@pytest.fixture(scope="module")
def pictures() -> Any:
    return subjects.on_grounds("green", "circle", "test", subjects.GROUNDS)[0]


def bits(model: Any) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.denoiser.state_dict().items()}


def test_the_tuned_model_draws_the_thing_and_comes_back_bit_for_bit(model: Any, pictures: Any, tmp_path: Path) -> None:
    before, fingerprint = bits(model), model.fingerprint
    tuned = DisenBooth(steps=24).fit(model, pictures)
    assert all(torch.equal(v, before[k]) for k, v in model.denoiser.state_dict().items())
    asked = concepts._asked(["a sks1 on sand"] * 4, "test")
    with tuned.words.on(model):
        untuned = [concepts.draws("green", "circle", r.images[0]) for r in model.generate_many(asked, batch=4)]
    with tuned.on(model):
        drawn = [concepts.draws("green", "circle", r.images[0]) for r in model.generate_many(asked, batch=4)]
    assert sum(drawn) >= 2 > sum(untuned)
    assert model.fingerprint == fingerprint
    assert all(torch.equal(v, before[k]) for k, v in model.denoiser.state_dict().items())
    assert not any(m._forward_hooks for m in model.denoiser.modules())
    again = Change.load(tuned.change.save(tmp_path / "tuned.safetensors"))
    assert again.key == tuned.change.key


def test_factors_say_what_their_merged_matrices_say(model: Any) -> None:
    factors = Factors(attention_matrices(model), 2, 0)
    x, text = torch.randn(1, 4, 16, 16), model.encode(["a red circle"], "", False).condition
    with torch.no_grad():
        plain = model.denoiser(x, 500, encoder_hidden_states=text)[0]
        with factors.on():
            assert torch.equal(model.denoiser(x, 500, encoder_hidden_states=text)[0], plain)
        for name, p in factors.taught.items():
            p.add_(0.02 if name.endswith("B") else 0)
        with factors.on():
            hooked = model.denoiser(x, 500, encoder_hidden_states=text)[0]
        before, after = factors.matrices_after()
        for m in factors.matrices:
            m.weight.copy_(after[m.name])
        merged = model.denoiser(x, 500, encoder_hidden_states=text)[0]
        for m in factors.matrices:
            m.weight.copy_(before[m.name])
    assert (hooked - plain).abs().max() > 1e-3
    assert torch.allclose(hooked, merged, atol=1e-4)


def test_a_training_goes_on_where_it_was_stopped(model: Any, pictures: Any, tmp_path: Path) -> None:
    method, path, calls = DisenBooth(steps=2, batch=2), tmp_path / "tuning.safetensors", []
    whole = method.fit(model, pictures)

    def stop(n: int, _: str) -> None:
        calls.append(n)
        if len(calls) == 1:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("whence.engine.descent.SAVED", -1.0)
        with pytest.raises(KeyboardInterrupt):
            method.fit(model, pictures, path, stop)
    assert not any(m._forward_hooks for m in model.denoiser.modules())
    again = method.fit(model, pictures, path)
    assert again.change.key == whole.change.key
    assert torch.equal(again.images, whole.images)
    with pytest.raises(RunError, match="another file"):
        DisenBooth(steps=3, batch=2).fit(model, pictures, path)


def test_without_images_it_is_plain_low_rank_tuning(model: Any, pictures: Any) -> None:
    plain = DisenBooth(steps=1, batch=1, images=False, weak=0.0, contrast=0.0).fit(model, pictures)
    assert not bool(plain.images.any())
    assert plain.change.parameters


def test_bad_input_is_refused(model: Any, pictures: Any) -> None:
    with pytest.raises(RunError, match="0 pictures"):
        DisenBooth().fit(model, [])
    with pytest.raises(RunError, match="the caption"):
        DisenBooth(caption="a thing").fit(model, pictures)
    with pytest.raises(PromptError, match="knows it already"):
        DisenBooth(word="circle").fit(model, pictures)


def test_the_trial_gives_a_method_that_tunes_nothing_nothing(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subjects, "TUNING", {"steps": 1, "batch": 1})
    monkeypatch.setattr(concepts, "STEPS", 1)
    monkeypatch.setattr(subjects, "_prompts", lambda word, ground: [(f"a {word}", ""), (f"a {word} on fog", "fog")])
    found = subjects.disentangled(DisenBooth, 2, model)
    assert sum(found.values) == 0
    assert set(found.controls) == {"plain tuning", "the word untuned", "tuned to another subject"}
