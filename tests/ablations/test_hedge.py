"""HEDGE: units that act together stay together, and nothing stays together where units only add up."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from math import factorial
from typing import Any

import numpy as np
import pytest

from whence.ablations.hedge import HEDGE
from whence.errors import BudgetError, MethodError
from whence.question import Answer, Budget, Metered
from whence.units import Units
from whence.worlds.trial import recovery

F = Callable[[Any], Any]


class Tossed:
    """f of n fair coins, all observed as 1; a removed coin is tossed again."""

    readout, capabilities = "value of a known function", frozenset[str]()

    def __init__(self, f: F, n: int = 8, seed: int = 0) -> None:
        self.f, self.n, self.rng = f, n, np.random.default_rng(seed)
        self.units = Units("unit", tuple(f"u{i}" for i in range(n)), tuple(((i,),) for i in range(n)))

    def ask(self, keep: np.ndarray) -> Any:
        return self.f(np.where(keep, 1.0, self.rng.integers(0, 2, keep.shape)))


class Exact(Tossed):
    """The same, answered by the expectation over all tosses."""

    def ask(self, keep: np.ndarray) -> Any:
        states = ((np.arange(2**self.n)[:, None] >> np.arange(self.n)) & 1).astype(float)
        fits = ((states[None] == 1) | ~keep[:, None]).all(2)
        return (fits * self.f(states)).sum(1) / fits.sum(1)


def both(z: np.ndarray) -> Any:
    return z[:, 2] * z[:, 3]


def either(z: np.ndarray) -> Any:
    return 1 - (1 - z[:, 2]) * (1 - z[:, 3])


def differ(z: np.ndarray) -> Any:
    return 1 - (z[:, 5] - z[:, 6]) ** 2


def three(z: np.ndarray) -> Any:
    return z[:, 4] * z[:, 5] * z[:, 6] + 0.3 * z[:, 0]


def additive(z: np.ndarray) -> Any:
    return z @ np.array([0.5, -0.25, 0.0, 1.0, 0.125, 0.0, 0.3, 0.3])


@pytest.mark.parametrize(("f", "pair"), [(both, ["u2", "u3"]), (differ, ["u5", "u6"])], ids=["and", "xor"])
def test_the_planted_pair_is_a_set_and_is_cut_last(f: F, pair: list[str]) -> None:
    e = HEDGE().explain(Exact(f))
    assert e.details["groups"] == [pair]
    left, right, phi, _ = e.details["cuts"][-1]
    assert [left, right] == [[pair[0]], [pair[1]]]
    assert phi == pytest.approx(0.25 if f is both else 0.5)
    last_but_one = {tuple(names): psi for names, psi in e.details["hierarchy"][-2]}
    assert max(last_but_one, key=lambda s: last_but_one[s]) == tuple(pair)  # the set comes before any single unit
    assert last_but_one[tuple(pair)] > max(e.scores) + 0.2


def test_three_units_needed_together_are_a_set_of_three() -> None:
    e = HEDGE(strong=0.05).explain(Exact(three))
    assert ["u4", "u5", "u6"] in e.details["groups"]
    assert not any("u0" in s for s in e.details["groups"])


def test_in_an_additive_function_nothing_is_a_set_and_scores_are_the_parts() -> None:
    e = HEDGE().explain(Exact(additive))
    assert "groups" not in e.details
    assert e.details["synergies"] == []
    assert all(phi == 0 for *_, phi, _ in e.details["cuts"])
    assert e.scores == pytest.approx([0.25, -0.125, 0, 0.5, 0.0625, 0, 0.15, 0.15])
    assert Answer.of(e, e.units).sets is None


def test_spare_units_are_parted_first_and_each_scores() -> None:
    e = HEDGE().explain(Exact(either))
    left, right, phi, _ = e.details["cuts"][0]
    assert (left[-1], right[0], phi) == ("u2", "u3", pytest.approx(-0.25))
    assert e.scores[[2, 3]] == pytest.approx([0.25, 0.25])
    assert "groups" not in e.details


def test_the_interaction_is_the_restricted_shapley_interaction_index() -> None:
    """By enumeration of all S, from the definition, at the last cut: neighbours u1 and u4 of the pair u2, u3."""

    def f(z: np.ndarray) -> Any:
        return z[:, 2] * z[:, 3] * (1 + z[:, 1] + 0.5 * z[:, 1] * z[:, 4])

    question = Exact(f)
    expected, near = 0.0, (1, 4)
    for k in range(3):
        for s in combinations(near, k):
            gamma = 0.0
            for part, sign in (((2, 3), 1), ((2,), -1), ((3,), -1), ((), 1)):
                keep = np.zeros((1, 8), bool)
                keep[0, [*s, *part]] = True
                gamma += sign * float(question.ask(keep)[0])
            expected += factorial(k) * factorial(2 - k) / factorial(3) * gamma
    span, rows = (2, 3), 4 * 400
    from whence.ablations.hedge import _Game

    at, phi, _ = HEDGE(rows_per_span=rows)._weakest(_Game(question), span, [(1,), (4,)])
    assert at == 1
    assert phi == pytest.approx(expected, abs=0.02)


def test_groups_that_suffice_together_are_not_taken_for_sets_that_end_the_outcome() -> None:
    question = Exact(both)
    e = HEDGE().explain(question)
    assert [set(g) for g in e.details["groups"]] == [{"u2", "u3"}]
    answer = Answer.of(e, question.units)
    assert recovery(answer, [frozenset({2}), frozenset({3})]) == 1  # either one's removal ends it
    assert answer.interactions == {}


def test_levels_are_partitions_in_order_each_with_one_more_span() -> None:
    e = HEDGE().explain(Exact(three))
    for k, level in enumerate(e.details["hierarchy"], 1):
        assert len(level) == k
        assert [name for names, _ in level for name in names] == list(e.units.labels)
    assert [s[0] for s in e.details["hierarchy"][-1]] == [[name] for name in e.units.labels]


def placed(a: int, b: int, kind: str) -> F:
    def f(z: np.ndarray) -> Any:
        return z[:, a] * z[:, b] if kind == "and" else 1 - (1 - z[:, a]) * (1 - z[:, b])

    return f


def test_tossed_coins_leave_the_causes_ahead_and_random_scores_behind() -> None:
    won: dict[str, list[float]] = {"or": [], "and": [], "random": []}
    for seed in range(12):
        rng = np.random.default_rng(seed)
        a, b, c, d = (int(i) for i in rng.permutation(24)[:4])
        for kind in ("or", "and"):
            scores = HEDGE(seed=seed).explain(Tossed(placed(a, b, kind), 24, seed)).scores
            won[kind].append(float(np.mean([scores[i] > scores[j] for i in (a, b) for j in (c, d)])))
        for noise in rng.normal(size=(50, 24)):
            won["random"].append(float(np.mean([noise[i] > noise[j] for i in (a, b) for j in (c, d)])))
    assert np.mean(won["or"]) >= 0.9
    assert np.mean(won["and"]) >= 0.8
    assert np.mean(won["random"]) < 0.6


def test_a_larger_budget_names_the_pair_among_tossed_coins_and_rarely_another() -> None:
    found = [
        HEDGE(rows_per_span=300, draws=100, seed=s).explain(Tossed(both, 8, s)).details.get("groups", [])
        for s in range(8)
    ]
    assert np.mean([["u2", "u3"] in sets for sets in found]) >= 0.7
    assert np.mean([len([s for s in sets if not {"u2", "u3"} <= set(s)]) for sets in found]) <= 0.5
    flat = [HEDGE(seed=s).explain(Tossed(additive, 8, s)).details.get("groups", []) for s in range(8)]
    assert np.mean([len(sets) for sets in flat]) <= 0.7


def test_it_spends_at_most_what_its_settings_say() -> None:
    metered = Metered(Tossed(both, 24), Budget(forwards=1000))
    e = HEDGE().explain(metered)
    assert metered.spent.forwards == e.cost.runs <= HEDGE().rows(24) == 979
    with pytest.raises(BudgetError):
        HEDGE().explain(Metered(Tossed(both, 24), Budget(forwards=500)))


def test_the_same_seeds_give_the_same_tree() -> None:
    first, again = (HEDGE().explain(Tossed(both, 8)).details for _ in range(2))
    assert first == again
    assert HEDGE().explain(Tossed(both, 8, 1)).details["cuts"] != first["cuts"]


def test_what_is_no_question_is_refused() -> None:
    with pytest.raises(MethodError, match="would work: a Question"):
        HEDGE().explain("a red circle")  # type: ignore[arg-type]
