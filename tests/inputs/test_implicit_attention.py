"""Implicit attention: the matrices are the model's own arithmetic, and they find the token that a Mamba copies."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from whence.engine.randomness import stream
from whence.errors import MethodError
from whence.inputs.implicit_attention import ImplicitAttention, rollout
from whence.models import recurrence
from whence.models.recurrence import Implicit, implicit_attention, mixers, mixing
from whence.question import Budget, Metered
from whence.units import Units

VALUES, NOISE, MARKERS, ASK = 8, 8, (16, 17), 18
"""Words: values first, then noise, two markers, and the word that asks for the value behind the first marker."""
PLACES = 5
"""Pairs of tokens in a text, before the word that asks."""


def mamba(seed: int = 0, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "vocab_size": ASK + 1, "hidden_size": 24, "state_size": 6, "num_hidden_layers": 2, "time_step_rank": 3,
        "tie_word_embeddings": False, "initializer_range": 0.1,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MambaForCausalLM(MambaConfig(**settings | changes)).eval()


def texts(n: int, *names: object) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """Texts [text, token], and the values behind the two markers, [text, 2], with their places."""
    rng = stream("implicit attention", *names)
    words = VALUES + rng.integers(NOISE, size=(n, 2 * PLACES + 1))
    words[:, -1] = ASK
    starts = 2 * rng.permuted(np.tile(np.arange(PLACES), (n, 1)), axis=1)[:, :2]
    values = rng.integers(VALUES, size=(n, 2))
    rows = np.arange(n)
    for k, marker in enumerate(MARKERS):
        words[rows, starts[:, k]] = marker
        words[rows, starts[:, k] + 1] = values[:, k]
    return torch.from_numpy(words), values, starts + 1


@cache
@torch.enable_grad()  # type: ignore[no-untyped-call]
def trained() -> Any:
    """Learns in seconds to say the value behind the first marker; the second marker is in every text too."""
    model = mamba().train()
    steps = 140
    optimiser = torch.optim.AdamW(model.parameters(), lr=6e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 6e-3, total_steps=steps)
    for step in range(steps):
        words, values, _ = texts(40, "training", step)
        said = model(words, logits_to_keep=1, use_cache=False).logits[:, -1]
        loss = torch.nn.functional.cross_entropy(said, torch.from_numpy(values[:, 0]))
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    return model.requires_grad_(False).eval()


@cache
def swapped() -> Any:
    """The trained model with the two markers in each other's role."""
    model = mamba()
    model.load_state_dict(trained().state_dict())
    table = model.get_input_embeddings().weight
    with torch.no_grad():
        table[list(MARKERS)] = table[list(reversed(MARKERS))]
    return model.requires_grad_(False)


class Copied:
    """What a Mamba says after one text: units are its tokens but the last, drawn anew from all words but ``ASK``."""

    readout = "probability of the word that was said"
    capabilities = frozenset({"implicit attention"})

    def __init__(self, model: Any, words: Tensor) -> None:
        n = len(words) - 1
        self.model, self.words, self.rng = model, words, np.random.default_rng(0)
        self.units = Units("token", tuple(f"t{i}" for i in range(n)), tuple(((i,),) for i in range(n)))

    def ask(self, keep: np.ndarray) -> Any:
        drawn = torch.from_numpy(self.rng.integers(ASK, size=keep.shape))
        asked = self.words.repeat(len(keep), 1)
        asked[:, :-1] = torch.where(torch.from_numpy(keep), asked[:, :-1], drawn)
        with torch.no_grad():
            said = self.model(torch.cat([self.words[None], asked])).logits[:, -1].softmax(-1)
        return said[1:, said[0].argmax()].double().numpy()

    def implicit_attention(self) -> Implicit:
        n = len(self.words)
        unit_of = np.where(np.arange(n) < n - 1, np.arange(n), -1)
        return Implicit(implicit_attention(self.model, self.words), unit_of, (n - 1,))


