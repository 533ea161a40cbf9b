"""METHODS.md is made from the cards, the recorded trials and the roadmap, and is never edited by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from whence.errors import OutputError
from whence.method import catalogue
from whence.report.methods_page import SCHEMA, main, methods_page, read_systems, read_verdicts

ROOT = Path(__file__).parents[1]


def score(mean: float) -> dict[str, Any]:
    return {"name": "shapes.pointing", "unit": "share", "mean": mean, "interval": [mean - 0.05, mean + 0.05], "n": 60}


ROW = {
    "method": "daam", "word": "supported", "trial": "shapes.pointing", "expect": 0.75, "score": score(0.9),
    "controls": {"random": score(0.5), "shuffled": score(0.48)}, "seconds": 31.0, "verdict": {},
}  # fmt: skip


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "systems.tsv", tmp_path / "docs")
    return tmp_path


def record(root: Path, *rows: dict[str, Any], **changes: Any) -> None:
    whole = {"schema": SCHEMA, "command": "whence prove --full --write", "date": "2025-11-21",
             "versions": {"whence": "0.1.0"}, "methods": list(rows)}  # fmt: skip
    (root / "docs" / "verdicts.json").write_text(json.dumps(whole | changes))


def test_the_page_in_the_repository_is_up_to_date() -> None:
    page = ROOT / "METHODS.md"
    assert page.exists(), "run: python -m whence.report.methods_page"
    assert page.read_text(encoding="utf8") == methods_page(ROOT), "stale; run: python -m whence.report.methods_page"


def test_every_card_and_every_row_of_the_roadmap_is_on_the_page(root: Path) -> None:
    page = methods_page(root)
    for card in catalogue().values():
        assert f"### {card.name}\n" in page
        assert card.claim in page
        assert card.avoid in page
    for row in read_systems(root / "docs" / "systems.tsv"):
        assert row["id"] in page
    assert "| **all** | 197 |" in page


def test_a_method_without_a_recorded_trial_is_not_yet_tried(root: Path) -> None:
    assert "**Found: not yet tried.**" in methods_page(root)


def test_a_recorded_trial_shows_its_numbers_and_its_controls(root: Path) -> None:
    before = methods_page(root)
    record(root, ROW)
    page = methods_page(root)
    assert page != before
    assert "0.900 [0.850, 0.950] share, n=60, 31 s. Controls: random 0.500 [0.450, 0.550]; shuffled" in page
    assert "(2025-11-21; whence 0.1.0)" in page
    assert "| S000-01 | What the DAAM: Interpreting Stable Diffusion Using Cross Attention | daam | supported |" in page


def test_a_method_that_is_not_shown_says_why(root: Path) -> None:
    record(root, {"method": "daam", "word": "not shown", "reason": "it does not beat a centre map"})
    assert "**Found: not shown.** It does not beat a centre map." in methods_page(root)


@pytest.mark.parametrize(
    "changes", [{"schema": "whence.verdicts/9"}, {"methods": [{"method": "daam", "word": "good"}]}]
)
def test_a_record_that_cannot_be_read_gets_one_clear_error(root: Path, changes: dict[str, Any]) -> None:
    record(root, ROW, **changes)
    with pytest.raises(OutputError, match="would work"):
        read_verdicts(root / "docs" / "verdicts.json")


def test_the_page_is_written_whole_or_not_at_all(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(root)
    assert (root / "METHODS.md").read_text(encoding="utf8") == methods_page(root)
    assert [p.name for p in root.iterdir() if p.suffix == ".part"] == []
    assert capsys.readouterr().out.strip() == str(root / "METHODS.md")
    with pytest.raises(OutputError, match="clone"):
        main(root / "docs")
