"""The rule for the three words, held against brute force and against its error rates."""

from __future__ import annotations

import importlib.util
import json
import math
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from whence.errors import WhenceError
from whence.verdict import (
    LOOK_ALPHA,
    LOOKS,
    REFUTED,
    RUNS_LIKE_THIS,
    SUPPORTED,
    THIS_RUN,
    UNDECIDED,
    correct,
    exceedance_p,
    judge,
    judge_run,
    sequential,
    sign_flip_p,
    smallest_n,
    t_interval,
    unmeasured,
)

_SPEC = importlib.util.spec_from_file_location(
    "verdict_simulation", Path(__file__).parents[1] / "benchmarks" / "verdict_simulation.py"
)
assert _SPEC
assert _SPEC.loader
simulation = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(simulation)

N = 6000
ORDER = {REFUTED: 0, UNDECIDED: 1, SUPPORTED: 2}


def share(word: str, effect: float, control: float, shape: str = "normal", arms: int = 1, seed: int = 0) -> float:
    words, _ = simulation.verdicts(*simulation.paired(np.random.default_rng(seed), N, effect, control, shape, arms))
    return float((simulation.WORDS[words] == word).mean())


# --- error rates


def test_the_simulated_rule_is_the_rule() -> None:
    rng = np.random.default_rng(1)
    for effect, control, arms in ((0, 0, 1), (1.3, 0.3, 3), (0.5, 0.2, 2), (2, 1.5, 1)):
        e, c = simulation.paired(rng, 60, effect, control, arms=arms)
        words, seeds = simulation.verdicts(e, c)
        for i in range(len(e)):
            rows = [(e[i, k], {str(a): c[a, i, k] for a in range(arms)}) for k in range(LOOKS[-1])]
            v = sequential(rows.__getitem__, claim="", delta=1.0)
            assert (v.word, v.n) == (simulation.WORDS[words[i]], seeds[i])


@pytest.mark.parametrize("n", LOOKS)
def test_the_interval_of_a_look_covers_the_truth_as_often_as_it_says(n: int) -> None:
    x = np.random.default_rng(n).normal(size=(20_000, n))
    low, high = simulation.bounds(x, LOOK_ALPHA[3])
    assert ((low <= 0) & (high >= 0)).mean() == pytest.approx(0.978, abs=0.004)
    assert t_interval(x[0]) == pytest.approx((low[0], high[0]))


@pytest.mark.parametrize("shape", simulation.SHAPES)
def test_no_effect_is_supported_at_most_one_time_in_twenty(shape: str) -> None:
    assert share(SUPPORTED, 0, 0, shape) <= 0.05


@pytest.mark.parametrize("shape", ["normal", "skewed up", "gappy"])
def test_an_effect_that_its_control_has_too_is_supported_at_most_one_time_in_twenty(shape: str) -> None:
    assert share(SUPPORTED, 2, 2, shape) <= 0.05


def test_skew_against_the_claim_is_the_worst_case_and_stays_near_one_in_twenty() -> None:
    assert share(SUPPORTED, 2, 2, "skewed down") <= 0.065


def test_choosing_the_strongest_of_three_controls_does_not_raise_false_support() -> None:
    assert share(SUPPORTED, 2, 2, arms=3) < share(SUPPORTED, 2, 2, arms=1)


def test_an_effect_of_twice_delta_is_found() -> None:
    for shape in simulation.SHAPES:
        assert share(SUPPORTED, 2, 0, shape, arms=3) > 0.95


def test_an_effect_well_below_delta_is_refuted() -> None:
    assert share(REFUTED, 0, 0) > 0.85
    assert share(REFUTED, -0.5, 0) > 0.99


def test_an_effect_of_delta_or_more_is_refuted_at_most_one_time_in_twenty() -> None:
    assert share(REFUTED, 1, 0) <= 0.05
    assert share(REFUTED, 1, 3) <= 0.05


def test_the_needed_n_decides_four_times_in_five() -> None:
    for row in simulation.needed_n(4000).values():
        assert row["decided"] == pytest.approx(row["nominal"], abs=0.05)


