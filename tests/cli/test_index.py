"""`whence index` and `whence query`, as a new user would type them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from whence.cli import commands, run
from whence.worlds.facts import corpus
from whence.worlds.facts.training_set import training_set


def whence_says(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = run(commands.app, list(map(str, arguments)))
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of the documents about six people, in a file of the user's own."""
    folder = tmp_path_factory.mktemp("index")
    people = corpus.PEOPLE[:6]
    rows = [{"text": t} for t in training_set().items if any(p in t for p in people)]
    (folder / "lives.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert run(commands.app, ["index", "facts", str(folder / "lives.jsonl"), "-o", str(folder / "ix"), "--json"]) == 0
    return folder / "ix"


def test_a_town_known_by_heart_is_traced_to_documents_of_that_person(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named, right = 0, 0
    for person in corpus.PEOPLE[:4]:
        question, answer = corpus.born(person)
        code, out, err = whence_says(
            capsys,
            "query",
            place,
            "--prompt",
            f"Question: {question}\nAnswer:",
            "--text",
            f" {answer}",
            "--top",
            5,
            "--json",
        )
        assert code == 0, err
        record = json.loads(out)
        labels = [r["label"] for r in record["top"]]
        named += len(labels)
        right += sum(person in label for label in labels)
        assert record["trust"]["recall_of_first_stage"] is not None
    assert right / named > 0.6  # one person of six: .17


def test_a_span_and_each_token_are_asked_by_themselves(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    question, answer = corpus.born(corpus.PEOPLE[0])
    asked = ["query", place, "--prompt", f"Question: {question}\nAnswer:", "--text", f" {answer}", "--json"]
    town = answer.rstrip(".").split()[-1]
    code, out, err = whence_says(capsys, *asked, "--span", town, "--per-token", "--top", 101, "--exact", 0)
    assert code == 0, err
    record = json.loads(out)
    assert record["span"].strip() == town
    assert "".join(t["token"] for t in record["tokens"]) == f" {answer}"
    whole = json.loads(whence_says(capsys, *asked, "--top", 101, "--exact", 0)[1])
    assert record["top"] != whole["top"]
    code, _, err = whence_says(capsys, *asked, "--span", "nowhere")
    assert code == 2
    assert "it is not in what the model wrote" in err


def test_the_answer_is_tried_and_written_to_a_page(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = f"Question: {corpus.born(corpus.PEOPLE[0])[0]}\nAnswer:"
    code, out, err = whence_says(
        capsys, "query", place, "--prompt", prompt, "--both-ends", "--verify", "--out", tmp_path / "q", "--json"
    )
    assert code == 0, err
    record = json.loads(out)
    assert record["verdicts"][0]["word"] in ("supported", "refuted", "undecided")
    assert record["lowest"][0]["score"] < record["top"][0]["score"]
    page = Path(record["report"]).read_text(encoding="utf8")
    assert record["top"][0]["label"] in page
    assert "How far to trust it" in page
    assert json.loads((tmp_path / "q" / "query.json").read_text()) == {k: v for k, v in record.items() if k != "report"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["index", "facts", "nowhere.jsonl"], "no such file"),
        (["index", "facts", "--world", "moon"], "no such world"),
        (["index", "shapes", "--format", "gold"], "no such form"),
        (["index", "shapes", "--format", "sketch:4"], "no such form"),
        (["index", "facts", "--limit", "0"], "nothing to index"),
        (["query", "nowhere", "--prompt", "x"], "no manifest"),
        (["query", "nowhere"], "one of them is needed"),
        (["query", "nowhere", "no-report"], "no report is there"),
        (["query", "nowhere", "--prompt", "x", "--top", "0"], "nothing to show"),
    ],
)
def test_wrong_input_gets_one_clear_error(
    arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = whence_says(capsys, *arguments)
    assert (code, out) == (2, "")
    assert says in err
    assert "would work:" in err
    assert not list(tmp_path.iterdir())


def test_an_index_that_is_there_is_not_written_over(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = place.parent / "lives.jsonl"
    code, _, err = whence_says(capsys, "index", "facts", data, "-o", place)
    assert code == 2
    assert "there is one already" in err
    code, _, err = whence_says(capsys, "query", place, "--prompt", "Question: Where", "--top", 9999)
    assert code == 2
    assert "are in the index" in err
