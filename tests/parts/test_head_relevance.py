"""Relevance of heads: the heads of the wired layer are found; the weights fit DAAM; bad input is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from wired_pipeline import REAL, wired

from whence.errors import MethodError, PromptError
from whence.inputs.daam import DAAM
from whence.parts.head_relevance import HeadRelevance


class FarFrom:
    """How near a picture is to a given one."""

    name = "nearness to the run"

    def __init__(self, run: Any) -> None:
        self.run = run

    def __call__(self, run: Any) -> float:
        return -float(np.linalg.norm(run.latents - self.run.latents))


@pytest.fixture(scope="module")
def run() -> Any:
    return wired().picture("a red circle", seed=4, steps=2, guidance=3.0, height=32, width=32)


@pytest.fixture(scope="module")
def found(run: Any) -> Any:
    return HeadRelevance(word="red", other="blue", subsets=48).explain(run, FarFrom(run))


def test_only_heads_of_the_layer_that_carries_the_word_are_relevant(found: Any) -> None:
    order = np.argsort(-found.scores[:, 0])
    assert found.units.labels[order[0]].startswith(REAL)
    assert set(found.details["daam_heads"]["word"]) == {REAL}
    own = np.array([label.startswith(REAL) for label in found.units.labels])
    assert found.scores[own, 0].mean() > 2 * np.abs(found.scores[~own, 0]).mean()


def test_daam_reads_the_chosen_heads(run: Any, found: Any) -> None:
    heads = {layer: tuple(h) for layer, h in found.details["daam_heads"]["word"].items()}
    maps = DAAM(blocks=("down", "mid", "up"), heads=heads).explain(run)
    assert maps.details["layers"] == [REAL]
    assert maps.details["heads"] == len(heads[REAL])


def test_each_head_is_asked_in_as_many_pictures_as_not(found: Any) -> None:
    assert found.scores.shape == (len(found.units), 1)
    assert found.cost.runs == 48
    assert 0 < found.details["explained"]["word"][0] <= 1


def test_bad_input_is_refused_before_any_run(run: Any) -> None:
    with pytest.raises(PromptError, match="circle"):
        HeadRelevance(word="green", other="blue").explain(run)
    with pytest.raises(MethodError, match="other='blue'"):
        HeadRelevance(word="red").explain(run)
    with pytest.raises(MethodError, match="readout"):
        HeadRelevance(word="red", other="blue").explain(run)
    with pytest.raises(MethodError, match="4 or more"):
        HeadRelevance(word="red", other="blue", subsets=2).explain(run, FarFrom(run))