def test_verdicts_on_this_run_are_rarely_wrong() -> None:
    rng = np.random.default_rng(4)

    def words(mean: float, others: list[float], n: int = 250) -> list[str]:
        return [
            judge_run(
                mean + rng.normal(size=5),
                {str(i): m + rng.normal(size=3) for i, m in enumerate(others)},
                claim="",
                delta=1.0,
            ).word
            for _ in range(n)
        ]

    assert words(0, [0] * 5).count(SUPPORTED) <= 0.05 * 250
    assert words(2, [2] * 5).count(SUPPORTED) <= 0.08 * 250
    assert words(2, [4, 4, 2, 0, 0]).count(SUPPORTED) <= 0.05 * 250
    assert words(1, [0] * 5).count(REFUTED) <= 0.05 * 250
    assert words(3, [0] * 5).count(SUPPORTED) >= 0.9 * 250


def test_correction_keeps_the_share_of_false_claims_down() -> None:
    rates = simulation.many_claims(40)
    assert rates["corrected"]["false_share"] <= 0.05
    assert rates["corrected"]["power"] > 0.2


# --- exactness


@given(st.lists(st.floats(-5, 5).map(lambda v: round(v, 2)), min_size=1, max_size=8))
def test_the_sign_flip_p_is_that_of_brute_force(values: list[float]) -> None:
    x = np.array(values)
    sums = [abs(np.dot(signs, x)) for signs in product((1, -1), repeat=len(x))]
    assert sign_flip_p(x) == pytest.approx(np.mean(np.array(sums) >= abs(x.sum()) - 1e-9))


def test_the_sign_flip_p_has_its_known_floor_and_agrees_with_scipy() -> None:
    assert sign_flip_p([1, 2, 3, 4, 5]) == 2 / 32
    x = np.random.default_rng(0).normal(0.4, 1, 12)
    theirs = stats.permutation_test(
        (x,), np.mean, permutation_type="samples", n_resamples=np.inf, alternative="two-sided"
    )
    assert sign_flip_p(x) == pytest.approx(theirs.pvalue)
    assert sign_flip_p(np.random.default_rng(0).normal(2, 1, 30)) <= 2e-5


def test_the_exceedance_p_is_that_of_brute_force() -> None:
    x = np.random.default_rng(2).normal(size=9).round(1)
    ways = [x[list(c)].sum() >= x[:3].sum() - 1e-9 for c in combinations(range(9), 3)]
    assert exceedance_p(x[:3], x[3:]) == pytest.approx(np.mean(ways))
    assert exceedance_p(np.arange(10) + 50.0, np.arange(30.0)) == pytest.approx(1 / 20_000)


def test_the_t_interval_is_scipys() -> None:
    x = np.random.default_rng(3).normal(size=11)
    theirs = stats.ttest_1samp(x, 0).confidence_interval(0.978)
    assert t_interval(x, 0.022) == pytest.approx((theirs.low, theirs.high))


def test_the_interval_beyond_the_controls_of_this_run_is_welchs() -> None:
    rng = np.random.default_rng(3)
    own, other = rng.normal(1, 1, 5), rng.normal(0, 2, 7)
    theirs = stats.ttest_ind(own, other, equal_var=False).confidence_interval(0.95)
    assert judge_run(own, {"x": other}, claim="", delta=1.0).beyond_interval == pytest.approx((theirs.low, theirs.high))


# --- invariances

effects16 = st.lists(st.floats(-3, 3), min_size=8, max_size=16)


@settings(max_examples=60)
@given(effects16, st.floats(0, 3), st.integers(0, 99))
def test_adding_a_constant_never_lowers_the_word(values: list[float], constant: float, seed: int) -> None:
    e, c = np.array(values), np.random.default_rng(seed).normal(size=len(values))
    other = np.random.default_rng(seed + 1).normal(size=(2, 4))
    swaps = {"a": other[0], "b": other[1]}
    for before, after in (
        (judge(e, c, claim="", delta=0.5), judge(e + constant, c, claim="", delta=0.5)),
        (judge_run(e, swaps, claim="", delta=0.5), judge_run(e + constant, swaps, claim="", delta=0.5)),
    ):
        assert ORDER[after.word] >= ORDER[before.word]


@settings(max_examples=40)
@given(effects16, st.sampled_from([0.01, 0.5, 40.0]), st.randoms())
def test_neither_the_unit_nor_the_order_of_seeds_matters(values: list[float], scale: float, random: object) -> None:
    e = np.array(values)
    e = np.where(abs(e) < 1e-3, 0, e)
    c = np.random.default_rng(1).normal(size=len(e))
    order = np.random.default_rng(len(values)).permutation(len(e))
    v, w = judge(e, c, claim="", delta=0.5), judge(scale * e[order], scale * c[order], claim="", delta=0.5 * scale)
    assert v.word == w.word
    assert v.p == pytest.approx(w.p)
    assert w.effect == pytest.approx(scale * v.effect, abs=1e-9)


