"""BiLRP on encoders taught to liken sentences by one of two classes of shared words, a coin choosing the class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from whence.engine.randomness import stream
from whence.errors import MethodError, ModelError, WrongMapError
from whence.inputs.bilrp import CARD, BiLRP
from whence.models.encoders import EncodedText, TextPair, relevance

WORDS, CLASSES, LENGTH = 10, 2, 8
BEGIN, END = 0, 1
FILLERS = list(range(2, 14))
SHARED = (list(range(14, 24)), list(range(24, 34)))
"""Two classes of words: one of each stands in every sentence, fillers around them."""


def sentence(rng: np.random.Generator, words: tuple[int, int]) -> tuple[list[int], tuple[int, int]]:
    """Tokens with BEGIN and END, and the places of the words of both classes."""
    ids = [int(i) for i in rng.choice(FILLERS, LENGTH)]
    one, two = (int(i) for i in rng.choice(LENGTH, 2, replace=False))
    ids[one], ids[two] = SHARED[0][words[0]], SHARED[1][words[1]]
    return [BEGIN, *ids, END], (one, two)


def build(seed: int, **more: Any) -> Any:
    from transformers import BertConfig, BertModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = BertConfig(
            vocab_size=34, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
            max_position_embeddings=12, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, type_vocab_size=1,
            initializer_range=0.1, pad_token_id=None, **more,
        )  # fmt: skip
        return BertModel(config, add_pooling_layer=False)


@cache
def encoder(role: int, seed: int = 0, steps: int = 80, rows: int = 20) -> Any:
    """Taught to liken two sentences that share the word of class ``role``, whatever the other word is."""
    model, rng = build(seed), stream("test bilrp", role, seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.98))
    for step in range(steps):
        words = rng.integers(0, WORDS, (2 * rows, CLASSES))
        words[:, role] = np.arange(2 * rows) % WORDS
        ids = torch.tensor([sentence(rng, (int(a), int(b)))[0] for a, b in words])
        phi = model(input_ids=ids).last_hidden_state.mean(1)
        alike = torch.from_numpy(words[:rows, None, role] == words[None, rows:, role]).float()
        loss = torch.nn.functional.cross_entropy(phi[:rows] @ phi[rows:].T, alike / alike.sum(1, keepdim=True))
        for group in optimiser.param_groups:
            group["lr"] = 4e-3 * min(1.0, (step + 1) / 30) * (1 - step / steps)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.eval()


def encoded(ids: list[int]) -> EncodedText:
    return EncodedText(tuple(ids), tuple(f"w{i}" for i in range(LENGTH)), (-1, *range(LENGTH), -1))


@cache
def pairs_of(role: int, seed: int, n: int) -> list[tuple[TextPair, tuple[int, int], tuple[int, int]]]:
    """(pair of sentences that share a word of both classes, the planted pair of places, the decoy's), certified: with
    another word of class ``role`` the similarity falls by a quarter at least, with another decoy by a tenth at most."""
    rng, model, out = stream("test bilrp, pairs", role, seed), encoder(role, seed), []
    while len(out) < n:
        words = tuple(int(i) for i in rng.integers(0, WORDS, CLASSES))
        (x, a), (y, b) = sentence(rng, words), sentence(rng, words)  # type: ignore[arg-type]
        pair = TextPair(model, encoded(x), encoded(y))
        whole, falls = pair.similarity(), []
        for c in range(CLASSES):
            other = list(y)
            other[b[c] + 1] = SHARED[c][(words[c] + int(rng.integers(1, WORDS))) % WORDS]
            falls.append(1 - replace(pair, second=encoded(other)).similarity() / whole)
        if falls[role] > 0.25 and abs(falls[1 - role]) < 0.1:
            out.append((pair, (a[role], b[role]), (a[1 - role], b[1 - role])))
    return out


SEEDS, PAIRS = (0, 1), 12


def wins(score: Callable[[TextPair], np.ndarray], role: int, seed: int) -> tuple[float, float]:
    """Shares of pairs whose planted pair of words beats the decoy (half for a draw), and leads all pairs."""
    beats, leads = [], []
    for pair, planted, decoy in pairs_of(role, seed, PAIRS):
        m = score(pair).reshape(LENGTH, LENGTH)
        beats.append(float(m[planted] > m[decoy]) + 0.5 * float(m[planted] == m[decoy]))
        leads.append(float(m[planted] == m.max() and (m == m.max()).sum() == 1))
    return float(np.mean(beats)), float(np.mean(leads))


def bilrp(pair: TextPair) -> np.ndarray:
    return BiLRP().explain(pair).scores


@pytest.mark.parametrize("role", range(CLASSES))
def test_the_planted_pair_leads_and_those_who_know_nothing_do_not(role: int) -> None:
    """The card's falsifier."""
    dice = stream("test bilrp, dice", role)
    near = -abs(np.subtract.outer(np.arange(LENGTH), np.arange(LENGTH))).astype(float)

    def equal(pair: TextPair) -> np.ndarray:
        one, two = (np.array(t.ids[1:-1]) for t in (pair.first, pair.second))
        return (one[:, None] == two[None]).astype(float)

    def twin(pair: TextPair) -> np.ndarray:
        """The same texts, by the encoder that was taught the other class."""
        return bilrp(replace(pair, encoder=encoder(1 - role)))

    def measured(score: Callable[[TextPair], np.ndarray]) -> tuple[float, float]:
        return tuple(np.mean([wins(score, role, seed) for seed in SEEDS], axis=0))  # type: ignore[return-value]

    beats, leads = measured(bilrp)
    assert min(beats, leads) >= CARD.falsifier["expect"], (beats, leads)
    for ignorant in (lambda _: dice.random((LENGTH, LENGTH)), lambda _: near, equal):
        beats, leads = measured(ignorant)
        assert beats < 0.75
        assert leads < 0.25
    assert measured(twin)[0] < 0.1  # it follows the encoder, not the words


def test_pairs_add_up_to_the_similarity_less_what_biases_take() -> None:
    pair = pairs_of(0, 0, 1)[0][0]
    e = BiLRP().explain(pair)
    one, two = pair.relevances()
    for r in (one, two):
        np.testing.assert_allclose(r.tokens.sum(0) + r.bias, r.features, atol=1e-5)
    y = pair.similarity()
    assert e.details["similarity"] == pytest.approx(y, rel=1e-5)
    without = (one.features - one.bias) @ (two.features - two.bias)
    assert e.scores.sum() + e.details["elsewhere"] == pytest.approx(without, rel=1e-5)
    assert e.details["conserved"] == pytest.approx(without / y, rel=1e-5)
    assert 0.7 < e.details["conserved"] < 1.1


def test_without_biases_everything_is_conserved() -> None:
    model = build(3).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.mul_(0.0 if name.endswith("bias") else 1.0)
    pair = TextPair(model, *(encoded(sentence(stream("test", i), (1, 2))[0]) for i in range(2)))
    assert BiLRP().explain(pair).details["conserved"] == pytest.approx(1, abs=1e-4)


def test_the_second_derivative_gives_each_features_gradient_x_input() -> None:
    """The oracle: one backward pass for each feature, attention and norms detached by hand."""
    model = encoder(0).double()
    try:
        ids = sentence(stream("test", 5), (3, 4))[0]
        found = relevance(model, ids)
        with torch.no_grad():
            x = model.embeddings(input_ids=torch.tensor([ids]))[0]
        x.requires_grad_()
        h = x
        for layer in model.encoder.layer:
            at, heads = layer.attention.self, 4
            q, k, v = (m(h).reshape(len(ids), heads, -1).transpose(0, 1) for m in (at.query, at.key, at.value))
            a = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1).detach()
            heard = layer.attention.output.dense((a @ v).transpose(0, 1).reshape(len(ids), -1))
            h = normed(layer.attention.output.LayerNorm, h + heard)
            up = layer.intermediate.dense(h)
            slope = (torch.nn.functional.gelu(up) / up).detach()
            h = normed(layer.output.LayerNorm, h + layer.output.dense(up * slope))
        phi = h.mean(0)
        np.testing.assert_allclose(phi.detach().numpy(), found.features, atol=1e-9)
        for k in range(0, len(phi), 5):
            (g,) = torch.autograd.grad(phi[k], x, retain_graph=True)
            np.testing.assert_allclose((g * x).sum(-1).detach().numpy(), found.tokens[:, k], atol=1e-9)
    finally:
        model.float()


