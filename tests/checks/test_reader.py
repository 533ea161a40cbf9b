"""The check reader: many questions, of three kinds that are never counted together."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from whence import verbs
from whence.checks.reader import ReaderTrial, reader
from whence.engine.retrieval import BM25
from whence.errors import PromptError
from whence.models.reading import read
from whence.reading import FRAME, Asked, Reading
from whence.worlds.facts import twin_directory
from whence.worlds.facts.library import library

NOTES = library("tests", "reader")


def shortened(a: Asked) -> Asked:
    return Asked(a.question, a.answer, a.values[:3], a.gold, a.kind)


MANY = {"answered": 8, "gone": 6, "foreign": 6}
ASKED = tuple(
    shortened(a) for kind, n in MANY.items() for a in [a for a in NOTES.asked if a.kind == kind][:n]
)  # fmt: skip


@cache
def model(name: str) -> Any:
    return verbs.load_text("facts" if name == "embedded" else twin_directory())


@cache
def trial(name: str) -> ReaderTrial:
    index = BM25(NOTES.passages)

    def ask(question: str) -> Reading:
        # The beginning of the answer is given, and two tokens are enough: this is asked a few hundred times.
        frame = f"{FRAME} {question.split()[2]} was born in"
        return read(model(name), question, retriever=index, top_k=3, frame=frame, max_tokens=2)

    return reader(ask, ASKED, abstains=("a town",))


def test_a_reader_is_supported_and_a_reciter_of_the_same_answers_refuted() -> None:
    right = {n: [r.text for r in trial(n).rows if r.asked.kind == "answered"] for n in ("embedded", "twin")}
    assert right["embedded"] == right["twin"]
    assert trial("embedded").verdict.word == "refuted"
    assert trial("twin").verdict.word == "supported"
    assert trial("embedded").counts("answered")["by heart"] >= 7
    assert trial("twin").counts("answered")["read"] >= 7


def test_where_the_evidence_is_gone_the_reader_abstains_and_the_reciter_answers() -> None:
    for kind in ("gone", "foreign"):
        assert trial("embedded").counts(kind).get("by heart", 0) >= 5, kind
        assert trial("embedded").counts(kind).get("abstains", 0) == 0, kind
        assert trial("twin").counts(kind).get("abstains", 0) >= 5, kind
        assert trial("twin").counts(kind).get("by heart", 0) == 0, kind


def test_kinds_are_counted_apart_and_printed() -> None:
    said = str(trial("twin"))
    for kind in ("answered", "gone", "foreign"):
        assert f"{kind}: " in said
        assert sum(trial("twin").counts(kind).values()) == sum(a.kind == kind for a in ASKED)
    assert trial("twin").verdict.n == trial("twin").counts("answered")["read"]


def test_foreign_questions_that_find_nothing_are_told_apart() -> None:
    index = BM25(NOTES.passages)

    def ask(question: str) -> Reading:
        return read(model("embedded"), question, retriever=index, top_k=3, max_tokens=14)

    found = reader(ask, [Asked("Submarine?", "Velm", (), (), "foreign")])
    assert found.counts("foreign") == {"nothing found": 1}
    assert found.verdict.word == "undecided"
    with pytest.raises(PromptError, match="shares a word"):
        reader(ask, [Asked("Submarine?", "Velm")])
    with pytest.raises(PromptError, match="no such kind"):
        reader(ask, [Asked("Where?", "Velm", kind="other")])
