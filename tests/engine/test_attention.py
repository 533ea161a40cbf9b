"""The tape reads what the model computes, and the model does not notice."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from specimens import FAMILIES, PROMPT, Witness, eager_maps, fresh, model, settings, text_attentions

from whence.engine import capture
from whence.engine.attention import AttentionTape, Reweight
from whence.errors import RunError, WrongMapError

KEEP = ("layer", "head")


def taped(family: str, adapter: Any = None, keep: tuple[str, ...] = KEEP, **changes: Any) -> tuple[Any, AttentionTape]:
    tape_settings = {k: changes.pop(k) for k in ("kind", "every", "edits", "budget") if k in changes}
    tape = AttentionTape(keep=keep, **tape_settings)
    return (adapter or model(family)).generate(settings(family, **changes), tape), tape


def witnessed(family: str, images: int = 1, adapter: Any = None, text_only: bool = False, **changes: Any) -> Any:
    adapter = adapter or model(family)
    witness = Witness()
    asked = settings(family, images=images, **changes)
    with witness.of(adapter.denoiser, text_attentions(family)):
        adapter.generate(asked)
    columns = [list(map(list, adapter.columns(adapter.words(asked.prompt))))] * images
    return eager_maps(family, witness.calls, images, 48 * 64 // 8**2, columns, text_only)


@pytest.mark.parametrize("kind", ["probability", "text-only softmax"])
@pytest.mark.parametrize("family", FAMILIES)
def test_pooled_maps_equal_an_eager_softmax_in_float64(family: str, kind: str) -> None:
    _, tape = taped(family, kind=kind, images=2)
    truth = witnessed(family, images=2, text_only=kind != "probability")
    for image in (0, 1):
        layers = tape.layers(image)
        assert {layer.name for layer in layers} == set(truth)
        for layer in layers:
            expected = truth[layer.name][image].unflatten(-1, (layer.height, layer.width))
            assert layer.map_kind == kind
            torch.testing.assert_close(layer.values[0].double(), expected, atol=1e-5, rtol=0)
            assert expected.std() > 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_latents_and_pixels_keep_every_bit_under_the_tape(family: str) -> None:
    plain = model(family).generate(settings(family, images=2))
    for kind in ("probability", "text-only softmax"):
        watched, _ = taped(family, kind=kind, images=2)
        assert (watched.latents == plain.latents).all()
        assert (watched.images == plain.images).all()


@pytest.mark.parametrize("family", ["sd", "pixart", "flux", "sd3"])
def test_indicator_columns_give_what_the_kernels_statistics_give(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, tape = taped(family)
    original = capture.attend
    monkeypatch.setattr(capture, "attend", lambda *a, **k: (original(*a, **k)[0], None))
    _, other = taped(family)
    for a, b in zip(tape.layers(), other.layers(), strict=True):
        torch.testing.assert_close(a.values, b.values, atol=2e-6, rtol=0)


def test_axes_that_are_not_kept_are_means() -> None:
    _, full = taped("sd", keep=("step", "layer", "head"))
    _, heads = taped("sd", keep=("head", "layer"))
    _, none = taped("sd", keep=())
    _, steps = taped("sd", keep=("step",))
    for a, b in zip(full.layers(), heads.layers(), strict=True):
        assert a.steps == b.steps == (0, 1, 2)
        torch.testing.assert_close(a.values.mean(0, keepdim=True), b.values)
    for group, by_step in zip(none.layers(), steps.layers(), strict=True):
        same = [m.values for m in full.layers() if (m.height, m.width) == (group.height, group.width)]
        assert len(same) == group.merged == by_step.merged
        torch.testing.assert_close(by_step.values, torch.stack(same).mean(0).mean(1, keepdim=True))
        torch.testing.assert_close(group.values, by_step.values.mean(0, keepdim=True))


def test_every_second_step_is_every_second_step() -> None:
    _, all_steps = taped("sd", keep=("step", "layer"))
    _, some = taped("sd", keep=("step", "layer"), every=2)
    for a, b in zip(all_steps.layers(), some.layers(), strict=True):
        assert b.steps == (0, 2)
        assert (a.values[::2] == b.values).all()


def test_maps_do_not_depend_on_the_batch_they_were_made_in() -> None:
    for family in FAMILIES:
        adapter = model(family)
        many = [settings(family, prompt, seed=seed) for seed, prompt in enumerate(["a red fox", PROMPT, "the cat"])]
        together, tape = AttentionTape(keep=KEEP), None
        adapter.generate_many(many, together)
        for i, one in enumerate(many):
            tape = AttentionTape(keep=KEEP)
            adapter.generate(one, tape)
            for a, b in zip(together.layers(i), tape.layers(), strict=True):
                torch.testing.assert_close(a.values, b.values, atol=1e-5, rtol=0)


def test_memory_is_places_by_words_and_the_budget_is_held_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = fresh("sd")
    _, tape = taped("sd", adapter)
    need = 4 * sum(t.height * t.width * t.values.shape[1] * t.values.shape[2] for t in tape.layers())
    assert tape.nbytes == need
    ran: list[int] = []
    adapter.denoiser.register_forward_pre_hook(lambda *_: ran.append(1))
    with pytest.raises(WrongMapError, match=r"keep=\('layer'\)|keep=\('layer'"):
        taped("sd", adapter, budget=need - 1, keep=("layer", "head"))
    with pytest.raises(WrongMapError, match="no axis kept"):
        taped("sd", adapter, budget=16, keep=())
    assert not ran
    taped("sd", adapter, budget=need)


@pytest.mark.parametrize("wrong", [{"keep": ("time",)}, {"kind": "magic"}, {"every": 0}, {"mode": "write"}])
def test_a_tape_that_cannot_be_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(RunError):
        AttentionTape(**wrong)


# Differentiated through -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd", "sdxl", "pixart", "sd3", "flux"])
def test_a_loss_on_the_maps_has_the_right_gradient(family: str) -> None:
    adapter = fresh(family)
    moment = double_moment(adapter, family)

    def loss(latents: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        tape = AttentionTape(keep=("layer",), mode="grad")
        moment.predict(latents, prompt, tape)
        return torch.stack([layer.values[:, :, 1].double().square().mean() for layer in tape.layers()]).sum()

    with torch.enable_grad():
        latents, prompt = moment.latents.clone().requires_grad_(), moment.prompt.clone().requires_grad_()
        to_latents, to_prompt = torch.autograd.grad(loss(latents, prompt), (latents, prompt))
    generator = torch.Generator().manual_seed(0)
    for gradient, which in ((to_latents, 0), (to_prompt, 1)):
        direction = torch.randn(gradient.shape, generator=generator, dtype=torch.float64)
        step = 1e-4
        ends = []
        for sign in (1, -1):
            point = [moment.latents, moment.prompt]
            point[which] = point[which] + sign * step * direction
            ends.append(loss(*point))
        slope = float((ends[0] - ends[1]).detach() / (2 * step))
        assert float((gradient * direction).sum()) == pytest.approx(slope, rel=2e-2, abs=1e-9)
        assert abs(slope) > 1e-9


def double_moment(adapter: Any, family: str) -> Any:
    moment = adapter.moment(settings(family), 1)
    adapter.denoiser.double()

    def double(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: double(v) for k, v in value.items()}
        return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    return replace(moment, latents=moment.latents.double(), prompt=moment.prompt.double(), inputs=double(moment.inputs))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_moment_is_the_runs_own_pass(family: str) -> None:
    adapter = model(family)
    outputs: list[torch.Tensor] = []
    handle = adapter.denoiser.register_forward_hook(lambda _m, _a, out: outputs.append(out[0]))
    adapter.generate(settings(family, images=2))
    handle.remove()
    moment = adapter.moment(settings(family, images=2), 2)
    with torch.no_grad():
        assert torch.allclose(moment.predict(), outputs[2][-2:], atol=1e-5)


# Written to -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("normalise", [True, False])
def test_weight_one_keeps_every_bit_and_another_weight_changes_the_picture(family: str, normalise: bool) -> None:
    plain = model(family).generate(settings(family))
    same, _ = taped(family, edits=[Reweight({1: 1.0}, normalise=normalise)])
    other, _ = taped(family, edits=[Reweight({1: 3.0}, normalise=normalise)])
    assert (same.latents == plain.latents).all()
    assert not (other.latents == plain.latents).all()


@pytest.mark.parametrize("family", ["sd", "pixart", "sd3", "flux"])
def test_weight_zero_is_the_words_keys_masked_in_an_eager_softmax(family: str) -> None:
    word, seen = 2, []

    def check(attention: capture.Attention) -> torch.Tensor:
        reweighted = Reweight({word: 0.0})(attention)
        query = attention.query[attention.rows][:, :, attention.picture].double()
        key, value = (t[attention.rows].double() for t in (attention.key, attention.value))
        logits = query @ key.transpose(-1, -2) * attention.scale
        if attention.mask is not None:
            logits = logits + attention.mask[attention.rows].double()
        logits[..., [attention.text.start + c for c in attention.columns[0][word]]] = -torch.inf
        torch.testing.assert_close(reweighted.double(), logits.softmax(-1) @ value, atol=1e-5, rtol=0)
        seen.append(attention.layer.name)
        return reweighted

    _, tape = taped(family, edits=[check])
    assert set(seen) == {layer.name for layer in tape.layers()}


def test_an_edit_acts_only_where_it_was_told_to() -> None:
    plain = model("sd").generate(settings("sd"))
    nowhere, _ = taped("sd", edits=[Reweight({1: 5.0}, layers=lambda layer: layer.name == "none")])
    never, _ = taped("sd", edits=[Reweight({1: 5.0}, steps=range(9, 10))])
    last, tape = taped("sd", keep=("step", "layer"), edits=[Reweight({1: 5.0}, steps=[2])])
    _, before = taped("sd", keep=("step", "layer"))
    assert (nowhere.latents == plain.latents).all()
    assert (never.latents == plain.latents).all()
    assert not (last.latents == plain.latents).all()
    for a, b in zip(tape.layers(), before.layers(), strict=True):
        assert (a.values[:2] == b.values[:2]).all()


def test_an_edit_reaches_the_conditional_rows_alone() -> None:
    adapter, outputs = model("sd"), []
    first = next(m for n, m in adapter.denoiser.named_modules() if n.endswith("attn2"))
    handle = first.register_forward_hook(lambda _m, _a, out: outputs.append(out.clone()))
    adapter.generate(settings("sd", steps=1))
    taped("sd", steps=1, edits=[Reweight({1: 9.0})])
    handle.remove()
    plain, edited = outputs
    assert (plain[0] == edited[0]).all()
    assert not (plain[1] == edited[1]).all()


def test_a_word_that_is_not_there_cannot_be_reweighted() -> None:
    with pytest.raises(RunError, match="words"):
        taped("sd", edits=[Reweight({99: 2.0})])


# Refused, and cleaned up ----------------------------------------------------------------------------------------------


def leftovers(adapter: Any) -> int:
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in adapter.denoiser.modules())
    return hooks + torch._C._len_torch_function_stack()


@pytest.mark.parametrize("family", ["sd", "flux"])
@pytest.mark.parametrize("where", ["block", "attention", "kernel"])
def test_all_hooks_come_off_when_the_model_raises_half_way(family: str, where: str) -> None:
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry

    adapter = fresh(family)
    plain = adapter.generate(settings(family))
    before, table = leftovers(adapter), dict(registry._backends)
    victim = adapter.layers(64, 48)[-1].module
    calls: list[int] = []

    def crash(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    def crashing(attention: capture.Attention) -> None:
        crash()

    handle = None
    edits = [crashing] if where == "kernel" else []
    if where == "block":
        handle = adapter.denoiser.register_forward_hook(crash)
    if where == "attention":
        handle = victim.to_v.register_forward_hook(crash)
    with pytest.raises(KeyboardInterrupt):
        taped(family, adapter, edits=edits)
    if handle:
        handle.remove()
    assert leftovers(adapter) == before
    assert registry._backends == table
    assert (adapter.generate(settings(family)).latents == plain.latents).all()


def test_step_caches_are_refused_with_a_tape_and_left_alone_without() -> None:
    from diffusers import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig
    from diffusers.hooks import apply_pyramid_attention_broadcast

    adapter = fresh("flux")
    adapter.denoiser.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    adapter.generate(settings("flux"))
    with pytest.raises(WrongMapError, match="FirstBlockCacheConfig"):
        taped("flux", adapter)
    adapter.denoiser.disable_cache()
    taped("flux", adapter)

    adapter = fresh("sd")  # a UNet has no switch of its own: the hooks are what is there to be found
    config = PyramidAttentionBroadcastConfig(
        cross_attention_block_skip_range=2,
        cross_attention_timestep_skip_range=(0, 1000),
        cross_attention_block_identifiers=("attentions",),
        current_timestep_callback=lambda: 500,
    )
    apply_pyramid_attention_broadcast(adapter.denoiser, config)
    with pytest.raises(WrongMapError, match="step caches"):
        taped("sd", adapter)


def test_an_attention_that_does_not_pass_through_the_kernel_is_refused() -> None:
    from diffusers.models.attention_processor import AttnProcessor

    adapter = fresh("sd")
    adapter.denoiser.set_attn_processor(AttnProcessor())
    with pytest.raises(WrongMapError, match="no layer was seen"):
        taped("sd", adapter)
    adapter = fresh("sd")
    adapter.layers(64, 48)[2].module.set_processor(AttnProcessor())
    with pytest.raises(WrongMapError, match="not every layer"):
        taped("sd", adapter)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_a_backend_that_bypasses_torchs_kernel_is_read_all_the_same() -> None:
    from diffusers.models.attention_dispatch import attention_backend

    _, native = taped("flux")
    with attention_backend("flex"):
        plain = model("flux").generate(settings("flux"))
        watched, tape = taped("flux")
        edited, _ = taped("flux", edits=[Reweight({1: 4.0})])
    assert (watched.latents == plain.latents).all()
    assert not (edited.latents == plain.latents).all()
    for a, b in zip(native.layers(), tape.layers(), strict=True):
        torch.testing.assert_close(a.values, b.values, atol=1e-5, rtol=0)


def test_a_tape_has_no_picture_before_it_recorded_one() -> None:
    with pytest.raises(WrongMapError, match="holds 0"):
        AttentionTape().layers()


# What the daam package gets wrong, or cannot do -----------------------------------------------------------------------


def test_daam_1_without_guidance_all_heads_are_kept() -> None:
    for guidance in (1.0, 4.0):
        _, tape = taped("sd", guidance=guidance, negative_prompt="")
        assert all(layer.values.shape[1] == 4 for layer in tape.layers())
    truth = witnessed("sd", guidance=1.0)
    _, tape = taped("sd", guidance=1.0)
    for layer in tape.layers():
        torch.testing.assert_close(layer.values[0].double().flatten(-2), truth[layer.name][0], atol=1e-5, rtol=0)


def test_daam_2_pictures_of_one_prompt_are_kept_apart() -> None:
    _, both = taped("sd", images=2)
    assert both.images == 2
    first, second = both.layers(0), both.layers(1)
    assert any(not torch.allclose(a.values, b.values, atol=1e-4) for a, b in zip(first, second, strict=True))
    _, alone = taped("sd")
    for a, b in zip(first, alone.layers(), strict=True):
        assert a.values.shape == b.values.shape
        torch.testing.assert_close(a.values, b.values, atol=1e-5, rtol=0)


def test_daam_3_the_middle_block_is_read() -> None:
    _, tape = taped("sd")
    assert any(layer.name.startswith("mid_block") for layer in tape.layers())


@pytest.mark.parametrize("size", [(64, 48), (32, 96), (40, 72)])
def test_daam_4_pictures_need_not_be_square(size: tuple[int, int]) -> None:
    _, tape = taped("sd", height=size[0], width=size[1])
    assert (tape.layers()[0].height, tape.layers()[0].width) == (size[0] // 4, size[1] // 4)


def test_daam_5_small_latents_have_maps() -> None:
    _, tape = taped("sd", height=16, width=16)
    assert tape.layers()[0].height == 4


def test_daam_6_repeated_words_have_maps_of_their_own() -> None:
    run, tape = taped("sd")
    first, second = run.words.find("red"), run.words.find("red#2")
    assert any(
        not torch.allclose(layer.values[:, :, first], layer.values[:, :, second], atol=1e-5) for layer in tape.layers()
    )


def test_daam_7_the_picture_is_the_same_to_the_last_bit() -> None:
    plain = model("sd").generate(settings("sd", guidance=7.5))
    watched, _ = taped("sd", guidance=7.5)
    assert np.abs(plain.images.astype(int) - watched.images).max() == 0


def test_lora_layers_do_not_disturb_the_tape() -> None:
    from peft import LoraConfig

    adapter = fresh("sd")
    before = adapter.fingerprint
    adapter.denoiser.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False))
    assert adapter.fingerprint != before
    plain = adapter.generate(settings("sd"))
    watched, tape = taped("sd", adapter)
    assert (watched.latents == plain.latents).all()
    truth = witnessed("sd", adapter=adapter)
    for layer in tape.layers():
        torch.testing.assert_close(layer.values[0].double().flatten(-2), truth[layer.name][0], atol=1e-5, rtol=0)
