"""Does this unit matter? Ask the model, again and again, instead of reading it off an attribution.

For models rich enough, an attribution that is complete (its scores sum to the output minus that of a baseline) and
linear (as integrated gradients and SHAP) can be no better than a coin at telling whether the output changes when a unit
changes: functions with the same scores and opposite behaviour exist (Bilodeau et al. 2024). What helps is to say what
is asked, and to ask it of the model by brute force. Asked here, of a unit or a set S:

    fall_i = v(U) - v( U without S ; draw i )

with v(U) the value as observed and the second one with S re-rendered, drawn anew from the world's own conditional
(`question.ask`). The one primary number is its mean, in the readout's own units (a difference of probabilities): what
the value falls by on average when S is drawn anew. Claim: it is at least delta.

*This run* is deterministic at its seed; the replicates are the alternatives: re-renderings, four to a replicate, since
one often draws the same state again, and a handful without a change is no evidence. Control: in each draw equally many
other units, picked at random, are re-rendered instead. Replicates are taken until a look decides.

:func:`hold` holds what an explanation says of each unit against the direct answers, corrected for their number. It
takes one look: who stops as soon as one claim alone is decided has nothing left to pay for the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..engine.randomness import stream
from ..errors import MethodError
from ..method import Card
from ..question import Answer, Question, top_of
from ..verdict import LOOKS, REFUTED, SUPPORTED, THIS_RUN, UNDECIDED, Verdict, correct, sequential

if TYPE_CHECKING:
    from numpy.typing import NDArray

CARD = Card(
    name="direct_question",
    verb="direct_question",
    paper="Bilodeau, Jaques, Koh and Kim, Impossibility theorems for feature attribution, 2024",
    systems=("S002-93",),
    question="Does this attribution answer my question better than a coin, or should I simply ask the model again?",
    units=("any unit",),
    works_on=("every model that answers a Question",),
    needs=("ask",),
    cost="two coalitions per draw and one: 65 where the first look decides, 129 at most; 129 for each unit that hold "
    "asks about",
    claim="It is right about units whose integrated gradients are the same and whose behaviour is opposite.",
    falsifier={
        "trial": "tests/checks/test_direct_question.py::test_equal_attributions_of_opposite_behaviour",
        "planted": "pairs of hand-wired functions with equal integrated gradients; a coin decides which matters",
        "expect": 0.9,
        "control": "the attribution itself, right half of the time",
        "seconds": 10,
    },
    departs="The paper changes a feature by a chosen amount; here it is drawn anew from the world, so that the model "
    "is asked about inputs it could meet. The statistics are Whence's own.",
    avoid="One unit at a time where units stand in for each other (OR): each alone does nothing, ask about the set. "
    "Where all units do as much, none is supported: the control does as much. It says nothing of why, and costs draws "
    "for each unit, so that with thousands of units an explanation must say first which to ask about.",
)

DELTA = 0.2
"""Smallest mean fall worth having, in the readout's units."""
READOUT = "fall of the value when the unit is re-rendered"
LOWERS, RAISES, NOTHING = "lowers", "raises", "does nothing"
AGREES, CONTRADICTED = "agrees", "contradicted"


def direct_question(
    unit: str | int | Iterable[str | int],
    question: Question,
    *,
    delta: float = DELTA,
    raises: bool = False,
    draws: int = 4,
    looks: Sequence[int] = LOOKS,
    seed: int = 0,
) -> Verdict:
    """Does re-rendering this unit, or these units together, lower the value by at least ``delta`` on average?

    ``unit``: a label, an index, or several for a set. ``raises``: ask whether it raises the value instead. ``draws``:
    re-renderings per replicate. ``looks``: numbers of replicates at which to decide. ``seed``: of the stream that picks
    the control's units. ``details`` have the mean ``falls`` of each replicate and the coalitions asked (``rows``).

    Raises MethodError for no unit, an index that there is not, or all units (no other is left for the control);
    PromptError for an unknown label.
    """
    return _judged(_Falls(_indices(unit, question), question, draws, seed), delta, raises, looks)


class _Falls:
    """Replicates of one unit or set, drawn once and kept: both directions of a claim read the same ones."""

    def __init__(self, asked: list[int], question: Question, draws: int, seed: int) -> None:
        n, labels = len(question.units), question.units.labels
        self.others = np.array([u for u in range(n) if u not in asked])
        if not len(self.others):
            raise MethodError(f"whether all {n} units matter", "no other unit is left for the control", "a smaller set")
        if draws < 1:
            raise MethodError(f"a direct question with {draws} draws", "nothing to average", "1 draw at least")
        self.asked, self.question, self.draws = asked, question, draws
        self.named = " and ".join(labels[u] for u in asked)
        self.rng = stream("direct question", seed, *(labels[u] for u in asked))
        self.seen = float(question.ask(np.ones((1, n), bool))[0])
        self.found: list[tuple[float, float]] = []

    def draw(self, i: int) -> tuple[float, float]:
        """Mean fall of replicate i, and that of its control."""
        while len(self.found) <= i:
            keep = np.ones((2, self.draws, len(self.question.units)), bool)
            keep[0, :, self.asked] = False
            size = min(len(self.asked), len(self.others))
            for row in keep[1]:
                row[self.rng.choice(self.others, size, replace=False)] = False
            falls = self.seen - np.asarray(self.question.ask(keep.reshape(-1, keep.shape[2])), np.float64)
            own, control = falls.reshape(2, -1).mean(1).tolist()
            self.found.append((own, control))
        return self.found[i]


