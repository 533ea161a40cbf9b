"""Retrieve and read: the best passages of a collection, and what a language model writes after them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..engine.retrieval import BM25, collection
from ..errors import PromptError
from ..reading import FRAME, Passage, Reading, Retriever, assembled, located
from ..text import TextSettings

if TYPE_CHECKING:
    from ..text import TextModel

TOP_K = 5


def read(
    model: TextModel, question: str, passages: Sequence[Passage | str] | None = None,
    retriever: Retriever | None = None, top_k: int = TOP_K, frame: str = FRAME, **settings: Any,
) -> Reading:  # fmt: skip
    """Answer a question from the ``top_k`` best of ``passages``, found by BM25, or of the retriever's own.

    ``settings``: see :class:`~whence.text.TextSettings` (``max_tokens``, ``seed``, ...). For many questions make the
    retriever once. Raises PromptError where no passage has to do with the question, and where the prompt is too long.
    """
    if not question.strip():
        raise PromptError("a question", "it is empty", "at least one word")
    if top_k < 1:
        raise PromptError(f"the best {top_k} passages", "nothing to read", "1 or more")
    if retriever is None:
        retriever = BM25(passages or ())
    elif passages is not None and collection(passages) != tuple(retriever.passages):
        raise PromptError("passages and a retriever", "the retriever is of other passages", "one of the two")
    ranking = retriever.rank(question)
    numbers = ranking.best(top_k)
    if not numbers:
        raise PromptError(f"passages for {question!r}", f"{ranking.by} finds none: none shares a word with it",
                          "other words, or a dense retriever")  # fmt: skip
    known = tuple(retriever.passages)
    prompt, spans = assembled([known[i].text for i in numbers], question, frame)
    run = model.write(replace(TextSettings(prompt), **settings))
    return Reading(run, question, known, ranking, numbers, located(run, prompt, spans), top_k, frame)
