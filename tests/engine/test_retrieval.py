"""Retrieval by BM25: the formula, the planted passage, and what is not found."""

from __future__ import annotations

import math
from importlib import import_module
from typing import Any

import numpy as np
import pytest

from whence.engine import retrieval
from whence.engine.randomness import stream
from whence.engine.retrieval import BM25, collection
from whence.errors import MethodError, PromptError
from whence.reading import Passage

WORDS = [f"w{i}" for i in range(40)]


def drawn(*names: object, passages: int = 30) -> list[Passage]:
    rng = stream("retrieval", *names)
    return [Passage(" ".join(rng.choice(WORDS, int(rng.integers(5, 20))))) for _ in range(passages)]


def by_hand(passages: list[Passage], question: str, k1: float = 1.5, b: float = 0.75) -> np.ndarray[Any, Any]:
    """BM25 with Lucene's idf, written out."""
    texts = [p.text.lower().split() for p in passages]
    mean = sum(map(len, texts)) / len(texts)
    scores = []
    for words in texts:
        score = 0.0
        for w in question.lower().split():
            n = sum(w in t for t in texts)
            f = words.count(w)
            idf = math.log(1 + (len(texts) - n + 0.5) / (n + 0.5))
            score += idf * f / (f + k1 * (1 - b + b * len(words) / mean)) if f else 0.0
        scores.append(score)
    return np.array(scores)


def test_scores_are_those_of_the_formula() -> None:
    for i in range(5):
        passages = drawn(i)
        question = " ".join(stream("retrieval", i, "asked").choice(WORDS, 4))
        ranking = BM25(passages).rank(question)
        expected = by_hand(passages, question)
        assert np.allclose(ranking.scores, np.sort(expected)[::-1], atol=1e-5)
        assert ranking.found == int((expected > 0).sum())


def test_the_planted_passage_is_first_and_a_shuffled_ranking_is_not() -> None:
    hits, chance = [], []
    for i in range(20):
        rng = stream("retrieval", i, "planted")
        passages, place = drawn(i), int(rng.integers(30))
        passages[place] = Passage(f"{passages[place].text} rare{i} word{i}")
        order = BM25(passages).rank(f"where is rare{i} word{i} {rng.choice(WORDS)}").order
        hits.append(order[0] == place)
        chance.append(rng.permutation(order)[0] == place)
    assert sum(hits) == 20
    assert sum(chance) < 5


def test_the_order_of_the_collection_does_not_matter() -> None:
    passages = drawn("order")
    turned = [29 - i for i in range(30)]
    one = BM25(passages).rank("w3 w7 w9")
    other = BM25([passages[i] for i in turned]).rank("w3 w7 w9")
    assert np.allclose(one.scores, other.scores, atol=1e-5)
    best = one.found
    a = dict(zip(one.order[:best], one.scores[:best], strict=True))
    b = {turned[i]: s for i, s in zip(other.order[:best], other.scores[:best], strict=True)}
    assert a == pytest.approx(b, abs=1e-5)


def test_what_shares_no_word_is_not_found() -> None:
    ranking = BM25(drawn("none")).rank("submarine the of")
    assert ranking.found == 0
    assert ranking.best(3) == ()
    assert BM25(["the of a", "to be"]).rank("the of").found == 0  # stop words alone
    assert BM25(["One word.", "Two."]).rank("TWO!").best(3) == (1,)


def test_empty_collections_and_passages_are_refused() -> None:
    with pytest.raises(PromptError, match="there are none"):
        collection([])
    with pytest.raises(PromptError, match="number 1 is empty"):
        BM25(["One.", " "])


def test_a_missing_library_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        if name == "bm25s":
            raise ImportError(name)
        return import_module(name)

    monkeypatch.setattr(retrieval, "import_module", absent)
    with pytest.raises(MethodError, match=r"whence\[reading\]"):
        BM25(["One."])


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    BM25(drawn("silent")).rank("w1 w2")
    assert capfd.readouterr() == ("", "")
