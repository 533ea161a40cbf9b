"""Progress: a bar in a terminal, a line now and then in a log, and nothing of work that is quickly done."""

from __future__ import annotations

import pytest

from whence.engine import progress as module
from whence.engine.progress import progress


def test_a_log_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    with progress("pictures", total=10, done=2, unit="pictures") as advance:
        for _ in range(8):
            clock[0] += 25
            advance(1, "daam")
    told = capsys.readouterr().err.splitlines()
    # After 75 s three are done: .04 a second, and five are left.
    assert told[0] == "pictures: 5/10, 0.04 pictures/s, 2 min left, daam"
    assert len(told) == 2


def test_quick_work_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("counting", total=3) as advance:
        for _ in range(3):
            advance()
    assert capsys.readouterr().err == ""
