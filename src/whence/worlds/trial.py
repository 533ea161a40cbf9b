"""The trial of an explainer on worlds with planted causes.

For each question the explainer gets a metered handle and commits its answer. Only then the oracle draws interventions:
single units, pairs, keep-only sets (drawn anew) and swaps (put into their opposite state), and does them on the model.

* ``auc``: area under the ROC curve of the scores, certified causes against the other units of arm and twin, ties half.
* ``sets``: F1 of the committed sets with the minimal sets whose swap ends the outcome. An answer of scores alone is
  read as one set for each unit that reaches half of the largest score.
* ``effects``: Spearman's correlation of predicted and real effects, mean of re-renderings and of swaps.
* ``quiet``: 1 where the answer to a null is "nothing here did it" (said, or all scores below half of what counts as
  still), else 0; times the share of model and sibling where the answer was not that. Whoever whispers always gets 0.

Every question is asked of the model and of its sibling with the roles swapped, and of nulls, in an order that nobody
knows; the mean of model and sibling counts: what sees the input alone cannot be right on both. Each asking begins its
streams of draws anew, so that no result hangs on what was asked before. An explainer that raises, overspends or returns
no numbers gets 0 for that question, with the reason. The replicate is the draw of the world.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from itertools import combinations
from random import SystemRandom
from typing import TYPE_CHECKING, Any

import numpy as np

from ..engine.randomness import stream
from ..errors import WhenceError
from ..question import Answer, Budget, Explainer, Metered, Spent, behind
from .ground import STILL, Oracle, Planted, restart, rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .ground import Draw

METRICS = ("auc", "sets", "effects", "quiet")
PAIRS = 24
"""Pairs of an arm and its twin that the oracle intervenes on, at most: of many training examples there are hundreds."""
REPEATS = 16
"""Draws per re-rendering of the oracle."""


@dataclass(frozen=True)
class Effects:
    """Interventions drawn after the commitment, and what they did: ``fall`` of the value for each set of units."""

    redrawn: tuple[frozenset[int], ...]
    redrawn_fall: NDArray[np.float64]
    swapped: tuple[frozenset[int], ...]
    swapped_fall: NDArray[np.float64]


@dataclass(frozen=True)
class Tried:
    """One explainer on one question, model and sibling together: values[metric], what was spent, what went wrong."""

    question: str
    structure: str
    values: dict[str, float]
    spent: Spent
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class DrawResult:
    """One explainer on one draw of a world."""

    world: str
    key: str
    tried: tuple[Tried, ...] = field(default=())

    def mean(self, metric: str, structures: Sequence[str] = ()) -> float:
        """Mean over the questions (of these structures; none: all)."""
        return float(np.mean([t.values[metric] for t in self.tried if not structures or t.structure in structures]))

    def record(self) -> dict[str, Any]:
        """The JSON record."""
        return asdict(self)

    @classmethod
    def of(cls, record: dict[str, Any]) -> DrawResult:
        """From its JSON record."""
        tried = [
            Tried(t["question"], t["structure"], t["values"], Spent(**t["spent"]), tuple(t["reasons"]))
            for t in record["tried"]
        ]
        return cls(record["world"], record["key"], tuple(tried))


def commit(explain: Explainer, question: Oracle, budget: Budget) -> tuple[Answer | None, Spent, str]:
    """The explainer's answer (None: none that counts), what it spent and the reason why there is none."""
    restart(question, "explainer")
    handle = Metered(question, budget)
    try:
        answer = Answer.of(explain(handle), question.units)
        handle.settle()
    except WhenceError as error:
        return None, handle.spent, f"asked: {error.asked}; found: {error.found}"
    except (Exception, SystemExit) as error:
        # A stranger's explainer may fail in any way; its row says how and the trial goes on.
        return None, handle.spent, f"{type(error).__name__}: {error}"
    return answer, handle.spent, ""


def auc(scores: NDArray[np.float64], causes: Iterable[int], others: Iterable[int]) -> float:
    """Share of (cause, other) pairs in which the cause scores higher, ties half.

    >>> auc(np.array([.9, .1, .9]), [0], [1, 2])
    0.75
    """
    own, rest = scores[sorted(causes)][:, None], scores[sorted(others)][None]
    return float(((own > rest) + 0.5 * (own == rest)).mean())


def committed_sets(answer: Answer) -> frozenset[frozenset[int]]:
    """The sets that an answer stands for."""
    if answer.nothing:
        return frozenset()
    if answer.sets is not None:
        return frozenset(answer.sets)
    top = float(answer.scores.max())
    return frozenset(frozenset([int(i)]) for i in np.flatnonzero(answer.scores >= top / 2) if top > 0)


