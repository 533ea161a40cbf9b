"""Is my fidelity score fooled by the strange inputs that removal makes? Remove at random, and only by drawing anew.

With S the units of an explanation, G all units, f the readout and E_a(X) a random part of X, each unit in it with
probability a, the paper's measures are

    Fid_{a1,+} = f(G) - E f(G - E_{a1}(S))            needed: what is lost without part of S
    Fid_{a2,-} = f(G) - E f(S + E_{a2}(G - S))        enough: what is lost with S and part of the rest
    Fid_D      = Fid_{a1,+} - Fid_{a2,-}              the one primary number

Plain fidelity is a1 = 1, a2 = 0 with "-" taking units out; f is then asked about inputs that it never saw. Here "-"
draws units anew from the world's conditional (``question.ask``), which stays in the distribution at every a1 and a2,
for edges, tokens, patches or parts alike.

*This question*: a replicate is one draw, of both random parts and of what is drawn anew. The control is random
explanations of the same size, on the same named streams of random parts. More draws sharpen what is true of this one
question; they say nothing of others. *Runs like this* (:func:`over_questions`): a replicate is a question, its control
the mean of random explanations of that question.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..engine.randomness import stream
from ..errors import MethodError
from ..method import Card
from ..question import Answer, top_of
from ..verdict import LOOK_ALPHA, RUNS_LIKE_THIS, THIS_RUN, Verdict, judge, judge_run, unmeasured

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..question import Question

    Bools = NDArray[np.bool_]

CARD = Card(
    name="robust_fidelity",
    verb="robust_fidelity",
    paper="Zheng, Shirani, Wang, Cheng, Chen, Chen, Wei and Luo, Towards Robust Fidelity for Evaluating Explainability "
    "of Graph Neural Networks, ICLR 2024",
    systems=("S002-65",),
    question="Is my fidelity score fooled by the strange inputs that removal makes?",
    units=("any unit",),
    works_on=("every model that answers a Question",),
    needs=("ask",),
    cost="two model runs per draw, for the explanation and for each random one: 288 at the defaults",
    claim="Where zeroing ranks a wrong explanation above the planted one, robust fidelity ranks the planted one first.",
    falsifier={
        "trial": "tests/checks/test_robust_fidelity.py::test_zeroing_prefers_a_wrong_answer_and_drawing_anew_the_truth",
        "planted": "one unit decides; units that never change keep a gate open that only unseen inputs can close",
        "expect": 1.0,
        "control": "plain fidelity with zeroed units, which prefers the gate; random explanations of the same size",
        "seconds": 5,
    },
    departs="Units are drawn anew instead of erased. As this stays in the distribution at every a1 and a2, the "
    "defaults are wide, 0.8 and 0.2: at the paper's 0.1 and 0.9 most draws remove nothing. f is asked for the "
    "observed outcome of one question at a time, and has an interval and a control.",
    avoid="For units of which each alone suffices: a part of the truth is then enough but not needed and scores 0, and "
    "the whole scores low. Where the question draws nothing anew, as a graph model without a law of its edges.",
)

READOUT, UNIT = "fidelity with a random part drawn anew, Fid+ minus Fid-", "difference of the value"
DELTA = 0.1
"""Smallest effect worth having."""


def chosen(answer: Answer) -> frozenset[int]:
    """The units an answer stands for: all of its sets, else those that reach half of the largest score."""
    if answer.nothing:
        return frozenset()
    if answer.sets is not None:
        return frozenset().union(*answer.sets)
    top = float(answer.scores.max(initial=0))
    return frozenset(np.flatnonzero(answer.scores >= top / 2).tolist()) if top > 0 else frozenset()


def fidelity(
    question: Question, explanation: Iterable[int], *, alpha1: float = 0.8, alpha2: float = 0.2, draws: int = 48,
    name: str = "",
) -> NDArray[np.float64]:  # fmt: skip
    """(Fid_{a1,+}, Fid_{a2,-}) of each draw, [draw, 2]; the random parts are the same for all explanations of a
    ``name``."""
    n = len(question.units)
    inside = np.zeros(n, bool)
    inside[list(explanation)] = True
    u = np.stack([stream("robust_fidelity", name, "parts", i).random(n) for i in range(draws)])
    # One row of each kind in turn, so that what is drawn anew does not depend on how many draws there are.
    keep = np.stack([~(inside & (u < alpha1)), inside | (u < alpha2)], 1).reshape(-1, n)
    seen = float(question.ask(np.ones((1, n), bool))[0])
    return np.asarray(seen - question.ask(keep).reshape(draws, 2), np.float64)


def random_explanations(size: int, units: int, but: frozenset[int], wanted: int, name: str) -> list[frozenset[int]]:
    """Different sets of this size, none of them ``but``; fewer than ``wanted`` where there are no more."""
    rng, found = stream("robust_fidelity", name, "random explanations", size), dict[frozenset[int], None]()
    most = min(wanted, math.comb(units, size) - (len(but) == size))
    while len(found) < most:
        drawn = frozenset(rng.choice(units, size, replace=False).tolist())
        if drawn != but:
            found[drawn] = None
    return list(found)


def robust_fidelity(
    answer: Any, question: Question, *, size: int | None = None, alpha1: float = 0.8, alpha2: float = 0.2,
    draws: int = 48, controls: int = 8, delta: float = DELTA, name: str = "",
) -> Verdict:  # fmt: skip
    """The verdict on one explanation of one question: Fid_D against random explanations of the same size.

    ``answer``: an Answer, an Explanation or one number per unit; its units are the ``size`` largest scores, or without
    ``size`` those of :func:`chosen`. ``draws`` for the explanation, a quarter of them for each of ``controls`` random
    ones. ``name`` names the streams; ``details`` has Fid_{a1,+} and Fid_{a2,-}. Raises MethodError for an answer that
    is none, for probabilities outside 0..1 and for a size that there is not.
    """
    s, given = _explanation(answer, question, size), {"alpha1": alpha1, "alpha2": alpha2, "name": name}
    _check(alpha1, alpha2, draws, controls)
    labels = [question.units.labels[i] for i in sorted(s)]
    claim = f"{', '.join(labels) or 'nothing'}: needed and enough for {question.readout}"
    details: dict[str, Any] = {"explanation": labels, **given}
    others = random_explanations(len(s), len(question.units), s, controls, name)
    if not s or not others:
        why = "the answer names no unit" if not s else "the answer names every unit: no other is of its size"
        return unmeasured(claim, THIS_RUN, why, delta, readout=READOUT, unit=UNIT, **details)
    own = fidelity(question, s, alpha1=alpha1, alpha2=alpha2, draws=draws, name=name)
    rest = {
        ", ".join(question.units.labels[i] for i in sorted(o)): _delta(
            fidelity(question, o, alpha1=alpha1, alpha2=alpha2, draws=max(3, draws // 4), name=name)
        )
        for o in others
    }
    verdict = judge_run(
        _delta(own), rest, claim=claim, delta=delta, readout=READOUT, unit=UNIT,
        control_name=f"{len(others)} random explanations of {len(s)}",
        intervention=f"units of the explanation drawn anew with probability {alpha1:g}, the others with {1 - alpha2:g}",
        fid_plus=float(own[:, 0].mean()), fid_minus=float(own[:, 1].mean()), **details,
    )  # fmt: skip
    return replace(verdict, replicate="draw")


def over_questions(
    explain: Callable[[Any], Any], questions: Iterable[Question], *, size: int | None = None, alpha1: float = 0.8,
    alpha2: float = 0.2, draws: int = 16, controls: int = 4, delta: float = DELTA, name: str = "",
) -> Verdict:  # fmt: skip
    """The verdict on an explainer in runs like this: one mean Fid_D per question against the mean of random
    explanations of the same question. An answer that names no unit, or every unit, counts 0. Questions should come from
    draws of their own; two questions of one model are not two replicates."""
    _check(alpha1, alpha2, draws, controls)
    effects, control = [], []
    for i, question in enumerate(questions):
        s = _explanation(explain(question), question, size)
        streams = f"{name} {i}"
        others = random_explanations(max(1, len(s)), len(question.units), s, controls, streams)
        if not others:  # every unit is named: no other set of its size to hold it against
            effects.append(0.0)
            control.append(0.0)
            continue
        each = [
            float(_delta(fidelity(question, e, alpha1=alpha1, alpha2=alpha2, draws=draws, name=streams)).mean())
            if e else 0.0
            for e in (s, *others)
        ]  # fmt: skip
        effects.append(each[0])
        control.append(float(np.mean(each[1:])))
    claim = "the explainer names units that are needed and enough, in questions like these"
    if not effects:
        return unmeasured(claim, RUNS_LIKE_THIS, "no question was asked", delta, readout=READOUT, unit=UNIT)
    return judge(
        effects, {"random explanations of the same size": control}, claim=claim, delta=delta, readout=READOUT,
        unit=UNIT, alpha=LOOK_ALPHA[1], replicate="question", alpha1=alpha1, alpha2=alpha2,
    )  # fmt: skip


def _delta(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(values[:, 0] - values[:, 1])


def _explanation(answer: Any, question: Question, size: int | None) -> frozenset[int]:
    found = Answer.of(answer, question.units)
    if size is None or found.nothing:
        return chosen(found)
    if not 1 <= size <= len(question.units):
        raise MethodError(f"an explanation of {size} units", f"{len(question.units)} units", "a size between")
    return frozenset(top_of(found.scores, size))


def _check(alpha1: float, alpha2: float, draws: int, controls: int) -> None:
    if not (0 < alpha1 <= 1 and 0 <= alpha2 < 1):
        raise MethodError(
            f"robust fidelity at alpha1={alpha1:g}, alpha2={alpha2:g}", "nothing would ever be drawn anew",
            "0 < alpha1 <= 1 and 0 <= alpha2 < 1",
        )  # fmt: skip
    if draws < 3 or controls < 1:
        raise MethodError("robust fidelity", f"{draws} draws, {controls} controls", "3 draws and 1 control at least")