def normed(norm: Any, x: torch.Tensor) -> torch.Tensor:
    sd = (x.var(-1, correction=0, keepdim=True) + norm.eps).sqrt().detach()
    out: torch.Tensor = (x - x.mean(-1, keepdim=True)) / sd * norm.weight + norm.bias
    return out


def test_swapping_the_texts_transposes_the_pairs() -> None:
    pair = pairs_of(1, 0, 1)[0][0]
    there = bilrp(pair).reshape(LENGTH, LENGTH)
    back = bilrp(replace(pair, first=pair.second, second=pair.first)).reshape(LENGTH, LENGTH)
    np.testing.assert_allclose(there, back.T, rtol=1e-4, atol=1e-4)


def test_tokens_add_up_into_words_and_pairs_have_names() -> None:
    pair = pairs_of(0, 0, 1)[0][0]
    whole = BiLRP().explain(pair)
    halves = EncodedText(pair.first.ids, ("a", "a"), (-1, *[0] * 4, *[1] * 4, -1))
    joined = BiLRP().explain(replace(pair, first=halves))
    m = whole.scores.reshape(2, 4, LENGTH).sum(1)
    np.testing.assert_allclose(joined.scores.reshape(2, LENGTH), m, rtol=1e-4, atol=1e-4)
    assert joined.units.labels[:2] == ("a | w0", "a | w1")
    assert joined.units.labels[LENGTH] == "a#2 | w0"
    assert joined.units.kind == "pair"
    assert np.shape(joined.details["matrix"]) == (2, LENGTH)
    assert joined.cost.runs == 2


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {"[CLS]": 0, "[SEP]": 1, "[UNK]": 2, "red": 3, "fish": 4, "##es": 5, "blue": 6, ".": 7}
    inner = Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]")


