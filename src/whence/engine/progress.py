"""Progress of long work on standard error: bar, rate, time left. Silent where standard error is no terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Advance(Protocol):
    """Tells the bar that ``n`` more units are done."""

    def __call__(self, n: int = 1, note: str = "") -> None: ...


@contextmanager
def progress(what: str, total: int, done: int = 0, unit: str = "") -> Iterator[Advance]:
    """Show a bar for ``total`` units of work, of which ``done`` were done before; yields the function that advances it.

    >>> with progress("counting", total=2) as advance:
    ...     advance(2)
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{task.speed:.1f} {unit or 'it'}/s" if task.speed else "")

    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        Rate(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
        console=Console(file=sys.stderr), disable=not sys.stderr.isatty(),
    )  # fmt: skip
    with bar:
        task = bar.add_task(what, total=total, completed=done, note="")

        def advance(n: int = 1, note: str = "") -> None:
            bar.update(task, advance=n)
            if note:
                bar.update(task, note=note)

        yield advance
