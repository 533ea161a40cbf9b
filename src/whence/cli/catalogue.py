"""`whence methods`: the cards, read without importing a method."""

from __future__ import annotations

import json as json_text
from dataclasses import asdict

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..method import card_of, catalogue


def methods(name: str | None, json: bool) -> None:
    """Print all cards, or one. Raises MethodError for a name that no card has."""
    cards = [card_of(name)] if name else list(catalogue().values())
    if json:
        records = [asdict(c) for c in cards]
        print(json_text.dumps(records[0] if name else records, indent=2, ensure_ascii=False))
        return
    console = Console()
    if name:
        console.print(_card(asdict(cards[0])))
        return
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for heading in ("method", "question", "works on", "cost"):
        table.add_column(heading, overflow="fold", no_wrap=heading == "method")
    for c in cards:
        table.add_row(f"[bold]{escape(c.name)}[/]", *map(escape, (c.question, ", ".join(c.works_on), c.cost)))
    console.print(table)


def _card(record: dict[str, object]) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in record.items():
        if isinstance(value, dict):
            text = "\n".join(f"{k}: {v}" for k, v in value.items())
        else:
            text = ", ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)
        if text:
            table.add_row(key, escape(text))
    return table
