"""The check evidence: knocked out together, in a ranking that stays."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from whence import verbs
from whence.checks.evidence import Evidence, evidence, outcome, written
from whence.engine.retrieval import BM25
from whence.errors import MethodError, PromptError, RunError
from whence.models.reading import read
from whence.reading import FRAME, Asked, Passage, Reading
from whence.worlds.facts import twin_directory
from whence.worlds.facts.library import library

NOTES = library("tests")
SHORT = ("a town",)
"""How the twin begins to say that it is not said."""
ANSWERED = [a for a in NOTES.asked if a.kind == "answered"]


@cache
def model(name: str) -> Any:
    return verbs.load_text("facts" if name == "embedded" else twin_directory())


@cache
def index() -> BM25:
    return BM25(NOTES.passages)


@cache
def asked(name: str, a: Asked) -> Reading:
    """The beginning of the answer is given, and two tokens are enough: this is asked a few hundred times."""
    lead = f"{a.question.split()[2]} was born in"
    return read(
        model(name), a.question, retriever=index(), top_k=3, frame=f"{FRAME} {lead}", max_tokens=2
    )  # fmt: skip


def test_the_model_that_knows_it_by_heart_is_caught_and_its_twin_passes() -> None:
    """Both read the same passages, find the same ranking and give the same answer: only the trial tells them apart."""
    words: dict[str, list[str]] = {"embedded": [], "twin": []}
    verdicts: dict[str, list[str]] = {"embedded": [], "twin": []}
    for a in ANSWERED:
        for name, said in words.items():
            reading = asked(name, a)
            assert reading.read == asked("embedded", a).read
            assert reading.text == asked("embedded", a).text
            found = evidence(reading, a.answer, a.values[:3], abstains=SHORT)
            said.append(found.word)
            verdicts[name].append(found.verdict.word)
            assert set(a.gold) == set(found.holding)
    assert len(ANSWERED) == 12
    assert words["embedded"].count("by heart") >= 11, words
    assert verdicts["embedded"].count("refuted") >= 11
    assert words["twin"].count("read") >= 11, words
    assert verdicts["twin"].count("supported") >= 11


def test_one_passage_knocked_out_shows_nothing_while_another_says_the_same() -> None:
    twice = [a for a in ANSWERED if len(a.gold) == 2]
    assert len(twice) == 4
    for a in twice:
        found = evidence(asked("twin", a), a.answer, a.values[:3], abstains=SHORT)
        assert found.single is not None
        assert found.joint is not None
        assert found.single.word == "stays", a
        assert found.joint.word != "stays", a
        assert found.elsewhere is None or found.elsewhere.word == "stays"
        by_heart = evidence(asked("embedded", a), a.answer, a.values[:3], abstains=SHORT)
        assert by_heart.joint is not None
        assert by_heart.joint.word == "stays", a
    once = next(a for a in ANSWERED if len(a.gold) == 1)
    found = evidence(asked("twin", once), once.answer, once.values[:3], abstains=SHORT)
    assert found.single is not None
    assert found.single.word != "stays"


@cache
def by_sentence() -> Evidence:
    notes = [Passage("Ben has the key. Anna was born in Velm."), Passage("Leo went to the barn. Emma comes from Orsk.")]
    reading = read(model("twin"), "Where was Anna born?", notes, top_k=2, max_tokens=12)
    return evidence(reading, "Velm", ("Torin", "Quist", "Selde"), level="sentence")


def test_a_sentence_is_cut_where_it_stands_and_its_passage_stays() -> None:
    found = by_sentence()
    assert found.word == "read"
    assert found.joint is not None
    assert found.joint.word == "abstains"
    assert found.elsewhere is not None
    assert found.elsewhere.word == "stays"


def test_edits_beside_the_evidence_are_the_control() -> None:
    found = by_sentence()
    assert found.follows == 1
    assert found.verdict.control == 0
    assert found.verdict.word == "supported"
    assert "follows 100%" in str(found)


def test_an_answer_that_nothing_read_holds_is_told_apart() -> None:
    notes = [Passage("Ben is in the barn. Anna has the key."), Passage("Leo is in the mill.")]
    reading = read(model("embedded"), "Where was Anna born?", notes, max_tokens=12)
    town = reading.text.strip(" .").split()[-1]
    found = evidence(reading, town, ("Torin", "Quist", "Selde", "Velm"))
    assert found.word == "nothing holds it"
    assert found.verdict.word == "undecided"


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (" Anna was born in velm.", "stays"),
        (" Anna was born in Orsk.", "changes"),
        (" Anna was born in a town that is not said.", "abstains"),
        ("I don’t know.", "abstains"),
        ("", "abstains"),
        ("It is not said, but Velm.", "stays"),
    ],
)
def test_what_is_written_stays_changes_or_abstains(text: str, word: str) -> None:
    assert outcome(text, "Velm").word == word


def test_a_model_that_ends_at_once_has_abstained_and_one_that_breaks_has_not() -> None:
    m, a = model("embedded"), ANSWERED[0]
    reading = asked("embedded", a)
    ends = m.model.generation_config
    before = ends.eos_token_id
    ends.eos_token_id = int(reading.run.output_ids[0])
    try:
        assert written(reading) == ""
        assert outcome(written(reading), a.answer).word == "abstains"
    finally:
        ends.eos_token_id = before
    weight = m.model.get_input_embeddings().weight
    kept = weight.data.clone()
    weight.data.fill_(float("nan"))
    try:
        with pytest.raises(RunError, match="no numbers"):
            written(reading)
    finally:
        weight.data.copy_(kept)
    assert written(reading) == reading.text


def test_wrong_input_is_refused() -> None:
    a = ANSWERED[0]
    reading = asked("twin", a)
    with pytest.raises(PromptError, match="a piece of the output"):
        evidence(reading, "submarine", a.values)
    with pytest.raises(MethodError, match="three or more"):
        evidence(reading, a.answer, [a.answer, *a.values[:2]])
    with pytest.raises(MethodError, match="no such level"):
        evidence(reading, a.answer, a.values, level="word")
    with pytest.raises(RunError, match="no live model"):
        evidence(replace(reading, run=replace(reading.run, model=None)), a.answer, a.values)
    with pytest.raises(PromptError, match="the question says it"):
        evidence(replace(reading, asked=f"Was it {a.answer}?"), a.answer, a.values)
