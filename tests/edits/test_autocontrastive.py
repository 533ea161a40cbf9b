"""Autocontrastive decoding: where a lower layer pulls the model to a wrong token, the contrast writes the right one."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from whence.edits.autocontrastive import Autocontrastive, contrast
from whence.engine.decoding import decode, greedy, trace
from whence.errors import MethodError

RING = 15
"""Tokens 0..14 follow each other in a ring; after them comes one that never fits."""
MISFIT = RING
SURE = 6.0
PULL = 0.9


@cache
def wired(lower: int, upper: int) -> Any:
    """A Llama of two layers whose weights are set: after token x the lower layer is sure of x + ``lower``, and the
    upper one adds, ``PULL`` times as strongly, x + ``upper``: the model still finds the lower layer's token likelier.

    To the misfit the lower layer gives next to nothing and the upper one some more: hardly plausible, but the largest
    change of all.
    """
    width = RING + 1
    m = LlamaForCausalLM(LlamaConfig(
        vocab_size=width, hidden_size=width, intermediate_size=width, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=128, tie_word_embeddings=False, rms_norm_eps=1e-12,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )).eval()  # fmt: skip
    ring = torch.arange(RING)
    with torch.no_grad():
        for layer in m.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        table = m.model.embed_tokens.weight.zero_()
        table[ring, (ring + lower) % RING] = 1
        table[ring, MISFIT] = -0.8
        mlp = m.model.layers[1].mlp
        eye = torch.eye(width)
        eye[MISFIT] = 0
        mlp.gate_proj.weight.copy_(eye)
        mlp.up_proj.weight.copy_(eye)
        peak = (width / 1.64) ** 0.5  # of the one feature that is on, once its norm is taken out
        strength = peak * peak / (1 + np.exp(-peak))
        mlp.down_proj.weight[(ring - lower + upper) % RING, ring] = PULL / strength
        mlp.down_proj.weight[MISFIT, ring] = 1.0 / strength
        m.lm_head.weight.copy_(torch.eye(width) * SURE / width**0.5)
    return m


def ring(start: int, n: int, by: int) -> list[int]:
    return [(start + by * (i + 1)) % RING for i in range(n)]


def test_greedy_repeats_what_the_lower_layer_says_and_the_contrast_does_not() -> None:
    m, n = wired(0, 1), 20
    plain = decode(m, [3], greedy, n)
    assert plain.output_ids.tolist() == ring(3, n, 0)  # 3 3 3 3 ...
    assert (plain.trace.probability > 0.4).all()
    written = Autocontrastive(layer=1, max_tokens=n).write(m, [3])
    assert written.output_ids.tolist() == ring(3, n, 1)  # 4 5 6 7 ...
    for before, vetoed, lower in zip([3, *ring(3, n - 1, 1)], written.trace.vetoed, written.trace.lower, strict=True):
        assert [v.token for v in vetoed] == [lower] == [before]  # named: the word that was just said
        assert vetoed[0].probability > 0.4
        assert vetoed[0].lower > 0.85
    assert not written.trace.greedy.any()
    assert (written.trace.rank == 2).all()
    assert (written.trace.lower_probability < 0.05).all()


def test_with_the_roles_swapped_the_veto_falls_on_the_other_token() -> None:
    m, n = wired(1, 0), 20
    assert decode(m, [3], greedy, n).output_ids.tolist() == ring(3, n, 1)
    written = Autocontrastive(layer=1, max_tokens=n).write(m, [3])
    assert written.output_ids.tolist() == ring(3, n, 0)  # a lower layer that is right is vetoed as well
    assert [[v.token for v in vetoed] for vetoed in written.trace.vetoed] == [[4]] * n


def test_a_lower_layer_that_is_shuffled_or_says_nothing_changes_nothing() -> None:
    m, n = wired(0, 1), 10
    plain = decode(m, [3], greedy, n).output_ids.tolist()
    rng = np.random.default_rng(0)
    for _ in range(20):
        order = torch.from_numpy(rng.permutation(RING + 1))
        while (order == torch.arange(RING + 1)).any():
            order = torch.from_numpy(rng.permutation(RING + 1))

        def shuffled(state: torch.Tensor, order: torch.Tensor = order) -> torch.Tensor:
            return m.lm_head(m.model.norm(state))[:, order]

        texts = Autocontrastive(layer=1, head=shuffled, max_tokens=n).write(m, [3]).output_ids.tolist()
        assert texts != ring(3, n, 1)
    flat = Autocontrastive(layer=1, head=lambda s: torch.zeros(len(s), RING + 1), max_tokens=n).write(m, [3])
    assert flat.output_ids.tolist() == plain
    assert flat.trace.vetoed == ((),) * n


def test_without_the_plausible_set_the_contrast_writes_what_never_fits() -> None:
    m = wired(0, 1)
    loose = Autocontrastive(layer=1, alpha=1e-9, max_tokens=1).write(m, [3])
    assert loose.output_ids.tolist() == [MISFIT]
    assert loose.trace.probability[0] < 0.05
    strict = Autocontrastive(layer=1, alpha=1.0, max_tokens=5).write(m, [3])
    assert strict.output_ids.tolist() == [3] * 5  # only the likeliest is plausible: plain greedy decoding


@pytest.mark.parametrize("family", ["wired", "gpt2", "llama"])
def test_against_the_last_layer_it_is_plain_greedy_decoding(family: str) -> None:
    m = wired(0, 1) if family == "wired" else random_model(family)
    last = m.config.num_hidden_layers
    written = Autocontrastive(layer=last, max_tokens=15).write(m, [3, 1])
    plain = decode(m, [3, 1], greedy, 15)
    assert written.output_ids.tolist() == plain.output_ids.tolist()
    assert written.trace.vetoed == ((),) * 15


@cache
def random_model(family: str) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        if family == "gpt2":
            config: Any = GPT2Config(
                vocab_size=40, n_positions=64, n_embd=16, n_layer=4, n_head=2, initializer_range=0.4,
                bos_token_id=None, eos_token_id=None,
            )  # fmt: skip
            return GPT2LMHeadModel(config).eval()
        config = LlamaConfig(
            vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2,
            max_position_embeddings=64, initializer_range=0.4, bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        return LlamaForCausalLM(config).eval()


def test_the_contrast_is_the_papers_equations_written_out() -> None:
    rng = np.random.default_rng(3)
    for alpha in (0.01, 0.1, 0.5):
        upper, lower = (np.exp(rng.normal(size=30) * 2) for _ in range(2))
        upper, lower = upper / upper.sum(), lower / lower.sum()
        plausible = [x for x in range(30) if upper[x] >= alpha * max(upper)]
        ratios = {x: upper[x] / lower[x] for x in plausible}  # the softmax of a log ratio is the ratio's share
        mass = sum(upper[x] for x in plausible)
        wanted = [ratios[x] / sum(ratios.values()) * mass if x in ratios else upper[x] for x in range(30)]
        found = contrast(torch.from_numpy(upper).log(), torch.from_numpy(lower).log(), alpha).numpy()
        np.testing.assert_allclose(found, wanted, rtol=1e-9)
        np.testing.assert_allclose(found.sum(), 1)
        assert found.argmax() in plausible


def test_an_even_lower_layer_leaves_the_models_own_probabilities() -> None:
    upper = torch.randn(50, generator=torch.Generator().manual_seed(0)).double().log_softmax(0)
    found = contrast(upper, torch.zeros(50).double().log_softmax(0), 0.1)
    torch.testing.assert_close(found, upper.exp())


def test_a_token_that_the_lower_layer_holds_impossible_takes_the_plausible_tokens_share() -> None:
    upper = torch.tensor([0.5, 0.3, 0.2]).double().log()
    found = contrast(upper, torch.tensor([0.9, 0.1, 0.0]).double().log(), 0.1)
    assert found.tolist() == pytest.approx([0, 0, 1])


def test_drawn_texts_are_the_same_for_the_same_seed_and_follow_the_contrast() -> None:
    m = wired(0, 1)
    settings = {"layer": 1, "max_tokens": 30}
    one, two = (Autocontrastive(seed=4, **settings).write(m, [3]) for _ in range(2))
    assert one.output_ids.tolist() == two.output_ids.tolist()
    assert np.isfinite(one.trace.draw).all()
    wide = {"alpha": 0.001, "top_p": 1.0, **settings}
    texts = {tuple(Autocontrastive(seed=s, **wide).write(random_model("gpt2"), [3]).output_ids) for s in range(4)}
    assert len(texts) == 4
    said = [3, *one.output_ids.tolist()]
    follows = np.mean([(b - a) % RING == 1 for a, b in pairwise(said)])
    assert follows > 0.75 > 0.5 > one.trace.probability.max()  # the model alone gives the next in the ring less


def test_a_written_text_tells_what_would_have_been_vetoed() -> None:
    m = wired(0, 1)
    found = Autocontrastive(layer=1).trace(m, [3], [4, 4, 5, MISFIT])
    assert [[v.token for v in vetoed] for vetoed in found.vetoed] == [[3], [], [4], [5]]
    assert found.lower.tolist() == [3, 4, 4, 5]
    written = Autocontrastive(layer=2, max_tokens=12).write(random_model("llama"), [3])
    again = Autocontrastive(layer=2).trace(random_model("llama"), [3], written.output_ids)
    np.testing.assert_allclose(again.chance, written.trace.chance, atol=1e-5)
    assert again.vetoed != ((),) * 12
    assert [[v.token for v in a] for a in again.vetoed] == [[v.token for v in b] for b in written.trace.vetoed]


def test_the_middle_layer_is_the_lower_one_unless_another_is_named() -> None:
    m = random_model("gpt2")
    texts = [Autocontrastive(layer=layer, max_tokens=12).write(m, [3]).output_ids.tolist() for layer in (None, 2, 1)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("settings", [{"alpha": 0.0}, {"alpha": 1.1}, {"top_p": 0.0}])
def test_settings_that_mean_nothing_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(MethodError, match="above 0 and up to 1"):
        Autocontrastive(**settings).write(wired(0, 1), [3])


def test_a_head_learns_what_the_layer_knows_and_the_model_is_left_as_it_was() -> None:
    m = wired(0, 1)
    before = {k: v.clone() for k, v in m.state_dict().items()}
    rng = np.random.default_rng(0)
    texts = [[int(rng.integers(RING))] for _ in range(60)]
    for text in texts:
        text += ring(text[0], int(rng.integers(1, 9)), 1)  # of different lengths; the next in the ring follows always
    fitted = Autocontrastive(layer=1, max_tokens=5).fit(m, [*texts, [4]], steps=200)
    assert fitted.layer == 1
    lower = fitted.trace(m, [3], [4, 5, 6, 7, 8])
    assert lower.lower.tolist() == [4, 5, 6, 7, 8]  # the untrained exit says 3, 4, 5, 6, 7
    assert (lower.lower_probability > 0.8).all()
    assert fitted.write(m, [3]).output_ids.tolist() == [3] * 5  # advice that has become good is held against as well
    assert all(torch.equal(v, before[k]) for k, v in m.state_dict().items())
    assert all(p.grad is None for p in m.parameters())
    with pytest.raises(MethodError, match="two tokens"):
        Autocontrastive().fit(m, [[1]])
    with pytest.raises(MethodError, match="a head at layer 3"):
        Autocontrastive(layer=3).fit(m, [[1, 2]])


def test_writing_leaves_the_model_as_it_was() -> None:
    m = random_model("llama")
    before = {k: v.clone() for k, v in m.state_dict().items()}
    plain = trace(m, [3], [1, 2, 3]).probability
    Autocontrastive(max_tokens=4).write(m, [3])
    assert all(torch.equal(v, before[k]) for k, v in m.state_dict().items())
    assert (trace(m, [3], [1, 2, 3]).probability == plain).all()
