"""Deletion on hand-wired functions of units, where every effect is known exactly."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from wired import GRADED, Values, Wired, weighted

from whence.checks.deletion import NO_ORDER, Scale, areas_of, curves, cuts_of, deletion, orders_of, scale_of
from whence.checks.insertion import insertion
from whence.engine.randomness import stream
from whence.errors import MethodError
from whence.explanation import Cost, Explanation
from whence.question import Answer, Budget, Metered
from whence.units import Units
from whence.verdict import REFUTED, RUNS_LIKE_THIS, SUPPORTED, THIS_RUN, UNDECIDED, Verdict


def single(cause: int) -> Values:
    return lambda s: s[:, cause]


def either(a: int, b: int) -> Values:
    return lambda s: np.maximum(s[:, a], s[:, b])


def both(a: int, b: int) -> Values:
    return lambda s: s[:, a] * s[:, b]


# --- truth


@pytest.mark.parametrize("check", [deletion, insertion])
def test_only_the_true_scores_are_supported(check: Callable[..., Verdict]) -> None:
    words: dict[str, list[str]] = {name: [] for name in ("truth", "random", "shuffled", "constant", "reversed")}
    effects = []
    for i in range(10):
        question = Wired(weighted(GRADED), 12, i)
        scale = scale_of(question, insert=check is insertion, seed=i)
        rng = stream("guesses", i)
        given = {
            "truth": GRADED,
            "random": rng.normal(size=12),
            "shuffled": rng.permutation(GRADED),
            "constant": np.ones(12),
            "reversed": -GRADED,
        }
        found = {name: check(scores, question, scale=scale, seed=i) for name, scores in given.items()}
        effects.append(found["truth"].effect)
        for name, verdict in found.items():
            words[name].append(verdict.word)
            assert verdict.scope == THIS_RUN
    assert words["truth"].count(SUPPORTED) >= 9, words
    assert np.mean(effects) == pytest.approx(1, abs=0.1)
    # By luck one in forty orders does as well; twenty guesses, at most two by luck.
    assert words["random"].count(SUPPORTED) + words["shuffled"].count(SUPPORTED) <= 2, words
    assert SUPPORTED not in words["constant"] + words["reversed"], words
    assert words["reversed"] == [REFUTED] * 10


def test_over_several_questions_one_cause_among_eight_is_enough() -> None:
    causes = [int(stream("cause", i).integers(8)) for i in range(16)]
    questions = [Wired(single(c), 8, i) for i, c in enumerate(causes)]
    where = {id(q): c for q, c in zip(questions, causes, strict=True)}

    def truth(question: Any) -> np.ndarray:
        return np.eye(8)[where[id(question)]]

    guesses = stream("guesses")
    found = {
        "truth": deletion(truth, questions),
        "random": deletion(lambda q: guesses.normal(size=8), questions),
        "shuffled": deletion(lambda q: guesses.permutation(truth(q)), questions),
        "constant": deletion(lambda q: np.zeros(8), questions),
        "place": deletion(lambda q: -np.arange(8.0), questions),
    }
    assert found["truth"].word == SUPPORTED, found["truth"].line
    assert found["truth"].scope == RUNS_LIKE_THIS
    assert found["truth"].replicate == "question"
    assert found["truth"].effect == pytest.approx(1, abs=0.15)
    for name in ("random", "shuffled", "constant", "place"):
        assert found[name].word != SUPPORTED, (name, found[name].line)


def test_naming_one_unit_of_eight_by_luck_is_seldom_enough_in_one_question() -> None:
    """One guess in eight is right, and as good as the truth; the share of orders that do as well tells."""
    rng, supported, asked = stream("luck"), 0, 0
    for i in range(12):
        question = Wired(single(3), 8, i)
        scale = scale_of(question, orders=19, draws=12, seed=i)
        for _ in range(8):
            verdict = deletion(np.eye(8)[rng.integers(8)], question, scale=scale, draws=12)
            supported, asked = supported + (verdict.word == SUPPORTED), asked + 1
    assert supported <= 0.08 * asked, supported


def test_the_number_falls_with_every_tenth_of_the_truth_that_is_replaced_by_noise() -> None:
    weights = np.linspace(0, 1, 20) ** 2
    question = Wired(weighted(weights), 20, "degraded")
    scale = scale_of(question)
    rng, means = stream("degrade"), []
    for replaced in range(0, 20, 2):
        orders = []
        for _ in range(150):
            scores = weights.copy()
            which = rng.permutation(20)[:replaced]
            scores[which] = rng.random(replaced)
            orders.append(orders_of(scores, 1, rng)[0])
        values = curves(question, np.stack(orders), scale.cuts)
        means.append(float(scale.number(areas_of(values, scale.cuts, 20)).mean()))
    assert means[0] > 0.9
    assert means[-1] < 0.25
    assert all(a > b for a, b in pairwise(means)), means


# --- zeros leave the distribution


class Guarded:
    """Eight inputs, each 1 or 3. The first being low makes the output; the second does nothing between 1 and 3, but
    below 1/2, where no input of this world ever lies, it shuts the output off."""

    readout, capabilities = "p", frozenset({"gradients"})

    def __init__(self, zeros: bool) -> None:
        import torch

        self.zeros, self.rng = zeros, stream("guarded")
        self.inputs = torch.tensor([[1.0, 3, 1, 3, 1, 3, 1, 3]])
        self.unit_of = torch.arange(8)[None]
        self.units = Units("unit", tuple("abcdefgh"), tuple(((i,),) for i in range(8)))

    def forward(self, inputs: Any) -> Any:
        import torch

        return torch.sigmoid(8 * (2 - inputs[:, 0]) - 100 * torch.relu(0.5 - inputs[:, 1]))

    def background(self, n: int) -> Any:
        import torch

        return torch.as_tensor(self.rng.choice((1.0, 3.0), (n, 8)), dtype=torch.float32)

    def ask(self, keep: np.ndarray) -> np.ndarray:
        import torch

        kept = torch.as_tensor(keep)
        away = torch.zeros(keep.shape) if self.zeros else self.background(len(keep))
        return np.asarray(self.forward(torch.where(kept, self.inputs, away)), float)


def test_deletion_by_zeros_prefers_a_wrong_answer_and_re_rendering_does_not() -> None:
    truth, wrong = np.eye(8)[0], np.eye(8)[1]
    found = {}
    for removal in ("zeros", "drawn anew"):
        question = Guarded(zeros=removal == "zeros")
        scale = scale_of(question)
        for name, scores in (("truth", truth), ("wrong", wrong)):
            # The average over the ties of all other units.
            orders = orders_of(scores, 200, stream("ties", name))
            areas = areas_of(curves(question, orders, scale.cuts), scale.cuts, 8)
            found[removal, name] = float(scale.number(areas).mean())
    assert found["zeros", "wrong"] > 0.9 > 0.3 > found["zeros", "truth"], found
    assert found["drawn anew", "truth"] > 0.8 > 0.2 > found["drawn anew", "wrong"], found
    assert deletion(wrong, Guarded(zeros=False), draws=64).word == REFUTED
    assert deletion(truth, Guarded(zeros=False), draws=64).effect > 0.8
    # The model really does nothing with the second input inside its world.
    states = Guarded(zeros=False).background(64)
    other = states.clone()
    other[:, 1] = 4 - other[:, 1]
    model = Guarded(zeros=False).forward
    assert abs(model(states) - model(other)).max() < 1e-6


# --- structures


def numbers(value: Values, *answers: np.ndarray) -> list[float]:
    question = Wired(value, 10, "structures")
    scale = scale_of(question, draws=200)
    out = []
    for scores in answers:
        orders = orders_of(scores, 600, stream("ties"))
        out.append(float(scale.number(areas_of(curves(question, orders, scale.cuts), scale.cuts, 10)).mean()))
    return out


def test_the_search_finds_causes_that_stand_in_for_each_other() -> None:
    scale = scale_of(Wired(either(3, 7), 10))
    assert set(scale.order[:2]) == {3, 7}
    pair, one, none = numbers(either(3, 7), np.eye(10)[3] + np.eye(10)[7], np.eye(10)[3], np.eye(10)[0])
    assert pair == pytest.approx(1, abs=0.12)
    assert pair > one + 0.3 > none


def test_of_two_needed_units_either_ends_the_output() -> None:
    pair, one, none = numbers(both(3, 7), np.eye(10)[3] + np.eye(10)[7], np.eye(10)[3], np.eye(10)[0])
    assert pair == pytest.approx(1, abs=0.12)
    assert pair > one > none + 0.3


# --- nothing to rank, nothing said


def test_where_no_unit_matters_there_is_no_verdict() -> None:
    for value in (lambda s: np.full(len(s), 0.9), lambda s: s.mean(1)):  # alike: any order will do
        verdict = deletion(np.arange(6.0), Wired(value, 6))
        assert (verdict.word, verdict.n) == (UNDECIDED, 0)
        assert NO_ORDER in verdict.line


def test_an_answer_that_no_unit_did_it_has_no_order() -> None:
    verdict = deletion(Answer(np.zeros(12), nothing=True), Wired(weighted(GRADED), 12))
    assert (verdict.word, verdict.n) == (UNDECIDED, 0)
    assert "direct_question" in verdict.line


# --- invariance


def test_the_order_of_the_units_does_not_matter() -> None:
    moved = np.random.default_rng(0).permutation(12)
    a = deletion(GRADED, Wired(weighted(GRADED), 12), draws=64)
    b = deletion(GRADED[moved], Wired(weighted(GRADED[moved]), 12), draws=64)
    assert a.effect == pytest.approx(b.effect, abs=0.1)
    assert a.word == b.word == SUPPORTED


def test_only_the_order_of_scores_counts() -> None:
    one, two = (Wired(weighted(GRADED), 12) for _ in range(2))
    scores = GRADED + np.arange(12) / 1000
    assert deletion(scores, one).effect == deletion(np.exp(scores), two).effect


def test_the_same_seed_gives_the_same_verdict_and_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    first = deletion(GRADED, Wired(weighted(GRADED), 12)).record()
    monkeypatch.setattr("whence.checks.deletion.ROWS", 7)
    assert deletion(GRADED, Wired(weighted(GRADED), 12)).record() == first


def test_it_counts_what_it_asks() -> None:
    question = Metered(Wired(weighted(GRADED), 12), Budget(forwards=10_000))
    verdict = deletion(GRADED, question)
    assert verdict.details["rows"] == question.spent.forwards


def test_an_explanation_and_an_answer_are_read_alike() -> None:
    question = Wired(weighted(GRADED), 12)
    explanation = Explanation(
        "by hand", question.units, GRADED.astype(np.float32), ("unit",), "value", "attribution", {}, Cost(0, 0.0)
    )
    scale = scale_of(question)
    a = deletion(explanation, Wired(weighted(GRADED), 12), scale=scale)
    b = deletion(Answer(GRADED), Wired(weighted(GRADED), 12), scale=scale)
    assert a.effect == b.effect
    assert "by hand" in str(a)


def test_cuts_take_each_number_or_evenly_many() -> None:
    assert cuts_of(4, 10) == (1, 2, 3)
    assert cuts_of(100, 10) == tuple(range(10, 100, 10))


def test_more_units_than_steps_are_taken_in_blocks() -> None:
    weights = np.zeros(60)
    weights[[7, 30, 31, 50]] = 4, 3, 2, 1
    verdict = deletion(weights, Wired(weighted(weights), 60))
    assert verdict.word == SUPPORTED, verdict.line
    assert len(verdict.details["curve"]) == 9


# --- errors before work


@pytest.mark.parametrize("scores", [np.ones(3), np.full(12, np.nan), np.ones((12, 2)), "many"])
def test_scores_that_do_not_fit_are_refused(scores: Any) -> None:
    with pytest.raises(MethodError, match="would work"):
        deletion(scores, Wired(weighted(GRADED), 12))


def test_what_cannot_be_asked_is_refused() -> None:
    question = Wired(weighted(GRADED), 12)
    with pytest.raises(MethodError, match="one unit has no order"):
        deletion([1.0], Wired(weighted(np.ones(1)), 1))
    with pytest.raises(MethodError, match="too few"):
        deletion(GRADED, question, draws=1)
    with pytest.raises(MethodError, match="a function that explains"):
        deletion(GRADED, [question] * 8)
    with pytest.raises(MethodError, match="8 questions"):
        deletion(lambda q: GRADED, [question] * 3)
    other: Scale = scale_of(Wired(weighted(GRADED), 12), insert=True)
    with pytest.raises(MethodError, match="insertion over 12"):
        deletion(GRADED, question, scale=other)


def test_a_scale_of_another_question_is_refused() -> None:
    scale = scale_of(Wired(weighted(GRADED), 12, 1))
    for other in (Wired(lambda s: np.zeros(len(s)), 12, 2), Wired(lambda s: 0.2 * weighted(GRADED)(s), 12, 3)):
        with pytest.raises(MethodError, match="another question"):
            deletion(GRADED, other, scale=scale)


def test_questions_in_which_nothing_can_be_ranked_are_left_out() -> None:
    flat = [Wired(lambda s: np.ones(len(s)), 12, i) for i in range(8)]
    nothing = deletion(lambda q: GRADED, flat)
    assert nothing.word == UNDECIDED
    assert "no order" in str(nothing.details)
    mixed = [q for i in range(8) for q in (flat[i], Wired(weighted(GRADED), 12, f"ranked {i}"))]
    right = deletion(lambda q: GRADED, mixed)
    assert right.word == SUPPORTED
    assert right.effect == pytest.approx(1, abs=0.1)
    assert right.details["without_an_order"] == 8
