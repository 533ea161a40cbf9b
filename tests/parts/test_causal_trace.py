"""Causal tracing: the wired module is found by word, in denoiser and text encoder; bad input is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from wired_pipeline import REAL, TWIN, wired

from whence.engine.patch import Corruption
from whence.errors import MethodError, PromptError
from whence.parts.causal_trace import CausalTrace
from whence.report.bundle import plain

SWAP = Corruption("swap", other="blue")


@pytest.fixture(scope="module")
def run() -> Any:
    return wired().picture("a red circle", seed=4, steps=2, guidance=3.0, height=32, width=32)


@pytest.fixture(scope="module")
def found(run: Any) -> Any:
    return CausalTrace(word="red", corruption=SWAP, seeds=2).explain(run)


def test_the_module_that_carries_the_word_is_first_and_its_interval_excludes_the_others(found: Any) -> None:
    rows = found.details["sites"]
    order = found.details["order"]
    assert rows[order[0]]["site"] == REAL
    assert rows[order[0]]["effect"] > 0.99
    assert next(r for r in rows if r["site"] == TWIN)["effect"] < 0.5
    assert found.readout == "closeness of the latents"
    assert found.cost.runs == found.details["runs_one_by_one"] == 2 * (2 + len(rows))


def test_the_only_way_of_the_word_is_called_a_bottleneck(found: Any) -> None:
    # Everything that the prompt does passes through it, so the whole picture comes back.
    assert any(REAL in note and "bottleneck" in note for note in found.notes)


def test_heads_of_the_wired_module_come_first(run: Any) -> None:
    heads = CausalTrace(word="red", corruption=SWAP, seeds=1, heads=True, kinds=("cross-attention",)).explain(run)
    first = heads.units.labels[heads.details["order"][0]]
    assert first.startswith(REAL + " head")


def test_halves_need_fewer_pictures_and_name_the_same_first_site(run: Any, found: Any) -> None:
    halves = CausalTrace(word="red", corruption=SWAP, seeds=2, search="halves", floor=0.4).explain(run)
    assert halves.details["sites"][halves.details["order"][0]]["site"] == REAL
    assert halves.cost.runs < halves.details["runs_one_by_one"]


def test_the_verdict_asks_fresh_seeds_and_random_sites(run: Any, found: Any) -> None:
    method = CausalTrace(word="red", corruption=SWAP, seeds=2)
    verdict = method.judge(run, found, seeds=8, draws=1)
    assert verdict.n == 8
    assert verdict.details["site"] == found.details["sites"][found.details["order"][0]]["site"] or verdict.word
    assert "random sites" in verdict.details["controls"]


def test_the_answer_is_json_and_draws_itself(found: Any) -> None:
    record = json.loads(json.dumps(plain(found.record())))
    assert record["kind"] == "indirect effect"
    assert "causal_trace" in found._repr_html_()
    assert str(found)


def test_bad_input_is_refused_before_any_run(run: Any) -> None:
    for method, error, text in (
        (CausalTrace(word="green"), PromptError, "a, red, circle"),
        (CausalTrace(word="red", where="vae"), MethodError, "text encoder"),
        (CausalTrace(word="red", search="quick"), MethodError, "halves"),
        (CausalTrace(word="red", seeds=0), MethodError, "1 or more"),
        (CausalTrace(word="red", where="text encoder", heads=True), MethodError, "heads=False"),
    ):
        with pytest.raises(error, match=text):
            method.explain(run)
    with pytest.raises(MethodError, match="without its model"):
        CausalTrace(word="red").explain(replace(run, model=None))
