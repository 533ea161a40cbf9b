"""Does the output fall as fast as it could if the units are taken away from the highest score on?

Order the n units by score, pi(1), pi(2), ... (ties broken at random, anew in each draw). With v(S) the value with the
units S kept and all others re-rendered, drawn anew from the world's own conditional (`question.ask`),

    d(k) = v( U without {pi(1)..pi(k)} ),     A(pi) = sum over k of w_k d(k),   0 < k < n   (trapezoid weights w)

is the deletion curve and its area (Petsiuk et al. 2018); smaller is better. The ends d(0) and d(n) are the same for all
orders and left out. An area has no scale of its own: it depends on how many units there are and on what is left when
all are re-rendered. The one primary number is therefore

    D(pi) = ( A(random) - A(pi) ) / ( A(random) - A(best) )

with A(random) the mean over random orders and A(best) that of the best order found: by the units' effects if these
added up (least squares), and by a greedy search from both ends, first the unit whose removal lowers the value most, and
so on; or last the unit that alone brings back least, which finds causes that stand in for each other (OR). The search
and the area of its order use different draws, so that luck in the search does not raise the bar. 1: no order is known
that does better; 0: as a random order; below 0: worse. D may exceed 1 where the search missed the best. Where no order
stands out there is nothing to rank, and no verdict.

*This run* is deterministic at its seed: the output and its explanation are fixed. The replicates are the alternatives,
re-renderings of the removed units, a curve for each. Controls: random orders, which is what scores dealt out at random
give; and chance: the share of them that does at least as well. With one cause among n units one order in n is best, so
that below some 20 units a single cause is rarely told from luck in one question, only over several. *Runs like this*
takes an explainer and a sequence of questions, the replicates. Controls, for each question: scores dealt out at random,
the reversed order, the order in which the units come. The strongest of them on average counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from ..engine.randomness import stream
from ..errors import MethodError
from ..method import Card
from ..question import Answer, Explainer, Question
from ..verdict import LOOKS, RUNS_LIKE_THIS, THIS_RUN, Verdict, judge_run, sequential, unmeasured

if TYPE_CHECKING:
    from numpy.typing import NDArray

CARD = Card(
    name="deletion",
    verb="deletion",
    paper="Petsiuk, Das and Saenko, RISE: Randomized Input Sampling for Explanation of Black-box Models, 2018 (the "
    "curve and its area); re-rendering instead of zeros, and the scale between random and best, are Whence's own",
    systems=(),
    question="Does the output fall as fast as it could if the units are taken away from the highest score on?",
    units=("any unit",),
    works_on=("every model that answers a Question",),
    needs=("ask",),
    cost="about 440 curves of at most 9 steps, and the search: 4 times the square of the number of units; 32 curves "
    "from the second explanation of a question on, with scale=",
    claim="The true scores are supported; random, shuffled, constant and reversed scores are not.",
    falsifier={
        "trial": "tests/checks/test_deletion.py::test_only_the_true_scores_are_supported",
        "planted": "hand-wired functions of units whose effects are known exactly",
        "expect": 0.9,
        "control": "random, shuffled, constant and reversed scores",
        "seconds": 10,
    },
    departs="Removed units are drawn anew from the world instead of being set to a constant, several draws a step; "
    "the area is put on a scale from random (0) to the best order found (1).",
    avoid="Where causes stand in for each other (OR): the curve falls only when the last is gone, so that scores "
    "naming one of two look wrong; ask direct_question of the set. Where many explanations are tried and the best "
    "curve is kept: the number can be optimised by choosing, so choose on some questions and judge on others. It sees "
    "the order of scores only, not their size, and says nothing of the lower ranks once the output is gone.",
)

DELTA = 0.5
"""Smallest D worth having: half-way from a random order to the best one found."""
ROWS = 512
"""Coalitions asked at once."""
LEAST_ROOM = 0.02
"""Below this gap of area between random and best no order stands out; the readout's range is about 1."""
SAME = 1e-4
"""Values as observed that are no further apart are of one question."""
NO_ORDER = "no order of the units stands out: re-rendering them in turn moves the value by too little, or alike"


