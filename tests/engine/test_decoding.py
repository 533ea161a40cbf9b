"""The decoding desk writes what transformers writes, and tells of every token what else could have stood there."""

from __future__ import annotations

from dataclasses import fields
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    LogitsProcessorList,
    MambaConfig,
    TopPLogitsWarper,
)

from whence.engine.decoding import Choice, Step, Trace, blocks_of, decode, draw, greedy, nucleus, trace
from whence.errors import MethodError, PromptError, RunError

V = 96
CONFIGS: dict[str, Any] = {
    "gpt2": lambda: GPT2Config(vocab_size=V, n_positions=64, n_embd=32, n_layer=3, n_head=4, initializer_range=0.3),
    "llama": lambda: LlamaConfig(
        vocab_size=V, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3,
    ),
    "mamba": lambda: MambaConfig(
        vocab_size=V, hidden_size=32, state_size=8, num_hidden_layers=3, initializer_range=0.3,
        tie_word_embeddings=False,
    ),
}  # fmt: skip
FAMILIES = tuple(CONFIGS)
PROMPT = [5, 17, 3, 80, 41]


def built(config: Any) -> Any:
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        return AutoModelForCausalLM.from_config(config).eval()


@cache
def model(family: str) -> Any:
    return built(CONFIGS[family]())


def by_transformers(family: str, **settings: Any) -> list[int]:
    ids = torch.tensor([PROMPT])
    out = model(family).generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **settings)
    return out[0, len(PROMPT) :].tolist()


def dice(step: Step) -> Choice:
    """Draws from the nucleus of .8 at temperature .7, by a number that the token's place decides."""
    law = (step.logits / 0.7).softmax(0)
    u = (step.number * 0.618) % 1
    return Choice(draw(law, 0.8, u), law=law, draw=u)


class Given:
    """A model whose logits are known: those of the next token hang on the last one alone."""

    def __init__(self, table: list[list[float]]) -> None:
        self.table = torch.tensor(table)
        self.passes = 0

    def __call__(self, input_ids: torch.Tensor) -> Any:
        self.passes += 1
        return SimpleNamespace(logits=self.table[input_ids])


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_decoding_writes_what_transformers_writes(family: str) -> None:
    decoded = decode(model(family), PROMPT, greedy, 30)
    assert decoded.output_ids.tolist() == by_transformers(family, max_new_tokens=30)
    assert len(set(decoded.output_ids.tolist())) > 3  # no test if it said one word only
    assert decoded.trace.greedy.all()
    assert (decoded.trace.rank == 1).all()
    assert decoded.ended == "length"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_token_that_ends_texts_ends_them_as_in_transformers(family: str) -> None:
    stop = decode(model(family), PROMPT, greedy, 30).output_ids[7]
    decoded = decode(model(family), PROMPT, greedy, 30, [stop])
    assert decoded.output_ids.tolist() == by_transformers(family, max_new_tokens=30, eos_token_id=int(stop))
    assert decoded.ended == "stop"
    assert decoded.output_ids[-1] == stop


@pytest.mark.parametrize("family", FAMILIES)
def test_a_written_text_has_the_same_trace_as_the_text_being_written(family: str) -> None:
    exits = {1: None, 3: None}

    def choose(step: Step) -> Choice:
        drawn = dice(step)
        return Choice(drawn.token, drawn.law, step.exits[1].softmax(0), drawn.draw)

    decoded = decode(model(family), PROMPT, choose, 25, top_p=0.8, exits=exits)
    one = decoded.trace
    two = trace(model(family), PROMPT, decoded.output_ids, 0.8, choose=choose, exits=exits)
    assert not one.greedy.all()
    for f in fields(Trace):
        if f.name in ("draw", "vetoed"):
            continue
        np.testing.assert_allclose(getattr(one, f.name), getattr(two, f.name), atol=1e-5, err_msg=f.name)
    assert np.isfinite(one.draw).all()
    assert np.isnan(two.draw).all()  # the text does not say which number was drawn
    for a, b in zip(one.vetoed, two.vetoed, strict=True):
        assert [v.token for v in a] == [v.token for v in b]


@pytest.mark.parametrize("family", FAMILIES)
def test_states_that_are_kept_give_the_logits_of_a_plain_pass(family: str) -> None:
    seen: list[Step] = []
    decode(model(family), PROMPT, greedy, 12, observers=[lambda step, _: seen.append(step)])
    for step in seen:
        plain = model(family)(input_ids=torch.tensor([step.ids]), use_cache=False).logits[0, -1]
        torch.testing.assert_close(step.logits, plain.detach().double(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.8, 0.95, 0.999, 1.0])
