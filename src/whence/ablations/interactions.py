"""Which combinations of units, not single units, decide the output? Write it as few AND and OR interactions.

With v(S) = E f(units of S kept, the others drawn anew), and v asked for all 2^n subsets S of n units, Chen, Lou, Huang
and Zhang (2024) split v and take Harsanyi's dividends of both parts:

    v(T) = v_and(T) + v_or(T) + eps(T),     v_and = v / 2 + gamma,   v_or = v / 2 - gamma,   |eps| small
    I_and(S) = sum over T in S of  (-1)^(|S| - |T|) v_and(T)         there if all of S is kept
    I_or(S) = - sum over T in S of  (-1)^(|S| - |T|) v_or(N \\ T)     there if any of S is kept
    v(T) - eps(T) = I(none) + sum over S in T of I_and(S)  +  sum over S that meet T of I_or(S)

for every gamma, and choose gamma so that the interactions are few: for m models asked about the same units,

    min over gamma, eps   sum over S of [ max over models of |I(S)|  +  alpha  sum over the other models of |I(S)| ]

which for one model is the sum of |I(S)|, and for several favours what they share: where one model has an interaction,
it costs the others less. A unit's score is its share of the interactions, I(S) / |S| of each S it is in: with eps = 0
these are the Shapley values of v.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..engine.attribution import Coalitions, explanation_of, require
from ..errors import MethodError
from ..method import Card

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..explanation import Explanation
    from ..question import Question

    Numbers = NDArray[np.float64]

CARD = Card(
    name="interactions",
    verb="Interactions",
    paper="Chen, Lou, Huang and Zhang, Defining and Extracting Generalizable Interaction Primitives from DNNs, "
    "ICLR 2024",
    systems=("S002-21",),
    question="Which combinations of units, not single units, decide the output?",
    units=("any unit",),
    works_on=("every model that answers a Question",),
    needs=("ask",),
    cost="2^units x draws forwards, at most 10 units; where there are more than 5, choosing comes first: of 32 units, "
    "925 forwards choose 5, whose subsets take 962",
    claim="Where two units are needed together, each of them scores higher than its twin that does nothing.",
    falsifier={
        "trial": "twins.and",
        "planted": "a keyed coin made one of two twin pairs decide the outcome together; certified by swaps",
        "expect": 0.9,
        "control": "random scores, and its own scores with the units shuffled",
        "seconds": 5,
    },
    departs="Written from the equations in excerpts of the paper; the full text was not at hand, so alpha and the "
    "bound of eps are choices of ours: two standard errors of v, 0 where nothing was drawn. The paper descends "
    "gradients in gamma; the problem is convex, and is solved as such (ADMM). Its split of gamma into a part common "
    "to all models and a bounded part of each is left out. An OR of one unit is its AND and is counted there. Removed "
    "units are drawn anew, not masked. Which units make the game is the reader's choice in the paper; of more units "
    "than `most`, those are taken here that do most alone or left out alone, and the rest stays as observed. Sharing "
    "was tried small-scale, on games of five and six units: what was shared held in a third game far more often than "
    "what one game showed, but hardly more often than what two separate fits both listed.",
    avoid="For units that matter only three or more at a time: the choice of units does not see them; name them in "
    "`units`. Where a removed unit is often drawn as it was, as in worlds of coins, an AND of two shows as the pair "
    "and its single units in equal parts.",
)

AT_MOST = 10
"""Units whose subsets can be asked: 1 024 of them."""


@dataclass(frozen=True)
class Interactions:
    """Settings. ``units``: labels of at most AT_MOST units that make the game (None: all, or where there are more than
    ``most``, those of a screening with ``screen`` draws of each unit left out, and of each alone; 0: refuse more).
    ``rows_for_subsets``: about how many rows the subsets may take, each at least one: few units that are drawn often
    show more than many that are drawn once. ``noise``: bound of eps in standard errors of v, which takes two draws or
    more to know; with 0 the interactions add up to v as it was measured. ``alpha``: weight of interactions beside the
    largest one among models. ``salient``: those of at least this share of the largest one are listed. ``steps`` of the
    solver."""

    units: tuple[str, ...] | None = None
    most: int = 5
    screen: int = 14
    rows_for_subsets: int = 1_000
    noise: float = 2.0
    alpha: float = 0.5
    salient: float = 0.05
    steps: int = 600

    def rows(self, units: int) -> int:
        """Most rows sent forwards for so many units."""
        n = min(units, self.most) if self.units is None else len(self.units)
        screening = 0 if n == units or self.units else 1 + (2 * units + 2) * self.screen
        return int(screening + 1 + self._draws(n) * (2**n - 1))

    def _draws(self, n: int) -> int:
        return int(max(1, self.rows_for_subsets // 2**n))

    def explain(self, question: Question) -> Explanation:
        """scores[unit] of the units of the game, in the readout's units; their spread is that of v's Shapley values.

        ``details``: "and" and "or", the salient interactions, (labels, I), the largest first; "nothing kept", v of
        that; "interactions", what those do beyond the scores when units are *removed* together (see Answer); "kept",
        units that stayed as observed; "off by", the largest |eps|.
        """
        return self.shared([question])[0]

    def shared(self, questions: Sequence[Question]) -> tuple[Explanation, ...]:
        """One explanation for each question, from one fit of all: the same units asked of several models. "shared" in
        ``details`` lists what is salient in all of them, of the same sign: ("and" or "or", labels, mean I).

        Raises MethodError for questions about different units, and for more units than can be asked."""
        began = time.perf_counter()
        for question in questions:
            require(question, "interactions")
        chosen, spent = self._choose(questions)
        n = len(chosen)
        games = [_Chosen(question, chosen) for question in questions]
        asked = [_ask_all(game, self._draws(n)) for game in games]
        v = np.stack([a[0] for a in asked], 1)
        bound = self.noise * np.stack([a[1] for a in asked], 1)
        i_and, i_or, eps = fit(v, bound, self.alpha, self.steps)
        labels = games[0].units.labels
        kept = [label for label in questions[0].units.labels if label not in labels]
        large = [_salient(i_and[:, k], i_or[:, k], self.salient) for k in range(len(games))]
        common = _common(large, labels) if len(games) > 1 else {}
        found = []
        for k, game in enumerate(games):
            details = {
                **_listed(*large[k], labels),
                "nothing kept": float(i_and[0, k]),
                "interactions": _beyond(*large[k], shares(i_and[:, k], i_or[:, k]), labels),
                "kept": kept,
                "off by": float(abs(eps[:, k]).max()),
                **common,
            }
            scores, rows = shares(i_and[:, k], i_or[:, k]), spent[k] + asked[k][2]
            spread = _errors(asked[k][1]) if self._draws(n) > 1 else None
            found.append(explanation_of(game, "interactions", self, scores, began, rows, spread, details))
        return tuple(found)

    def _choose(self, questions: Sequence[Question]) -> tuple[list[int], list[int]]:
        """The units of the game, in their order, and the rows that choosing took of each question."""
        if not questions or any(q.units.labels != questions[0].units.labels for q in questions):
            found = "questions about different units" if questions else "none"
            raise MethodError("interactions of several questions", found, "one or more about the same units")
        units = questions[0].units
        n, nothing = len(units), [0] * len(questions)
        if self.units is not None:
            chosen = sorted({units.find(label) for label in self.units})
        elif n <= min(self.most, AT_MOST):
            return list(range(n)), nothing
        else:
            chosen = list(range(self.most if self.screen else n))
        if not 0 < len(chosen) <= AT_MOST:
            raise MethodError(
                f"interactions of {len(chosen)} units", f"{len(chosen)} units have 2^{len(chosen)} subsets",
                f"units=(...), 1 to {AT_MOST} labels, or a screening: screen=14, most={AT_MOST} or fewer",
            )  # fmt: skip
        if self.units is not None:
            return chosen, nothing
        screened = [_screen(q, self.screen) for q in questions]
        does = np.mean([s for s, _ in screened], 0)
        return sorted(np.argsort(-does, kind="stable")[: self.most].tolist()), [rows for _, rows in screened]


class _Chosen:
    """The question about some of its units, the others kept."""

    capabilities: frozenset[str] = frozenset()

    def __init__(self, question: Question, chosen: list[int]) -> None:
        self._question, self._chosen = question, chosen
        self.units, self.readout = question.units.subset(chosen), question.readout

    def ask(self, keep: NDArray[np.bool_]) -> Numbers:
        whole = np.ones((len(keep), len(self._question.units)), bool)
        whole[:, self._chosen] = keep
        return self._question.ask(whole)


def _screen(question: Question, draws: int) -> tuple[Numbers, int]:
    """How much each unit does: the more of what is lost without it, and of what is gained with it alone."""
    n = len(question.units)
    coalitions = Coalitions(question, draws, empty=2 * draws)
    alone = np.eye(n, dtype=bool)
    values = coalitions.values(np.concatenate([~alone, alone, np.zeros((1, n), bool)]))
    return np.maximum(abs(coalitions.full - values[:n]), abs(values[n:-1] - values[-1])), coalitions.rows


def _ask_all(question: Question, draws: int) -> tuple[Numbers, Numbers, int]:
    """v[subset] (unit i is in subset s if its bit i is set), its standard error, pooled over subsets, 0 for the whole,
    and the rows asked."""
    n = len(question.units)
    keep = ((np.arange(2**n)[:, None] >> np.arange(n)) & 1).astype(bool)
    coalitions = Coalitions(question)
    sampled = np.array([coalitions.values(keep) for _ in range(draws)])
    error = np.zeros(2**n)
    if draws > 1:
        error[:-1] = np.sqrt(sampled[:, :-1].var(0, ddof=1).mean() / draws)
    return sampled.mean(0), error, coalitions.rows


# --- interactions: all arrays [subset] or [subset, model]; an OR of one unit is counted as AND -----------------------


def _sizes(n: int) -> NDArray[np.int64]:
    return np.array([s.bit_count() for s in range(2**n)])


def _added(x: Numbers, sign: int = 1) -> Numbers:
    """Sum over the subsets of each subset; with sign -1 the inverse of that: Harsanyi's dividends."""
    out = np.array(x, float)
    for unit in range(len(x).bit_length() - 1):
        halves = out.reshape(-1, 2, 2**unit, *out.shape[1:])
        halves[:, 1] += sign * halves[:, 0]
    return out