def recovery(answer: Answer, truth: Iterable[frozenset[int]]) -> float:
    """F1 of exact sets."""
    found, planted = committed_sets(answer), frozenset(truth)
    return 2 * len(found & planted) / (len(found) + len(planted))


def correlation(predicted: Sequence[float], real: NDArray[np.float64]) -> float:
    """Spearman's; 0 where one side is constant."""
    from scipy.stats import spearmanr

    if np.ptp(predicted) < 1e-12 or np.ptp(real) < 1e-12:
        return 0.0
    return float(spearmanr(predicted, real).statistic)


@lru_cache(maxsize=512)
def effects(planted: Planted) -> Effects:
    """What the oracle finds. The interventions depend on nothing that an explainer is shown, and are the same for all
    explainers of a question, so that they can be compared."""
    q, n = planted.question, len(planted.question.units)
    restart(q, "oracle")  # draws of its own: an explainer that remembers the noise it met gains nothing
    rng = stream("oracle", planted.name)
    inside = sorted(planted.arm + planted.twin)
    outside = [int(i) for i in rng.permutation(sorted(set(range(n)) - set(inside)))[:3]]
    singles = [frozenset([i]) for i in (*inside, *outside)]
    pairs = [frozenset(c) for c in combinations(inside, 2)]
    if len(pairs) > PAIRS:
        pairs = [pairs[i] for i in sorted(rng.choice(len(pairs), PAIRS, replace=False).tolist())]
    pairs += [frozenset(rng.choice(n, 2, replace=False).tolist()) for _ in range(4)]
    kept = [rng.choice(n, max(1, n // 3), replace=False).tolist() for _ in range(6)]
    everything = frozenset(range(n))
    redrawn = (*singles, *pairs, *(everything - frozenset(k) for k in kept))
    seen = float(q.ask(np.ones((1, n), bool))[0])
    draws = getattr(q, "repeats", REPEATS)
    values = q.ask(~np.repeat(rows(redrawn, n), draws, 0)).reshape(len(redrawn), draws).mean(1)
    swapped = (*singles, *pairs)
    return Effects(redrawn, seen - values, swapped, seen - q.swap(rows(swapped, n)))


def _judged(answer: Answer, planted: Planted) -> dict[str, float]:
    others = frozenset(planted.arm + planted.twin) - planted.causes
    scores = np.zeros(len(answer.scores)) if answer.nothing else answer.scores
    found = effects(planted)
    return {
        "auc": auc(scores, planted.causes, others),
        "sets": recovery(answer, planted.ends),
        "effects": (
            correlation([answer.predict(s) for s in found.redrawn], found.redrawn_fall)
            + correlation([answer.predict(s) for s in found.swapped], found.swapped_fall)
        )
        / 2,
    }


def _quiet(answer: Answer | None) -> float:
    return float(answer is not None and (answer.nothing or float(abs(answer.scores).max()) < STILL / 2))


def try_question(explain: Explainer, planted: Planted, budget: Budget) -> Tried:
    """One explainer on one question, its sibling and its nulls."""
    total, reasons = Spent(), []

    def ask(question: Oracle) -> Answer | None:
        answer, spent, reason = commit(explain, question, budget)
        total.forwards += spent.forwards
        total.backwards += spent.backwards
        total.seconds += spent.seconds
        if reason and reason not in reasons:
            reasons.append(reason)
        return answer

    sides = (planted, planted.mirrored())
    to_ask = [s.question for s in sides] + list(planted.nulls)
    order = list(range(len(to_ask)))
    SystemRandom().shuffle(order)  # in a fixed order, counting calls would tell the sibling from its question
    answers = {i: ask(to_ask[i]) for i in order}
    said = [answers[i] for i in range(2)]
    none = {"auc": 0.0, "sets": 0.0, "effects": 0.0}
    values = [_judged(a, side) if a else none for a, side in zip(said, sides, strict=True)]
    found = {m: float(np.mean([v[m] for v in values])) for m in none}
    if planted.nulls:
        loud = np.mean([a is not None and not _quiet(a) for a in said])
        found["quiet"] = float(loud * np.mean([_quiet(answers[i]) for i in range(2, len(to_ask))]))
    asked = len(to_ask)
    mean = Spent(round(total.forwards / asked), round(total.backwards / asked), round(total.seconds / asked, 4))
    return Tried(planted.name, planted.structure, found, mean, tuple(reasons))


def try_draw(
    explain: Explainer,
    draw: Draw,
    structures: Sequence[str] = (),
    budget: Budget | None = None,
    advance: Callable[[], None] | None = None,
) -> DrawResult:
    """One explainer on one draw of a world: all its questions (of these structures; none: all)."""
    asked = [p for p in draw.planted if not structures or p.structure in structures]
    order = list(range(len(asked)))
    SystemRandom().shuffle(order)  # nor does a place in the order tell the structure
    tried = {}
    for i in order:
        tried[i] = try_question(explain, asked[i], budget or Budget())
        if advance:
            advance()
    return DrawResult(draw.world, draw.key, tuple(tried[i] for i in range(len(asked))))


# --- floor and ceiling -----------------------------------------------------------------------------------------------


def random_scores(question: Any) -> NDArray[np.float64]:
    """The floor: scores that know nothing. The model is asked once, for nothing but a number to begin the dice with:
    drawn from names alone they would be the same for a question and its sibling, and right on one of them exactly."""
    n = len(question.units)
    dice = float(question.ask(np.zeros((1, n), bool))[0])
    return stream("control", "random", *question.units.labels, question.readout, dice.hex()).random(n)


def once(explain: Explainer) -> Explainer:
    """The explainer, asked once for each question: its shuffled control needs the same answers again."""
    known: dict[int, tuple[Any, Answer]] = {}

    def explain_once(question: Any) -> Answer:
        asked = behind(question)  # kept, so that its id stays its own
        if id(asked) not in known:
            known[id(asked)] = (asked, Answer.of(explain(question), question.units))
        return known[id(asked)][1]

    return explain_once


def shuffled(explain: Explainer, throw: int = 0) -> Explainer:
    """The explainer's own scores, given to the wrong units; ``throw``: another shuffle of the same."""

    def explain_shuffled(question: Any) -> NDArray[np.float64]:
        scores = Answer.of(explain(question), question.units).scores
        names = (*question.units.labels, question.readout, scores.tobytes().hex())  # another order for the sibling
        return scores[stream("control", "shuffled", *names, *([throw] if throw else ())).permutation(len(scores))]

    return explain_shuffled


ROWS = 19_000
"""Rows that brute force asks at most."""


def brute_force(question: Any, draws: int = 24) -> Answer:
    """The ceiling: every unit and every pair drawn anew, ``draws`` times each or as often as ROWS allows; sets by what
    ends the outcome.

    With b units in two states each, drawing a set of k anew puts all of it into the opposite state once in 2^k draws:
    a set counts if the value falls by more than half in at least one draw, and no set inside it does.
    """
    n = len(question.units)
    asked = [frozenset(c) for k in (1, 2) for c in combinations(range(n), k)]
    draws = max(2, min(draws, ROWS // len(asked)))
    seen = float(question.ask(np.ones((1, n), bool))[0])
    fall = seen - question.ask(~np.repeat(rows(asked, n), draws, 0)).reshape(len(asked), draws)
    mean = dict(zip(asked, fall.mean(1).tolist(), strict=True))
    scores = np.array([mean[frozenset([i])] for i in range(n)])
    variance = dict(zip(asked, (fall.var(1, ddof=1) / draws).tolist(), strict=True))

    def beyond(s: frozenset[int]) -> float:
        """What a pair does beyond its units, shrunk towards 0 by its noise: there are hundreds of pairs."""
        raw = mean[s] - sum(scores[i] for i in s)
        noise = variance[s] + sum(variance[frozenset([i])] for i in s)
        return float(raw * max(0.0, 1 - 4 * noise / raw**2)) if raw else 0.0

    together = {s: beyond(s) for s in mean if len(s) == 2}
    ends: list[frozenset[int]] = []
    for s, most in zip(asked, fall.max(1).tolist(), strict=True):
        if most > 0.5 and not any(t < s for t in ends):
            ends.append(s)
    # A unit of a set that ends the outcome is a cause, though alone it may do nothing: its share of the set's effect.
    spoken = np.array([max([scores[i], *(mean[s] / 2 for s in ends if i in s and len(s) == 2)]) for i in range(n)])
    alone = {frozenset([i]): float(scores[i] - spoken[i]) for i in range(n)}
    return Answer(spoken, tuple(ends), alone | together)


def brief_force(question: Any) -> Answer:
    """The ceiling with fewer draws: a set of two that ends the outcome is missed one time in ten."""
    return brute_force(question, draws=8)
