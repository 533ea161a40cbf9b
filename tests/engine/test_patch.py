"""The patch engine: the wired module is found and its twin is not; rows do not hang on each other; nothing stays."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from wired_pipeline import REAL, TWIN, wired

from whence.engine.journal import Journal
from whence.engine.patch import (
    Bench,
    Corruption,
    Kept,
    Row,
    Site,
    against_random,
    by_halves,
    denoiser_sites,
    encoded,
    encoder_sites,
    keep_clean,
    one_by_one,
    play,
    restored_texts,
)
from whence.errors import MethodError, PromptError, RunError, WrongMapError
from whence.models import tiny
from whence.models.loading import load
from whence.run import Settings

PROMPT = "a red circle"
SWAP = Corruption("swap", other="blue")


@pytest.fixture(scope="module")
def model() -> Any:
    return wired()


def settings(seed: int = 0, guidance: float = 3.0, steps: int = 2, size: int = 32) -> Settings:
    return Settings(PROMPT, seed, steps, guidance, size, size)


def bench(model: Any, n: int = 2, guidance: float = 3.0, **more: Any) -> Bench:
    many = [settings(s, guidance) for s in range(n)]
    return Bench(model, many, ["red"] * n, [SWAP] * n, denoiser_sites(model), **more)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_one_module_that_carries_the_word_is_found_and_its_twin_is_not(model: Any, guidance: float) -> None:
    b = bench(model, guidance=guidance)
    found = one_by_one(b.measure, b.sites)
    names = [s.module for s in b.sites]
    np.testing.assert_allclose(found.effects[names.index(REAL)], 1, atol=1e-3)  # the clean picture, whole
    assert names[found.order[0]] == REAL
    twin = found.effects[names.index(TWIN)]
    assert (np.abs(twin) < 0.5).all()
    # Largest activations and most parameters, which know no runs, name others.
    assert names[int(b.activation_norms().argmax())] != REAL
    assert max(b.sites, key=lambda s: s.parameters).module != REAL
    values, random, groups = against_random(b, (b.sites[names.index(REAL)],), 3, "test")
    assert (values - random > 0.3).all()
    assert all(len(g) == 1 and g[0].module != REAL for g in groups)


def test_the_answer_follows_when_the_roles_are_swapped() -> None:
    b = bench(wired(TWIN, REAL), 1)
    found = one_by_one(b.measure, b.sites)
    assert b.sites[found.order[0]].module == TWIN


def test_halves_find_the_same_first_site_with_fewer_runs(model: Any) -> None:
    def measure(groups: Any) -> Any:
        return np.array(
            [[2.0 * any(s.depth == 20 for s in g) + 1.0 * any(s.depth == 3 for s in g)] * 2 for g in groups]
        )

    sites = denoiser_sites(model)
    slow, fast = one_by_one(measure, sites), by_halves(measure, sites, floor=0.1)
    assert fast.order[:2] == slow.order[:2] == [20, 3]
    assert fast.groups < slow.groups
    np.testing.assert_array_equal(fast.effects, slow.effects)  # what was not asked alone was in a group without effect


def test_restoring_every_attention_to_the_text_is_the_clean_run(model: Any) -> None:
    for guidance in (1.0, 4.0):
        b = bench(model, 2, guidance)
        every = tuple(s for s in b.sites if s.kind == "cross-attention")
        np.testing.assert_allclose(b.measure([every]), 1, atol=1e-4)


def test_heads_of_a_module_together_are_the_module(model: Any) -> None:
    heads = denoiser_sites(model, ["cross-attention"], heads=True)
    many = [settings(0)]
    b = Bench(model, many, ["red"], [SWAP], heads)
    own = tuple(h for h in heads if h.module == REAL)
    effects = b.measure([own, own[:1]])
    np.testing.assert_allclose(effects[0], 1, atol=1e-3)
    assert effects[1, 0] < 0.99
    assert len(heads) == 4 * sum(s.kind == "cross-attention" for s in denoiser_sites(model))


def test_steps_choose_the_passes_that_are_put_back(model: Any) -> None:
    real = next(s for s in denoiser_sites(model) if s.module == REAL)
    first, last = replace(real, steps=(0, 1)), replace(real, steps=(1, 2))
    b = Bench(model, [settings(0)], ["red"], [SWAP], (real, first, last))
    every, begin, end = b.measure([(real,), (first,), (last,)])[:, 0]
    assert every > 0.999
    assert 0 < begin < every
    assert 0 < end < every


def test_rows_of_a_batch_do_not_hang_on_each_other_or_on_its_size(model: Any) -> None:
    sites = [s for s in denoiser_sites(model) if s.module in (REAL, "up_blocks.2.resnets.0")]
    many, groups = [settings(0), settings(1)], [(s,) for s in sites]
    one, other = (Bench(model, many, ["red"] * 2, [SWAP] * 2, sites, batch=b) for b in (32, 1))
    together = one.measure(groups)
    np.testing.assert_allclose(together, other.measure(groups), atol=1e-3)
    np.testing.assert_allclose(together, one.measure(groups[::-1])[::-1], atol=1e-3)
    assert abs(together).max() > 0.01


def test_a_row_that_asks_for_nothing_is_the_plain_run(model: Any) -> None:
    run = model.generate(settings(5))
    again = play(model, [Row(settings(5))])[0]
    assert (run.latents == again.latents).all()


def test_only_the_conditional_rows_are_changed(model: Any) -> None:
    seen = []
    handle = model.denoiser.register_forward_hook(
        lambda m, args, kwargs, out: seen.append(kwargs["encoder_hidden_states"].clone()), with_kwargs=True
    )
    try:
        play(model, [Row(settings(0), text=SWAP.text(model, settings(0), "red"))])
    finally:
        handle.remove()
    clean = model.encode([PROMPT], "", True)
    assert len(seen[0]) == 2
    torch.testing.assert_close(seen[0][0], clean.inputs["negative_prompt_embeds"][0])
    torch.testing.assert_close(seen[0][1], encoded(model, "a blue circle", settings(0)))


def test_corruptions_spoil_what_they_say(model: Any) -> None:
    clean = encoded(model, PROMPT, settings(0))
    noise = Corruption("noise", 2.0, after=False).text(model, settings(0), "red")
    changed = (noise != clean).any(-1).nonzero().flatten().tolist()
    assert changed == [2]
    assert 1 < float((noise - clean)[2].std() / clean.std()) < 3
    after = Corruption("noise", 2.0).text(model, settings(0), "red")
    assert (after != clean).any(-1).nonzero().flatten().tolist() == list(range(2, len(clean)))
    assert torch.equal(noise, Corruption("noise", 2.0, after=False).text(model, settings(0), "red"))
    assert not torch.equal(noise, Corruption("noise", 2.0, after=False).text(model, settings(1), "red"))
    drop = Corruption("drop").text(model, settings(0), "red")
    assert torch.equal(drop, encoded(model, "a circle", settings(0)))


@pytest.mark.parametrize("how", [SWAP, Corruption("noise", 4.0)])
def test_text_encoder_states_put_back_at_every_token_are_the_clean_embedding(model: Any, how: Corruption) -> None:
    clean = encoded(model, PROMPT, settings(0))
    sites = encoder_sites(model, PROMPT)
    last = tuple(s for s in sites if s.module == "text_encoder.encoder.layers.0.self_attn")
    corrupted, (one, every) = restored_texts(model, settings(0), "red", how, [(sites[0],), sites])
    assert not torch.allclose(corrupted, clean, atol=1e-3)
    assert {s.place for s in last} == {"a", "red", "circle", "the end"}
    after = slice(3, None)  # the word's own place still has its own embedding below the layers
    torch.testing.assert_close(every[after], clean[after], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(one[after], clean[after], atol=1e-3)


@pytest.mark.parametrize("family", ["sdxl", "pixart", "sd3", "flux"])
def test_every_family_is_traced_by_blocks_or_modules(family: str) -> None:
    other = load(tiny.tiny(family))
    sites = denoiser_sites(other)
    size = other.default_size[0] // 2
    one = replace(settings(0, 1.0 if family == "flux" else 3.0, 2), height=size, width=size)
    b = Bench(other, [one], ["red"], [SWAP], sites[:3])
    assert np.isfinite(b.measure([(s,) for s in sites[:3]])).all()
    assert encoder_sites(other, PROMPT)
    assert sites[0].kind == ("resnet" if family == "sdxl" else "block")


def test_feeding_another_prompt_to_every_layer_is_that_prompt(model: Any) -> None:
    blue = replace(settings(0), prompt="a blue circle")
    other = encoded(model, blue.prompt, blue)
    layers = [s.module for s in denoiser_sites(model, ["cross-attention"])]
    every, none, back = play(
        model,
        [
            Row(settings(0), feed=dict.fromkeys(layers), other=other),
            Row(settings(0), feed={REAL: ()}, other=other),
            Row(settings(0), feed={REAL: None}, other=other, amount=0.0),
        ],
    )
    np.testing.assert_allclose(every.latents, model.generate(blue).latents, atol=1e-4)
    for run in (none, back):
        np.testing.assert_allclose(run.latents, model.generate(settings(0)).latents, atol=1e-4)


def test_what_was_measured_is_not_measured_again(model: Any, tmp_path: Any) -> None:
    journal = Journal(tmp_path / "trace.jsonl")
    first = bench(model, 1, journal=journal)
    sites = [(s,) for s in first.sites[:3]]
    values = first.measure(sites)
    again = bench(model, 1, journal=Journal(tmp_path / "trace.jsonl"))
    before = again.runs
    np.testing.assert_array_equal(again.measure(sites), values)
    assert again.runs == before
    assert again.near(sites[0]) == first.near(sites[0])


def hooks(model: Any) -> int:
    modules = [*model.denoiser.modules(), *model.pipeline.text_encoder.modules()]
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)


def test_hooks_come_off_also_after_a_crash(model: Any) -> None:
    kept = Kept()
    sites = denoiser_sites(model)[:2]
    play(model, [Row(settings(0))], kept, sites)
    assert not hooks(model)
    with pytest.raises(IndexError):
        play(model, [Row(settings(0), restore=sites, source=7)], kept)
    assert not hooks(model)
    with pytest.raises(IndexError):
        restored_texts(model, settings(0), "red", SWAP, [(replace(encoder_sites(model, PROMPT)[0], tokens=(-999,)),)])
    assert not hooks(model)


def test_bad_input_is_refused_with_what_would_work(model: Any) -> None:
    sites = denoiser_sites(model)
    with pytest.raises(MethodError, match="cross-attention"):
        denoiser_sites(model, ["flux capacitor"])
    with pytest.raises(MethodError, match="block"):
        denoiser_sites(load(tiny.flux()), ["resnet"])
    with pytest.raises(RunError, match="more than the budget"):
        keep_clean(model, [settings(s) for s in range(4)], sites, budget=10_000)
    with pytest.raises(PromptError, match="not among the words"):
        Bench(model, [settings(0)], ["green"], [SWAP], sites)
    with pytest.raises(MethodError, match="noise, swap or drop"):
        Corruption("blur")
    with pytest.raises(MethodError, match="other"):
        Corruption("swap")
    with pytest.raises(MethodError, match="smaller group"):
        against_random(bench(model, 1), tuple(sites), 1)
    with pytest.raises(RunError, match="images=1"):
        play(model, [Row(replace(settings(0), images=2))])
    with pytest.raises(RunError, match="`name`"):
        bench(model, 1, readout=lambda run: 0.0, journal=Journal(Path("never.jsonl")))
    with pytest.raises(RunError, match="finite"):
        bench(model, 1, readout=lambda run: float("nan"))


def test_compiled_modules_and_cached_blocks_are_refused() -> None:
    compiled = load(tiny.stable_diffusion())
    compiled.denoiser.mid_block.compile(backend="eager")
    with pytest.raises(WrongMapError, match="compiled"):
        play(compiled, [Row(settings(0))])
    from diffusers import FirstBlockCacheConfig

    flux = load(tiny.flux())
    flux.denoiser.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(WrongMapError, match="disable_cache"):
        play(flux, [Row(replace(settings(0, 1.0), height=64, width=64))])


def test_a_site_says_what_it_is() -> None:
    assert Site("a.attn2", "cross-attention", 2, steps=(0, 4)).label == "a.attn2 head 2 steps 0-3"
    assert Site("enc.mlp", "feed-forward", tokens=(3,), place="red").label == "enc.mlp at red"
