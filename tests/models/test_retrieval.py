"""Dense retrieval with a tiny encoder from its config: windows, batches, padding. What a trained encoder would find is
not shown here: none is at hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentences import WORDS, tiny, tokenizer

from whence import verbs
from whence.errors import ModelError, PromptError
from whence.models.reading import read
from whence.models.retrieval import Dense, load_dense

TEXTS = [
    "Anna is in the kitchen.", "Ben has the key, and Clara took the lamp.", "Question: Where is Ben?", "The lamp.",
    "Clara is here. Anna has the lamp. Ben took the key.",
]  # fmt: skip


def encoder(seed: int = 0) -> Any:
    from transformers import BertConfig, BertModel

    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=WORDS, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, pad_token_id=1, initializer_range=0.3,
    )  # fmt: skip
    return BertModel(config, add_pooling_layer=False).eval()


def test_a_text_is_nearest_to_itself() -> None:
    dense = Dense(encoder(), tokenizer(), TEXTS)
    for i, text in enumerate(TEXTS):
        ranking = dense.rank(text)
        assert ranking.order[0] == i
        assert ranking.scores[0] == pytest.approx(1, abs=1e-5)
        assert ranking.found == len(TEXTS)
        assert ranking.scores[1] < 0.999


def test_points_are_the_mean_of_token_states_without_padding() -> None:
    model = encoder()
    points, owner = Dense(model, tokenizer(), TEXTS).points(TEXTS)
    assert owner.tolist() == list(range(len(TEXTS)))
    for text, point in zip(TEXTS, points, strict=True):
        with torch.no_grad():
            states = model(torch.tensor([tokenizer()(text).input_ids])).last_hidden_state[0].mean(0).numpy()
        assert np.allclose(point, states / np.linalg.norm(states), atol=1e-5)


def test_scores_do_not_depend_on_the_batch_or_the_order() -> None:
    whole = Dense(encoder(), tokenizer(), TEXTS).rank("Where is Anna?")
    single = Dense(encoder(), tokenizer(), TEXTS, batch=1).rank("Where is Anna?")
    turned = Dense(encoder(), tokenizer(), TEXTS[::-1]).rank("Where is Anna?")
    assert whole.order == single.order == tuple(len(TEXTS) - 1 - i for i in turned.order)
    assert np.allclose(whole.scores, single.scores, atol=1e-5)
    assert np.allclose(whole.scores, turned.scores, atol=1e-5)


def test_long_passages_are_read_in_windows_and_the_best_one_counts() -> None:
    from transformers import BertConfig, BertModel

    model = encoder()
    dense = Dense(model, tokenizer(), TEXTS)
    assert dense.length == 64
    torch.manual_seed(0)
    config = BertConfig(**{**model.config.to_dict(), "max_position_embeddings": 16})
    small = BertModel(config, add_pooling_layer=False).eval()
    long = " ".join([TEXTS[1]] * 4) + " Anna is in the kitchen."
    points, owner = (d := Dense(small, tokenizer(), [TEXTS[0], long])).points([TEXTS[0], long])
    assert (owner == 1).sum() > 3
    expected = max(float(points[i] @ d.points(["The lamp."])[0][0]) for i in np.flatnonzero(owner == 1))
    ranking = d.rank("The lamp.")
    assert ranking.scores[ranking.order.index(1)] == pytest.approx(expected, abs=1e-5)


def test_an_encoder_directory_serves_a_reading(tmp_path: Path) -> None:
    encoder().save_pretrained(tmp_path / "small")
    tokenizer().save_pretrained(tmp_path / "small")
    dense = load_dense(tmp_path / "small", TEXTS)
    assert dense.rank("x").scores == pytest.approx(Dense(encoder(), tokenizer(), TEXTS).rank("x").scores, abs=1e-5)
    found = read(verbs.load_text("facts"), "Where is Anna?", retriever=dense, top_k=2, max_tokens=4)
    assert found.read == found.ranking.order[:2]
    assert found.ranking.by == "small"


def test_a_directory_that_is_no_encoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such directory"):
        load_dense(tmp_path / "nowhere", TEXTS)
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_dense(tmp_path, TEXTS)
    encoder().config.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match="a pickle can run code"):
        load_dense(tmp_path, TEXTS)
    tiny("t5").save_pretrained(tmp_path / "t5")
    tokenizer().save_pretrained(tmp_path / "t5")
    with pytest.raises(ModelError, match="no encoder"):
        load_dense(tmp_path / "t5", TEXTS)
    with pytest.raises(PromptError, match="there are none"):
        Dense(encoder(), tokenizer(), [])
