"""Several checkpoints of one training, each with an index of its own, asked as one.

What an example did to an output differs from checkpoint to checkpoint: early ones know what was learned first, and the
mean over several follows training again better than any one of them (TracIn sums over checkpoints, TRAK takes the mean
over models). A query goes through every index; all that any of them found is scored by all, and the mean is the score.
The first checkpoint makes the output that is asked about.

    made = [build(o, examples, p) for o, p in zip(objectives, places("out/ix", 3))]
    found = Checkpoints(tuple(made)).search([query])
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..engine.scan import top
from ..engine.stages import LEAST, Found, once_more
from ..errors import RunError

if TYPE_CHECKING:
    from ..engine.crew import Workers
    from .training_index import TrainingIndex


def places(place: str, checkpoints: int) -> list[str]:
    """Where the index of each checkpoint lies: the first at the place itself, the others in folders of it."""
    return [place, *(f"{place.rstrip('/')}/checkpoint-{i}" for i in range(2, checkpoints + 1))]


@dataclass(frozen=True)
class Checkpoints:
    """Indexes of the same examples in the same form. Raises RunError for others."""

    members: tuple[TrainingIndex, ...]

    def __post_init__(self) -> None:
        first = self.members[0]
        for other in self.members[1:]:
            a, b = first.index.manifest, other.index.manifest
            if (a.data, first.form) != (b.data, other.form):
                found = f"one of {a.data} as {first.form.name}, one of {b.data} as {other.form.name}"
                raise RunError("indexes of several checkpoints", found, "the same examples in the same format")

    def search(
        self, queries: Sequence[Any], k: int = 20, exact: int | None = 0, workers: Workers | None = None
    ) -> list[Found]:
        """As :meth:`TrainingIndex.search`; ``again`` counts the examples that all members scored, ``recall`` is the
        lowest of theirs."""
        if len(self.members) == 1:
            return self.members[0].search(queries, k, exact, workers)
        alive = np.logical_and.reduce([m.index.alive for m in self.members])
        here = int(alive.sum())
        if not 1 <= k <= here:
            raise RunError(f"the best {k} examples", f"{here} are in the index", "--top of 1 or more, not more")
        curvatures = [] if exact == 0 else [m.curvature(exact) for m in self.members]
        if exact is None:
            counts = [
                m.affordable(c, len(queries) * len(self.members)) for m, c in zip(self.members, curvatures, strict=True)
            ]
            exact = min(counts)
        some = min(max(LEAST, k, exact), here)
        each = [m.search(queries, some, 0, workers) for m in self.members]
        found = []
        for q, query in enumerate(queries):
            own = [e[q] for e in each]
            chosen = np.unique(np.concatenate([n for f in own for n in (f.numbers, f.low_numbers)]))
            chosen = chosen[alive[chosen]]
            scores = [m.fitted.at(m.fitted.prepare([query]), chosen) for m in self.members]
            recalls = [f.recall for f in own if f.recall is not None]
            best = _ends(chosen, np.mean(scores, 0), max(exact, k))
            one = Found(*best, own[0].scanned, len(chosen), min(recalls, default=None), own[0].slice)
            if exact and curvatures:
                numbers = np.unique(np.concatenate([one.numbers, one.low_numbers]))
                again = []
                for m, curvature in zip(self.members, curvatures, strict=True):
                    assert curvature is not None
                    f = once_more(one, curvature, m.fitted, query, len(numbers))
                    again.append(f.scores[np.argsort(f.numbers)])  # all of them, each once
                best = _ends(numbers, np.mean(again, 0)[None], k)
                one = replace(one, numbers=best[0], scores=best[1], low_numbers=best[2], low_scores=best[3])
                one = replace(one, exact=len(numbers))
            found.append(one)
        return found

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *how: object) -> None:
        with ExitStack() as stack:
            for m in self.members:
                stack.callback(m.__exit__, *how)


def _ends(numbers: Any, scores: Any, k: int) -> tuple[Any, Any, Any, Any]:
    """The best and the lowest ``k`` of score[1, number], as Found has them."""
    ends = top([(numbers, scores.astype(np.float32))], min(k, len(numbers)))
    assert ends.worst is not None
    return ends.best.rows[0], ends.best.scores[0], ends.worst.rows[0], ends.worst.scores[0]
