"""`whence explain` of text, as a new user would type it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from sentences import WORDS, tiny, tokenizer
from transformers import BertConfig, BertForSequenceClassification

from whence.cli import commands, run
from whence.cli.explain_text import assemble
from whence.engine.ablate import Ablation, Version

KEY = Path(__file__).parents[2] / "examples" / "who-has-the-key.txt"


def whence_says(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = run(commands.app, list(map(str, arguments)))
    said = capsys.readouterr()
    return code, said.out, said.err


def bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(
        vocab_size=WORDS, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, initializer_range=0.3, pad_token_id=1, id2label={0: "calm", 1: "glad"},
    )).eval()  # fmt: skip


def test_who_has_the_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["explain", "facts", "--prompt-file", KEY, "--by", "mexgen,leave_one_out", "--json"]
    code, printed, told = whence_says(capsys, *arguments, "--out", tmp_path / "out")
    assert code == 0, told
    record = json.loads(printed)
    assert record == json.loads((tmp_path / "out" / "report.json").read_text())
    assert record["run"]["text"].strip() == "The key is with Ben."
    for e in record["explanations"]:
        best = max(zip(e["scores"], e["units"], strict=True))[1]
        assert best == "Ben has the key."
    words = {t["unit"]: t["verdict"]["word"] for t in record["trials"]}
    assert words.pop("Ben has the key.") == "supported"
    assert "supported" not in words.values()
    assert all("Question" not in u for e in record["explanations"] for u in e["units"])
    toggles = {t["unit"]: t for t in record["toggles"]}
    assert "Ben" not in toggles["Ben has the key."]["text"]
    assert toggles["Clara took the lamp."]["text"] == record["run"]["text"]
    assert record["trace"][0]["probability"] > 0


def test_the_command_of_the_record_makes_the_same_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = ["explain", "facts", "--prompt-file", KEY, "--span", "Ben", "--by", "leave_one_out", "--units", "word"]
    a = json.loads(whence_says(capsys, *first, "--json", "--out", tmp_path / "a")[1])
    b = json.loads(whence_says(capsys, *shlex.split(a["command"])[1:], "--json", "--out", tmp_path / "b")[1])
    for record in (a, b):
        for e in record["explanations"]:
            e["cost"].pop("seconds")
    assert a == b
    assert a["span"]["text"].strip() == "Ben"


def test_files_of_context_are_passages_and_the_question_is_never_removed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = []
    for i, text in enumerate(("Anna is in the mill. Ben took the rope.", "David is in the barn.", "Emma has the key.")):
        files += ["--context", tmp_path / f"{i}.txt"]
        (tmp_path / f"{i}.txt").write_text(text + "\n")
    question = "Question: Where is David?\nAnswer:"
    arguments = ["explain", "facts", "--prompt", question, *files, "--units", "passage", "--by", "leave_one_out"]
    record = json.loads(whence_says(capsys, *arguments, "--json", "--out", tmp_path / "out")[1])
    (e,) = record["explanations"]
    assert e["units"] == ["Anna is in the mill. Ben took the rope.", "David is in the barn.", "Emma has the key."]
    assert max(zip(e["scores"], e["units"], strict=True))[1] == "David is in the barn."


def test_a_table_and_the_path_of_the_report_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, printed, told = whence_says(
        capsys, "explain", "facts", "--prompt-file", KEY, "--by", "leave_one_out", "--out", tmp_path / "out"
    )
    assert code == 0
    assert printed.strip() == str(tmp_path / "out" / "report.html")
    assert "supported" in told
    assert (tmp_path / "out" / "report.html").stat().st_size > 1000


def test_what_was_measured_before_a_stop_is_not_asked_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["explain", "facts", "--prompt-file", KEY, "--by", "leave_one_out,mexgen", "--out", tmp_path / "out"]
    asked: list[int] = []
    logprobs, stops = Ablation.logprobs, [3]

    def counted(self: Ablation, versions: Sequence[Version], *more: Any) -> list[Any]:
        asked.append(len(versions))
        if len(asked) == stops[0]:
            raise KeyboardInterrupt
        return logprobs(self, versions, *more)

    monkeypatch.setattr("whence.models.asked.SECONDS", 0)
    monkeypatch.setattr(Ablation, "logprobs", counted)
    code, _, told = whence_says(capsys, *arguments)
    kept = tmp_path / "out.part.jsonl"
    assert code == 130
    assert "goes on from there" in told
    assert kept.is_file()
    assert not (tmp_path / "out").exists()
    before, stops[0] = sum(asked[1:2]), 0  # the first says how likely the text was when it was written
    asked.clear()
    assert whence_says(capsys, *arguments)[0] == 0
    assert not kept.exists()
    resumed = sum(asked)
    asked.clear()
    assert whence_says(capsys, *arguments)[0] == 0
    assert before > 0
    assert sum(asked) == resumed + before


def test_a_classifier_says_which_words_made_it_say_the_class(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bert().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    arguments = [
        "explain",
        tmp_path / "model",
        "--prompt",
        "Anna is in the kitchen. Ben has the key.",
        "--units",
        "word",
    ]
    code, printed, told = whence_says(
        capsys, *arguments, "--by", "leave_one_out,context_cite", "--json", "--out", tmp_path / "out"
    )
    assert code == 0, told
    record = json.loads(printed)
    assert record["run"]["text"] in ("calm", "glad")
    assert len(record["explanations"]) == 2
    assert "Anna" in record["explanations"][0]["units"]
    assert (tmp_path / "out" / "report.html").is_file()
    code, _, told = whence_says(capsys, *arguments, "--by", "alti_logit", "--out", tmp_path / "other")
    assert code == 2
    assert "alti_logit" in told


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_a_directory_of_ones_own_works_as_well(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny(kind).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    arguments = ["explain", tmp_path / "model", "--prompt", "Anna is here. Ben is out. Clara has it.", "--json"]
    code, printed, told = whence_says(
        capsys, *arguments, "--by", "leave_one_out", "--max-tokens", 5, "--seed", 3, "--out", tmp_path / "out"
    )
    assert code == 0, told
    assert json.loads(printed)["explanations"][0]["units"] == ["Anna is here.", "Ben is out.", "Clara has it."]


def test_reports_of_pictures_and_of_texts_take_each_others_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = ["explain", "facts", "--prompt-file", KEY, "--by", "leave_one_out", "--out", tmp_path / "out"]
    picture = ["explain", "--prompt", "a red circle", "--steps", 1, "--by", "daam", "--out", tmp_path / "out"]
    for arguments in (text, picture, text):
        code, _, told = whence_says(capsys, *arguments)
        assert code == 0, told


def test_the_question_is_what_stands_after_the_last_empty_line() -> None:
    assert assemble([], "One. Two.\n\nThree?")[2] == (11, 17)
    assert assemble([], "One. Two.") == ("One. Two.", [], None)
    prompt, passages, question = assemble(["First.\n", "Second."], "What?")
    assert [prompt[a:b] for a, b in passages] == ["First.", "Second."]
    assert question is not None
    assert prompt[question[0] : question[1]] == "What?"


WRONG = {
    "the prompt of": ["--prompt-file", "empty.txt"],
    "neither of": ["--context", str(KEY)],
    "both of": ["--prompt", "x", "--prompt-file", str(KEY)],
    "No such file": ["--prompt-file", "nowhere.txt"],
    "no text in UTF-8": ["--prompt-file", "binary"],
    "no such level": ["--prompt-file", str(KEY), "--units", "chapter"],
    "no card has this name": ["--prompt-file", str(KEY), "--by", "mexgin"],
    "scores no parts of a text": ["--prompt-file", str(KEY), "--by", "daam"],
    "not in what the model wrote": ["--prompt-file", str(KEY), "--span", "submarine"],
    "0 <= start < end": ["--prompt-file", str(KEY), "--span", "10:4000"],
    "reads 4096 in all": ["--prompt-file", "long.txt"],
    "has none": ["--prompt-file", str(KEY), "--template"],
}


@pytest.mark.parametrize("says", WRONG)
def test_wrong_input_gets_one_clear_error_and_leaves_nothing(
    says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text(" \n")
    Path("binary").write_bytes(bytes(range(128, 200)))
    Path("long.txt").write_text("Anna is in the kitchen. " * 900)
    before = sorted(tmp_path.iterdir())
    code, printed, told = whence_says(capsys, "explain", "facts", *WRONG[says], "--out", "out")
    assert (code, printed) == (2, "")
    assert says in told
    assert [line.partition(":")[0] for line in told.strip().splitlines()] == ["asked", "found", "would work"]
    assert sorted(tmp_path.iterdir()) == before


def test_a_pickle_and_a_directory_without_a_model_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny("gpt2").config.save_pretrained(tmp_path)
    asked = ["explain", tmp_path, "--prompt", "Anna", "--out", tmp_path / "out"]
    assert "no weights" in whence_says(capsys, *asked)[2]
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    assert "only a pickle" in whence_says(capsys, *asked)[2]
    asked[1] = tmp_path / "nowhere"
    assert "no such directory" in whence_says(capsys, *asked, "--span", "x")[2]


def test_train_facts_says_what_it_cannot_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", tmp_path / "out"]
    assert "no such folder" in whence_says(capsys, "train", "facts", "--data", tmp_path / "no", *out)[2]
    assert "always trained from nothing" in whence_says(capsys, "train", "facts", "--start", tmp_path, *out)[2]
    assert "reads no data" in whence_says(capsys, "train", "shapes", "--data", tmp_path, *out)[2]
