"""Nucleus sampling: greedy text repeats, nucleus text is more like the corpus, and chance is told from choice."""

from __future__ import annotations

import gzip
import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from whence.edits.nucleus import Nucleus, repetition, said_before, self_bleu, source, zipf
from whence.engine.decoding import decode, greedy
from whence.errors import MethodError

WORDS, PROMPT, LENGTH, TEXTS = 40, 4, 32, 20
DATA = Path(os.environ.get("WHENCE_DATA", Path(__file__).parents[3] / "shared" / "data")) / "tinyshakespeare"
Ids = list[int]


def learned(texts: torch.Tensor, vocabulary: int, steps: int, batch: int) -> Any:
    """A small Llama that has read windows of texts[text, token]."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=128, initializer_range=0.05, bos_token_id=None, eos_token_id=None,
            pad_token_id=None,
        ))  # fmt: skip
        optimiser = torch.optim.AdamW(model.parameters(), lr=8e-3)
        for step in range(steps):
            optimiser.param_groups[0]["lr"] = 8e-3 * min(1, step / 20) * (1 - step / steps)
            ids = texts[torch.randint(len(texts), (batch,))]
            optimiser.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            optimiser.step()
    return model.eval()


class Source:
    """Texts whose law is known: each word hangs on the one before it, and words are about as frequent as 1 / rank. The
    likeliest word after the likeliest word after ... must run into a circle: there are only so many words."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)
        often = 1 / np.arange(1, WORDS + 1)
        self.often = often / often.sum()
        self.after = np.stack([self.rng.dirichlet(self.often * 6 + 1e-3) for _ in range(WORDS)])

    def texts(self, n: int) -> Any:
        found = np.empty((n, PROMPT + LENGTH), int)
        for text in found:
            text[0] = self.rng.choice(WORDS, p=self.often)
            for i in range(1, len(text)):
                text[i] = self.rng.choice(WORDS, p=self.after[text[i - 1]])
        return found


@cache
def world() -> tuple[Any, list[Ids], list[Ids]]:
    """A model that read the source, prompts that it did not read, and how the source went on after them."""
    source = Source()
    read, held = source.texts(1500), source.texts(TEXTS)
    return learned(torch.from_numpy(read), WORDS, 150, 24), held[:, :PROMPT].tolist(), held[:, PROMPT:].tolist()


def sampled(model: Any, prompts: list[Ids], top_p: float, length: int) -> list[Ids]:
    settings = {"top_p": top_p, "max_tokens": length}
    return [Nucleus(seed=i, **settings).write(model, p).output_ids.tolist() for i, p in enumerate(prompts)]


def likeliest(model: Any, prompts: list[Ids], length: int) -> list[Ids]:
    return [decode(model, p, greedy, length).output_ids.tolist() for p in prompts]


def statistics(texts: Sequence[Ids]) -> np.ndarray:
    return np.array([said_before(texts), zipf(texts), self_bleu(texts, 3)])


def closer(texts: Sequence[Ids], than: Sequence[Ids], corpus: Sequence[Ids]) -> float:
    """Share of the statistics in which texts lie closer to the corpus: less than half as far away."""
    a, b, c = (statistics(t) for t in (texts, than, corpus))
    return float(np.mean(abs(a - c) < abs(b - c) / 2))


def test_greedy_text_repeats_and_nucleus_text_lies_closer_to_the_corpus() -> None:
    model, prompts, corpus = world()
    plain, nucleus = likeliest(model, prompts, LENGTH), sampled(model, prompts, 0.95, LENGTH)
    assert max(repetition(corpus), repetition(nucleus)) < 0.1
    assert repetition(plain) > 0.8
    assert closer(nucleus, plain, corpus) == 1.0
    rng = np.random.default_rng(1)
    evenly = rng.integers(WORDS, size=(TEXTS, LENGTH)).tolist()
    assert closer(evenly, plain, corpus) < 1.0  # text that knows nothing repeats nothing, and is found out all the same
    assert abs(statistics(evenly) - statistics(corpus))[1] > 3 * abs(statistics(nucleus) - statistics(corpus))[1]


