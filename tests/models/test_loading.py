"""A directory, a hub id or a live pipeline becomes an adapter; anything else gets one clear error."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from specimens import FAMILIES, fresh, model, settings

from whence.errors import ModelError
from whence.models.loading import load


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    fresh("sd").pipeline.save_pretrained(tmp_path / "pipe")
    return tmp_path / "pipe"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_pipeline_loads_and_draws_what_the_live_one_draws(family: str, tmp_path: Path) -> None:
    live = model(family)
    live.pipeline.save_pretrained(tmp_path / "pipe")
    adapter = load(tmp_path / "pipe")
    asked = settings(family)
    assert adapter.words(asked.prompt) == live.words(asked.prompt)
    assert adapter.fingerprint == live.fingerprint
    size = adapter.default_size
    assert size == live.default_size or family.startswith("flux")
    assert (adapter.generate(asked).latents == live.generate(asked).latents).all()
    assert adapter.name == "pipe"
    assert adapter.family == live.family


def test_half_precision_weights_become_float32_on_the_cpu(tmp_path: Path) -> None:
    pipeline = fresh("sd").pipeline.to(torch.float16)
    pipeline.save_pretrained(tmp_path / "half")
    adapter = load(str(tmp_path / "half"), device="cpu")
    assert {p.dtype for p in adapter.denoiser.parameters()} == {torch.float32}
    assert {p.dtype for p in adapter.pipeline.text_encoder.parameters()} == {torch.float32}
    assert np.isfinite(adapter.generate(settings("sd")).latents).all()


def test_words_json_gives_the_vocabulary_alternatives_and_defaults(saved: Path) -> None:
    words = {
        "words": ["a", "red", "fox"],
        "alternatives": {"red": ["red", "fox"]},
        "defaults": {"steps": 2, "guidance": 3},
    }
    (saved / "words.json").write_text(json.dumps(words))
    adapter = load(saved)
    assert adapter.lexicon is not None
    assert adapter.alternatives("a red fox", 1) == ("fox",)
    run = adapter.picture("a red fox")
    assert (run.settings.steps, run.settings.guidance) == (2, 3.0)
    (saved / "words.json").write_text('{"alternatives": {}}')
    with pytest.raises(ModelError, match=r"words\.json"):
        load(saved)


def test_loading_is_silent(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load(saved)
    assert capfd.readouterr() == ("", "")


def test_what_is_no_pipeline_is_refused(tmp_path: Path, saved: Path) -> None:
    with pytest.raises(ModelError, match=r"no model_index\.json"):
        load(tmp_path)
    with pytest.raises(ModelError, match="no such directory"):
        load(tmp_path / "missing")
    with pytest.raises(ModelError, match="no such directory"):
        load("stable diffusion")
    (saved / "model_index.json").write_text("{ half a file")
    with pytest.raises(ModelError, match=r"model_index\.json"):
        load(saved)
    (saved / "model_index.json").write_text("[]")
    with pytest.raises(ModelError, match=r"model_index\.json"):
        load(saved)


def test_pickles_are_refused_unread(saved: Path, tmp_path: Path) -> None:
    weights = saved / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ModelError, match=r"(?s)unet has only a pickle.*safetensors"):
        load(saved)
    checkpoint = tmp_path / "model.ckpt"
    checkpoint.write_bytes(b"\x80\x04.")
    with pytest.raises(ModelError, match="a pickle, which can run code"):
        load(checkpoint)


def test_a_directory_with_a_part_missing_or_broken_is_refused(saved: Path) -> None:
    weights = saved / "unet" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="cannot load"):
        load(saved)
    shutil.rmtree(saved / "unet")
    with pytest.raises(ModelError):
        load(saved)


def test_a_pipeline_without_an_adapter_is_refused_with_those_that_have_one(saved: Path) -> None:
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    unet = UNet2DModel(
        sample_size=8, block_out_channels=(8,), norm_num_groups=4, down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )  # fmt: skip
    with pytest.raises(ModelError, match=r"(?s)DDPMPipeline.*StableDiffusionPipeline.*FluxPipeline"):
        load(DDPMPipeline(unet, DDPMScheduler()))
    index = json.loads((saved / "model_index.json").read_text())
    (saved / "model_index.json").write_text(json.dumps(index | {"_class_name": "KandinskyPipeline"}))
    with pytest.raises(ModelError, match="KandinskyPipeline"):
        load(saved)
    with pytest.raises(ModelError, match="int"):
        load(3)


def test_a_hub_model_that_cannot_be_fetched_is_one_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="not in the local cache"):
        load("nobody/no-such-model")
