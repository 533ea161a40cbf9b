"""The report's four lines per word, condensed for a terminal."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..report.fragments import cost, interval, number

if TYPE_CHECKING:
    from ..explanation import Explanation
    from ..report.bundle import Bundle
    from ..verdict import Verdict

MARKS = {"supported": ("✓", "blue"), "refuted": ("✕", "red"), "undecided": ("?", "yellow")}


def print_table(bundle: Bundle) -> None:
    """Each method's table on standard error: word, its map's mean, verdict, effect, control, replacements."""
    console = Console(stderr=True, highlight=False)
    console.print(escape(str(bundle.run)), style="dim")
    scopes = list(dict.fromkeys(t.verdict.scope for t in bundle.trials)) or [""]
    for e in bundle.explanations:
        for scope in scopes:
            of = f"; verdicts for {scope}" if scope else ""
            console.print(f"\n[bold]{escape(e.method)}[/]: {e.kind}; {cost(e)}{of}")
            console.print(_table(bundle, e, scope))
    if not bundle.trials:
        word = max(bundle.run.words.names, key=len, default="dog")
        hint = (
            "\nNothing was tried: no words are known that could take a word's place. "
            f"Name some, for two words or more (one is the other's control): --swap {word}=A,B,C"
        )
        console.print(escape(hint))
    sys.stderr.flush()


def _table(bundle: Bundle, e: Explanation, scope: str) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    for heading in ("word", "map", "verdict", "effect", "n", "control", "replaced by"):
        table.add_column(heading, no_wrap=heading not in ("replaced by",), overflow="fold")
    totals = dict(zip(e.units.labels, e.totals, strict=True))
    for label in bundle.run.words.labels:
        mean = f"{totals[label]:.3f}" if label in totals else ""
        others = " ".join(c.replacement for c in bundle.counterfactuals if c.word == label)
        row = (f"[bold]{escape(label)}[/]", mean)
        found = [v for v in bundle.verdicts(e.method, label) if v.scope == scope]
        for v in found:
            mark, colour = MARKS[v.word]
            ends = f" [dim]{escape(_ends(v))}[/]" if interval(v.interval) else ""
            effect, control = (number(round(x, 3) if math.isfinite(x) else x) for x in (v.effect, v.control))
            said = f"[{colour}]{mark} {v.word}[/]"
            table.add_row(*row, said, effect + ends, str(v.n), control, f"[dim]{escape(others)}[/]")
        if not found:
            table.add_row(*row, "[dim]  not tried[/]", "", "", "", f"[dim]{escape(others)}[/]")
    return table


def _ends(v: Verdict) -> str:
    return "[{:.2f}, {:.2f}]".format(*v.interval)
