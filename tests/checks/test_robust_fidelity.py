"""Robust fidelity ranks planted answers first where zeroing prefers wrong ones."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch

from whence.checks.robust_fidelity import chosen, fidelity, over_questions, random_explanations, robust_fidelity
from whence.engine.randomness import stream
from whence.errors import MethodError
from whence.question import Answer
from whence.units import Units
from whence.verdict import REFUTED, RUNS_LIKE_THIS, SUPPORTED, THIS_RUN, UNDECIDED
from whence.worlds.motifs import WORLD

CAUSE, GATE, REST = 2, (4, 5, 6), (0, 1, 3, 7)


class Wired:
    """Eight units in states -1 and 1; unit 2 decides. Units 4 to 6 hold a gate open by x^2, which in every state of the
    world is 1: they never matter, but for inputs that the world has not."""

    capabilities = frozenset[str]()
    readout = "probability of the outcome"

    def __init__(self, name: str = "") -> None:
        self.units = Units("unit", tuple(f"u{i}" for i in range(8)), tuple(((i,),) for i in range(8)))
        self.state = stream("wired", name).choice([-1.0, 1.0], 8)
        self.state[CAUSE] = 1
        self._rng = stream("wired", name, "ask")

    def value(self, x: Any) -> Any:
        gate = (x[:, GATE] ** 2).mean(1)
        return 1 / (1 + np.exp(-(6 * x[:, CAUSE] * gate - 12 * (1 - gate))))

    def ask(self, keep: Any) -> Any:
        return self.value(np.where(keep, self.state, self._rng.choice([-1.0, 1.0], keep.shape)))


def scores_of(units: Iterable[int], n: int = 8) -> Any:
    out = np.zeros(n)
    out[list(units)] = 1
    return out


def zeroed(question: Wired, s: Iterable[int]) -> float:
    """Plain Fid+ minus Fid- with units set to zero."""
    inside = scores_of(s) > 0
    without, alone = question.value(np.stack([~inside, inside]) * question.state)
    return float(alone - without)


def redrawn(question: Any, s: Iterable[int], draws: int = 64) -> float:
    plus, minus = fidelity(question, s, draws=draws).mean(0)
    return float(plus - minus)


def test_zeroing_prefers_a_wrong_answer_and_drawing_anew_the_truth() -> None:
    for name in ("a", "b", "c"):
        question = Wired(name)
        plain = {s: zeroed(question, s) for k in (1, 3) for s in combinations(range(8), k)}
        assert plain[GATE] > plain[(CAUSE,)] + 0.3
        robust = {s: redrawn(question, s) for s in combinations(range(8), 1)} | {GATE: redrawn(question, GATE)}
        assert max(robust, key=lambda s: robust[s]) == (CAUSE,)
        assert robust[(CAUSE,)] > robust[GATE] + 0.5
        with_cause = [redrawn(question, s) for s in combinations(range(8), 3) if CAUSE in s]
        without = [redrawn(question, s) for s in combinations(range(8), 3) if CAUSE not in s]
        assert min(with_cause) > max(without)


def test_the_three_words_on_the_wired_question() -> None:
    assert robust_fidelity(scores_of([CAUSE]), Wired()).word == SUPPORTED
    for wrong in (GATE, REST, (0,)):
        assert robust_fidelity(scores_of(wrong), Wired()).word == REFUTED
    assert robust_fidelity(Answer(np.zeros(8), nothing=True), Wired()).word == UNDECIDED
    assert robust_fidelity(np.ones(8), Wired()).word == UNDECIDED


def test_the_numbers_are_the_equations() -> None:
    # With 1 and 0 and enough draws: needed, 1/2 of the outcome goes; enough, nothing goes.
    plus, minus = fidelity(Wired(), [CAUSE], alpha1=1, alpha2=0, draws=2_000).mean(0)
    assert plus == pytest.approx(0.5, abs=0.04)
    assert minus == pytest.approx(0, abs=1e-6)
    # The cause is in the random part with probability alpha1, or outside it with 1 - alpha2.
    assert fidelity(Wired(), [CAUSE], alpha1=0.3, draws=2_000)[:, 0].mean() == pytest.approx(0.15, abs=0.03)
    assert fidelity(Wired(), [0], alpha2=0.4, draws=2_000)[:, 1].mean() == pytest.approx(0.3, abs=0.04)
    v = robust_fidelity(scores_of([CAUSE]), Wired())
    assert v.effect == pytest.approx(v.details["fid_plus"] - v.details["fid_minus"])
    assert (v.scope, v.replicate, v.n) == (THIS_RUN, "draw", 48)
    assert "n=48 draws" in v.line


def test_controls_share_the_random_parts_and_never_are_the_explanation() -> None:
    kept: list[Any] = []

    class Watched(Wired):
        def ask(self, keep: Any) -> Any:
            kept.append(keep)
            return super().ask(keep)

    one, other = frozenset([1, 2]), frozenset([2, 5])
    for s in (one, other):
        fidelity(Watched(), s, draws=10)
    first, second = kept[1], kept[3]
    assert (first[0::2][:, 2] == second[0::2][:, 2]).all()  # in both explanations
    assert (first[1::2][:, 3] == second[1::2][:, 3]).all()  # in neither
    assert first[1::2][:, 1].all()
    others = random_explanations(2, 8, one, 100, "")
    assert len(others) == len(set(others)) == 27
    assert one not in others
    assert len(random_explanations(8, 8, frozenset(range(8)), 5, "")) == 0


def test_the_size_and_the_sets_of_an_answer() -> None:
    scores = np.array([0, 0.1, 1, 0.6, 0, 0, 0, 0.4])
    assert chosen(Answer(scores)) == {2, 3}
    assert chosen(Answer(scores, (frozenset([1]), frozenset([4, 5])))) == {1, 4, 5}
    assert chosen(Answer(scores * 0)) == frozenset()
    assert robust_fidelity(scores, Wired(), size=1).details["explanation"] == ["u2"]
    assert robust_fidelity(scores, Wired(), size=3).details["explanation"] == ["u2", "u3", "u7"]


def test_it_says_what_it_cannot_do() -> None:
    for wrong in ({"size": 9}, {"alpha1": 0.0}, {"alpha2": 1.0}, {"alpha1": 2.0}, {"draws": 1}, {"controls": 0}):
        with pytest.raises(MethodError):
            robust_fidelity(scores_of([CAUSE]), Wired(), **wrong)
    with pytest.raises(MethodError):
        robust_fidelity(np.ones(3), Wired())


def test_runs_like_this_replicates_over_questions() -> None:
    questions = [Wired(f"q{i}") for i in range(8)]
    right = over_questions(lambda q: scores_of([CAUSE]), questions)
    assert (right.word, right.scope, right.replicate, right.n) == (SUPPORTED, RUNS_LIKE_THIS, "question", 8)
    assert over_questions(lambda q: scores_of(GATE), questions).word == REFUTED
    assert over_questions(lambda q: Answer(np.zeros(8), nothing=True), questions).word == REFUTED
    assert over_questions(lambda q: scores_of([CAUSE]), questions[:3]).word == UNDECIDED
    assert over_questions(lambda q: scores_of([CAUSE]), []).word == UNDECIDED


# --- trained graph nets -----------------------------------------------------------------------------------------------


@cache
def planted() -> dict[str, Any]:
    return {p.structure: p for p in WORLD.draw("one").planted}


def weightless(question: Any, s: Iterable[int]) -> float:
    """Plain Fid+ minus Fid- with edge weights set to zero."""
    n = len(question.units)
    inside = torch.zeros(n, dtype=torch.bool)
    inside[list(s)] = True
    keep = torch.zeros(2, question.inputs.shape[1])
    keep[:, :n] = torch.stack([~inside, inside])
    without, alone = question.forward(keep).tolist()
    return float(alone - without)


@pytest.mark.parametrize("structure", WORLD.structures)
def test_on_a_trained_net_the_arm_is_supported_and_its_twin_refuted(structure: str) -> None:
    p = planted()[structure]
    n = len(p.question.units)
    assert robust_fidelity(scores_of(p.causes, n), p.question, draws=96).word == SUPPORTED
    assert robust_fidelity(scores_of(p.twin, n), p.question, draws=96).word == REFUTED


def test_zeroed_edges_cannot_tell_an_absence_from_its_twin_and_edges_drawn_anew_can() -> None:
    p = planted()["absence"]
    plain = {s: weightless(p.question, s) for s in (p.arm, p.twin)}
    assert abs(plain[p.arm] - plain[p.twin]) < 0.1
    assert redrawn(p.question, p.arm) > redrawn(p.question, p.twin) + 0.4


def test_a_null_supports_nothing() -> None:
    p = planted()["single"]
    for null in p.nulls:
        assert robust_fidelity(scores_of(p.arm, len(null.units)), null).word == REFUTED