def dividends(v_and: Numbers, v_or: Numbers) -> tuple[Numbers, Numbers]:
    """I_and and I_or of the two parts of v. What is there with nothing kept is I_and of no unit."""
    i_and, i_or = _added(v_and, -1), -_added(v_or[::-1], -1)  # the complement of s is 2^n - 1 - s
    i_and[0] += v_or[0]
    one = _sizes(len(v_and).bit_length() - 1) == 1
    i_and[one] += i_or[one]
    i_or[one] = 0
    i_or[0] = 0
    return i_and, i_or


def together(i_and: Numbers, i_or: Numbers) -> Numbers:
    """v of every subset from its interactions."""
    return np.asarray(_added(i_and) + i_or.sum(0) - _added(i_or)[::-1])


def shares(i_and: Numbers, i_or: Numbers) -> Numbers:
    """scores[unit]: each interaction in equal parts to its units."""
    n = len(i_and).bit_length() - 1
    parts = (i_and + i_or) / np.maximum(_sizes(n), 1)
    return np.array([parts[(np.arange(2**n) >> unit & 1) == 1].sum() for unit in range(n)])


def _errors(error: Numbers) -> Numbers:
    """Standard errors of the Shapley values of v[subset] with this standard error: they are sums with known weights."""
    n = len(error).bit_length() - 1
    parts = _added(np.eye(2**n), -1) / np.maximum(_sizes(n), 1)[:, None]
    weights = np.array([parts[(np.arange(2**n) >> unit & 1) == 1].sum(0) for unit in range(n)])
    return np.asarray(np.sqrt(weights**2 @ error**2))


