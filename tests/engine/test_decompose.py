"""A decoder's logit, taken apart: the parts add up to it in every family, and each part is what it is said to be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from whence.engine.decompose import Frozen, LogitParts, decompose, mixing
from whence.errors import MethodError, ModelError, WhenceError, WrongMapError
from whence.models.residual import logit_parts, read

VOCABULARY, LAYERS, HEADS = 40, 3, 4
TARGET, FOIL = 3, 5
GROUPED = {"num_key_value_heads": 2}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"num_key_value_heads": 4}),
    "llama, two heads to a value": ("Llama", GROUPED),
    "llama with biases": ("Llama", {**GROUPED, "attention_bias": True, "mlp_bias": True}),
    "mistral, window 4": ("Mistral", {**GROUPED, "sliding_window": 4}),
    "qwen2": ("Qwen2", GROUPED),
    "qwen3": ("Qwen3", {**GROUPED, "head_dim": 12}),
    "gpt2": ("GPT2", {}),
}


def build(name: str, dtype: torch.dtype = torch.float32, attention: str = "eager") -> Any:
    import transformers

    family, choices = MODELS[name]
    size = {"vocab_size": VOCABULARY, "attn_implementation": attention, "bos_token_id": 0, "eos_token_id": 0}
    if family == "GPT2":
        size |= {"n_embd": 32, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 32, "initializer_range": 0.3}
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**size, **choices))
    else:
        size |= {
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
            "initializer_range": 0.3, "max_position_embeddings": 32,
        }  # fmt: skip
        config = getattr(transformers, f"{family}Config")(**size, **choices)
        model = getattr(transformers, f"{family}ForCausalLM")(config)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():  # biases and norms begin at 0 and 1, where a mistake would not show
            p.copy_(torch.randn(p.shape, generator=draw) * 0.3 + (p.ndim == 1) * p)
    return model.eval().to(dtype)


def text(n: int = 20, seed: int = 0) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(0, VOCABULARY, n)]


def logits(model: Any, ids: Sequence[int]) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(torch.tensor([ids])).logits[0]
    return out


@pytest.mark.parametrize("foil", [FOIL, None])
@pytest.mark.parametrize("position", [19, 7, 0, -1])
@pytest.mark.parametrize("name", MODELS)
def test_the_parts_add_up_to_the_models_own_logit(name: str, position: int, foil: int | None) -> None:
    for dtype, attention, limit in ((torch.float32, "sdpa", 1e-4), (torch.float64, "eager", 1e-9)):
        model, ids = build(name, dtype, attention), text()
        parts = logit_parts(model, ids, position, TARGET, foil, mixed=False)
        own = logits(model, ids)[position]
        want = float(own[TARGET] - (0 if foil is None else own[foil]))
        assert parts.sum == pytest.approx(want, abs=limit)
        assert parts.total == pytest.approx(want, abs=limit)
        assert parts.heads.shape == (LAYERS, HEADS, 20)
        assert len(parts.bias) == LAYERS + 1


@pytest.mark.parametrize("name", MODELS)
def test_a_heads_part_is_what_the_logit_loses_when_the_head_is_taken_out_of_the_frozen_sum(name: str) -> None:
    """The oracle sends the head's own output alone through the model's W_O, and the final norm by hand."""
    model, ids, t = build(name, torch.float64), text(), 15
    stream = read(model, [ids])[0]
    parts = decompose(stream, [(t, TARGET, FOIL)], mixed=False)
    outs = [m for n, m in model.named_modules() if n.endswith(("o_proj", "attn.c_proj"))]
    into: list[Tensor] = []
    hooks = [m.register_forward_pre_hook(lambda _, args: into.append(args[0])) for m in outs]
    logits(model, ids)
    for hook in hooks:
        hook.remove()
    unembed = model.get_output_embeddings().weight
    for layer, (module, x) in enumerate(zip(outs, into, strict=True)):
        channels = x.shape[-1] // HEADS
        for head in range(HEADS):
            alone = torch.zeros_like(x[0, t])
            alone[head * channels : (head + 1) * channels] = x[0, t, head * channels : (head + 1) * channels]
            with torch.no_grad():
                wrote = module(alone[None])[0] - (0 if module.bias is None else module.bias)
                wrote = stream.scale[t] * (wrote - (wrote.mean() if stream.centred else 0))
                gives = float((unembed[TARGET] - unembed[FOIL]) @ wrote)
            # What biases add to the head's values is counted with the biases.
            of_biases = float(_constant(stream, layer, head, t) @ (unembed[TARGET] - unembed[FOIL]).detach())
            assert parts.heads[layer, head].sum() + of_biases == pytest.approx(gives, abs=1e-9)


def _constant(stream: Any, layer: int, head: int, t: int) -> Tensor:
    one = stream.layers[layer]
    wrote = one.attention[head, t].sum() * one.constant[head] @ one.out[head]
    scaled: Tensor = stream.scale[t] * (wrote - (wrote.mean() if stream.centred else 0))
    return scaled


def test_what_biases_add_to_values_is_none_of_the_tokens() -> None:
    """A model whose tokens say nothing (all embeddings 0, so all norms give their bias) has its logit in biases."""
    model = build("gpt2", torch.float64)
    with torch.no_grad():
        model.transformer.wte.weight[:30] = 0
        model.transformer.wpe.weight.zero_()
        for name, p in model.named_parameters():
            if "mlp.c_proj" in name or "attn.c_proj.bias" in name:
                p.zero_()
        for block in model.transformer.h:  # and nothing is passed from layer to layer
            block.attn.c_proj.weight.zero_()
        model.transformer.h[-1].attn.c_proj.weight.normal_(generator=torch.Generator().manual_seed(0))
    parts = logit_parts(model, [1, 2, 3, 4], 3, 35, 36)
    assert abs(parts.heads).max() < 1e-12
    assert abs(parts.bias[LAYERS - 1]) > 0.01
    assert parts.sum == pytest.approx(parts.total, abs=1e-9)


def test_heads_that_share_a_value_still_have_parts_of_their_own() -> None:
    parts = logit_parts(build("llama, two heads to a value"), text(), 19, TARGET, FOIL, mixed=False)
    for one, two in ((0, 1), (2, 3)):
        assert abs(parts.heads[:, one] - parts.heads[:, two]).max() > 0.01


def test_nothing_is_read_from_outside_a_sliding_window() -> None:
    windowed = logit_parts(build("mistral, window 4"), text(), 19, TARGET, FOIL)
    without = logit_parts(build("llama, two heads to a value"), text(), 19, TARGET, FOIL)
    assert (abs(without.heads[:, :, :16]) > 0).mean() > 0.9
    assert (windowed.heads[:, :, :16] == 0).all()
    assert (abs(windowed.heads[:, :, 16:]) > 0).all()
    assert windowed.mixing is not None
    reach = [[j for j in range(20) if row[j] > 0] for row in windowed.mixing[0]]
    assert all(i - 3 <= j <= i for i, js in enumerate(reach) for j in js)
    assert any(min(js) == i - 3 for i, js in enumerate(reach))
    # Over three layers tokens come from up to 9 places away, and so do the pulled parts.
    assert (windowed.pulled()[:10] == 0).all()
    assert (abs(windowed.pulled()[10:13]) > 0).any()


@pytest.mark.parametrize("name", MODELS)
def test_a_text_has_the_same_parts_alone_in_a_batch_and_with_more_text_behind_it(name: str) -> None:
    model, one = build(name, torch.float64), text(12)
    alone = decompose(read(model, [one])[0], [(9, TARGET, FOIL)])
    batch = read(model, [text(20, 1), one, text(5, 2)])
    among = decompose(batch[1], [(9, TARGET, FOIL)])
    assert [len(s.last) for s in batch] == [20, 12, 5]
    cut = logit_parts(model, one[:10], 9, TARGET, FOIL)
    for field in ("embedding", "heads", "mlp", "bias", "total", "mixing"):
        a, b, c = (np.asarray(getattr(p, field)) for p in (alone, among, cut))
        # An eager softmax works in float32 even in a model of doubles, so that padding moves its last digits.
        np.testing.assert_allclose(a, b, atol=2e-6)
        if a.ndim and a.shape[-1] == 12:
            a = a[..., :10, :10] if field == "mixing" else a[..., :10]
        np.testing.assert_allclose(a, c, atol=2e-6)


def test_parts_of_several_tokens_are_the_sum_of_the_parts_of_each() -> None:
    model, ids = build("qwen2"), text()
    both = logit_parts(model, ids, [10, 11], [3, 4], [5, 6])
    one, two = logit_parts(model, ids, 10, 3, 5), logit_parts(model, ids, 11, 4, 6)
    np.testing.assert_allclose(both.pulled(), one.pulled() + two.pulled(), atol=1e-5)
    assert both.total == pytest.approx(one.total + two.total, abs=1e-5)


def test_pulling_back_moves_parts_between_tokens_and_loses_none() -> None:
    parts = logit_parts(build("llama", torch.float64), text(), 19, TARGET, FOIL)
    assert parts.mixing is not None
    np.testing.assert_allclose(parts.mixing.sum(-1), 1)
    assert (np.triu(parts.mixing, 1) == 0).all()
    assert parts.pulled().sum() == pytest.approx(parts.tokens().sum(), abs=1e-12)
    assert abs(parts.pulled() - parts.tokens()).max() > 0.01
    with pytest.raises(WrongMapError, match="mixed=True"):
        logit_parts(build("llama"), text(), 19, TARGET, mixed=False).pulled()


def test_mixing_is_the_papers_equation_one_pair_at_a_time() -> None:
    layer = read(build("gpt2", torch.float64), [text(6)])[0].layers[1]
    found = mixing(layer)
    for i in range(6):
        y, c = layer.residual[i] + layer.attended[i], []
        for j in range(6):
            part = sum(layer.attention[h, i, j] * (layer.value[h, j] @ layer.out[h]) for h in range(HEADS))
            part = part + layer.residual[i] * (i == j)
            c.append(max(0.0, float(y.abs().sum() - (y - part).abs().sum())))
        np.testing.assert_allclose(found[i].numpy(), np.array(c) / sum(c), atol=1e-12)


def test_units_add_up_their_tokens_and_leave_out_those_of_none() -> None:
    parts = logit_parts(build("llama"), text(6), 5, TARGET, FOIL, unit_of=[-1, 0, 0, 2, -1, 2])
    x = parts.tokens()
    np.testing.assert_allclose(parts.by_unit(x, 4), [x[1] + x[2], 0, x[3] + x[5], 0])
    for bad in (parts.by_unit, logit_parts(build("llama"), text(6), 5, TARGET).by_unit):
        with pytest.raises(WrongMapError, match="one number below"):
            bad(x, 2)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_model_is_left_as_it_was_also_when_reading_it_fails(attention: str) -> None:
    model = build("llama", attention=attention)
    before = logits(model, text())

    def boom(*_: Any) -> None:
        raise RuntimeError("half-way")

    trap = model.model.layers[1].mlp.register_forward_hook(boom)
    with pytest.raises(RuntimeError, match="half-way"):
        logit_parts(model, text(), 5, TARGET)
    trap.remove()
    logit_parts(model, text(), 5, TARGET)
    assert model.config._attn_implementation == attention
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(logits(model, text()), before)


def test_what_writes_into_the_stream_unseen_is_refused() -> None:
    """Parts that do not add up are an error, never an answer."""
    model = build("llama")
    steer = model.model.layers[1].register_forward_hook(lambda _, args, out: out + 1.0)
    with pytest.raises(WrongMapError, match="they add up to"):
        logit_parts(model, text(), 5, TARGET)
    steer.remove()


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner, self.weight, self.bias = inner, inner.weight, inner.bias

    def forward(self, x: Tensor) -> Tensor:
        return 1.1 * self.inner(x)  # type: ignore[no-any-return]


def refused(asked: Any, error: type[WhenceError], says: str) -> None:
    with pytest.raises(error, match=says):
        asked()


def test_what_cannot_be_taken_apart_is_refused_with_what_would_work() -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    size = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    gemma = Gemma2ForCausalLM(Gemma2Config(**size, num_attention_heads=2, num_key_value_heads=1, bos_token_id=0))
    refused(lambda: logit_parts(gemma.eval(), [1, 2], 1, 3), MethodError, "'gemma2'[\\s\\S]*leave_one_out")
    refused(lambda: logit_parts(build("llama").train(), text(), 5, 3), MethodError, "model.eval")
    adapted = build("llama")
    adapted.model.layers[0].self_attn.o_proj = Wrapped(adapted.model.layers[0].self_attn.o_proj)
    refused(lambda: logit_parts(adapted, text(), 5, 3), ModelError, "merge adapters")
    model = build("llama")
    for position, target, foil, units in (
        (20, 3, None, None), (5, VOCABULARY, None, None), (5, 3, -1, None), ([5, 6], 3, None, None), (5, 3, 4, [0]),
    ):  # fmt: skip
        refused(lambda p=position, w=target, f=foil, u=units: logit_parts(model, text(), p, w, f, u),
                MethodError, "one position inside")  # fmt: skip
    refused(lambda: read(model, [[]]), MethodError, "one token at least")


class Small(nn.Module):
    """One of everything that Frozen holds fixed."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.norm, self.up, self.down = nn.Linear(6, 18), nn.LayerNorm(6), nn.Linear(6, 9), nn.Linear(9, 6)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        x = self.norm(x + functional.softmax(q @ k.mT / math.sqrt(6), -1) @ v)
        for f in (functional.gelu, functional.silu, torch.relu, torch.tanh):
            x = self.norm(x + self.down(f(self.up(x))))
        return x