def _judged(falls: _Falls, delta: float, raises: bool, looks: Sequence[int]) -> Verdict:
    def draw(i: int) -> tuple[float, float]:
        own, control = falls.draw(i)
        return (-own, -control) if raises else (own, control)

    named = falls.named
    verdict = sequential(
        draw,
        claim=f"re-rendering {named} {RAISES if raises else LOWERS} the value by {delta:g} or more",
        delta=delta,
        looks=looks,
        readout=READOUT.replace("fall", "rise") if raises else READOUT,
        unit=falls.question.readout,
        replicate="alternative",
        evidence="none: the model is asked directly",
        intervention=f"{named} re-rendered, everything else kept, {falls.draws} draws a replicate; as the control, as "
        "many other units",
        control_name="as many other units",
    )
    details = {
        "of": named,
        "value": falls.seen,
        "falls": [own for own, _ in falls.found],
        "rows": 1 + 2 * falls.draws * len(falls.found),
    }
    # One output at its seed: its re-renderings are drawn independently, so the rule of paired replicates holds.
    return replace(verdict, scope=THIS_RUN, details={**verdict.details, **details})


def _indices(unit: str | int | Iterable[str | int], question: Question) -> list[int]:
    listed = [unit] if isinstance(unit, str | int | np.integer) else list(unit)
    found = [question.units.find(u) if isinstance(u, str) else int(u) for u in listed]
    wrong = [u for u in found if not 0 <= u < len(question.units)]
    if not found or wrong:
        raise MethodError(
            f"whether {listed} matters", f"unit {wrong[0]}" if wrong else "no unit",
            f"labels, or indices from 0 to {len(question.units) - 1}",
        )  # fmt: skip
    return sorted(set(found))


@dataclass(frozen=True)
class Held:
    """What an explanation says of a unit (``lowers``, ``raises``, ``does nothing``), and what came of it: ``agrees``,
    ``contradicted`` or ``undecided``. ``verdicts``: the direct answers, corrected; two for ``does nothing``, which
    says that re-rendering neither lowers nor raises the value by delta."""

    unit: str
    says: str
    word: str
    verdicts: tuple[Verdict, ...]

    def __str__(self) -> str:
        return f"{self.unit} {self.says}: {self.word}\n" + "\n".join(f"  {v.line}" for v in self.verdicts)


def hold(
    given: Any,
    question: Question,
    *,
    delta: float = DELTA,
    top: int | None = None,
    draws: int = 4,
    looks: Sequence[int] = (LOOKS[-1],),
    q: float = 0.05,
    seed: int = 0,
) -> list[Held]:
    """What the explanation says of each unit against the direct answers. *Supported* is corrected over all of them
    (Benjamini-Hochberg); *refuted*, which "does nothing" rests on, is not: of many true claims at the very edge of
    delta some will be contradicted.

    ``given``: an Answer, an Explanation or one number per unit. Without ``top`` its scores are read in the readout's
    own units: a score of ``delta`` or more says that re-rendering the unit lowers the value, -``delta`` or less that
    it raises it, and anything between that it does nothing. With ``top``, scores have no scale: the ``top`` highest say
    that they lower the value, and nothing is read off the others. ``nothing`` says that no unit does anything.

    Raises MethodError for scores that do not fit the units or are not finite, or a senseless ``top``.
    """
    answer = Answer.of(given, question.units)
    n = len(question.units)
    if top is not None and not 1 <= top <= n:
        raise MethodError(f"hold the top {top}", f"there are {n} units", f"a number from 1 to {n}, or None")
    claims = _claims(answer.scores, answer.nothing, delta, top)
    asked: list[tuple[int, Verdict]] = []
    for unit, says in claims.items():
        falls = _Falls([unit], question, draws, seed)
        for side in (LOWERS, RAISES) if says == NOTHING else (says,):
            asked.append((unit, _judged(falls, delta, side == RAISES, looks)))
    found = correct([v for _, v in asked], q)
    held = []
    for unit, says in claims.items():
        verdicts = tuple(v for (of, _), v in zip(asked, found, strict=True) if of == unit)
        held.append(Held(question.units.labels[unit], says, _word(says, verdicts), verdicts))
    return held


def _claims(scores: NDArray[np.float64], nothing: bool, delta: float, top: int | None) -> dict[int, str]:
    """What is said of which unit."""
    if nothing:
        return dict.fromkeys(range(len(scores)), NOTHING)
    if top is not None:
        return dict.fromkeys(top_of(scores, top), LOWERS)
    return {u: LOWERS if s >= delta else RAISES if s <= -delta else NOTHING for u, s in enumerate(scores.tolist())}


def _word(says: str, verdicts: Sequence[Verdict]) -> str:
    words = {v.word for v in verdicts}
    right, wrong = (REFUTED, SUPPORTED) if says == NOTHING else (SUPPORTED, REFUTED)
    if wrong in words:
        return CONTRADICTED
    return AGREES if words == {right} else UNDECIDED