def fit(v: Numbers, bound: Numbers, alpha: float = 0.5, steps: int = 600) -> tuple[Numbers, Numbers, Numbers]:
    """I_and, I_or and eps, [subset, model], of v[subset, model] with |eps| at most ``bound[subset, model]``: few
    interactions, by ADMM (projection on those that add up to v, shrinkage, and the sum of what was left over)."""
    n = len(v).bit_length() - 1
    subsets = np.arange(2**n)
    several = subsets[_sizes(n) > 1]
    terms = np.hstack([(subsets[:, None] & subsets) == subsets, (subsets[:, None] & several) != 0]).astype(float)
    noisy = float(bound.max() > 0)
    solve = np.linalg.inv(terms @ terms.T + noisy * np.eye(2**n))
    scale = float(abs(v - v[0]).max()) or 1.0
    target, bound, step = v / scale, bound / scale, 0.1
    z, e = np.zeros((terms.shape[1], v.shape[1])), np.zeros(v.shape)
    u, w = z.copy(), e.copy()
    for _ in range(steps):
        x, y = z - u, noisy * (e - w)
        off = solve @ (target - terms @ x - y)
        u += 1.6 * (x + terms.T @ off) - 0.6 * z  # over-relaxed, as usual
        w += 1.6 * (y + noisy * off) - 0.6 * e
        z, e = _shrunk(u, alpha, step), np.clip(w, -bound, bound)
        z[0] = u[0]  # what is there with nothing kept is no interaction
        u, w = u - z, w - e
    z, e = z * scale, e * scale
    v_and = _added(z[: 2**n])
    return *dividends(v_and, v - e - v_and), e