@dataclass(frozen=True)
class Scale:
    """What random orders and the best order found reach on one question: the ends 0 and 1 of the number.

    ``random[order]`` and ``best[draw]`` are areas, signed so that larger is better; ``order`` is the best order found;
    ``cuts`` how many units are taken at each step; ``rows`` how many coalitions it cost. It does not depend on any
    explanation, so that several of one question can share it.
    """

    insert: bool
    cuts: tuple[int, ...]
    random: NDArray[np.float64]
    best: NDArray[np.float64]
    order: tuple[int, ...]
    rows: int
    of: tuple[tuple[str, ...], str, float]
    """Of which question: labels of its units, its readout, its value as observed."""

    @property
    def room(self) -> float:
        """Area between a random order and the best one found."""
        return float(self.best.mean() - self.random.mean())

    @property
    def error(self) -> float:
        """Standard error of the room."""
        return float(np.hypot(*(x.std(ddof=1) / np.sqrt(len(x)) for x in (self.best, self.random))))

    @property
    def measurable(self) -> bool:
        """Whether some order stands out."""
        return self.room > max(LEAST_ROOM, 3 * self.error)

    def number(self, areas: NDArray[np.float64]) -> NDArray[np.float64]:
        """D of areas: 0 as a random order, 1 as the best order found."""
        return np.asarray((areas - self.random.mean()) / self.room)


def orders_of(scores: NDArray[np.float64], draws: int, rng: np.random.Generator) -> NDArray[np.intp]:
    """order[draw, place]: units from the highest score on, ties broken at random in each draw.

    >>> orders_of(np.array([0.1, 3.0, -1.0]), 1, np.random.default_rng(0)).tolist()
    [[1, 0, 2]]
    """
    return np.stack([np.lexsort((rng.random(len(scores)), -scores)) for _ in range(draws)])


def cuts_of(units: int, steps: int) -> tuple[int, ...]:
    """How many units are taken at each step: each number in between, or ``steps`` - 1 of them evenly spread."""
    if units <= steps:
        return tuple(range(1, units))
    return tuple(np.unique(np.rint(np.linspace(0, units, steps + 1)[1:-1]).astype(int)).tolist())


def ask(question: Question, keep: NDArray[np.bool_]) -> NDArray[np.float64]:
    """``question.ask`` in blocks of ROWS."""
    return np.concatenate([question.ask(keep[i : i + ROWS]) for i in range(0, len(keep), ROWS)])


def curves(
    question: Question, orders: NDArray[np.intp], cuts: Sequence[int], insert: bool = False
) -> NDArray[np.float64]:
    """value[order, step] with the first ``cuts[step]`` units of each order re-rendered, or (``insert``) only them kept;
    one draw each."""
    place = np.argsort(orders, axis=1)
    top = place[:, None, :] < np.asarray(cuts)[None, :, None]
    keep = top if insert else ~top
    return ask(question, keep.reshape(-1, orders.shape[1])).reshape(len(orders), len(cuts))


def _seen(question: Question) -> float:
    """The value as observed."""
    return float(question.ask(np.ones((1, len(question.units)), bool))[0])


def areas_of(values: NDArray[np.float64], cuts: Sequence[int], units: int, insert: bool = False) -> NDArray[np.float64]:
    """area[order] of curves value[order, step], signed so that larger is better."""
    x = np.array([0, *cuts, units]) / units
    area = values @ ((x[2:] - x[:-2]) / 2)
    return np.asarray(area if insert else -area)


def _greedy(
    question: Question, cuts: Sequence[int], insert: bool, draws: int, back: bool
) -> tuple[NDArray[np.intp], int]:
    """An order built from its front or from its back, by what one unit more does at each step; and coalitions asked."""
    n = len(question.units)
    blocks = np.diff([0, *cuts, n])
    picked: list[int] = []
    rows = 0
    for block in blocks[::-1] if back else blocks:
        left = [u for u in range(n) if u not in picked]
        taken = np.zeros((len(left), n), bool)
        taken[:, picked] = True
        taken[np.arange(len(left)), left] = True
        # From the back the picked ones are those not yet taken away.
        keep = taken if insert != back else ~taken
        value = ask(question, np.repeat(keep, draws, 0)).reshape(len(left), draws).mean(1)
        best = np.argsort(-value if insert else value, kind="stable")
        picked += [left[i] for i in best[:block]]
        rows += len(left) * draws
    return np.array(picked[::-1] if back else picked), rows


def _by_effect(
    orders: NDArray[np.intp], values: NDArray[np.float64], cuts: Sequence[int], insert: bool
) -> NDArray[np.intp]:
    """The order of the units' effects if effects simply added up: least squares over curves that were drawn anyway."""
    top = (np.argsort(orders, axis=1)[:, None, :] < np.asarray(cuts)[None, :, None]).reshape(-1, orders.shape[1])
    # Subtracting the mean of a step leaves what depends on which units were taken, not on how many.
    rest = (values - values.mean(0)).reshape(-1)
    effects = np.linalg.lstsq(top - top.mean(1, keepdims=True), rest, rcond=None)[0]
    return np.argsort(-effects if insert else effects)