def test_a_tokenizers_pieces_belong_to_the_words_of_the_text() -> None:
    pair = TextPair.of(build(0).eval(), tokenizer(), "red fishes .", "blue fish, red fish")
    assert pair.first.words == ("red", "fishes", ".")
    assert pair.first.ids == (0, 3, 4, 5, 7, 1)
    assert pair.first.word_of == (-1, 0, 1, 1, 2, -1)
    assert pair.second.labels == ("blue", "fish", ",", "red", "fish#2")
    assert len(BiLRP().explain(pair).scores) == 15


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_encoder_is_left_as_it_was_also_when_it_fails(attention: str) -> None:
    model = build(0, attn_implementation=attention).eval()
    pair = TextPair(model, *(encoded(sentence(stream("test", i), (1, 2))[0]) for i in range(2)))
    before = pair.similarity()

    def boom(*_: Any) -> None:
        raise RuntimeError("half-way")

    trap = model.encoder.layer[1].register_forward_hook(boom)
    with pytest.raises(RuntimeError, match="half-way"):
        BiLRP().explain(pair)
    trap.remove()
    BiLRP().explain(pair)
    assert model.config._attn_implementation == attention
    assert not any(m._forward_hooks for m in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert pair.similarity() == before
    x = torch.randn(3, requires_grad=True)  # and softmax has its gradient again
    assert torch.softmax(x, 0)[0].requires_grad


def test_an_activation_that_cannot_be_held_fixed_is_refused() -> None:
    pair = TextPair(build(0, hidden_act="gelu_new").eval(), *(encoded([0, *range(2, 10), 1]) for _ in range(2)))
    with pytest.raises(WrongMapError, match="miss its output"):
        BiLRP().explain(pair)


def test_what_is_no_pair_or_no_encoder_is_refused() -> None:
    from transformers import GPT2Config, GPT2Model

    with pytest.raises(MethodError, match="TextPair"):
        BiLRP().explain("two texts")
    one = encoded([0, *range(2, 10), 1])
    decoder = GPT2Model(GPT2Config(vocab_size=34, n_embd=8, n_layer=1, n_head=1, n_positions=12)).eval()
    with pytest.raises(ModelError, match="BertModel"):
        BiLRP().explain(TextPair(decoder, one, one))
    with pytest.raises(MethodError, match="training mode"):
        BiLRP().explain(TextPair(build(0).train(), one, one))
    with pytest.raises(MethodError, match="for each token"):
        EncodedText((1, 2), ("a",), (0,))
