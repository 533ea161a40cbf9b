"""Progress of long work on standard error: bar, rate, time left. Where standard error is no terminal (a log file of a
cluster), a line now and then, of work that takes longer than that."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

SECONDS = 60.0
"""Between two lines in a log."""


class Advance(Protocol):
    """Tells the bar that ``n`` more units are done."""

    def __call__(self, n: int = 1, note: str = "") -> None: ...


@contextmanager
def progress(what: str, total: int, done: int = 0, unit: str = "") -> Iterator[Advance]:
    """Show a bar for ``total`` units of work, of which ``done`` were done before; yields the function that advances it.

    >>> with progress("counting", total=2) as advance:
    ...     advance(2)
    """
    if not sys.stderr.isatty():
        yield _lines(what, total, done, unit or "it")
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{task.speed:.1f} {unit or 'it'}/s" if task.speed else "")

    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        Rate(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=Console(file=sys.stderr),
    )  # fmt: skip
    with bar:
        task = bar.add_task(what, total=total, completed=done, note="")

        def advance(n: int = 1, note: str = "") -> None:
            bar.update(task, advance=n)
            if note:
                bar.update(task, note=note)

        yield advance


def _lines(what: str, total: int, done: int, unit: str) -> Advance:
    """Says how far it is, how fast and how long still, when SECONDS have passed since it did last."""
    began = said = time.monotonic()
    now = done

    def advance(n: int = 1, note: str = "") -> None:
        nonlocal said, now
        now += n
        at = time.monotonic()
        if at - said < SECONDS or now == done:
            return
        said, rate = at, (now - done) / (at - began)
        left = max(total - now, 0) / rate
        told = f"{what}: {now}/{total}, {rate:.3g} {unit}/s, {left / 60:.0f} min left"
        print(f"{told}, {note}" if note else told, file=sys.stderr, flush=True)

    return advance
