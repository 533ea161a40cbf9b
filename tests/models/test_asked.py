"""What a model was asked and said: kept in a file, so that stopped work goes on from there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentences import tiny, tokenizer

from whence import verbs
from whence.inputs.mexgen import MExGen
from whence.models.asked import Asked
from whence.models.text import LanguageModel
from whence.segments import split
from whence.text import TextRun, TextSettings

PROMPT = "Anna is in the kitchen. Ben has the key. Clara took the lamp.\nQuestion: Where is Anna?\nAnswer:"

WORK = """
import sys, time
from pathlib import Path
from whence import verbs
from whence.models import asked
from whence.models.text_question import PromptQuestion
from whence.segments import split
from whence.text import TextSettings

asked.SECONDS = 0
model = verbs.load_text()
run = model.write(TextSettings(sys.argv[1], max_tokens=3))
def slowly(n=1, note=""):
    kept = Path(sys.argv[2])
    enough = kept.exists() and kept.read_bytes().count(b"\\n") >= 3
    time.sleep(600 if enough else 0.02)  # it can only end by being stopped
q = PromptQuestion(model, run, split(run.prompt), "word", megabytes=0.5, advance=slowly, kept=Path(sys.argv[2]))
print("begins", flush=True)
verbs.explain(q, "mexgen")
print("ends", flush=True)
"""


@pytest.fixture(autouse=True)
def kept_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("whence.models.asked.SECONDS", 0)


def asked(path: Path | None, prompt: str = PROMPT) -> tuple[TextRun, Any]:
    run = LanguageModel(tiny("llama"), tokenizer(), "tiny").write(TextSettings(prompt, max_tokens=4))
    assert run.model is not None
    return run, run.model.question(run, split(run.prompt), level="word", kept=path)


def test_what_was_said_is_read_back_to_the_last_digit_and_asked_no_more(tmp_path: Path) -> None:
    path = tmp_path / "asked.jsonl"
    _, q = asked(path)
    n = len(q.units)
    keep = np.random.default_rng(0).random((20, n)) < 0.7
    said, scaled = q.ask_tokens(keep), q.suppress(np.where(keep, 1.0, 0.5))
    mean = q.removing("mean").ask(keep)
    _, again = asked(path)
    assert (again.ask_tokens(keep) == said).all()
    assert (again.suppress(np.where(keep, 1.0, 0.5)) == scaled).all()
    assert (again.removing("mean").ask(keep) == mean).all()
    assert again.forwards == 0
    again.suppress(np.where(keep, 1.0, 0.5), "bias")  # another way is another question
    assert again.forwards > 0


def test_another_prompt_or_output_takes_nothing_over(tmp_path: Path) -> None:
    path = tmp_path / "asked.jsonl"
    run, q = asked(path)
    q.ask(np.ones((1, len(q.units)), bool))
    assert len(Asked(run, path)) == 1
    other, _ = asked(path, PROMPT.replace("Anna", "Clara"))
    assert len(Asked(other, path)) == 0
    assert len(Asked(run.again(forced=" Ben"), path)) == 0


def test_a_torn_line_costs_what_it_held_and_no_more(tmp_path: Path) -> None:
    path = tmp_path / "asked.jsonl"
    run, q = asked(path)
    alone = ~np.eye(len(q.units), dtype=bool)
    q.ask(alone[:3])
    q.ask(alone[3:6])
    text = path.read_text()
    path.write_text(text[: len(text) - 40])
    assert len(Asked(run, path)) == 5
    _, again = asked(path)
    # The one that was lost is asked in a pass of its own, which rounds differently.
    assert again.ask(alone[:6]) == pytest.approx(q.ask(alone[:6]), abs=1e-4)
    assert again.forwards == 1
    assert len(Asked(run, path)) == 6


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_killed_process_goes_on_from_what_was_measured(how: signal.Signals, tmp_path: Path) -> None:
    path = tmp_path / "asked.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-c", WORK, PROMPT, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (path.exists() and path.read_bytes().count(b"\n") >= 3) and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.02)
    process.send_signal(how)
    out, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "ends" not in out

    model = verbs.load_text()
    run = model.write(TextSettings(PROMPT, max_tokens=3))
    had = len(Asked(run, path))
    assert had > 0
    kept, whole = (model.question(run, split(run.prompt), level="word", kept=p) for p in (path, None))
    one, other = MExGen().explain(kept), MExGen().explain(whole)
    assert kept.forwards == whole.forwards - had
    # Packs are others, and with them the rounding.
    np.testing.assert_allclose(one.scores, other.scores, atol=1e-4)
