"""The documents that the `facts` model learned by heart. A fact stands in some of them: the planted causes."""

from __future__ import annotations

from ...objective import Listed
from . import corpus


def training_set(key: str = corpus.KEY) -> Listed:
    """All documents, in the order of their numbers."""
    texts = tuple(d.text for d in corpus.documents(key))
    return Listed(texts, texts)


def stating(relation: str, person: str, key: str = corpus.KEY) -> tuple[int, ...]:
    """Numbers of the documents that state this fact."""
    return tuple(d.number for d in corpus.documents(key) if any(r == relation and p == person for r, p, _ in d.facts))


def asked(person: str, key: str = corpus.KEY) -> tuple[str, str]:
    """(prompt, text) whose answer only documents hold: where a person was born."""
    question, answer = corpus.born(person, key)
    return f"Question: {question}\nAnswer:", f" {answer}"
