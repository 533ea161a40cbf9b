"""How is an index built by the ranks that hold a model between them? Each makes ranges of rows, all in step.

    torchrun --nproc-per-node 8 mine.py      # in which fully_shard(model) and build(objective, examples, "/shared/ix")

What is fitted once every rank fits, with the same passes over the same sample; the first rank writes it down. Then each
takes every n-th of the ranges that are missing and writes their rows where the index lies, as Ray's workers do
(ray_workers.py); a rank that has no row left to make makes one again that nobody keeps, as its part of the weights is
needed. If a rank fails all end; what was written stays, what was not is still ``missing``.
"""

from __future__ import annotations

import socket
from collections import ChainMap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from ..engine import ranks
from ..engine.influence import Skipped, finite
from ..engine.progress import progress
from ..errors import RunError, WhenceError
from .contents import FILE
from .index import Index
from .places import place_of
from .ray_workers import SHARED, gather, note, seen

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..engine.gradients import GradientBank
    from ..engine.influence import Scheme
    from ..objective import Examples


class Follower:
    """The index as every rank but the first has it: read by all, and what is learned kept in memory, to be compared."""

    def __init__(self, place: str, index: Index | None) -> None:
        self.place, self.index = place, index
        self._own: dict[str, NDArray[Any]] = {}

    @property
    def done(self) -> int:
        return 0 if self.index is None else self.index.done

    @property
    def tensors(self) -> Mapping[str, NDArray[Any]]:
        there: Any = {} if self.index is None else self.index.tensors
        return ChainMap(self._own, there)

    def keep(self, tensors: Mapping[str, NDArray[Any]]) -> None:
        self._own |= dict(tensors)

    def append(self, planes: Mapping[str, NDArray[np.uint8]]) -> None:
        raise NotImplementedError("the first rank alone appends")

    def begin(self, strides: Mapping[str, int]) -> Index:
        """The index that the first rank has begun. Raises RunError where it cannot be read here, or holds something
        else than was learned here."""
        self.index = Index.open(self.place)
        odd = [k for k, v in self._own.items() if not np.array_equal(v, self.index.tensors[k], equal_nan=True)]
        if odd:
            found = f"what is learned of a sample differs on {socket.gethostname()}: {odd[0]}"
            raise RunError(f"build the index {self.place}", found, "one kind of host, and the same data on all")
        self._own = {}
        return self.index

    def blocks(self, plane: str, rows: int = 16_384) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        assert self.index is not None
        return self.index.blocks(plane, rows=rows, only_alive=False)

    def rows(self, plane: str, numbers: NDArray[np.int64]) -> NDArray[np.uint8]:
        assert self.index is not None
        return self.index.rows(plane, numbers)

    def __enter__(self) -> Follower:
        return self

    def __exit__(self, *how: Any) -> None:
        """Nothing is held."""


@contextmanager
def in_step(asked: str) -> Iterator[None]:
    """For passes that all ranks do. Whatever ends one ends them all, and what the others then say is not the reason."""
    try:
        yield
    except WhenceError:
        raise
    except Exception as error:
        found = f"rank {ranks.number()}: {ranks.first_line(error)}"
        works = f"examples that work or, where another rank ended, {ranks.AGAIN}"
        raise RunError(asked, found, works) from error


def met(place: str) -> None:
    """All ranks are here and see the same place. Raises RunError where they do not."""
    here = place_of(place).read(FILE) is not None
    there = ranks.on_any(here)
    reason = f"{place} is not to be seen from the host {socket.gethostname()}" if there and not here else ""
    ranks.agree(asked_of(place), reason, SHARED)


def asked_of(place: str) -> str:
    """What is asked for, in errors."""
    return f"build the index {place} on {ranks.count()} ranks"


def fill(shelf: Any, scheme: Scheme, bank: GradientBank, examples: Examples, batch: int) -> None:
    """Have the rows that are missing made by all ranks. Raises RunError on each when one fails; rows that were written
    are kept then."""
    first, place = ranks.number() == 0, str(shelf.place)
    asked = asked_of(place)
    if first:
        shelf.begin(scheme.planes).flush()
    ranks.agree(asked)
    why = ""
    if not first:
        try:
            shelf.begin(scheme.planes)
        except WhenceError as error:
            why = f"{error.asked}: {error.found}"
    ranks.agree(asked, why, SHARED)
    try:
        _make(shelf.index, place, scheme, bank, examples, batch, asked)
        ranks.agree(asked)
    finally:
        if first:
            gather(shelf.index, place)
    if first:
        for job in shelf.index.missing():
            seen(shelf.index, place, {}, job, "one of the ranks")


def _make(
    index: Index, place: str, scheme: Scheme, bank: GradientBank, examples: Examples, batch: int, asked: str
) -> None:
    """This rank's part of the rows that are missing."""
    ranges, many = index.missing(), ranks.count()
    with progress("index", total=len(ranges), unit="ranges") as advance:
        for at in range(0, len(ranges), many):
            turn = dict(enumerate(ranges[at : at + many]))
            a, b = turn.get(ranks.number(), (0, 0))
            planes: list[dict[str, NDArray[np.uint8]]] = []
            skipped = Skipped()
            for step in range(0, max(stop - start for start, stop in turn.values()), batch):
                own, why = range(a + step, min(a + step + batch, b)), ""
                part: list[Any] = []
                try:
                    part = [examples[i] for i in own or turn[0][:1]]
                except Exception as error:
                    why = f"examples {own.start}..{own.stop - 1}: {ranks.first_line(error)}"
                ranks.agree(asked, why)
                with in_step(asked):
                    gradients = bank.gradients(part)
                if own:
                    planes.append(scheme.encode(finite(gradients, own.start, skipped)))
            if planes:
                if skipped.numbers:
                    note(place, index.manifest, a, b, skipped.numbers)
                index.put(a, {name: np.concatenate([p[name] for p in planes]) for name in planes[0]})
            advance(len(turn))


def followed(shelf: Follower, scheme: Scheme) -> tuple[int, ...]:
    """Once the first rank has finished the index: open it here, with what was learned; gives the examples that were
    left out."""
    ranks.agree(f"finish the index {shelf.place}")
    shelf.index = Index.open(shelf.place)
    held = shelf.tensors
    scheme.restore({k.removeprefix("learned/"): held[k] for k in held if k.startswith("learned/")})
    return tuple(int(i) for i in held["skipped"])
