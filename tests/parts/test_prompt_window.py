"""The window that reads another prompt: the wired layer is found, and agrees with tracing; bad input is refused."""

from __future__ import annotations

from typing import Any

import pytest
from wired_pipeline import REAL, TWIN, wired

from whence.engine.patch import Corruption
from whence.errors import MethodError, PromptError
from whence.models import tiny
from whence.models.loading import load
from whence.parts.causal_trace import CausalTrace
from whence.parts.prompt_window import PromptWindow


@pytest.fixture(scope="module")
def run() -> Any:
    return wired().picture("a red circle", seed=4, steps=2, guidance=3.0, height=32, width=32)


def test_the_layer_that_carries_the_word_is_found_and_tracing_agrees(run: Any) -> None:
    found = PromptWindow(word="red", other="blue", width=1, seeds=2).explain(run)
    effects = dict(zip(found.units.labels, found.totals.tolist(), strict=True))
    assert effects[REAL] > 0.001
    assert max(v for k, v in effects.items() if k != REAL) < 1e-5
    assert effects[TWIN] < 1e-5
    layers = CausalTrace(word="red", corruption=Corruption("swap", other="blue"), seeds=1, kinds=("cross-attention",))
    traced = layers.explain(run)
    assert traced.units.labels[traced.details["order"][0]] == max(effects, key=effects.__getitem__)


def test_every_window_with_the_layer_in_it_changes_the_picture_alike(run: Any) -> None:
    found = PromptWindow(word="red", other="blue", width=2, seeds=1).explain(run)
    has = [REAL in w for w in found.details["windows"]]
    values = found.totals.tolist()
    inside = [v for v, i in zip(values, has, strict=True) if i]
    assert min(inside) > 0.001 > max(v for v, i in zip(values, has, strict=True) if not i)
    assert max(inside) - min(inside) < 1e-4
    assert found.cost.runs == 1 + len(values)


def test_bad_input_is_refused_before_any_run(run: Any) -> None:
    with pytest.raises(PromptError, match="circle"):
        PromptWindow(word="green", other="blue").explain(run)
    with pytest.raises(MethodError, match="1 to"):
        PromptWindow(word="red", other="blue", width=99).explain(run)
    with pytest.raises(MethodError, match="other='blue'"):
        PromptWindow(word="red").explain(run)
    flux = load(tiny.flux()).picture("a red circle", seed=0, steps=1)
    with pytest.raises(MethodError, match="causal_trace"):
        PromptWindow(word="red", other="blue").explain(flux)