# --- the matrices are the model --------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [
    {}, {"use_conv_bias": False}, {"use_bias": True}, {"conv_kernel": 2, "num_hidden_layers": 3}, {"expand": 1},
])  # fmt: skip
def test_the_implicit_matrix_times_the_values_is_the_mixers_own_output(changes: dict[str, Any]) -> None:
    model = mamba(1, **changes)
    with torch.no_grad():
        for parameter in model.parameters():  # also those that begin as zeros and ones
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    seen: dict[Any, tuple[Tensor, Tensor]] = {}
    for mixer in mixers(model):
        mixer.register_forward_hook(lambda m, given, out: seen.update({m: (given[0], out)}))
    with torch.no_grad():
        model(texts(1, "exact")[0])
        for mixer in mixers(model):
            given, out = seen[mixer]
            mixed = mixing(mixer, given[0])
            assert out.abs().max() > 0.01
            torch.testing.assert_close(mixer.out_proj(mixed.output), out[0], atol=1e-5, rtol=1e-5)
            assert not mixed.matrix.triu(1).any()  # nothing comes from later tokens
            assert bool(mixed.rest.any()) == model.config.use_conv_bias


def test_a_text_shorter_than_the_convolution_and_one_of_one_token_are_exact_too() -> None:
    model = mamba(2)
    for n in (1, 2, 3):
        with torch.no_grad():
            given = torch.randn(1, n, 24, generator=torch.Generator().manual_seed(n))
            mixer = mixers(model)[0]
            mixed = mixing(mixer, given[0])
            torch.testing.assert_close(mixer.out_proj(mixed.output), mixer(given)[0], atol=1e-6, rtol=1e-5)