@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
def test_the_nucleus_is_what_the_filter_of_transformers_keeps(top_p: float, scale: float) -> None:
    logits = torch.randn(50, V, generator=torch.Generator().manual_seed(1)) * scale
    kept = LogitsProcessorList([TopPLogitsWarper(top_p)])(torch.zeros(50, 1).long(), logits).isfinite()
    for row, wanted in zip(logits, kept, strict=True):
        found = nucleus(row.double().softmax(0), top_p)
        assert set(found.tolist()) == set(wanted.nonzero()[:, 0].tolist())


def test_the_nucleus_is_the_smallest_set_that_reaches_p() -> None:
    generator = torch.Generator().manual_seed(2)
    for top_p in (0.1, 0.5, 0.9, 0.99):
        p = torch.randn(V, generator=generator).mul(2).double().softmax(0)
        found = nucleus(p, top_p)
        assert p[found].sum() >= top_p
        assert p[found[:-1]].sum() < top_p
        assert (p[found].diff() <= 0).all()
    assert nucleus(torch.tensor([0.25, 0.25, 0.25, 0.25]), 0.5).tolist() == [0, 1]  # of equals, the first ones


def test_draws_over_all_seeds_are_the_renormalised_nucleus() -> None:
    law = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15]).double()
    drawn = np.bincount([draw(law, 0.8, u) for u in (np.arange(2000) + 0.5) / 2000], minlength=5) / 2000
    np.testing.assert_allclose(drawn, np.array([0, 0.4, 0, 0.3, 0.15]) / 0.85, atol=1e-3)


def test_the_trace_tells_the_numbers_of_a_model_that_is_known() -> None:
    law = np.array([0.5, 0.25, 0.15, 0.1])
    known = Given([np.log(np.roll(law, i)).tolist() for i in range(4)])
    decoded = decode(known, [0], lambda step: (1, 3, 0)[step.number], 3, top_p=0.7)
    t = decoded.trace
    assert decoded.output_ids.tolist() == t.chosen.tolist() == [1, 3, 0]
    np.testing.assert_allclose(t.probability, [0.25, 0.15, 0.25])
    np.testing.assert_allclose(t.entropy, -(law * np.log(law)).sum())
    assert t.rank.tolist() == [2, 3, 2]
    assert t.nucleus.tolist() == [2, 2, 2]
    np.testing.assert_allclose(t.chance, [1 / 3, 0, 1 / 3])
    np.testing.assert_allclose(t.cut, 0.25)
    assert t.greedy.tolist() == [False] * 3
    assert t.likeliest[0].tolist() == [0, 1, 2, 3]
    np.testing.assert_allclose(t.likeliest_probability[1], law)
    assert t.lower.tolist() == [-1] * 3
    assert len(t) == 3
    assert t.table(lambda i: "abcd"[i]).splitlines()[1].split() == ["b", "0.250", "2", "2", "0.333"]
    assert known.passes == 3


def test_a_written_text_is_read_in_one_pass() -> None:
    known = Given([[0.0, 1.0], [1.0, 0.0]])
    assert trace(known, [0], [1, 0, 0, 1]).greedy.tolist() == [True, True, False, True]
    assert known.passes == 1


def test_the_trace_says_what_the_contrast_put_below_the_chosen_token() -> None:
    known = Given([[3.0, 2.0, 1.0, 0.0]])
    law, lower = torch.tensor([0.1, 0.2, 0.6, 0.1]).double(), torch.tensor([0.7, 0.1, 0.1, 0.1]).double()
    t = decode(known, [0], lambda _: Choice(2, law, lower), 1).trace
    p = np.exp([3, 2]) / np.exp([3, 2, 1, 0]).sum()
    assert [(v.token, round(v.lower, 6)) for v in t.vetoed[0]] == [(0, 0.7), (1, 0.1)]
    np.testing.assert_allclose([v.probability for v in t.vetoed[0]], p)
    assert (t.lower[0], round(t.lower_probability[0], 6)) == (0, 0.1)
    assert decode(known, [0], lambda _: Choice(2, law), 1).trace.vetoed == ((),)  # held against nothing


