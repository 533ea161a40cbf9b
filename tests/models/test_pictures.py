"""A Run is what the pipeline makes by hand, recorded so that it can be made again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from specimens import FAMILIES, PROMPT, fresh, model, settings

from whence.engine.attention import AttentionTape
from whence.errors import PromptError, RunError
from whence.models.pictures import noise_generator


def by_hand(family: str, asked: Any, generator: Any) -> Any:
    pipeline = model(family).pipeline
    pipeline.set_progress_bar_config(disable=True)
    more: dict[str, Any] = {}
    if family in ("pixart", "sd3", "flux", "flux-schnell"):
        more["max_sequence_length"] = 48
    if family == "pixart":
        more |= {"use_resolution_binning": False, "clean_caption": False}
    if asked.negative_prompt:
        more["negative_prompt"] = asked.negative_prompt
    return pipeline(
        asked.prompt,
        height=asked.height,
        width=asked.width,
        num_inference_steps=asked.steps,
        guidance_scale=asked.guidance,
        generator=generator,
        output_type="pil",
        **more,
    ).images


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy")
@pytest.mark.parametrize(
    ("family", "negative"),
    [(f, n) for f in FAMILIES for n in ("", "blue snow") if not (f.startswith("flux") and n)],  # refused: see below
)
def test_a_run_has_the_pixels_of_the_pipeline_called_by_hand(family: str, negative: str) -> None:
    asked = settings(family, negative_prompt=negative)
    run = model(family).generate(asked)
    (image,) = by_hand(family, asked, torch.Generator().manual_seed(asked.seed))
    assert (np.asarray(image) == run.images[0]).all()
    assert run.images.shape == (1, 64, 48, 3)
    assert run.latents.shape == (1, 4, 16, 12)
    assert run.latents.dtype == np.float32


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_replays_bit_for_bit_whatever_was_run_in_between(family: str) -> None:
    adapter = model(family)
    run = adapter.generate(settings(family, images=2))
    adapter.generate(settings(family, "a cat", seed=9, height=32, guidance=1.0))
    torch.manual_seed(5)
    assert run.replays()
    assert not (run.again(seed=8).latents == run.latents).all()
    assert not (run.again(prompt="the cat").latents == run.latents).all()


def test_the_record_names_what_is_needed_to_make_it_again() -> None:
    run = model("sd").generate(settings("sd"))
    record = run.record()
    assert record["scheduler"].startswith('DDIMScheduler {"beta_end"')
    assert {"torch", "diffusers", "transformers", "python"} <= set(record["versions"])
    assert len(record["fingerprint"]) == 16
    assert record["settings"]["negative_prompt"] == "blue snow"
    assert str(run).endswith("DDIMScheduler")


@pytest.mark.parametrize("family", ["sd", "flux"])
def test_each_picture_has_a_named_seed_and_the_first_has_the_runs_own(family: str) -> None:
    adapter = model(family)
    run = adapter.generate(settings(family, images=3))
    alone = adapter.generate(settings(family))
    assert np.allclose(run.latents[0], alone.latents[0], atol=1e-4)
    assert not np.allclose(run.latents[0], run.latents[1], atol=1e-2)
    generators = [noise_generator(7, i) for i in range(3)]
    pictures = [by_hand(family, replace(settings(family)), g)[0] for g in generators] if family == "flux" else []
    for made, expected in zip(run.images, pictures, strict=False):
        assert abs(made.astype(int) - np.asarray(expected)).max() <= 1


@pytest.mark.parametrize("family", FAMILIES)
def test_many_runs_at_once_are_the_runs_one_by_one(family: str) -> None:
    adapter = model(family)
    prompts = [PROMPT, "a red fox", "the small bird flying", "a red fox"]
    many = [settings(family, prompt, seed=i, images=1 + (i == 2)) for i, prompt in enumerate(prompts)]
    many.append(settings(family, "a big dog", height=32, steps=2))
    together = adapter.generate_many(many, batch=3)
    for asked, run in zip(many, together, strict=True):
        alone = adapter.generate(asked)
        assert run.settings == asked
        assert run.words == alone.words
        assert run.images.shape == alone.images.shape
        assert np.allclose(run.latents, alone.latents, rtol=1e-4, atol=1e-4 * abs(alone.latents).max())
        assert abs(run.images.astype(int) - alone.images).max() <= 1


def test_one_tape_holds_the_pictures_of_many_runs_in_their_order() -> None:
    adapter = model("sd")
    many = [settings("sd", prompt, seed=i) for i, prompt in enumerate(["a red fox", PROMPT, "the cat"])]
    tape = AttentionTape(keep=("layer",))
    adapter.generate_many(many, tape, batch=2)
    assert tape.images == 3
    assert [tape.layers(i)[0].values.shape[2] for i in range(3)] == [3, 13, 2]
    with pytest.raises(RunError, match="differ"):
        adapter.generate_many([many[0], replace(many[1], steps=2)], tape)


def test_guidance_and_the_negative_prompt_change_the_picture_where_the_family_has_them() -> None:
    for family in ("sd", "sdxl", "pixart", "sd3"):
        adapter = model(family)
        guided, off = (adapter.generate(settings(family, guidance=g)) for g in (4.0, 1.0))
        other = adapter.generate(settings(family, negative_prompt="the white dog"))
        assert not (guided.latents == off.latents).all()
        assert not (guided.latents == other.latents).all()
        assert "guidance" in adapter.capabilities
    dev = model("flux")
    assert not (dev.generate(settings("flux")).latents == dev.generate(settings("flux", guidance=1.5)).latents).all()


def test_distilled_models_refuse_what_was_distilled_away() -> None:
    with pytest.raises(RunError, match="distilled"):
        model("flux").generate(settings("flux", negative_prompt="blue"))
    with pytest.raises(RunError, match="takes no guidance"):
        model("flux-schnell").generate(settings("flux-schnell", guidance=3.5))
    assert "guidance" not in model("flux").capabilities
    assert "distilled-guidance" not in model("flux-schnell").capabilities


def test_defaults_are_the_familys() -> None:
    run = model("flux-schnell").picture("a red fox")
    assert (run.settings.steps, run.settings.guidance) == (4, 1.0)
    assert run.images.shape == (1, 64, 64, 3)
    assert model("flux").guidance == 3.5
    assert model("sd").guidance == 7.5


@pytest.mark.parametrize(
    "wrong",
    [
        {"height": 66},
        {"width": 0},
        {"steps": 0},
        {"images": 0},
        {"seed": -1},
        {"seed": 2**63},
        {"guidance": float("nan")},
    ],
)
def test_settings_that_do_not_fit_are_refused_before_any_work(wrong: dict[str, Any]) -> None:
    adapter = fresh("sd")
    ran: list[int] = []
    adapter.pipeline.text_encoder.register_forward_pre_hook(lambda *_: ran.append(1))
    with pytest.raises(RunError):
        adapter.generate(settings("sd", **wrong))
    with pytest.raises(PromptError):
        adapter.generate_many([settings("sd"), settings("sd", "red " * 90)])
    assert not ran


def test_sd3_refuses_pictures_beyond_its_table_of_places() -> None:
    with pytest.raises(RunError, match="at most 128"):
        model("sd3").generate(settings("sd3", height=160))


def test_runs_are_silent_and_leave_the_callers_randomness_alone(capfd: pytest.CaptureFixture[str]) -> None:
    adapter = fresh("sd")
    before = torch.random.get_rng_state()
    told: list[int] = []
    adapter.generate(settings("sd"), advance=lambda n=1, note="": told.append(n))
    assert told == [1, 1, 1]
    assert (torch.random.get_rng_state() == before).all()
    assert capfd.readouterr() == ("", "")
    assert not adapter.denoiser._forward_hooks


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy")
@pytest.mark.parametrize("scheduler", ["DDPMScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler"])
def test_schedulers_that_draw_noise_or_call_twice_replay_and_can_be_taped(scheduler: str) -> None:
    import diffusers

    adapter = fresh("sd")
    adapter.pipeline.scheduler = getattr(diffusers, scheduler).from_config(adapter.pipeline.scheduler.config)
    run = adapter.generate(settings("sd"))
    assert run.replays()
    tape = AttentionTape(keep=("step",))
    assert (adapter.generate(settings("sd"), tape).latents == run.latents).all()
    assert tape.layers()[0].steps == tuple(range(5 if scheduler.startswith("Heun") else 3))


def test_the_fingerprint_follows_the_weights_and_nothing_else() -> None:
    adapter, twin = fresh("sd"), fresh("sd")
    first = adapter.fingerprint
    adapter.generate(settings("sd"))
    assert adapter.fingerprint == first == twin.fingerprint == model("sd").fingerprint
    assert model("sdxl").fingerprint != first
    with torch.no_grad():
        next(twin.denoiser.parameters()).view(-1)[3] += 1e-3
    assert twin.fingerprint != first


def test_dropout_is_off() -> None:
    from whence.models.loading import load
    from whence.models.tiny import tiny

    pipeline = tiny("pixart")
    pipeline.text_encoder.train()
    assert load(pipeline).generate(settings("pixart")).replays()