def test_on_shakespeare_greedy_text_repeats_and_nucleus_text_lies_closer_to_the_corpus() -> None:
    if not (DATA / "blocks.jsonl.gz").exists():
        pytest.skip(f"NOT TRIED on ordinary text: no {DATA}/blocks.jsonl.gz (set WHENCE_DATA)")
    with gzip.open(DATA / "blocks.jsonl.gz", "rt", encoding="utf8") as lines:
        blocks = [re.findall(r"\w+(?:'\w+)*|[^\w\s]|\n", json.loads(line)["text"].lower()) for line in lines]
    known = {w: i for i, (w, _) in enumerate(Counter(w for b in blocks[:-10] for w in b).most_common(400))}
    read, held = ([known[w] for b in part for w in b if w in known] for part in (blocks[:-10], blocks[-10:]))
    width = 40
    windows = torch.tensor(read[: len(read) // width * width]).reshape(-1, width)
    model = learned(windows, len(known), 150, 16)
    starts = np.linspace(0, len(held) - 80, 10).astype(int)
    prompts, corpus = [held[s : s + 10] for s in starts], [held[s + 10 : s + 50] for s in starts]
    plain, nucleus = likeliest(model, prompts, 40), sampled(model, prompts, 0.95, 40)
    assert repetition(corpus) == repetition(nucleus) == 0  # how often greedy text ends in an exact loop varies widely
    assert said_before(plain) > said_before(corpus) + 0.3
    assert closer(nucleus, plain, corpus) == 1.0


def test_the_chance_of_a_token_is_the_share_of_seeds_that_write_it() -> None:
    model, prompts, _ = world()
    first = [Nucleus(top_p=0.8, seed=s, max_tokens=1).write(model, prompts[0]).trace for s in range(200)]
    drawn = Counter(int(t.chosen[0]) for t in first)
    for token, chance in {(int(t.chosen[0]), round(float(t.chance[0]), 9)) for t in first}:
        assert abs(drawn[token] / 200 - chance) < 4 * (chance * (1 - chance) / 200) ** 0.5
    assert 2 < len(drawn) <= first[0].nucleus[0]


def test_the_same_seed_writes_the_same_text_and_another_seed_another() -> None:
    model, prompts, _ = world()
    one, two, other = (Nucleus(seed=s, max_tokens=20).write(model, prompts[0]) for s in (3, 3, 4))
    assert one.output_ids.tolist() == two.output_ids.tolist() != other.output_ids.tolist()
    assert (one.trace.draw == two.trace.draw).all()
    torch.rand(5)  # what else was drawn does not matter
    short = Nucleus(seed=3, max_tokens=7).write(model, prompts[0])
    assert short.output_ids.tolist() == one.output_ids.tolist()[:7]


def test_nothing_outside_the_nucleus_is_written_and_a_small_one_is_greedy() -> None:
    model, prompts, _ = world()
    trace = Nucleus(top_p=0.5, max_tokens=30).write(model, prompts[0]).trace
    assert (trace.chance > 0).all()
    assert (trace.rank <= trace.nucleus).all()
    assert (trace.cut <= 0.5).all()
    narrow = Nucleus(top_p=1e-6, max_tokens=20).write(model, prompts[0])
    assert narrow.output_ids.tolist() == decode(model, prompts[0], greedy, 20).output_ids.tolist()
    assert set(source(narrow.trace)) == {"model"}
    cold = Nucleus(temperature=0.01, max_tokens=20).write(model, prompts[0])
    assert cold.output_ids.tolist() == narrow.output_ids.tolist()


def test_a_written_text_says_which_tokens_no_seed_would_have_written() -> None:
    model, prompts, _ = world()
    sampler = Nucleus(top_p=0.7, temperature=1.3, max_tokens=20)
    written = sampler.write(model, prompts[0])
    again = sampler.trace(model, prompts[0], written.output_ids)
    np.testing.assert_allclose(again.chance, written.trace.chance, atol=1e-5)
    assert (again.nucleus == written.trace.nucleus).all()
    changed = written.output_ids.copy()
    law = model(input_ids=torch.tensor([[*prompts[0], *changed[:4].tolist()]])).logits[0, -1]
    changed[4] = int(law.argmin())
    assert source(sampler.trace(model, prompts[0], changed))[4] == "outside"


def test_every_token_is_the_models_likely_chance_or_outside() -> None:
    model, prompts, _ = world()
    trace = Nucleus(top_p=0.6, max_tokens=60).write(model, prompts[1]).trace
    said = source(trace)
    for word, size, chance in zip(said, trace.nucleus, trace.chance, strict=True):
        if word == "model":
            assert (size, chance) == (1, pytest.approx(1))
        else:
            assert (word == "likely") == (chance >= 0.5)
    assert {"likely", "chance"} <= set(said)


def test_a_phrase_is_a_repetition_if_the_text_ends_in_it_three_times() -> None:
    assert repetition([[1, 2, 3, 2, 3, 2, 3]]) == 1
    assert repetition([[2, 3, 2, 3, 2, 3, 1]]) == 0  # it went on
    assert repetition([[1, 2, 3, 2, 3]]) == 0
    assert repetition([[7] * 5]) == 0  # a phrase has two tokens
    assert repetition([[7] * 6]) == 1
    assert repetition([[7] * 3], shortest=1) == 1
    assert repetition([[0, *range(9), *range(9), *range(9)], [1, 2]]) == 0.5


def test_zipfs_coefficient_is_the_planted_exponent() -> None:
    for s in (0.7, 1.0, 1.6):
        texts = [[rank] * round(2e4 * rank**-s) for rank in range(1, 40)]
        assert zipf(texts) == pytest.approx(s, abs=0.02)


def test_self_bleu_is_one_for_equal_texts_and_falls_as_texts_differ() -> None:
    rng = np.random.default_rng(0)
    same = list(range(20))
    values = []
    for changed in (0, 4, 10, 20):
        texts = []
        for _ in range(6):
            text = np.array(same)
            text[rng.permutation(20)[:changed]] = rng.integers(100, 10_000, changed)
            texts.append(text.tolist())
        values.append(self_bleu(texts))
    assert values[0] == 1
    assert values == sorted(values, reverse=True)
    assert values[-1] < 0.05


def test_bleu_clips_at_the_best_reference_and_punishes_brevity() -> None:
    texts = [["the"] * 7, ["the", "cat", "is", "on", "the", "mat"], ["there", "is", "a", "cat", "on", "the", "mat"]]
    only_first = self_bleu([texts[0], texts[1], texts[2]], 1)
    hand = [2 / 7, 6 / 6, 5 / 7]  # Papineni et al.: "the" counts twice, as in the reference that has it most often
    brevity = [1, np.exp(1 - 7 / 6), 1]  # for each the references are the two others: the nearest length of six is 7
    assert only_first == pytest.approx(np.mean([h * b for h, b in zip(hand, brevity, strict=True)]))


@pytest.mark.parametrize("settings", [{"top_p": 0.0}, {"top_p": 1.5}, {"temperature": 0.0}])
def test_settings_that_mean_nothing_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(MethodError, match="nucleus sampling"):
        Nucleus(**settings).write(world()[0], [1])


def test_statistics_of_too_little_text_are_refused() -> None:
    with pytest.raises(MethodError, match="Self-BLEU"):
        self_bleu([[1, 2, 3, 4]])
    with pytest.raises(MethodError, match="said before"):
        said_before([[1, 2]])
    with pytest.raises(MethodError, match="Zipf"):
        zipf([[1, 1]])
