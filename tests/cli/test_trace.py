"""`whence trace`, as a new user would type it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from whence.cli import commands, run

FAST = ("--kinds", "self-attention", "--where", "text-encoder", "--seeds", "1", "--steps", "4", "--guidance", "1")


def whence_says(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = run(commands.app, list(map(str, arguments)))
    said = capsys.readouterr()
    return code, said.out, said.err


def test_a_word_is_traced_ranked_and_written_and_a_stopped_trace_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("trace", "shapes", "--prompt", "a red circle", "--word", "red", "--swap", "blue", *FAST)
    more = ("--fresh", "0", "--journal", tmp_path / "journal.jsonl", "-o", tmp_path / "out")
    code, out, err = whence_says(capsys, *asked, *more, "--json")
    assert code == 0, err
    record = json.loads(out)
    assert record["schema"] == "whence/trace/1"
    first = record["sites"][0]
    assert first["site"] == "text_encoder.encoder.layers.0.self_attn at circle"
    assert first["effect"] > 0.9  # the noun carries the colour, from the first layer on
    assert next(r for r in record["sites"] if r["site"].endswith("layers.0.self_attn at a"))["effect"] < 0.1
    assert record["cost"]["runs"] == record["cost"]["one_by_one"] == 2 + len(record["sites"])
    assert record["verdict"] is None
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf8")
    assert page.count("<img") >= 3
    assert "http" not in page.replace("http://www.w3.org", "")
    assert "<script" not in page
    written = json.loads((tmp_path / "out" / "trace.json").read_text(encoding="utf8"))
    assert written["sites"] == record["sites"]
    # Again: what is in the journal is not made again, the report is replaced.
    code, out, err = whence_says(capsys, *asked, *more)
    assert code == 0, err
    assert "2 pictures made" in out
    assert "layers.0.self_attn at circle" in out.splitlines()[1]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--prompt", "", "--word", "red"), "a few words"),
        (("--prompt", "a red circle"), "--word circle"),
        (("--prompt", "a red circle", "--word", "green"), "red"),
        (("--prompt", "a red zebra", "--word", "red"), "never saw zebra"),
        (("--prompt", "a red circle", "--word", "red", "--where", "vae"), "text-encoder"),
        (("--prompt", "a red circle", "--word", "red", "--fresh", "2"), "6 or more"),
        (("--prompt", "a red circle", "--word", "red", "--corrupt", "swap"), "--swap WORD"),
        (("--prompt", "a red circle", "--word", "red", "--kinds", "gates"), "cross-attention"),
    ],
)
def test_bad_input_is_refused_in_one_error(
    arguments: tuple[Any, ...], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = whence_says(capsys, "trace", "shapes", *arguments)
    assert code == 2
    assert not out
    assert says in err
    assert err.count("would work") == 1
