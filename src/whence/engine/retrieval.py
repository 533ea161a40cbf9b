"""Finds passages by their words: BM25 over a fixed collection, by the library bm25s."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import numpy as np

from ..errors import MethodError, PromptError
from ..reading import Passage, Ranking


def collection(passages: Sequence[Passage | str]) -> tuple[Passage, ...]:
    """Passages, of which plain texts may be given. Raises PromptError for none and for empty ones."""
    found = tuple(p if isinstance(p, Passage) else Passage(p) for p in passages)
    empty = [i for i, p in enumerate(found) if not p.text.strip()]
    if not found or empty:
        raise PromptError("a collection of passages", f"number {empty[0]} is empty" if empty else "there are none",
                          "passages of at least one word")  # fmt: skip
    return found


def ranked(scores: Any, found: int, by: str) -> Ranking:
    """The ranking of scores[passage]; ties in the order of the collection."""
    order = np.argsort(-np.asarray(scores), kind="stable")
    return Ranking(tuple(order.tolist()), tuple(np.asarray(scores, float)[order].tolist()), found, by)


class BM25:
    """A :class:`~whence.reading.Retriever`: the score of a passage is the sum over the question's words of

        idf(w) * f / (f + k1 * (1 - b + b * length / mean length)),    f: how often w stands in the passage

    (Robertson et al.'s BM25 with Lucene's idf, words in lower case without the library's English stop words). A passage
    that shares no word with the question is not found. The index is made once: hide passages in the ranking.
    """

    name = "bm25"

    def __init__(self, passages: Sequence[Passage | str], k1: float = 1.5, b: float = 0.75) -> None:
        self.passages = collection(passages)
        self._library = _library()
        self._index = self._library.BM25(method="lucene", k1=k1, b=b)
        words = self._words([p.text for p in self.passages])
        self._known = bool(any(words))
        if self._known:
            self._index.index(words, show_progress=False)

    def _words(self, texts: list[str]) -> list[list[str]]:
        return self._library.tokenize(  # type: ignore[no-any-return]
            texts, stopwords="english", token_pattern=r"(?u)\b\w+\b", return_ids=False, show_progress=False
        )

    def rank(self, question: str) -> Ranking:
        """All passages, those that share rare words with the question first."""
        scores = np.zeros(len(self.passages))
        (words,) = self._words([question])
        if self._known and any(w in self._index.vocab_dict for w in words):
            scores = np.asarray(self._index.get_scores(words), float)
        return ranked(scores, int((scores > 0).sum()), self.name)


def _library() -> Any:
    try:
        return import_module("bm25s")
    except ImportError:
        raise MethodError(
            "retrieval by BM25", "the library bm25s is not installed",
            "pip install 'whence[reading]', or a dense retriever (whence.models.retrieval)",
        ) from None  # fmt: skip
