"""The liars' gallery: explainers that look right and are not. A trial that one of them passes proves nothing.

Each liar cheats in a way that a published comparison has let through: by knowing the published worlds by heart, by
reading the input and never the model, by choosing among many maps the one that the metric likes. The
trial must place every one of them below honest methods on fresh draws (``tests/worlds/test_liars.py``), by its AUC and
by the effects that it foretells. Choosing by real re-renderings does find a single cause: the chooser is below by what
it foretells alone. Attention mass, which needs a model with attention, is a method of its own, tried as all are.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..engine.randomness import stream
from ..question import Answer, Explainer
from .ground import Draw, Planted
from .trial import random_scores


def _face(question: Any) -> tuple[str, ...]:
    """What a question looks like from outside: its readout and the names of its units, in order."""
    return (question.readout, *question.units.labels)


def by_heart(listed: Iterable[Draw]) -> Explainer:
    """Right on the listed draws, random elsewhere: it has read the answers of the published worlds.

    The sibling has the same face as its question, so even there it is right on one of the two only.
    """
    known: dict[tuple[str, ...], frozenset[int]] = {}
    for draw in listed:
        known |= {_face(p.question): p.causes for p in draw.planted}

    def explain(question: Any) -> NDArray[np.float64]:
        causes = known.get(_face(question))
        if causes is None:
            return random_scores(question)
        return np.array([float(i in causes) for i in range(len(question.units))])

    return explain


def chooser(maps: int = 60, steps: int = 6) -> Explainer:
    """Draws many random maps and commits to the one whose deletion curve falls fastest: it optimises the metric."""

    def explain(question: Any) -> NDArray[np.float64]:
        n = len(question.units)
        rng = stream("liar", "chooser", *_face(question))
        drawn = rng.random((maps, n))
        order = (-drawn).argsort(1)
        keep = np.ones((maps, steps, n), bool)
        for m in range(maps):
            for s in range(steps):
                keep[m, s, order[m, : s + 1]] = False
        area = question.ask(keep.reshape(-1, n)).reshape(maps, steps).mean(1)
        return np.asarray(drawn[area.argmin()])

    return explain


def confident(question: Any) -> Answer:
    """Names one unit, drawn at random, as the whole cause: no false modesty, never "nothing"."""
    scores = np.zeros(len(question.units))
    scores[stream("liar", "confident", *_face(question)).integers(len(scores))] = 1.0
    return Answer(scores, (frozenset([int(scores.argmax())]),))


def silent(question: Any) -> Answer:
    """Says "nothing here did it", always: never a false alarm, never an answer."""
    return Answer(np.zeros(len(question.units)), nothing=True)


def truth(planted: Iterable[Planted]) -> dict[int, Answer]:
    """The right answers by the identity of the question: scores from certified swaps, and the sets. For meta-tests."""
    found = {}
    for p in planted:
        for side in (p, p.mirrored()):
            scores = np.array([float(i in side.causes) for i in range(len(side.question.units))])
            found[id(side.question)] = Answer(scores, side.ends)
        found |= {id(null): Answer(np.zeros(len(null.units)), nothing=True) for null in p.nulls}
    return found


def degraded(answer: Answer, share: float, *names: object) -> Answer:
    """The answer with this share of its scores given to other units: 0 leaves it, 1 shuffles all."""
    rng = stream("degraded", share, *names)
    n = len(answer.scores)
    moved = rng.permutation(n)[: round(share * n)]
    scores = answer.scores.copy()
    scores[moved] = answer.scores[rng.permutation(moved)]
    return Answer(scores, None if share else answer.sets, nothing=answer.nothing)