def test_supported_needs_delta_the_interval_and_the_control() -> None:
    rng = np.random.default_rng(0)
    e = 1 + 0.05 * rng.normal(size=8)
    none = 0.01 * rng.normal(size=8)
    assert judge(e, none, claim="", delta=0.5).word == SUPPORTED
    assert judge(e, none, claim="", delta=0.5, scope_note="kept").details["scope_note"] == "kept"
    assert judge(e, none, claim="", delta=1.05).word != SUPPORTED
    v = judge(e, e + none - none.mean() + 1e-4, claim="", delta=0.5)
    assert (v.word, v.needed_n) == (UNDECIDED, None)
    assert "the control does as much" in str(v)
    assert judge(-e, none, claim="", delta=0.5).word == REFUTED


def test_the_strongest_control_on_average_is_the_control() -> None:
    v = judge(np.linspace(1, 2, 8), {"weak": np.zeros(8), "strong": np.ones(8) * 0.4}, claim="", delta=0.5)
    assert (v.details["control_name"], v.control) == ("strong", pytest.approx(0.4))
    assert set(v.details["controls"]) == {"weak", "strong"}


# --- edges


def test_values_that_do_not_vary() -> None:
    assert judge([0.0] * 8, [0.0] * 8, claim="", delta=0.1).word == REFUTED
    assert judge([0.5] * 8, [0.0] * 8, claim="", delta=0.1).word == SUPPORTED
    same = judge([0.5] * 8, [0.5] * 8, claim="", delta=0.1)
    assert (same.word, same.needed_n) == (UNDECIDED, None)
    assert "control does as much" in same.line
    assert judge_run([0.0] * 3, {"x": [0.0] * 3}, claim="", delta=0.1).word == REFUTED
    assert judge_run([0.5] * 3, {"x": [0.0] * 3}, claim="", delta=0.1).word == SUPPORTED


@pytest.mark.parametrize("n", [0, 1, 2, 5, 6])
def test_too_few_seeds_are_undecided_and_say_how_many_are_needed(n: int) -> None:
    v = judge([1.0 + 0.01 * i for i in range(n)], [0.0] * n, claim="", delta=0.1)
    assert (v.word, v.n) == (UNDECIDED, n)
    assert v.needed_n == smallest_n(LOOK_ALPHA[3]) == 7
    json.dumps(v.record(), allow_nan=False)


def test_too_few_alternatives_or_controls_are_undecided() -> None:
    assert judge_run([0.9, 0.91], {"x": [0.0, 0.1, 0.0]}, claim="", delta=0.1).word == UNDECIDED
    v = judge_run([0.9, 0.91, 0.92], {"x": [0.0], "y": [0.1]}, claim="", delta=0.1)
    assert (v.word, "too few" in v.line) == (UNDECIDED, True)
    assert judge_run([], {"x": [0.0]}, claim="", delta=0.1).n == 0
    assert judge_run([0.9, 0.91, 0.92], {}, claim="", delta=0.1).word == UNDECIDED


def test_trying_every_alternative_leaves_no_sampling_error_but_controls_and_chance_still_count() -> None:
    own, other = [0.2, 0.5, 0.9], {"x": [0.0, 0.1, 0.05], "y": [0.1, 0.0]}
    some = judge_run(own, other, claim="", delta=0.1, chance=0.01)
    every = judge_run(own, other, claim="", delta=0.1, chance=0.01, tried_all=True)
    assert (some.word, every.word) == (UNDECIDED, SUPPORTED)
    assert every.interval == (every.effect, every.effect)
    assert judge_run(own, other, claim="", delta=0.1, chance=0.2, tried_all=True).word == UNDECIDED
    as_much = judge_run(own, {"x": [0.4, 0.9], "y": [0.5, 0.6]}, claim="", delta=0.1, chance=0.01, tried_all=True)
    assert (as_much.word, as_much.needed_n) == (UNDECIDED, None)
    assert judge_run(own, other, claim="", delta=0.6, chance=0.01, tried_all=True).word == REFUTED