def test_frozen_networks_are_linear_in_inputs_and_biases_and_keep_their_output() -> None:
    torch.manual_seed(0)
    net = Small().double()
    x = torch.randn(5, 6, dtype=torch.double, requires_grad=True)
    biases = [p for n, p in net.named_parameters() if n.endswith("bias")]
    w = torch.randn(5, 6, dtype=torch.double)
    with Frozen():
        out = net(x)
    torch.testing.assert_close(out, net(x))
    given = torch.autograd.grad((out * w).sum(), [x, *biases])
    whole = sum(float((g * z).sum().detach()) for g, z in zip(given, [x, *biases], strict=True))
    assert whole == pytest.approx(float((out * w).sum().detach()), abs=1e-12)
    free = torch.autograd.grad((net(x) * w).sum(), [x, *biases])  # not so without it
    loose = sum(float((g * z).sum().detach()) for g, z in zip(free, [x, *biases], strict=True))
    assert abs(loose - float((out * w).sum().detach())) > 0.1


def test_parts_of_nothing_mixed_are_plain_arrays() -> None:
    parts = LogitParts(np.zeros(2), np.ones((1, 1, 2)), np.ones(1), np.zeros(2), 3.0)
    assert parts.sum == 3
    assert parts.tokens().tolist() == [1, 1]
