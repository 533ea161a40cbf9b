"""`whence prove`: methods on trial where the answer is known."""

from __future__ import annotations

import json as json_text
import os
import sys
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..errors import OutputError
from ..method import card_of

SCHEMA = "whence.verdicts/1"
RECORD = Path("docs") / "verdicts.json"


JOURNAL = Path("whence-prove.jsonl")


@dataclass(frozen=True)
class Asked:
    """What was typed."""

    names: tuple[str, ...]
    world: str | None
    full: bool
    key: str | None
    journal: Path | None
    write: bool
    jobs: int


def prove(asked: Asked, json: bool) -> None:
    """Run the trials of these methods (none: all), print a table or JSON, and record them if asked to.

    Raises MethodError for an unknown name, RunError for an unknown world or one whose own tests fail, OutputError where
    there is no ``docs`` folder to record in.
    """
    for name in asked.names:
        if ".py:" not in name:
            card_of(name)
    if asked.write and not RECORD.parent.is_dir():
        raise OutputError(f"--write {RECORD}", "no docs folder here", "run it at the root of a clone of the repository")
    if asked.write and (asked.world or asked.key or any(".py:" in n for n in asked.names)):
        raise OutputError(
            "--write with another world, key or explainer", "the record holds each card's own trial",
            "--write without --world, --key and file.py:function",
        )  # fmt: skip
    from ..engine.progress import progress
    from ..proving import pieces, prove
    from ..report.bundle import plain

    journal = asked.journal or (JOURNAL if asked.full else None)
    total = pieces(asked.names, asked.full, asked.world)
    with progress("trials", total=total, unit="draws") as advance:
        found = prove(
            asked.names, asked.full, advance, world=asked.world, key=asked.key, journal=journal, jobs=asked.jobs
        )
    rows: list[dict[str, Any]] = plain(found)
    if asked.write:
        _record(rows, asked.full)
    if json:
        print(json_text.dumps(rows, indent=2, ensure_ascii=False, allow_nan=False))
        return
    _print(rows)


def _record(rows: list[dict[str, Any]], full: bool) -> None:
    """Put rows into the record; those of methods that were not tried now stay as they are, and so do those of the same
    trial that have more replicates."""
    from ..proving import NOT_NOW

    versions = {name: version(name) for name in ("torch", "diffusers", "transformers", "numpy")}
    today = {"date": date.today().isoformat(), "versions": versions}
    kept = json_text.loads(RECORD.read_text(encoding="utf8"))["methods"] if RECORD.exists() else []
    found = {row["method"]: row for row in kept}
    for row in rows:
        if row["word"] == NOT_NOW:
            continue
        old = found.get(row["method"], {})
        if old.get("trial") == row.get("trial") and _replicates(old) > _replicates(row):
            told = f"{row['method']}: the record keeps {_replicates(old)} replicates, these are {_replicates(row)}"
            print(told, file=sys.stderr)
        else:
            found[row["method"]] = row | today
    command = "whence prove --full --write" if full else "whence prove --write"
    record = {"schema": SCHEMA, "command": command, **today, "methods": [found[n] for n in sorted(found)]}
    part = RECORD.with_suffix(".json.part")
    part.write_text(json_text.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf8")
    os.replace(part, RECORD)


def _replicates(row: dict[str, Any]) -> int:
    return int((row.get("score") or {}).get("n", 0))


def _print(rows: list[dict[str, Any]]) -> None:
    from .table import MARKS

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for heading in ("method", "verdict", "score", "expected", "strongest control", "n", "seconds"):
        table.add_column(heading, no_wrap=heading not in ("strongest control",))
    for row in rows:
        mark, colour = MARKS.get(row["word"], (" ", "dim"))
        cells = [f"[bold]{escape(row['method'])}[/]", f"[{colour}]{mark} {escape(row['word'])}[/]"]
        if "score" in row:
            name, control = max(row["controls"].items(), key=lambda item: item[1]["mean"])
            low, high = row["score"]["interval"]
            cells += [f"{row['score']['mean']:.3f} [dim]{escape(f'[{low:.2f}, {high:.2f}]')}[/]", f"{row['expect']:g}"]
            cells += [f"{control['mean']:.3f} {escape(name)}", str(row["score"]["n"]), f"{row['seconds']:.0f}"]
        table.add_row(*cells)
    console = Console(highlight=False)
    console.print(table)
    panels = [row for row in rows if row.get("panel")]
    for metric, says in PANEL.items():
        if panels:
            console.print(_panel(panels, metric, says))
    for row in rows:
        if row.get("reason"):
            console.print(f"[bold]{escape(row['method'])}[/]: {escape(str(row['reason']))}", style="dim")


PANEL = {
    "auc": "do causes score higher than the rest of arm and twin? (AUC, chance .5)",
    "sets": "are the sets found that must go together? (F1)",
    "effects": "are the effects of interventions foretold? (rank correlation)",
    "quiet": "is it quiet where nothing is the cause? (share)",
}


def _panel(rows: list[dict[str, Any]], metric: str, says: str) -> Table:
    structures = list(dict.fromkeys(s for row in rows for s in row["panel"]))
    table = Table(title=says, title_justify="left", title_style="dim", box=None, padding=(0, 2, 0, 0))
    table.add_column("method", header_style="dim")
    for structure in structures:
        table.add_column(structure, header_style="dim", justify="right")
    for row in rows:
        values = [row["panel"].get(s, {}).get(metric) for s in structures]
        table.add_row(escape(row["method"]), *("" if v is None else f"{v:.2f}" for v in values))
    return table
