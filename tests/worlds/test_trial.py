"""The trial: what it gives for right, wrong and missing answers, and that an explainer cannot reach round it."""

import contextlib
import re
import sys
import time

import numpy as np
import pytest

from whence.engine.journal import Journal
from whence.engine.randomness import stream
from whence.errors import BudgetError, MethodError, RunError
from whence.method import load
from whence.proving import Ground, prove, try_explainer
from whence.question import Answer, Budget, Metered
from whence.units import Units
from whence.worlds import registry, trial
from whence.worlds.ground import Draw, Planted, minimal, subsets, trouble

RULES = {
    "single": lambda s, a: s[:, a[0]] == 1,
    "and": lambda s, a: (s[:, a[0]] == 1) & (s[:, a[1]] == 1),
    "or": lambda s, a: (s[:, a[0]] == 1) | (s[:, a[1]] == 1),
    "xor": lambda s, a: s[:, a[0]] != s[:, a[1]],
}


class Rule:
    """A rule over binary units: the value is 1 while the output is as observed."""

    capabilities, readout = frozenset({"ask"}), "1 if the output is as observed"

    def __init__(self, states, rule, arm, name):
        self.states, self.rule, self.arm, self.rng = states, rule, arm, stream("rule", name)
        self.units = Units("unit", tuple(f"u{i}" for i in range(len(states))), ((),) * len(states))

    def value(self, states):
        if self.arm is None:
            return np.ones(len(states))
        return (self.rule(states, self.arm) == self.rule(self.states[None], self.arm)).astype(float)

    def ask(self, keep):
        return self.value(np.where(keep, self.states, self.rng.integers(0, 2, keep.shape)))

    def swap(self, which):
        return self.value(np.where(which, 1 - self.states, self.states))


class Coins:
    name, structures = "coins", tuple(RULES)

    def draw(self, key):
        rng = stream("coins", key)
        planted = []
        for structure, rule in RULES.items():
            places = rng.permutation(10)
            size = 1 if structure == "single" else 2
            arm, twin = tuple(places[:size].tolist()), tuple(places[size : 2 * size].tolist())
            states = rng.integers(0, 2, 10)
            states[list(arm + twin)] = 1
            if structure == "xor":
                states[[arm[0], twin[0]]] = 0
            sides = [Rule(states, rule, a, (key, structure, str(a))) for a in (arm, twin, None)]
            planted.append(Planted(f"{key}/{structure}", structure, sides[0], arm, twin, sides[1], (sides[2],)))
        return Draw(self.name, key, tuple(planted))


COINS = Coins()


@pytest.fixture(scope="module")
def draws():
    return [COINS.draw(str(i)) for i in range(8)]


def right(draws, change=lambda a: a):
    """The planted answer, looked up by the identity of the question behind the handle."""
    known = {}
    for p in (p for d in draws for p in d.planted):
        for side in (p, p.mirrored()):
            scores = np.array([float(i in side.causes) for i in range(10)])
            known[id(side.question)] = Answer(scores, side.ends)
        known |= {id(n): Answer(np.zeros(10), nothing=True) for n in p.nulls}
    return lambda handle: change(known[id(handle._question)])


def mean(explain, draws, metric, *structures):
    return np.mean([trial.try_draw(explain, d).mean(metric, structures) for d in draws])


def test_hand_wired_questions_are_certified(draws):
    assert not any(trouble(p) for d in draws for p in d.planted)


def test_the_truth_scores_one_and_random_scores_a_half(draws):
    for metric in ("auc", "sets", "quiet"):
        assert mean(right(draws), draws, metric) == 1
    assert 0.35 < mean(trial.random_scores, draws, "auc") < 0.65
    assert mean(trial.random_scores, draws, "sets") < 0.3
    assert mean(trial.random_scores, draws, "quiet") == 0


def test_an_explainer_of_the_input_alone_is_right_half_of_the_time_exactly(draws):
    for scorer in (lambda q: q._question.states, lambda q: np.arange(10.0), lambda q: stream("x", 1).random(10)):
        assert mean(scorer, draws, "auc") == 0.5


def test_only_a_pair_named_as_a_pair_is_right_where_either_suffices(draws):
    singles = right(draws, lambda a: Answer(a.scores, nothing=a.nothing))
    assert mean(singles, draws, "sets", "and") == 1
    assert mean(singles, draws, "sets", "or") == 0
    assert mean(singles, draws, "auc", "or") == 1


