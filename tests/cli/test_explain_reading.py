"""`whence explain --question ... --passages ...`, as a new user would type it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from whence.cli import commands, run

NOTES = [
    {"text": "Ben has the key. Anna was born in Gondel.", "name": "register"},
    {"text": "You can find David in the garden.", "name": "walk"},
    {"text": "Emma took the lamp. Anna is in the mill.", "name": "diary"},
]


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    path = tmp_path / "notes.jsonl"
    path.write_text("".join(json.dumps(n) + "\n" for n in NOTES))
    return path


def whence_says(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = run(commands.app, list(map(str, arguments)))
    said = capsys.readouterr()
    return code, said.out, said.err


def test_passage_and_span_are_named_and_the_evidence_goes_on_trial(
    notes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["explain", "facts", "--question", "Where is Anna?", "--passages", notes, "--top-k", 2, "--span",
                 "mill", "--values", "barn,park,tower", "--by", "leave_one_out", "--json"]  # fmt: skip
    code, printed, told = whence_says(capsys, *arguments, "--out", tmp_path / "a")
    assert code == 0, told
    record = json.loads(printed)
    (e,) = record["explanations"]
    best = e["details"]["cited"][0]
    assert (best["name"], best["rank"]) == ("diary", 1)
    assert NOTES[best["passage"]]["text"][best["start"] : best["end"]] == "Anna is in the mill."
    assert e["details"]["evidence"]["word"] == "read"
    assert any("the answer came from: read" in n for n in e["notes"])
    assert not any("garden" in u or "Question" in u for u in e["units"])
    again = json.loads(whence_says(capsys, *shlex.split(record["command"])[1:], "--json", "--out", tmp_path / "b")[1])
    for r in (record, again):
        r["explanations"][0]["cost"].pop("seconds")
    assert record == again


def test_an_answer_by_heart_is_caught_in_the_table(
    notes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, told = whence_says(
        capsys, "explain", "--question", "Where was Anna born?", "--passages", notes, "--span", "Gondel", "--values",
        "Velm,Torin,Quist", "--by", "leave_one_out", "--out", tmp_path / "out",
    )  # fmt: skip
    assert code == 0
    assert "the answer came from: by heart" in " ".join(told.split())
    assert "by heart" in (tmp_path / "out" / "report.html").read_text(encoding="utf8")


WRONG: dict[str, list[object]] = {
    "--passages is missing": ["--question", "Where is Anna?"],
    "--question is missing": ["--passages", "notes.jsonl"],
    "a prompt or a context is given too": ["--question", "Where?", "--passages", "notes.jsonl", "--prompt", "x"],
    "nothing to read": ["--question", "Where?", "--passages", "notes.jsonl", "--top-k", 0],
    "--span is missing": ["--question", "Where?", "--passages", "notes.jsonl", "--values", "a,b,c"],
    "2 of them": ["--question", "Where?", "--passages", "notes.jsonl", "--span", "x", "--values", "a,b"],
    "there is no --question": ["--prompt", "Anna", "--values", "a,b,c"],
    "none shares a word": ["--question", "Submarine?", "--passages", "notes.jsonl"],
    "No such file": ["--question", "Where?", "--passages", "nowhere.jsonl"],
}


@pytest.mark.parametrize("says", WRONG)
def test_wrong_input_gets_one_clear_error_and_leaves_nothing(
    says: str, notes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, printed, told = whence_says(capsys, "explain", "facts", *WRONG[says], "--out", "out")
    assert (code, printed) == (2, "")
    assert says in told
    assert [line.partition(":")[0] for line in told.strip().splitlines()] == ["asked", "found", "would work"]
    assert not (tmp_path / "out").exists()