@pytest.mark.parametrize("family", FAMILIES)
def test_an_exit_is_the_state_after_a_layer_by_final_norm_and_output_embedding(family: str) -> None:
    m = model(family)
    norm = {"gpt2": "transformer.ln_f", "llama": "model.norm", "mamba": "backbone.norm_f"}[family]
    blocks = {"gpt2": "transformer.h", "llama": "model.layers", "mamba": "backbone.layers"}[family]
    states = []
    handle = m.get_submodule(blocks)[1].register_forward_hook(
        lambda _m, _i, out: states.append(out[0] if isinstance(out, tuple) else out)
    )
    seen: list[Step] = []
    own = {1: lambda state: state.sum(-1, keepdim=True).expand(-1, V)}
    decode(m, PROMPT, greedy, 3, exits={0: None, 2: None, 3: None} | own, observers=[lambda s, _: seen.append(s)])
    handle.remove()
    for step, state in zip(seen, states, strict=True):
        wanted = m.get_output_embeddings()(m.get_submodule(norm)(state[0, -1])).detach().double()
        torch.testing.assert_close(step.exits[2], wanted)
        assert torch.equal(step.exits[3], step.logits)  # the last layer is the model
        assert step.exits[1].unique().numel() == 1  # a head that is handed in is used
        assert (step.exits[0] - step.logits).abs().max() > 0.1
    assert len(blocks_of(m)) == 3


def test_exits_that_do_not_make_the_logits_are_refused() -> None:
    capped = built(Gemma2Config(
        vocab_size=V, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, max_position_embeddings=64, final_logit_softcapping=1.0, initializer_range=0.5,
    ))  # fmt: skip
    assert len(decode(capped, PROMPT, greedy, 2).output_ids) == 2
    with pytest.raises(MethodError, match="caps or scales"):
        decode(capped, PROMPT, greedy, 2, exits={1: None})
    seen = []
    decode(capped, PROMPT, greedy, 2, exits={1: lambda s: s[:, :8]}, observers=[lambda s, _: seen.append(s.exits[1])])
    assert seen[0].shape == (8,)  # with a head of its own the exit is free


def test_no_hook_is_left_even_when_a_head_breaks_off() -> None:
    m = model("llama")

    def hooks() -> int:
        return sum(len(x._forward_hooks) + len(x._forward_pre_hooks) for x in m.modules())

    def broken(_state: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError

    decode(m, PROMPT, greedy, 2, exits={1: None})
    before = hooks()
    with pytest.raises(ZeroDivisionError):
        decode(m, PROMPT, greedy, 2, exits={1: broken})
    assert hooks() == before


def test_tokens_come_as_list_array_or_tensor() -> None:
    texts = [decode(model("gpt2"), p, greedy, 5).output_ids.tolist()
             for p in (PROMPT, np.array(PROMPT), torch.tensor([PROMPT]), iter(PROMPT))]  # fmt: skip
    assert all(t == texts[0] for t in texts)


def test_what_cannot_be_written_is_refused_with_what_would_work() -> None:
    m = model("gpt2")
    with pytest.raises(PromptError, match="no tokens"):
        decode(m, [], greedy, 3)
    with pytest.raises(PromptError, match="one text"):
        decode(m, torch.tensor([[1, 2], [3, 4]]), greedy, 3)
    with pytest.raises(PromptError, match="one text"):
        decode(m, [0.5], greedy, 3)
    with pytest.raises(PromptError, match="a text to trace"):
        trace(m, PROMPT, [])
    with pytest.raises(RunError, match="max_tokens"):
        decode(m, PROMPT, greedy, 0)
    with pytest.raises(RunError, match="64 positions"):
        decode(m, PROMPT, greedy, 61)
    assert len(decode(m, PROMPT, greedy, 60).output_ids) == 60
    with pytest.raises(RunError, match="vocabulary of 96"):
        decode(m, PROMPT, lambda _: 96, 3)
    with pytest.raises(RunError, match="vocabulary of 96"):
        trace(m, PROMPT, [96])
    with pytest.raises(MethodError, match="an exit at layer 4"):
        decode(m, PROMPT, greedy, 3, exits={4: None})
    with pytest.raises(MethodError, match="no list of blocks"):
        decode(Given([[0.0]]), [0], greedy, 3, exits={1: None})
    for broken in (float("nan"), float("inf")):
        with pytest.raises(RunError, match="no numbers"):
            decode(Given([[broken, 0.0]]), [0], greedy, 3)
    assert decode(Given([[-float("inf"), 0.0], [0.0, 0.0]]), [0], greedy, 1).trace.entropy[0] == 0
    dropping = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=1)).train()
    with pytest.raises(RunError, match="training mode"):
        decode(dropping, [0], greedy, 1)