def test_the_matrix_is_the_recurrence_written_out() -> None:
    """alpha[t, s] = C_t (A_t ... A_(s+1)) B_s, by its products, with the gate, the skip and the convolution around."""
    mixer, t, s, channel = mixers(mamba(4))[0], 6, 3, 5
    given = torch.randn(9, 24, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        x, z = mixer.in_proj(given).T.chunk(2)
        c = mixer.conv1d(x[None])[0, :, :9]
        low, b, out = mixer.x_proj(torch.nn.functional.silu(c).T).split([3, 6, 6], -1)
        delta = torch.nn.functional.softplus(mixer.dt_proj(low))[:, channel]
        a = -mixer.A_log[channel].exp()

        def alpha(t: int, s: int) -> Tensor:
            passed = torch.ones(6)
            for k in range(s + 1, t + 1):
                passed = passed * torch.exp(delta[k] * a)
            return (out[t] * passed * delta[s] * b[s]).sum() + (mixer.D[channel] if t == s else 0)

        kernel = mixer.conv1d.weight[channel, 0]
        expected = sum(alpha(t, r) * c[channel, r].sigmoid() * kernel[3 - (r - s)] for r in range(s, min(s + 4, t + 1)))
        expected = torch.nn.functional.silu(z[channel, t]) * expected
        assert mixing(mixer, given).matrix[channel, t, s] == pytest.approx(float(expected), rel=1e-4)


# --- and they find what was planted ----------------------------------------------------------------------------------


def found(model: Any, which: int, score: Any) -> tuple[float, float]:
    """Over fresh texts, how often the token behind the marker ``which`` comes first, and before its twin."""
    words, _, places = texts(40, "asked")
    first, before = [], []
    for text, place in zip(words, places, strict=True):
        scores = score(Copied(model, text))
        own, twin = scores[place[which]], scores[place[1 - which]]
        first.append(own == scores.max() and (scores == own).sum() == 1)
        before.append((own > twin) + 0.5 * (own == twin))
    return float(np.mean(first)), float(np.mean(before))


def explained(question: Any) -> np.ndarray:
    return np.asarray(ImplicitAttention().explain(question).scores)


@pytest.mark.parametrize(("model", "which"), [(trained, 0), (swapped, 1)])
def test_the_token_that_is_copied_comes_first_and_follows_the_swap_of_roles(model: Any, which: int) -> None:
    words, values, _ = texts(200, "check")
    with torch.no_grad():
        said = model()(words).logits[:, -1].argmax(-1).numpy()
    assert (said == values[:, which]).mean() > 0.97
    first, before = found(model(), which, explained)
    assert first > 0.85
    assert before > 0.9
    dice = np.random.default_rng(7)
    for guess in (lambda q: dice.random(len(q.units)), lambda q: np.arange(len(q.units)) * 1.0):  # random, and recency
        first, before = found(model(), which, guess)
        assert first < 0.4
        assert 0.25 < before < 0.75


def test_the_cause_is_real_it_is_what_the_model_loses_when_it_is_drawn_anew() -> None:
    words, _, places = texts(8, "asked")
    lost = []
    for text in words:
        question: Any = Copied(trained(), text)
        n = len(question.units)
        lost.append(1 - question.ask(np.repeat(~np.eye(n, dtype=bool), 8, 0)).reshape(n, 8).mean(1))
    own, twin = np.take_along_axis(np.array(lost), places, 1).T
    assert own.mean() > 0.6
    assert twin.mean() < 0.15
    assert (own > twin + 0.2).all()


def test_in_an_untrained_model_the_token_is_not_found() -> None:
    first, before = found(mamba(9), 0, explained)
    assert first < 0.4
    assert 0.2 < before < 0.8


# --- shapes, invariances, refusals -----------------------------------------------------------------------------------


def test_rollout_is_the_product_of_rows_that_add_up_to_one() -> None:
    mass = np.tril(stream("rollout").random((3, 5, 5)))
    back = rollout(mass)
    np.testing.assert_allclose(back.sum(1), 1)
    assert not np.triu(back, 1).any()
    parts = [(m + np.eye(5)) / (m + np.eye(5)).sum(1, keepdims=True) for m in mass]
    np.testing.assert_allclose(back, parts[2] @ parts[1] @ parts[0])
    np.testing.assert_allclose(rollout(mass * 0), np.eye(5))


def test_masses_do_not_depend_on_how_many_channels_are_worked_out_at_once(monkeypatch: Any) -> None:
    words, model = texts(1, "chunks")[0][0], mamba(3)
    whole = implicit_attention(model, words)
    monkeypatch.setattr(recurrence, "CHANNELS", 5)
    np.testing.assert_allclose(implicit_attention(model, words), whole, rtol=1e-5)
    assert whole.shape == (2, len(words), len(words))
    assert (whole >= 0).all()


def test_nothing_is_left_on_the_model() -> None:
    model = mamba(3)
    words = texts(1, "hooks")[0]
    with pytest.raises(IndexError):
        implicit_attention(model, words + 100)  # words that there are not
    implicit_attention(model, words)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_units_of_several_tokens_get_the_sum_and_several_targets_the_mean() -> None:
    mass = implicit_attention(mamba(3), texts(1, "units")[0])

    class Halves:
        units = Units("phrase", ("one", "two"), (((0, 1),), ((2, 3, 4),)))
        readout, capabilities = "what was said", frozenset({"implicit attention"})

        def ask(self, keep: np.ndarray) -> Any:
            raise AssertionError

        def implicit_attention(self) -> Implicit:
            return Implicit(mass, np.array([0, 0, 1, 1, 1] + [-1] * (mass.shape[1] - 5)), (8, 10))

    e = ImplicitAttention().explain(Halves())
    back = rollout(mass)[[8, 10]].mean(0)
    np.testing.assert_allclose(e.scores, [back[:2].sum(), back[2:5].sum()], rtol=1e-6)
    assert e.scores.sum() + e.details["elsewhere"] == pytest.approx(1)
    last = ImplicitAttention(layers=(1,)).explain(Halves())
    np.testing.assert_allclose(last.scores[0], rollout(mass[1:])[[8, 10]].mean(0)[:2].sum(), rtol=1e-6)
    with pytest.raises(MethodError, match="the model has 2"):
        ImplicitAttention(layers=(2,)).explain(Halves())


def test_models_that_are_no_mamba_are_refused() -> None:
    small = {"vocab_size": 8, "hidden_size": 16, "num_hidden_layers": 1}
    llama = LlamaForCausalLM(LlamaConfig(**small, intermediate_size=16, num_attention_heads=2))
    second = Mamba2ForCausalLM(Mamba2Config(**small, num_heads=4, head_dim=8, state_size=4, n_groups=1))
    for model, says in (
        (llama, "LlamaForCausalLM"), (second, "Mamba2ForCausalLM"), (mamba(hidden_act="relu"), "relu gates"),
    ):  # fmt: skip
        with pytest.raises(MethodError, match=says):
            implicit_attention(model, torch.zeros(1, 4, dtype=torch.long))


def test_a_question_without_implicit_attention_is_refused() -> None:
    class Closed(Copied):
        capabilities = frozenset[str]()

    with pytest.raises(MethodError, match="no implicit attention"):
        ImplicitAttention().explain(Closed(mamba(), texts(1, "closed")[0][0]))


def test_a_metered_question_counts_one_forward() -> None:
    metered: Any = Metered(Copied(mamba(), texts(1, "metered")[0][0]), Budget(forwards=1))
    assert ImplicitAttention().explain(metered).cost.runs == metered.spent.forwards == 1