def scale_of(
    question: Question, *, insert: bool = False, orders: int = 39, draws: int = 16, steps: int = 10, seed: int = 0
) -> Scale:
    """Measure what ``orders`` random orders (half of ``draws`` each) and the best one found (4 times) reach.

    Raises MethodError for a question of fewer than 2 units, fewer than 3 orders or 4 draws.
    """
    n, name = len(question.units), "insertion" if insert else "deletion"
    if n < 2:
        raise MethodError(f"{name} of {n} units", "one unit has no order", "direct_question, or 2 units and more")
    if orders < 3 or draws < 4 or steps < 2:
        raise MethodError(
            f"{name} with {orders} random orders, {draws} draws, {steps} steps", "too few to tell chance",
            "3 orders, 4 draws and 2 steps at least; 19 orders for a verdict on this run",
        )  # fmt: skip
    cuts, rng = cuts_of(n, steps), stream(name, "random orders", seed, n)

    def areas(listed: NDArray[np.intp], times: int) -> NDArray[np.float64]:
        values = curves(question, np.repeat(listed, times, 0), cuts, insert)
        return np.asarray(areas_of(values, cuts, n, insert).reshape(len(listed), times).mean(1))

    at_random, few = np.stack([rng.permutation(n) for _ in range(orders)]), draws // 2
    values = curves(question, np.repeat(at_random, few, 0), cuts, insert).reshape(orders, few, -1)
    random = areas_of(values.mean(1), cuts, n, insert)
    front, back = (_greedy(question, cuts, insert, max(2, draws // 4), end) for end in (False, True))
    summed = _by_effect(at_random, values.mean(1), cuts, insert)
    found = np.stack([front[0], back[0], summed, at_random[random.argmax()]])
    # Chosen on one set of draws, measured on another; well, since every number is divided by it.
    order = found[areas(found, draws).argmax()]
    best = areas_of(curves(question, np.repeat(order[None], 4 * draws, 0), cuts, insert), cuts, n, insert)
    rows = (orders * few + len(found) * draws + 4 * draws) * len(cuts) + front[1] + back[1]
    of = (question.units.labels, question.readout, _seen(question))
    return Scale(insert, cuts, random, best, tuple(order.tolist()), rows + 1, of)


def deletion(
    given: Any,
    question: Question | Sequence[Question],
    *,
    delta: float = DELTA,
    scale: Scale | None = None,
    orders: int | None = None,
    draws: int = 16,
    steps: int = 10,
    looks: Sequence[int] = LOOKS,
    seed: int = 0,
) -> Verdict:
    """Does the output fall as fast as it could if the units are re-rendered from the highest score on?

    For *this run*, ``given`` is an Answer, an Explanation or one number per unit, and ``question`` the one it answers.
    For *runs like this*, ``given`` is an explainer and ``question`` a sequence of questions, at least as many as the
    first of ``looks``. ``scale``: an earlier :func:`scale_of` the same question. ``orders``: random orders (39; 20 for
    each of several questions); ``draws``: curves of the explanation's own order; ``steps``: steps of a curve;
    ``seed``: of the streams that deal out orders. The effect is D, without a unit; ``details`` have the mean curve,
    D of the reversed order, the best order found, the room between random and best, and the coalitions asked (rows).

    Raises MethodError for scores that do not fit the units or are not finite, for fewer than 2 units or too few draws.
    """
    return trial(
        given, question, insert=False, delta=delta, scale=scale, orders=orders, draws=draws, steps=steps,
        looks=looks, seed=seed,
    )  # fmt: skip


def trial(
    given: Any, question: Question | Sequence[Question], *, insert: bool, delta: float, scale: Scale | None,
    orders: int | None, draws: int, steps: int, looks: Sequence[int], seed: int,
) -> Verdict:  # fmt: skip
    """:func:`deletion`, or (``insert``) the same with units kept from the highest score on."""
    if isinstance(question, Sequence):
        return _runs_like_this(
            given, question, insert, delta, looks,
            lambda q: scale_of(q, insert=insert, orders=orders or 20, draws=draws, steps=steps, seed=seed),
            draws, seed,
        )  # fmt: skip
    answer = Answer.of(given, question.units)
    said: dict[str, Any] = {"readout": READOUTS[insert], "unit": UNIT, "evidence": _evidence(given)}
    claim = CLAIMS[insert]
    if answer.nothing:
        why = "the explanation says that no unit did it, so it has no order; hold it against direct_question"
        return unmeasured(claim, THIS_RUN, why, delta, **said)
    known = scale or scale_of(question, insert=insert, orders=orders or 39, draws=draws, steps=steps, seed=seed)
    n, name = len(question.units), "insertion" if insert else "deletion"
    labels, readout, seen = known.of
    same = (labels, readout) == (question.units.labels, question.readout)
    same = same and (scale is None or abs(seen - _seen(question)) < SAME)
    if known.insert != insert or not same:
        found = f"one of {'insertion' if known.insert else 'deletion'} over {len(known.order)} units"
        found += f" of {readout!r}, observed {seen:.3g}"
        raise MethodError(f"{name} on a scale of another question", found, f"scale_of(question, insert={insert})")
    if not known.measurable:
        return unmeasured(claim, THIS_RUN, NO_ORDER, delta, room=known.room, rows=known.rows, **said)
    own = orders_of(answer.scores, draws, stream(name, "ties", seed, n))
    values = curves(question, own, known.cuts, insert)
    effects = known.number(areas_of(values, known.cuts, n, insert))
    reverse = areas_of(curves(question, own[:, ::-1], known.cuts, insert), known.cuts, n, insert)
    others = known.number(known.random)
    # Exact for scores dealt out at random: their order is one of these. More draws for the own order make it stricter.
    chance = (1 + int((others >= effects.mean()).sum())) / (1 + len(others))
    return judge_run(
        effects,
        {f"random order {i}": [value] for i, value in enumerate(others.tolist(), 1)},
        claim=claim,
        delta=delta,
        chance=chance,
        control_name="random orders of the same units",
        intervention=f"units {'kept' if insert else 're-rendered'} from the highest score on, {draws} draws of "
        f"{len(known.cuts)} steps",
        curve=values.mean(0).tolist(),
        taken=list(known.cuts),
        reversed=float(known.number(reverse).mean()),
        best_order=[labels[u] for u in known.order],
        room=known.room,
        rows=known.rows + 2 * values.size + (scale is not None),
        **said,
    )


READOUTS = {False: "how fast the value falls", True: "how fast the value comes back"}
CLAIMS = {
    False: "the units with the highest scores are those whose removal ends the output",
    True: "the units with the highest scores are those that alone bring the output about",
}
UNIT = "0 as a random order, 1 as the best found"


def _evidence(given: Any) -> str:
    return f"scores by {given.method}" if hasattr(given, "method") else "scores as handed over"


def _runs_like_this(
    given: Any, questions: Sequence[Question], insert: bool, delta: float, looks: Sequence[int],
    measure: Callable[[Question], Scale], draws: int, seed: int,
) -> Verdict:  # fmt: skip
    name = "insertion" if insert else "deletion"
    if not callable(given):
        raise MethodError(f"{name} over several questions", f"a {type(given).__name__}", "a function that explains one")
    if len(questions) < min(looks):
        raise MethodError(f"{name} over {len(questions)} questions", "too few", f"{min(looks)} questions at least")
    # Whether anything can be ranked depends on no explanation; where nothing can, there is nothing to be right about.
    scales = [measure(q) for q in questions]
    ranked = [(q, scale) for q, scale in zip(questions, scales, strict=True) if scale.measurable]
    explain, rows = cast(Explainer, given), sum(scale.rows for scale in scales)
    evidence = "scores by an explainer, asked of each question"
    told: dict[str, Any] = {"readout": READOUTS[insert], "unit": UNIT, "evidence": evidence}
    plan = tuple(k for k in looks if k <= len(ranked))
    claim = f"{CLAIMS[insert]}, in runs like this"
    if not plan:
        why = f"in {len(questions) - len(ranked)} of {len(questions)} questions no order stands out"
        return unmeasured(claim, RUNS_LIKE_THIS, why, delta, rows=rows, **told)

    def draw(i: int) -> tuple[float, Mapping[str, float]]:
        nonlocal rows
        question, scale = ranked[i]
        n = len(question.units)
        answer = Answer.of(explain(question), question.units)
        own = orders_of(answer.scores, draws, stream(name, "ties", seed, n, i))
        arms = {
            "own": own,
            "scores dealt out at random": orders_of(np.zeros(n), draws, stream(name, "dealt", seed, n, i)),
            "the reversed order": own[:, ::-1],
            "the order the units come in": np.tile(np.arange(n), (draws, 1)),
        }
        if answer.nothing:  # though something can be ranked
            return 0.0, {k: 0.0 for k in arms if k != "own"}
        found = {}
        for arm, order in arms.items():
            areas = areas_of(curves(question, order, scale.cuts, insert), scale.cuts, n, insert)
            found[arm] = float(scale.number(areas).mean())
            rows += areas.size * len(scale.cuts)
        return found.pop("own"), found

    verdict = sequential(
        draw, claim=claim, delta=delta, looks=plan, replicate="question", **told
    )  # fmt: skip
    verdict.details.update(rows=rows, without_an_order=len(questions) - len(ranked))
    return verdict
