"""Readings: what is read, what is cited, and that knocking out never moves the ranking."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from whence import verbs
from whence.engine.retrieval import BM25
from whence.errors import PromptError
from whence.models.reading import read
from whence.reading import Passage, Ranking, Reading, assembled, passages_from

NOTES = (
    Passage("Ben has the key. Anna is in the mill.", "first"),
    Passage("You can find David in the garden.", "second"),
    Passage("Emma took the lamp. Anna has the rope.", "third"),
    Passage("Leo went to the barn.", "fourth"),
)


@pytest.fixture(scope="module")
def model() -> Any:
    return verbs.load_text("facts")


@pytest.fixture(scope="module")
def reading(model: Any) -> Reading:
    return read(model, "Where is Anna?", NOTES, top_k=2, max_tokens=12)


def test_an_explanation_names_the_passage_and_the_span_that_was_read(reading: Reading) -> None:
    assert reading.text.strip() == "Anna is in the mill."
    found = verbs.explain(reading.about("mill"), by="leave_one_out")
    best = reading.evidence(found)[0]
    assert (best.name, best.text) == ("first", "Anna is in the mill.")
    assert NOTES[best.number].text[best.start : best.end] == best.text
    assert reading.ranking.order[best.rank - 1] == best.number
    by_passage = verbs.explain(reading.about("mill", level="passage"), by="leave_one_out")
    assert reading.evidence(by_passage)[0].text == NOTES[0].text


def test_the_question_is_never_a_unit(reading: Reading) -> None:
    for level in ("passage", "sentence", "word"):
        assert not any("Question" in name for name in reading.about(level=level).units.names)
    with pytest.raises(PromptError, match="lie in no passage"):
        reading.cited(len(reading.run.prompt) - 3, len(reading.run.prompt))


def test_hidden_passages_are_passed_over_and_all_others_keep_rank_and_score(reading: Reading) -> None:
    first, second = reading.read
    filled = reading.again(hidden=[first])
    assert filled.ranking is reading.ranking
    assert filled.read == reading.ranking.best(2, [first])
    assert filled.read[0] == second
    assert "mill" not in filled.run.prompt
    left = reading.again(hidden=[first], refill=False)
    assert left.read == (second,)


def test_indexing_again_would_have_moved_the_scores() -> None:
    """Why passages are hidden in the ranking: without them the same words weigh otherwise."""
    whole = BM25(NOTES).rank("Where is Anna?")
    less = BM25(NOTES[1:]).rank("Where is Anna?")
    before = dict(zip(whole.order, whole.scores, strict=True))
    after = {i + 1: s for i, s in zip(less.order, less.scores, strict=True)}
    assert before[2] != pytest.approx(after[2], rel=0.05)


def test_edited_passages_are_read_where_they_stand_and_the_collection_is_left_as_it_was(reading: Reading) -> None:
    edited = reading.again({0: "Anna is in the park."})
    assert edited.text.strip() == "Anna is in the park."
    assert edited.read == reading.read
    assert edited.passages == reading.passages == NOTES
    a, b = edited.spans[edited.read.index(0)]
    assert edited.run.prompt[a:b] == "Anna is in the park."
    assert edited.again({2: "Emma has the lamp."}).texts[0] == "Anna is in the park."
    emptied = reading.again({0: ""})
    assert emptied.read == tuple(i for i in reading.read if i)


def test_with_everything_hidden_the_bare_question_is_asked(reading: Reading) -> None:
    bare = reading.again(hidden=range(4))
    assert bare.run.prompt == "Question: Where is Anna?\nAnswer:"
    assert bare.read == ()
    with pytest.raises(PromptError, match="no passage was read"):
        bare.segments()


def test_writing_again_unchanged_replays_the_reading(reading: Reading) -> None:
    again = reading.again()
    assert (again.run.prompt, again.text, again.spans) == (reading.run.prompt, reading.text, reading.spans)


def test_a_chat_template_around_the_prompt_is_protected(model: Any) -> None:
    model.tokenizer.chat_template = "<{% for m in messages %}{{ m.content }}{% endfor %}>"
    try:
        found = read(model, "Where is Anna?", NOTES, top_k=2, max_tokens=4, template=True)
        texts = [found.run.prompt[a:b] for a, b in found.spans]
        assert texts == [NOTES[i].text for i in found.read]
        assert found.run.prompt.startswith("<")
        assert [found.about(level="passage").units.names[i] for i in range(2)] == texts
        model.tokenizer.chat_template = "{% for m in messages %}{{ m.content | upper }}{% endfor %}"
        with pytest.raises(PromptError, match="chat template changes"):
            read(model, "Where is Anna?", NOTES, top_k=2, max_tokens=4, template=True)
    finally:
        model.tokenizer.chat_template = None


def test_a_question_with_braces_and_a_frame_of_ones_own() -> None:
    prompt, spans = assembled(["One {x}.", "Two."], "Why {passages}?", "Read:\n{passages}\nQ: {question}")
    assert prompt == "Read:\nOne {x}.\n\nTwo.\nQ: Why {passages}?"
    assert [prompt[a:b] for a, b in spans] == ["One {x}.", "Two."]
    with pytest.raises(PromptError, match="both parts once"):
        assembled(["One."], "Why?", "{passages}")


def test_the_best_are_the_found_ones_alone() -> None:
    ranking = Ranking((3, 1, 0, 2), (2.0, 1.0, 0.0, 0.0), 2, "any")
    assert ranking.best(5) == (3, 1)
    assert ranking.best(1, {3}) == (1,)
    assert ranking.best(3, {1, 3}) == ()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "it is empty"),
        ("\n\n", "it is empty"),
        ('{"text": "One."}\nnonsense', "line 2 has no text"),
        ('{"text": " "}', "line 1 has no text"),
        ('["One."]', "line 1 has no text"),
        ('{"text": 3}', "line 1 has no text"),
    ],
)
def test_a_file_that_holds_no_passages_is_refused(content: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "notes.jsonl"
    path.write_text(content)
    with pytest.raises(PromptError, match=says):
        passages_from(path)


def test_passages_come_from_a_file_of_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "notes.jsonl"
    path.write_text('{"text": " One. ", "name": "a"}\n\n{"text": "Two.", "other": 1}\n', encoding="utf8")
    assert passages_from(path) == [Passage("One.", "a"), Passage("Two.")]
    path.write_bytes(bytes(range(128, 200)))
    with pytest.raises(PromptError, match="no text in UTF-8"):
        passages_from(path)
    with pytest.raises(PromptError, match="No such file"):
        passages_from(tmp_path / "nowhere")


def test_what_cannot_be_read_is_refused(model: Any) -> None:
    with pytest.raises(PromptError, match="none shares a word"):
        read(model, "Submarine?", NOTES)
    with pytest.raises(PromptError, match="it is empty"):
        read(model, " ", NOTES)
    with pytest.raises(PromptError, match="nothing to read"):
        read(model, "Where is Anna?", NOTES, top_k=0)
    with pytest.raises(PromptError, match="there are none"):
        read(model, "Where is Anna?")
    with pytest.raises(PromptError, match="of other passages"):
        read(model, "Where is Anna?", NOTES[:2], BM25(NOTES))
    with pytest.raises(PromptError, match="reads 4096 in all"):
        read(model, "Where is Anna?", [Passage("Anna is in the mill. " * 900)])