def test_an_effect_that_chance_placements_reach_is_undecided() -> None:
    good = {"x": [0.0, 0.01, 0.02]}
    assert judge_run([0.5, 0.6, 0.55], good, claim="", delta=0.1, chance=0.01).word == SUPPORTED
    assert judge_run([0.5, 0.6, 0.55], good, claim="", delta=0.1, chance=0.2).word == UNDECIDED


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: judge([1.0, math.nan], [0.0, 0.0], claim="", delta=0.1), "1 of 2 are not finite"),
        (lambda: judge([1.0], [math.inf], claim="", delta=0.1), "the control"),
        (lambda: judge([1.0, 2.0], [0.0], claim="", delta=0.1), "equal lengths"),
        (lambda: judge([1.0], {}, claim="", delta=0.1), "no control"),
        (lambda: judge([1.0], [0.0], claim="", delta=0.0), "delta is 0.0"),
        (lambda: judge([1.0], [0.0], claim="", delta=math.nan), "delta is nan"),
        (lambda: judge([1.0], [0.0], claim="", delta=1, alpha=0.7), "alpha is 0.7"),
        (lambda: judge(np.ones((2, 2)), [0.0, 0.0], claim="", delta=1), "shape (2, 2)"),
        (lambda: judge_run([math.nan], {"x": [0.0]}, claim="", delta=1), "not finite"),
        (lambda: sequential(lambda i: (0.0, 0.0), claim="", delta=1, looks=(12, 8)), "rising"),
    ],
)
def test_senseless_input_gets_one_clear_error(call: object, says: str) -> None:
    with pytest.raises(WhenceError, match="would work") as caught:
        call()  # type: ignore[operator]
    assert says in str(caught.value)


def test_looks_stop_as_soon_as_one_decides() -> None:
    drawn: list[int] = []

    def draw(i: int) -> tuple[float, float]:
        drawn.append(i)
        return 1 + 0.1 * (-1) ** i, 0.0

    v = sequential(draw, claim="", delta=0.5)
    assert (v.word, v.n, v.looks, drawn) == (SUPPORTED, 8, (8,), list(range(8)))
    noisy = np.random.default_rng(0).normal(0.5, 2, 16)
    v = sequential(lambda i: (noisy[i], 0.0), claim="", delta=0.5)
    assert (v.looks, v.n, v.details["alpha"]) == (LOOKS, 16, 0.022)
    assert sequential(lambda i: (1.0, 0.0), claim="", delta=0.5, looks=(9,)).details["alpha"] == 0.05


# --- how it reads


def test_a_verdict_prints_its_four_lines_and_its_record_is_json() -> None:
    v = judge(
        np.linspace(1, 2, 8), np.zeros(8), claim="the word 'red' drew this circle", delta=0.5, unit="rank",
        evidence="daam, probability, 1 model run", intervention="'red' replaced at the same seed",
    )  # fmt: skip
    assert [line.split()[0] for line in str(v).splitlines()] == ["claim", "evidence", "intervention", "verdict"]
    assert "supported (runs like this)" in str(v)
    assert "n=8 seeds" in str(v)
    record = json.loads(json.dumps(v.record(), allow_nan=False))
    assert record["word"] == SUPPORTED
    assert record["interval"] == pytest.approx(list(v.interval))
    assert record["scope"] == RUNS_LIKE_THIS


def test_an_unmeasured_claim_says_why() -> None:
    v = unmeasured("the word 'of' drew these pixels", THIS_RUN, "no alternative is known", 0.1)
    assert v.line == "undecided (this run): no alternative is known"
    assert json.loads(json.dumps(v.record(), allow_nan=False))["effect"] is None


def test_correction_weakens_only_supported_claims_and_keeps_their_order() -> None:
    rng = np.random.default_rng(0)
    lone = judge(0.6 + 0.42 * rng.normal(size=8), np.zeros(8), claim="lone", delta=0.1)
    nulls = [judge(rng.normal(size=8), np.zeros(8), claim=str(i), delta=3.0) for i in range(19)]
    assert lone.word == SUPPORTED
    together = correct([*nulls, lone])
    assert [v.claim for v in together] == [*map(str, range(19)), "lone"]
    assert all(v.word != SUPPORTED for v in together[:-1])
    assert [v.word for v in together[:-1]] == [v.word for v in nulls]
    assert together[-1].details["claims"] == 20
    assert correct([lone])[0].word == SUPPORTED
    p = [v.details["p_rule"] * 0.05 / 0.022 for v in [*nulls, lone]]
    theirs = stats.false_discovery_control(np.minimum(p, 1))
    assert [v.details["q"] for v in together] == pytest.approx(theirs.tolist())
    assert correct([]) == []


def test_the_example_of_the_page_runs() -> None:
    import doctest

    page = Path(__file__).parents[1] / "docs" / "verdict.md"
    done = doctest.testfile(str(page), module_relative=False, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert (done.attempted, done.failed) == (3, 0)
