"""When enough was drawn, and whether the scores hold for coalitions that they were not made from."""

from __future__ import annotations

import numpy as np
import pytest

from whence.ablations.shapley_sampling import ShapleySampling
from whence.engine.enough import LEAST, held_out, rank_error, stop
from whence.inputs.context_cite import ContextCite
from whence.inputs.textgen_shap import TextGenSHAP
from whence.units import Units

N, CAUSE = 14, 9


class Game:
    """Unit 9 does it, with a little of all others; or each pair of neighbours does it only together."""

    readout, capabilities = "value of a known function", frozenset[str]()

    def __init__(self, noise: float = 0.0, pairs: bool = False) -> None:
        self.noise, self.pairs, self.rng, self.rows = noise, pairs, np.random.default_rng(0), 0
        self.units = Units("unit", tuple(f"u{i}" for i in range(N)), tuple(((i, i + 1),) for i in range(N)))

    def ask(self, keep: np.ndarray) -> np.ndarray:
        self.rows += len(keep)
        z = 2.0 * keep - 1
        f = (z * np.roll(z, 1, 1))[:, ::2].sum(1) if self.pairs else 2 * keep[:, CAUSE] + 0.05 * keep.sum(1)
        return np.asarray(f + self.noise * self.rng.normal(size=len(keep)))


METHODS = {
    "shapley_sampling": (ShapleySampling, {"orders": 200, "held_back": 40}),
    "textgen_shap": (TextGenSHAP, {"samples": 200, "held_back": 40, "exact_up_to": 2, "levels": 1}),
    "banzhaf": (TextGenSHAP, {"index": "banzhaf", "samples": 200, "held_back": 40, "exact_up_to": 2, "levels": 1}),
    "context_cite": (ContextCite, {"ablations": 400}),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_tolerance_saves_passes_and_finds_the_same_cause(name: str) -> None:
    kind, settings = METHODS[name]
    whole, some = Game(noise=0.3), Game(noise=0.3)
    a = kind(**settings).explain(whole)
    b = kind(**settings, tolerance=0.15).explain(some)
    assert int(a.totals.argmax()) == int(b.totals.argmax()) == CAUSE
    assert some.rows < 0.6 * whole.rows
    assert b.spread is not None
    assert rank_error(b.totals, b.spread) <= 0.15
    tighter = Game(noise=0.3)
    kind(**settings, tolerance=0.04).explain(tighter)
    assert tighter.rows > some.rows


@pytest.mark.parametrize("name", [n for n in METHODS if n != "context_cite"])
def test_what_was_held_back_tells_sums_that_hold_from_sums_that_do_not(name: str) -> None:
    kind, settings = METHODS[name]
    good, bad = (kind(**settings).explain(Game(pairs=p)).details["fit"] for p in (False, True))
    assert good["n"] == bad["n"] == 40
    assert good["r2"] > 0.95
    assert good["spearman"] > 0.9
    assert bad["r2"] < 0.3


def test_the_stated_error_is_the_one_that_there_is() -> None:
    """Over many runs, scores stopped at a tolerance differ from the truth by about what they say."""
    truth = np.full(N, 0.05)
    truth[CAUSE] += 2
    off, told = [], []
    for seed in range(12):
        e = ShapleySampling(orders=300, tolerance=0.1, seed=seed).explain(Game(noise=0.4))
        assert e.spread is not None
        off.append(e.totals - truth)
        told.append(e.spread)
    share = np.std(off) / np.sqrt(np.mean(np.square(told)))
    assert 0.7 < share < 1.5


def test_nothing_is_said_of_too_few_samples_or_of_none_that_differ() -> None:
    rng = np.random.default_rng(1)
    same = [np.arange(4.0)] * LEAST
    assert stop(same, 0.1)
    assert not stop(same[1:], 0.1)
    assert not stop(same, None)
    assert not stop([np.ones(4)] * 20, 0.5)  # no ranking yet
    assert not stop([rng.normal(size=4) for _ in range(20)], 0.01)
    assert rank_error(np.arange(3.0), None) == float("inf")
    assert held_out(np.zeros(20), np.zeros(20)) == {"r2": None, "spearman": None, "n": 20}
    shuffled = held_out(rng.permutation(50.0 * np.arange(50)), 50.0 * np.arange(50))
    assert shuffled["r2"] < 0.2
