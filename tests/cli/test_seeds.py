"""`whence seeds`, as a new user would type it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from whence import verbs
from whence.cli import commands, run
from whence.cli.seeds import seeds_of
from whence.engine.randomness import stream


class Painter:
    """A model whose picture is bright for the seeds below 20 and for some others, prompt by prompt."""

    name, default_size, steps, guidance, fingerprint = "painter", (8, 8), 1, 1.0, "painter"
    asked = 0

    def words(self, prompt: str) -> None: ...

    def refuse(self, settings: Any) -> None: ...

    def generate_many(self, many: list[Any], batch: int) -> list[Any]:
        Painter.asked += len(many)
        bright = [s.seed < 20 or stream("painter", s.seed, s.prompt).random() < 0.3 for s in many]
        return [type("Run", (), {"images": np.full((1, 8, 8, 3), 200 * b, np.uint8)})() for b in bright]


@pytest.fixture
def painter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    Painter.asked = 0
    monkeypatch.setattr(verbs, "load", lambda model=None: Painter())
    file = tmp_path / "bright.py"
    file.write_text("def judge(prompt, image):\n    return {'success': image.mean() > 100, 'light': image.mean()}\n")
    return f"{file}:judge"


def whence_says(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = run(commands.app, list(map(str, arguments)))
    said = capsys.readouterr()
    return code, said.out, said.err


LIKE = [a for i in range(7) for a in ("--like", f"other {i}")]


def test_seeds_that_matter_are_named_and_shown(
    painter: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "page"
    asked = ["seeds", "mine", "--prompt", "a <b> house", *LIKE, "--judge", painter]
    code, said, err = whence_says(capsys, *asked, "--json", "-o", out, "--journal", tmp_path / "j")
    assert code == 0, err
    record = json.loads(said)
    assert record["matter"] == "supported"
    assert all(r["seed"] < 20 for r in record["top"])
    assert record["test"]["p"] < 0.01
    assert record["shares"]["light"]["within"] > 0.2
    assert Painter.asked == record["pictures"] == 64 * 4 + 16 * 4
    page = (out / "report.html").read_text()
    assert "Seeds matter here" in page
    assert "a &lt;b&gt; house" in page
    assert page.count("<li class") == 64 * 4
    assert page.count("data:image/png") == 64 * 4
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "<script" not in page
    assert json.loads((out / "seeds.json").read_text())["top"] == record["top"]
    # again: the journal has all of it, and the page takes the old one's place
    code, again, err = whence_says(capsys, *asked, "-o", out, "--journal", tmp_path / "j")
    assert code == 0, err
    assert Painter.asked == record["pictures"]
    assert "Seeds matter here" in again


def test_seeds_that_do_not_matter_are_said_not_to(painter: str, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["seeds", "mine", "--prompt", "a house", *LIKE, "--judge", painter]
    code, said, err = whence_says(capsys, *asked, "--seeds", "100:140")
    assert code == 0, err
    assert "No sign that seeds matter here" in said or "Seeds do not matter here" in said


def test_numbers_of_seeds_ranges_and_lists() -> None:
    assert seeds_of("4:6") == (4, 5)
    assert seeds_of("9,2") == (9, 2)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "no prompt"),
        (["--prompt", "two green circles", "--seeds", "-3:20"], "no such seed"),
        (["--prompt", "two green circles", "--seeds", f"{2**63},{','.join(map(str, range(20)))}"], "no such seed"),
        (["--prompt", "two green circles", "--seeds", ",".join(map(str, [*range(20), 4]))], "seed 4 is there twice"),
        (["--prompt", "two green circles", "--seeds", "many"], "no number of seeds"),
        (["--prompt", "two green circles", "--seeds", "9"], "too few are left"),
        (["--prompt", "two green circles", "--seeds", "0"], "0 seeds"),
        (["--prompt", "a house"], "does not know house"),
        (["--prompt", "on night"], "no coloured shapes"),
        (["--prompt", "two green circles", "--prompts", "1"], "2 prompts"),
        (["--prompt", "two green circles", "--like", "two red circles"], "2 of this kind"),
        (["--prompt", "two green circles", "--judge", "nowhere.py:judge"], "no file"),
        (["elsewhere", "--prompt", "two green circles"], "--judge file.py:function"),
    ],
)
def test_wrong_input_gets_one_clear_error(
    painter: str, arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = whence_says(capsys, "seeds", *arguments)
    assert (code, out) == (2, "")
    assert says in err
    assert "would work:" in err
    assert Painter.asked == 0
