"""Two forms of one gradient side by side, and a query in stages: all by the small form, the best again by the larger.

The first stage scans the signs of everything and keeps both ends of the ranking; the second scores these again from
their int8 rows. How many of the true best twenty the first stage let through is measured on a slice, not assumed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from .influence import BLOCK, Fitted, Scheme, Shelf, exact_scores
from .scan import Ends, top

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .curvature import KroneckerFisher

LEAST = 256
"""At least so many of each end are scored again."""
SHARE = 0.02
"""And at least this share of all."""


class Both:
    """Everything is scanned by ``small``, and what is worth it scored by ``large``; its own score is the large one's. A
    scheme that also learns and encodes extends it."""

    def __init__(self, small: Scheme, large: Scheme) -> None:
        self.small, self.large = small, large
        self.sample = max(small.sample, large.sample)

    @property
    def planes(self) -> dict[str, int]:
        return {**self.small.planes, **self.large.planes}

    def finish(self, shelf: Shelf) -> None:
        self.small.finish(shelf)
        self.large.finish(shelf)

    def prepare(self, gradients: Mapping[str, Tensor]) -> tuple[Any, Any]:
        return self.small.prepare(gradients), self.large.prepare(gradients)

    def score(self, prepared: tuple[Any, Any], codes: Mapping[str, NDArray[np.uint8]]) -> NDArray[np.float32]:
        return self.large.score(prepared[1], codes)


@dataclass(frozen=True)
class Found:
    """The ends of one query's ranking.

    ``numbers`` and ``scores`` of the best, ``low_numbers`` and ``low_scores`` of the lowest (the lowest first);
    ``scanned`` and ``again``: examples scored in the first two stages; ``recall``: share of the best ``k`` of a slice
    of ``slice`` examples, by the large form, that were among those scored again; ``exact``: how many were scored once
    more by EK-FAC.
    """

    numbers: NDArray[np.int64]
    scores: NDArray[np.float32]
    low_numbers: NDArray[np.int64]
    low_scores: NDArray[np.float32]
    scanned: int
    again: int
    recall: float | None = None
    slice: int = 0
    exact: int = 0


def search(
    fitted: Fitted, queries: Sequence[Any], k: int = 20, alive: NDArray[np.bool_] | None = None, check: int = 20_000
) -> list[Found]:
    """The ``k`` best and lowest examples for each query. ``alive``: rows that may be named; ``check``: examples of the
    slice that recall is measured on (0: it is not)."""
    prepared = fitted.prepare(queries)
    scheme: Any = fitted.scheme
    n = len(fitted.examples) if alive is None else int(alive.sum())
    k = min(k, n)

    def living(start: int, scores: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        numbers = np.arange(start, start + scores.shape[1])
        keep = slice(None) if alive is None else alive[numbers]
        return numbers[keep], scores[:, keep]

    if not isinstance(scheme, Both):
        ends = top((living(start, part) for start, part in fitted.stream(prepared)), k)
        return [_found(ends, q, n, 0, None, 0) for q in range(len(queries))]
    many = min(n, max(LEAST, k, int(SHARE * n)))
    plane = next(iter(scheme.small.planes))
    stream = (
        living(start, scheme.small.score(prepared[0], {plane: codes}))
        for start, codes in fitted.shelf.blocks(plane, rows=4 * BLOCK)
    )
    coarse = top(stream, many)
    chosen = []
    for q in range(len(queries)):
        low = coarse.worst.rows[q] if coarse.worst else np.zeros(0, np.int64)
        chosen.append(np.unique(np.concatenate([coarse.best.rows[q], low])))
    # Rows that several queries chose are read once, and so is the slice that recall is measured on.
    every = np.unique(np.concatenate(chosen))
    again = _at(fitted, prepared, every)
    part = _slice(len(fitted.examples), alive, check)
    known = np.isin(part, every).all()
    true = again[:, np.searchsorted(every, part)] if known else _at(fitted, prepared, part)
    found = []
    for q, own in enumerate(chosen):
        ends = top([(own, again[q : q + 1, np.searchsorted(every, own)])], k)
        best = part[np.argsort(-true[q], kind="stable")[:k]]
        recall = float(np.isin(best, own).mean()) if len(part) else None
        found.append(_found(ends, 0, n, len(own), recall, len(part)))
    return found


def _slice(n: int, alive: NDArray[np.bool_] | None, check: int) -> NDArray[np.int64]:
    """Evenly spread numbers of ``check`` rows, on which recall is measured."""
    rows = np.arange(n) if alive is None else np.flatnonzero(alive)
    if not check or not len(rows):
        return np.zeros(0, np.int64)
    return rows[np.unique(np.linspace(0, len(rows) - 1, min(check, len(rows))).astype(np.int64))]


def _at(fitted: Fitted, prepared: Any, numbers: NDArray[np.int64]) -> NDArray[np.float32]:
    """score[query, number] by the large form, some thousands at a time."""
    parts = [fitted.at(prepared, numbers[i : i + BLOCK]) for i in range(0, len(numbers), BLOCK)]
    return np.concatenate(parts, 1) if parts else np.zeros((0, 0), np.float32)


def _found(ends: Ends, q: int, scanned: int, again: int, recall: float | None, part: int) -> Found:
    low = ends.worst
    assert low is not None
    return Found(ends.best.rows[q], ends.best.scores[q], low.rows[q], low.scores[q], scanned, again, recall, part)


def once_more(found: Found, curvature: KroneckerFisher, fitted: Fitted, query: Any, k: int) -> Found:
    """The last stage: all that was found, scored once more by EK-FAC from gradients taken anew."""
    numbers = np.unique(np.concatenate([found.numbers, found.low_numbers]))
    scores = exact_scores(curvature, [query], [fitted.examples[int(i)] for i in numbers])
    ends = top([(numbers, scores)], min(k, len(numbers)))
    last = _found(ends, 0, found.scanned, found.again, found.recall, found.slice)
    return replace(last, exact=len(numbers))