def test_brute_force_finds_causes_sets_and_silence(draws):
    budget = Budget(forwards=5_000)
    found = [trial.try_draw(trial.brute_force, d, budget=budget) for d in draws]
    for structure in RULES:
        assert np.mean([f.mean("auc", [structure]) for f in found]) >= 0.95, structure
        assert np.mean([f.mean("sets", [structure]) for f in found]) >= 0.7, structure
        assert np.mean([f.mean("effects", [structure]) for f in found]) >= 0.6, structure
    assert np.mean([f.mean("quiet") for f in found]) >= 0.95


def test_silence_is_no_answer_to_a_question_that_has_one(draws):
    def silent(q):
        return Answer(np.zeros(10), nothing=True)

    assert mean(silent, draws, "auc") == 0.5
    assert mean(silent, draws, "sets") == 0
    assert mean(silent, draws, "quiet") == 0


def test_whispering_is_no_quiet(draws):
    def loud(q):
        return right(draws, lambda a: Answer(a.scores * 1.0))(q)

    assert mean(loud, draws, "quiet") == 1
    assert mean(lambda q: Answer(loud(q).scores * 1e-3), draws, "quiet") == 0
    assert mean(lambda q: trial.random_scores(q) * 1e-3, draws, "quiet") == 0


def test_counting_calls_does_not_tell_the_sibling_from_its_question(draws):
    first = []
    for p in draws[0].planted * 20:
        order = []

        def note(q, order=order):
            order.append(id(q._question))
            return np.zeros(10)

        trial.try_question(note, p, Budget())
        first.append(order[0] == id(p.question))
    assert 5 < sum(first) < len(first) - 5


@pytest.mark.parametrize(
    "answer",
    [
        lambda: Answer(np.zeros(10), sets=([0],)),
        lambda: Answer(np.zeros(10), sets=(0,)),
        lambda: Answer(np.zeros(10), sets=(frozenset([10]),)),
        lambda: Answer(np.zeros(10), sets=(frozenset(),)),
        lambda: Answer(np.zeros(10), interactions={frozenset([1, 2]): np.nan}),
        lambda: Answer(np.zeros(10), interactions={"ab": 1.0}),
        lambda: sys.exit(3),
    ],
)
def test_an_answer_of_another_kind_is_refused_or_read_and_the_trial_goes_on(answer, draws):
    row = try_explainer("mine", lambda q: answer(), COINS, draws)
    assert 0 <= row["score"]["mean"] <= 1
    assert np.isfinite(list(row["panel"]["single"].values())).all()


def test_time_is_taken_and_a_swallowed_budget_is_not_forgiven(draws):
    def slow(q):
        time.sleep(0.02)
        return np.zeros(10)

    def deaf(q):
        with contextlib.suppress(BudgetError):
            q.ask(np.ones((200, 10), bool))
        return right(draws)(q)

    limits = Budget(forwards=100, seconds=0.01)
    for explain, says in ((slow, "seconds of 0.01"), (deaf, "200 forwards of 100")):
        tried = trial.try_question(explain, draws[0].planted[0], limits)
        assert tried.values["auc"] == 0
        assert says in tried.reasons[0]
    assert trial.try_question(slow, draws[0].planted[0], Budget()).spent.seconds > 0.015


def test_a_result_does_not_depend_on_what_was_asked_before():
    drawn = registry.find("twins").draw("restart")
    explain, other = load("leave_one_out")().explain, load("occlusion")().explain
    once = trial.try_draw(explain, drawn, ["single", "or"])
    trial.effects.cache_clear()
    trial.try_draw(other, drawn, ["single", "or"])
    again = trial.try_draw(explain, drawn, ["single", "or"])
    assert [t.values for t in once.tried] == [t.values for t in again.tried]


@pytest.mark.parametrize(
    ("explain", "says"),
    [
        (lambda q: 1 / 0, "ZeroDivisionError"),
        (lambda q: np.full(10, np.nan), "10 of 10 not finite"),
        (lambda q: np.zeros(3), r"scores of shape \(3,\)"),
        (lambda q: None, "not finite|shape|NoneType"),
        (lambda q: q.ask(np.ones((9_999, 10), bool))[:10], "9999 forwards of 2000"),
        (lambda q: q.forward(None), "offers"),
        (lambda q: q.ask(np.ones(10, bool)), "keep of shape"),
    ],
    ids=["raises", "nan", "length", "nothing", "budget", "capability", "shape"],
)
def test_a_failing_explainer_gets_a_failing_row_with_the_reason(explain, says, draws):
    row = try_explainer("mine", explain, COINS, draws)
    assert row["word"] == "not shown"
    assert row["score"]["mean"] == 0
    assert re.search(says, row["reason"])


