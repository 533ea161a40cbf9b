"""The engine that asks a language model again: what it saves must not change what it finds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sentences import CAUSAL, WORDS, tiny

from whence.engine.ablate import MEAN, MEGABYTES, Ablation, Version, common
from whence.engine.narrow import fused, last_feed_forward, narrowed
from whence.errors import MethodError, RunError
from whence.models.kept_states import KeptStates, _apart, _scaled
from whence.models.suppression import scaled_attention


def versions(n: int = 24, seed: int = 0) -> list[Version]:
    rng = np.random.default_rng(seed)
    prompt, target = rng.integers(2, WORDS, 40).tolist(), tuple(rng.integers(2, WORDS, 5).tolist())
    drops: list[set[int]] = [set(), *({i} for i in range(40))]
    drops += [set(rng.choice(40, int(rng.integers(1, 39)), replace=False).tolist()) for _ in range(n)]
    return [Version(tuple(t for j, t in enumerate(prompt) if j not in d), target) for d in drops]


def engine(model: Any, megabytes: float = MEGABYTES, how: str = "", **more: Any) -> Ablation:
    return Ablation(model, megabytes, KeptStates.of(model, how), **more)


def plainly(model: Any, version: Version) -> NDArray[np.float64]:
    """One pass, no kept states, all logits."""
    with torch.no_grad():
        said = model(input_ids=torch.tensor([version.ids]), use_cache=False).logits[0].double().log_softmax(-1)
    first = len(version.prompt) - 1
    return np.array([float(said[first + i, t]) for i, t in enumerate(version.target)])


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("kind", CAUSAL)
def test_every_version_gets_the_number_that_one_plain_pass_gives(kind: str, kept: bool) -> None:
    model = tiny(kind)
    asked = versions()
    ablation = engine(model) if kept else Ablation(model)
    for version, values in zip(asked, ablation.logprobs(asked), strict=True):
        np.testing.assert_allclose(values, plainly(model, version), atol=2e-5)
    assert ablation.shortcuts is True  # also with windows and with capped scores
    assert (ablation.keeper is None) == (not kept or kind == "mamba")


@pytest.mark.parametrize("kind", ["gpt2", "llama", "mistral", "gemma2", "gemma3"])
def test_targets_of_different_lengths_after_one_prompt_are_each_asked_at_their_places(kind: str) -> None:
    model, v = tiny(kind), versions(0)[0]
    asked = [Version(v.prompt, v.target[:n]) for n in (1, 3, 5)] + [Version(v.prompt[:30], v.target)]
    for version, values in zip(asked, engine(model).logprobs(asked), strict=True):
        np.testing.assert_allclose(values, plainly(model, version), atol=2e-5)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen3", "mistral", "gemma2", "gemma3"])
def test_shared_beginnings_are_read_once(kind: str) -> None:
    asked = versions(0)
    ablation = engine(tiny(kind), megabytes=0.2)
    ablation.logprobs(asked)
    assert ablation.tokens < 0.7 * sum(len(v.ids) for v in asked)


def test_states_that_do_not_fit_the_cap_are_not_kept() -> None:
    asked = versions(0)
    ablation = engine(tiny("llama"), megabytes=0.001)
    ablation.logprobs(asked)
    # Three passes more for the trial of the shortcuts.
    assert ablation.passes == len(asked) + 2
    assert ablation.tokens >= sum(len(v.ids) - 1 for v in asked)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_shortcuts_that_give_other_numbers_are_not_used(kind: str) -> None:
    class Forgetful(type(tiny(kind))):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            cache = kwargs.get("past_key_values")
            if cache is not None:  # what was read before counts for nothing
                for layer in cache.layers:
                    for states in layer.states.past(layer.number) or ():
                        states.zero_()
            return super().forward(*args, **kwargs)

    model = tiny(kind)
    model.__class__ = Forgetful
    ablation = engine(model)
    asked = versions(4)
    found = ablation.logprobs(asked)
    assert ablation.shortcuts is False
    np.testing.assert_allclose(found[3], plainly(model, asked[3]), atol=2e-5)


def test_a_last_layer_that_looks_around_is_not_narrowed() -> None:
    """The trial of the shortcuts finds a feed-forward part that is none."""
    model = tiny("llama")
    last = last_feed_forward(model)
    assert last is not None
    last.register_forward_hook(lambda module, given, out: out + given[0].cumsum(1))
    ablation = engine(model)
    asked = versions(4)
    found = ablation.logprobs(asked)
    assert ablation.shortcuts is False
    np.testing.assert_allclose(found[3], plainly(model, asked[3]), atol=2e-5)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma3"])
def test_the_model_is_left_as_it_was_also_when_a_pass_fails(kind: str) -> None:
    model, asked = tiny(kind), versions(4)
    before = model.config._attn_implementation

    def clean() -> bool:
        hooks = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m)]
        return not hooks and model.config._attn_implementation == before

    def fail(version: Version, values: Any) -> None:
        raise KeyboardInterrupt

    engine(model).logprobs(asked)
    assert clean()
    with pytest.raises(KeyboardInterrupt):
        engine(model).logprobs(asked, each=fail)
    assert clean()
    row = torch.zeros(1, dtype=torch.long)
    with pytest.raises(IndexError), fused(model), narrowed(model, row, row + 999, last_feed_forward(model)):
        model(input_ids=torch.ones(1, 4, dtype=torch.long))
    assert clean()


def test_values_are_handed_over_as_soon_as_they_are_known() -> None:
    model, asked, seen = tiny("gpt2"), versions(4), {}
    found = engine(model, 0.01).logprobs(asked, each=lambda v, values: seen.update({v: values.copy()}))
    assert len(seen) == len(set(asked))
    assert all((seen[v] == values).all() for v, values in zip(asked, found, strict=True))


def test_two_keys_have_in_common_what_their_tokens_and_scales_have() -> None:
    v = versions(0)[0]
    other = Version((*v.prompt[:7], v.prompt[7] + 1, *v.prompt[8:]), v.target)
    scaled_one = Version(v.prompt, v.target, (1.0,) * 5 + (0.1,) + (1.0,) * (len(v.ids) - 6))
    assert [common(v.key, x.key) for x in (v, other, scaled_one)] == [len(v.ids), 7, 5]
    assert common(v.key, Version(v.prompt[:3], ()).key) == 3


@pytest.mark.parametrize("kind", ["gpt2", "llama", "mistral"])
def test_numbers_depend_neither_on_the_cap_nor_on_the_order_of_versions(kind: str) -> None:
    model, asked = tiny(kind), versions()
    known = engine(model).logprobs(asked)
    for megabytes in (0.001, 1.0, 1000.0):
        other = engine(model, megabytes).logprobs(asked[::-1])[::-1]
        for a, b in zip(known, other, strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5)


def test_a_version_that_stands_there_twice_is_asked_once() -> None:
    ablation = engine(tiny("gpt2"))
    asked = versions(3)
    a = ablation.logprobs(asked * 4)
    other = engine(tiny("gpt2"))
    other.logprobs(asked)
    assert ablation.tokens == other.tokens
    assert len(a) == 4 * len(asked)


def test_the_mean_is_read_in_place_of_a_token() -> None:
    model, mean = tiny("llama"), torch.randn(32)
    v = versions(0)[0]
    ids = list(v.prompt)
    ids[7] = MEAN
    found = engine(model, mean=mean).logprobs([v, Version(tuple(ids), v.target)])
    embedded = model.get_input_embeddings()(torch.tensor([v.ids]))
    embedded[0, 7] = mean
    with torch.no_grad():
        said = model(inputs_embeds=embedded).logits[0].log_softmax(-1)
    wanted = [float(said[39 + i, t]) for i, t in enumerate(v.target)]
    np.testing.assert_allclose(found[1], wanted, atol=2e-5)
    assert abs(found[0] - found[1]).max() > 1e-3


def scaled(v: Version, unit: int, factor: float) -> Version:
    return Version(v.prompt, v.target, tuple(factor if i == unit else 1.0 for i in range(len(v.ids))))


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2", "qwen3", "mistral", "gemma3"])
def test_attention_scaled_to_nothing_is_attention_masked(kind: str) -> None:
    """The oracle is a mask that transformers itself is given."""
    model, v = tiny(kind), versions(0)[0]
    bias = engine(model, how="bias")
    unit = 36  # inside every window
    found = bias.logprobs([scaled(v, unit, 1e-30), scaled(v, unit, 1.0), v])
    n = len(v.ids)
    rows, columns = torch.arange(n)[:, None], torch.arange(n)
    seen = columns <= rows
    window = getattr(model.config, "sliding_window", None)
    near = seen & (columns > rows - window) if window else seen
    hide = (columns == unit) & (rows != unit)

    def mask(allowed: torch.Tensor) -> torch.Tensor:
        return torch.zeros(1, 1, n, n).masked_fill(~(allowed & ~hide), torch.finfo(torch.float32).min)

    given: Any = mask(near)
    if kind == "gemma3":
        given = {"full_attention": mask(seen), "sliding_attention": mask(near)}
    with torch.no_grad():
        said = model(input_ids=torch.tensor([v.ids]), attention_mask=given, use_cache=False).logits[0].log_softmax(-1)
    wanted = [float(said[39 + i, t]) for i, t in enumerate(v.target)]
    # The unit itself may still look at itself alone, if it is told not to by odds and not by a mask.
    np.testing.assert_allclose(found[0], wanted, atol=0.2)
    np.testing.assert_allclose(found[1], found[2], atol=3e-5)
    assert abs(found[0] - found[1]).max() > 1e-3


@pytest.mark.parametrize("how", ["multiply", "bias"])
def test_scaling_is_the_same_in_packs_and_one_by_one_and_leaves_the_model_as_it_was(how: str) -> None:
    model = tiny("llama")
    before = model.config._attn_implementation
    asked = [scaled(versions(0)[0], u, f) for u in range(0, 40, 3) for f in (0.1, 2.0)]
    packs = engine(model, how=how).logprobs(asked)
    single = engine(model, 0.001, how).logprobs(asked)
    for a, b in zip(packs, single, strict=True):
        np.testing.assert_allclose(a, b, atol=3e-5)
    assert model.config._attn_implementation == before
    with pytest.raises(MethodError, match="multiply"):
        KeptStates(model, "add")


@pytest.mark.parametrize("heads", [4, 2])
@pytest.mark.parametrize("how", ["multiply", "bias"])
def test_scaled_attention_in_parts_is_scaled_attention_under_a_mask(how: str, heads: int) -> None:
    torch.manual_seed(0)
    rows, tokens, before, width = 3, 700, 400, 8
    query, key, value = torch.randn(rows, 4, tokens, width), *torch.randn(2, rows, heads, tokens, width)
    past = torch.randn(1, heads, before, width), torch.randn(1, heads, before, width)
    scale = torch.rand(1, before + tokens).expand(rows, -1).clone()
    scale[:, before:] = torch.rand(rows, tokens).clamp(min=0.01)
    scale[:, ::3] = 1
    whole = [torch.cat([p.expand(rows, -1, -1, -1), x], 2) for p, x in zip(past, (key, value), strict=True)]
    seen = torch.ones(tokens, before + tokens, dtype=torch.bool).tril(before)
    wanted = scaled_attention(query, *whole, seen[None, None], 0.35, None, scale, how)
    found = _apart(*_scaled(query, key, value, past, scale, 0.35, how), 0.35, None)[..., :-1]
    torch.testing.assert_close(found, wanted, atol=3e-6, rtol=1e-5)
    at = torch.tensor([[3, 600], [699, 0], [5, 6]])
    some = _apart(*_scaled(query, key, value, past, scale, 0.35, how), 0.35, at)[..., :-1]
    torch.testing.assert_close(some[0, [3, 600]], wanted[0, [3, 600]], atol=3e-6, rtol=1e-5)
    assert not some[0, 4].any()


def test_a_model_without_such_attention_is_refused() -> None:
    model = tiny("mamba")
    with pytest.raises(MethodError, match="table of functions"):
        engine(model, how="bias")
    with pytest.raises(RunError, match="cannot be scaled"):
        engine(model).logprobs([scaled(versions(0)[0], 3, 0.5)])


def test_a_model_that_gives_nan_is_an_error_and_no_number() -> None:
    model = tiny("gpt2")
    with torch.no_grad():
        model.transformer.ln_f.weight[:] = float("nan")
    with pytest.raises(RunError, match="NaN"):
        engine(model).logprobs(versions(2))
