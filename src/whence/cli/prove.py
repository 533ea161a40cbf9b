"""`whence prove`: methods on trial where the answer is known."""

from __future__ import annotations

import json as json_text
import os
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..errors import OutputError
from ..method import card_of, catalogue

SCHEMA = "whence.verdicts/1"
RECORD = Path("docs") / "verdicts.json"


def prove(names: list[str], full: bool, json: bool, write: bool) -> None:
    """Run the trials of these methods (none: all), print a table or JSON, and record them if asked to.

    Raises MethodError for an unknown name, OutputError where there is no ``docs`` folder to record in.
    """
    for name in names:
        card_of(name)
    if write and not RECORD.parent.is_dir():
        raise OutputError(f"--write {RECORD}", "no docs folder here", "run it at the root of a clone of the repository")
    from ..engine.progress import progress
    from ..proving import prove
    from ..report.bundle import plain

    with progress("trials", total=len(names or catalogue()), unit="methods") as advance:
        rows: list[dict[str, Any]] = plain(prove(names, full, advance))
    if write:
        _record(rows, full)
    if json:
        print(json_text.dumps(rows, indent=2, ensure_ascii=False, allow_nan=False))
        return
    _print(rows)


def _record(rows: list[dict[str, Any]], full: bool) -> None:
    """Put rows into the record; those of methods that were not tried now stay as they are."""
    versions = {name: version(name) for name in ("torch", "diffusers", "transformers", "numpy")}
    today = {"date": date.today().isoformat(), "versions": versions}
    kept = json_text.loads(RECORD.read_text(encoding="utf8"))["methods"] if RECORD.exists() else []
    found = {row["method"]: row for row in kept} | {row["method"]: row | today for row in rows}
    command = "whence prove --full --write" if full else "whence prove --write"
    record = {"schema": SCHEMA, "command": command, **today, "methods": [found[n] for n in sorted(found)]}
    part = RECORD.with_suffix(".json.part")
    part.write_text(json_text.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf8")
    os.replace(part, RECORD)


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
    for row in rows:
        if row.get("reason"):
            console.print(f"[bold]{escape(row['method'])}[/]: {escape(str(row['reason']))}", style="dim")
