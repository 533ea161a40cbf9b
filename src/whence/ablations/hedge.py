"""How do units join into phrases that decide the output? Split where the parts interact least, from the top down.

For units x_1..x_n in their order and f the readout of a set of units kept, the others drawn anew (Chen, Zheng and Ji
2020, section 3): a partition P starts as the one span of all units, and in each step the span and the cut j with the
least interaction between its two parts are chosen and cut, until all spans are single units:

    min over spans of P, min over cuts j of   phi(j1, j2 | P),       j1, j2 the parts left and right of the cut
    phi(j1, j2 | P) = sum over S in N_m of  |S|! (M - |S| - 2)! / (M - 1)!  gamma(j1, j2, S)
    gamma(j1, j2, S) = E f(S, j1, j2) - E f(S, j1) - E f(S, j2) + E f(S)

the Shapley interaction index restricted to N_m, the m spans on each side, with M = |N_m| + 2. A span's importance is
psi(span) = E f(span kept) - E f(nothing kept). The weights of S add up to 1 and say: draw a size from 0 to |N_m|
evenly, then a set of that size; so phi is estimated by drawing S, and every value of a coalition is the mean over all
its draws so far. ``scores`` are psi of the single units, ``spread`` their standard error.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING

import numpy as np

from ..engine.attribution import explanation_of, require
from ..engine.randomness import stream
from ..method import Card

if TYPE_CHECKING:
    from ..explanation import Explanation
    from ..question import Question

CARD = Card(
    name="hedge",
    verb="HEDGE",
    paper="Chen, Zheng and Ji, Generating Hierarchical Explanations on Text Classification via Feature Interaction "
    "Detection, ACL 2020",
    systems=("S002-104",),
    question="How do units join into phrases that decide the output?",
    units=("any unit in an order",),
    works_on=("every model that answers a Question",),
    needs=("ask",),
    cost="draws x units, and about rows_per_span for each of units - 1 spans: 979 forwards at most for 24 units",
    claim="Where either of two units suffices, each scores higher than its twin, though leaving one out changes "
    "nothing.",
    falsifier={
        "trial": "twins.or",
        "planted": "a keyed coin made either unit of one of two twin pairs suffice for the outcome; certified by swaps",
        "expect": 0.9,
        "control": "random scores, and its own scores with the units shuffled",
        "seconds": 5,
    },
    departs="Units are removed by drawing them anew; the paper pads or masks them. The readout less its value with "
    "nothing kept takes the place of the margin over the next best class. A span's cuts are measured once, among the "
    "neighbours it has when it is made, and S is drawn, not enumerated: short spans get more draws, as the last cuts "
    "decide what stays together. Groups (details 'sets') are Whence's addition.",
    avoid="For units that interact from afar: only neighbouring spans are seen to interact. To name groups on a small "
    "budget where one draw moves the output: the standard errors then leave few or none.",
)

Span = tuple[int, ...]


@dataclass(frozen=True)
class HEDGE:
    """Settings: ``window`` (m) neighbouring spans on each side; ``draws`` of each single unit and twice as many of
    nothing kept; ``rows_per_span``: about how many rows each span's cuts may take. A span is a group if its weakest
    cut's interaction is at least ``strong`` and two standard errors above 0."""

    window: int = 1
    draws: int = 11
    rows_per_span: int = 20
    strong: float = 0.1
    seed: int = 0

    def rows(self, units: int) -> int:
        """Most rows sent forwards for so many units: if each cut splits off a single unit."""
        spans = sum(max(2 * k, self.rows_per_span) for k in range(2, units + 1))
        return (units + 2) * self.draws + spans + units - 1

    def explain(self, question: Question) -> Explanation:
        """scores[unit] in the readout's units: what each unit does if it alone is kept.

        ``details``: "hierarchy", levels from the whole to single units, each a list of (labels, psi); "cuts", one for
        each span that was split: (labels left, labels right, phi, its standard error); "sets", the groups, the most
        important first (absent if there are none); "interactions", the same groups with psi(span) less the scores of
        its units: what they do beyond their sum.
        """
        began = time.perf_counter()
        require(question, "hedge")
        n, labels = len(question.units), question.units.labels
        game = _Game(question)
        units: list[Span] = [(i,) for i in range(n)]
        game.ask(u for u in units for _ in range(self.draws))
        game.ask([()] * (2 * self.draws))
        partition: list[Span] = [tuple(range(n))]
        levels = [list(partition)]
        cuts: dict[Span, tuple[int, float, float]] = {}
        made: list[tuple[Span, int, float, float]] = []
        while len(partition) < n:
            for place, span in enumerate(partition):
                if len(span) > 1 and span not in cuts:
                    near = partition[max(0, place - self.window) : place]
                    cuts[span] = self._weakest(game, span, near + partition[place + 1 : place + 1 + self.window])
            place = min((i for i, s in enumerate(partition) if len(s) > 1), key=lambda i: cuts[partition[i]][1])
            span = partition[place]
            made.append((span, *cuts[span]))
            at = cuts[span][0]
            partition = [*partition[:place], span[:at], span[at:], *partition[place + 1 :]]
            levels.append(list(partition))
        game.ask(span for span, *_ in made)  # psi of a span is its value alone, which drawing S may have left out

        def psi(span: Span) -> float:
            return game.mean(span) - game.mean(())

        def named(span: Span) -> list[str]:
            return [labels[i] for i in span]

        scores = np.array([psi(u) for u in units])
        groups = [s for s, _, phi, error in made if phi >= self.strong and phi > 2 * error]
        groups.sort(key=psi, reverse=True)
        details = {
            "hierarchy": [[(named(s), psi(s)) for s in level] for level in levels],
            "cuts": [(named(s[:at]), named(s[at:]), phi, error) for s, at, phi, error in made],
            "synergies": [(tuple(named(s)), psi(s) - float(scores[list(s)].sum())) for s in _innermost(groups)],
        }
        if groups:
            # Not `sets` or `interactions` of an Answer, which say what removal does: these are what suffices together.
            details["groups"] = [named(s) for s in groups]
        spread = np.array([game.error({u: 1.0, (): -1.0}) for u in units])
        return explanation_of(question, "hedge", self, scores, began, game.rows, spread, details)

    def _weakest(self, game: _Game, span: Span, near: Sequence[Span]) -> tuple[int, float, float]:
        """The cut with the least phi, phi and its standard error."""
        size = len(span)
        times = max(1, self.rows_per_span // (2 * size))
        rng = stream("hedge", self.seed, span)
        drawn: list[Span] = []
        for _ in range(times):
            chosen = rng.choice(len(near), int(rng.integers(len(near) + 1)), replace=False) if near else ()
            drawn.append(tuple(sorted(u for i in chosen for u in near[i])))

        def joined(s: Span, part: Span) -> Span:
            return tuple(sorted(s + part))

        parts = [part for at in range(1, size) for part in (span[:at], span[at:])]
        game.ask(c for s in drawn for c in (joined(s, span), s, *(joined(s, p) for p in parts)))
        found = []
        for at in range(1, size):
            gamma: dict[Span, float] = defaultdict(float)  # phi as coefficients of coalitions
            for s in drawn:
                for part, sign in ((span, 1), (span[:at], -1), (span[at:], -1), ((), 1)):
                    gamma[joined(s, part)] += sign / times
            phi = sum(c * game.mean(s) for s, c in gamma.items())
            found.append((round(phi, 9), abs(at - size / 2), at, gamma))
        phi, _, at, gamma = min(found, key=lambda f: f[:2])  # ties: the cut nearest to the middle, the cheapest
        return at, phi, game.error(gamma)


class _Game:
    """E f of coalitions, each the mean over all its draws so far."""

    def __init__(self, question: Question) -> None:
        self._question, self._n = question, len(question.units)
        self._draws: dict[Span, tuple[int, float, float]] = {}  # number, sum, sum of squares
        self.rows = 0

    def ask(self, coalitions: Iterable[Span]) -> None:
        """Draw each listed coalition once more; the full one, where nothing is drawn, only once."""
        whole = tuple(range(self._n))
        listed = [c for c in coalitions if c != whole]
        listed += [whole] * (whole not in self._draws)
        keep = np.zeros((len(listed), self._n), bool)
        for row, c in zip(keep, listed, strict=True):
            row[list(c)] = True
        self.rows += len(keep)
        for c, value in zip(listed, self._question.ask(keep).tolist(), strict=True):
            k, total, squares = self._draws.get(c, (0, 0.0, 0.0))
            self._draws[c] = (k + 1, total + value, squares + value * value)

    def mean(self, coalition: Span) -> float:
        k, total, _ = self._draws[coalition]
        return total / k

    def error(self, coefficients: Mapping[Span, float]) -> float:
        """Standard error of a sum of coefficients times means. Draws of all coalitions are taken to vary alike: two or
        three draws of one do not tell how much it varies."""
        freedom = sum(k - 1 for k, _, _ in self._draws.values())
        around = sum(squares - total * total / k for k, total, squares in self._draws.values())
        variance = max(around, 0.0) / max(freedom, 1)
        return sqrt(variance * sum(c * c / self._draws[s][0] for s, c in coefficients.items()))


def _innermost(groups: Sequence[Span]) -> list[Span]:
    """Groups that contain no other: interactions of nested sets would be counted twice."""
    return [s for s in groups if not any(set(t) < set(s) for t in groups)]