def _shrunk(x: Numbers, alpha: float, step: float) -> Numbers:
    """argmin over z of  |z - x|^2 / 2 + step (alpha sum |z| + (1 - alpha) max |z|)  for each row: of all entries by a
    threshold, then of the largest ones alone."""
    x = np.sign(x) * np.maximum(abs(x) - alpha * step, 0)
    falling = -np.sort(-abs(x), 1)
    ceilings = (falling.cumsum(1) - (1 - alpha) * step) / np.arange(1, x.shape[1] + 1)
    top = np.maximum(ceilings.max(1), 0)[:, None]
    return np.clip(x, -top, top)


# --- what is listed --------------------------------------------------------------------------------------------------


def _salient(i_and: Numbers, i_or: Numbers, share: float) -> tuple[Numbers, Numbers]:
    """The same without those below this share of the largest."""
    largest = max(abs(i_and[1:]).max(), abs(i_or).max())
    kept = [np.where(abs(i) >= max(share * largest, 1e-9), i, 0.0) for i in (i_and, i_or)]
    kept[0][0] = 0.0
    return kept[0], kept[1]


def _named(subset: int, labels: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(label for i, label in enumerate(labels) if subset >> i & 1)


def _pairs(values: Numbers, labels: tuple[str, ...]) -> list[tuple[tuple[str, ...], float]]:
    order = np.argsort(-abs(values), kind="stable")
    return [(_named(int(s), labels), float(values[s])) for s in order if values[s]]


def _listed(i_and: Numbers, i_or: Numbers, labels: tuple[str, ...]) -> dict[str, Any]:
    return {"and": _pairs(i_and, labels), "or": _pairs(i_or, labels)}


def _common(large: Sequence[tuple[Numbers, Numbers]], labels: tuple[str, ...]) -> dict[str, Any]:
    listed: list[tuple[str, tuple[str, ...], float]] = []
    for kind, values in zip(("and", "or"), map(np.array, zip(*large, strict=True)), strict=True):
        same = (values > 0).all(0) | (values < 0).all(0)
        listed += [(kind, *pair) for pair in _pairs(np.where(same, values.mean(0), 0.0), labels)]
    return {"shared": sorted(listed, key=lambda row: -abs(row[2]))}


def _beyond(i_and: Numbers, i_or: Numbers, scores: Numbers, labels: tuple[str, ...]) -> Any:
    """What the fall of v has beyond the scores for each set that is removed: an OR falls with all of its set, an AND
    with any unit of it, which is, by inclusion and exclusion, a sum over the sets inside it. Sets of one correct the
    scores to what is lost without that unit alone."""
    n = len(labels)
    over = _added(i_and[::-1])[::-1]  # sums over the sets that contain each set
    fall = i_or - (-1.0) ** _sizes(n) * over
    fall[0] = 0
    fall[2 ** np.arange(n)] -= scores
    return _pairs(np.where(abs(fall) > 1e-9, fall, 0.0), labels)
