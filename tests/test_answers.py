"""Which texts hold an answer, and where it is replaced."""

from __future__ import annotations

import pytest

from whence.answers import holds, put

HELD = [
    ("He was born in Velm.", "velm"),
    ("the Denver  Broncos won", "The Denver Broncos"),
    ("Denver\nBroncos", "Denver Broncos"),
    ("a 1,250-page book", "1250"),
    ("1250 pages", "1,250"),
    ("it is 24.5 m", "24.5"),
    ("the US Army", "U.S."),
    ("in 2015, three", "2015"),
    ("Café Müller", "Cafe\u0301 Mu\u0308ller"),  # the same letters, composed and not
    ("100 % of it", "%"),
    ("a c++ book", "c++"),
]
NOT_HELD = [
    ("Velmora is far", "Velm"),
    ("3,124 pages", "124"),
    ("24.5 m", "24"),
    ("1007", "007"),
    ("7 men", "007"),
    ("10.00", "1000"),
    ("it gave us that", "US"),
    ("it gave us that", "U.S."),
    ("", "Velm"),
    ("anything", ""),
    ("anything", "  "),
]


@pytest.mark.parametrize(("text", "answer"), HELD)
def test_an_answer_is_found_whatever_its_case_and_punctuation(text: str, answer: str) -> None:
    assert holds(text, answer)
    assert "Orsk" in put(text, answer, "Orsk")
    assert not holds(put(text, answer, "Orsk"), answer)


@pytest.mark.parametrize(("text", "answer"), NOT_HELD)
def test_part_of_a_longer_word_or_number_is_no_answer(text: str, answer: str) -> None:
    assert not holds(text, answer)
    assert put(text, answer, "Orsk") == text


def test_every_occurrence_is_replaced_and_nothing_else() -> None:
    assert put("Velm, VELM and Velmora.", "Velm", r"\1 {x}") == r"\1 {x}, \1 {x} and Velmora."
