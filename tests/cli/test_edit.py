"""`whence edit` and `whence undo`, as a new user would type them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from whence.change import Change
from whence.cli import commands, run
from whence.worlds.shapes import editing, model_directory


def whence_says(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = run(commands.app, list(map(str, arguments)))
    said = capsys.readouterr()
    return code, said.out, said.err


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_an_edited_copy_differs_in_one_file_and_undo_gives_back_every_byte(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, copy = tmp_path / "change", tmp_path / "copy"
    made = ("edit", "shapes", "--change", "red -> blue", "--seeds", 0, "-o", out, "--apply", copy, "--json")
    code, said, err = whence_says(capsys, *made)
    assert code == 0, err
    told = json.loads(said)
    assert told["change"]["predicted"]["edit"] < 0.3
    assert {p.name for p in out.iterdir()} == {"change.safetensors", "edit.json", "report.html"}
    was, now = files(model_directory()), files(copy)
    ledger = now.pop("whence-ledger.jsonl")
    assert [n for n in was if was[n] != now[n]] == ["text_encoder/model.safetensors"]
    assert json.loads(ledger)["did"] == "apply"

    code, _, err = whence_says(capsys, *made)
    assert code == 2
    assert "already" in err

    code, said, err = whence_says(capsys, "undo", out, copy, "--json")
    assert code == 0, err
    assert json.loads(said)["undone"] == Change.load(out).key
    again = files(copy)
    assert len(again.pop("whence-ledger.jsonl").splitlines()) == 2
    assert again == was
    code, _, err = whence_says(capsys, "undo", out, copy)
    assert code == 2
    assert told["change"]["fingerprint"] in err
    assert not list(tmp_path.glob(".*"))


def test_the_page_says_what_moved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(editing.pictures, "__defaults__", (1, 1.0, None))
    code, said, err = whence_says(
        capsys, "edit", "shapes", "--change", "green -> purple", "--by", "time", "--seeds", 8, "--relearn", 1,
        "-o", tmp_path / "c", "--json",
    )  # fmt: skip
    assert code == 0, err
    told = json.loads(said)
    assert set(told["rates"]) == set(editing.GROUPS)
    assert all(r["n"] == 8 and len(r["interval"]) == 2 for r in told["rates"].values())
    assert told["verdict"]["n"] == 8
    assert len(told["relearn"]["edited word"]) == 2
    page = (tmp_path / "c" / "report.html").read_text(encoding="utf8")
    for piece in ("green -&gt; purple", 'class="wipe"', "How fast does it come back?", "left to go", "data:image/png"):
        assert piece in page
    assert "http" not in page


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--change", "red blue"), "arrow"),
        (("--change", "red -> blue", "--by", "nucleus"), "plans no change"),
        (("--change", "red -> blue", "--seeds", 3), "too few"),
        (("--change", "red -> blue", "--by", "uce", "--site", "x"), "diff_quickfix"),
        (("--change", "elephant -> blue", "--dry-run"), "never saw elephant"),
        (("--change", "red -> blue", "--keep", "red", "--dry-run"), "conflicts with what is to be kept"),
    ],
)
def test_what_cannot_be_done_is_refused_before_any_work(
    arguments: tuple[object, ...], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = whence_says(capsys, "edit", "shapes", *arguments, "-o", tmp_path / "out")
    assert code == 2
    assert says in err
    assert not out
    assert not (tmp_path / "out").exists()


def test_undo_needs_a_pipeline_and_a_change(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert whence_says(capsys, "undo", tmp_path, tmp_path)[0] == 2
    code, _, err = whence_says(capsys, "undo", tmp_path / "none", model_directory())
    assert code == 2
    assert "no such file" in err