def test_an_explainer_that_fails_once_loses_that_question_only(draws):
    truth, single = right(draws), draws[0].planted[0]
    assert single.structure == "single"

    def once(q):
        if q._question is single.question:
            raise ValueError("the first is hard")
        return truth(q)

    row = try_explainer("mine", once, COINS, draws)
    assert row["reason"] == "ValueError: the first is hard"
    assert row["score"]["mean"] == pytest.approx(1 - 0.5 / len(draws))


def test_the_handle_counts_and_shows_nothing_else(draws):
    handle = Metered(draws[0].planted[0].question, Budget(forwards=20))
    handle.ask(np.ones((12, 10), bool))
    assert handle.spent.forwards == 12
    assert not {"swap", "arm", "states"} & {n for n in dir(handle) if not n.startswith("_")}
    with pytest.raises(BudgetError, match="24 forwards of 20"):
        handle.ask(np.ones((12, 10), bool))
    with pytest.raises(MethodError, match="one number for each of 10 units"):
        Answer.of([1.0], handle.units)


def test_a_stopped_trial_goes_on_and_another_budget_does_not(draws, tmp_path):
    truth, asked = right(draws), []

    def counted(q):
        asked.append(1)
        return truth(q)

    first = try_explainer("mine", counted, COINS, draws[:6], journal=Journal(tmp_path / "j"))
    before = len(asked)
    with (tmp_path / "j").open("a") as handle:
        handle.write('{"piece": "torn')
    second = try_explainer("mine", counted, COINS, draws[:7], journal=Journal(tmp_path / "j"))
    shuffled_again = len(draws[:7]) * 2
    assert len(asked) - before <= before // 6 + 2 * shuffled_again
    assert (first["score"]["n"], second["score"]["n"]) == (6, 7)
    journal = Journal(tmp_path / "j")
    assert journal.get("mine", "", "coins", draws[6].key, Budget(), ()) is not None
    assert journal.get("mine", "", "coins", draws[6].key, Budget(forwards=3), ()) is None


def test_a_world_that_lies_about_its_causes_is_refused(draws):
    p = draws[0].planted[0]
    assert "planted were" in trouble(Planted(p.name, "single", p.question, p.twin, p.arm, p.sibling))
    assert "sibling" in trouble(Planted(p.name, "single", p.question, p.arm, p.twin, p.question))
    loud = Planted(p.name, "single", p.question, p.arm, p.twin, p.sibling, (p.question,))
    assert "null 0 moves by 1.00" in trouble(loud)


def test_minimal_sets_contain_no_other():
    assert minimal(map(frozenset, ([1, 2], [1], [2, 3], [1, 2, 3]))) == {frozenset([1]), frozenset([2, 3])}
    assert len(subsets([4, 7, 9])) == 7


@pytest.mark.parametrize(
    ("spec", "says"), [("twin", "'twins'"), ("no/such.py:WORLD", "no file"), ("{file}:WORLDS", "has no 'WORLDS'")]
)
def test_an_unknown_world_is_refused_before_any_work(spec, says, tmp_path):
    (tmp_path / "mine.py").write_text("WORLD = 1\n")
    with pytest.raises(RunError, match=says):
        registry.find(spec.format(file=tmp_path / "mine.py"))
    (tmp_path / "bad.py").write_text("import nonsense_\n")
    with pytest.raises(RunError, match="ModuleNotFoundError"):
        registry.from_file(f"{tmp_path / 'bad.py'}:f", "explainer")


def test_a_method_that_maps_pictures_is_not_asked_questions():
    with pytest.raises(MethodError, match="it maps pictures"):
        prove(["daam"], world="twins")


def test_the_ground_draws_each_world_once(monkeypatch):
    drawn = []
    monkeypatch.setattr(registry, "find", lambda name: COINS)
    monkeypatch.setattr(Coins, "draw", lambda self, key, draw=Coins.draw: drawn.append(key) or draw(self, key))
    ground = Ground(6)
    assert ground["coins"] is ground["coins"]
    assert len(drawn) == 6
