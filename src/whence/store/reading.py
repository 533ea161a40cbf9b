"""Reading rows: shards are mapped when first needed, and let go so that memory stays bounded."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import RunError, nearest
from .contents import Contents, Entry
from .places import Place
from .shards import Mapped, unchecked

BLOCK = 1 << 24
"""Bytes of a block where its rows are not asked for."""
AHEAD = 4
"""Shards of a store that are fetched while one is read."""


class Reader:
    """The mapped shards of an index. ``resident``: bytes of shards that stay mapped, the last ones read."""

    def __init__(self, place: Place, trust: bool, resident: int) -> None:
        self._place, self._trust, self._resident = place, trust, resident
        self._mapped: OrderedDict[str, Mapped] = OrderedDict()
        self._checked: dict[str, NDArray[np.bool_]] = {}
        self._guard = threading.Lock()

    def shard(self, contents: Contents, entry: Entry, plane: str) -> Mapped:
        """Raises RunError when it is missing or damaged."""
        name = contents.name(entry, plane)
        with self._guard:
            found = self._mapped.pop(name, None)
            if found is None:
                if name not in self._checked:
                    self._checked[name] = unchecked(contents.shard(entry, plane), self._trust)
                found = self.open(contents, entry, plane, self._checked[name])
            self._mapped[name] = found
            # Whoever still looks at rows of a shard keeps it mapped; here only our own hold on it ends.
            held = sum(m.size for m in self._mapped.values())
            while held > self._resident and len(self._mapped) > 1:
                held -= self._mapped.popitem(last=False)[1].size
            return found

    def open(
        self, contents: Contents, entry: Entry, plane: str, checked: NDArray[np.bool_], fresh: bool = False
    ) -> Mapped:
        """Map a shard; one whose fetched copy is no good is fetched once more."""
        name, shard = contents.name(entry, plane), contents.shard(entry, plane)
        try:
            path = self._place.local(name, fresh=fresh)
            if path is None:
                raise FileNotFoundError("it is missing")
            return Mapped(path, shard, dict(entry.sums)[plane], checked)
        except RunError:
            if fresh or not self._place.remote:
                raise
            return self.open(contents, entry, plane, checked, fresh=True)
        except (OSError, ValueError) as error:
            raise RunError(
                f"read rows {entry.first}..{entry.stop - 1} of plane {plane!r}",
                f"the shard {name} of {self._place.url} cannot be read: {error}",
                "the index opened again, if it was changed since it was opened; or a copy of that file",
            ) from None

    def blocks(
        self, contents: Contents, plane: str, rows: int | None, alive: NDArray[np.bool_] | None, first: int, last: int
    ) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """Number of its first row, and a view of the rows; only ``alive`` ones if that is given."""
        self._must_have(contents, plane)
        if rows is not None and rows < 1:
            raise RunError(f"read blocks of {rows} rows", "less than 1", "1 or more; None for the usual size")
        step = rows or max(1, BLOCK // contents.manifest.stride(plane))
        return self._blocks(contents, plane, step, alive, first, last)

    def _blocks(
        self, contents: Contents, plane: str, step: int, alive: NDArray[np.bool_] | None, first: int, last: int
    ) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        entries = [e for e in contents.entries if e.first < last and e.stop > first]
        for entry in self._in_turn(contents, plane, entries):
            shard = self.shard(contents, entry, plane)
            for start in range(max(first, entry.first), min(last, entry.stop), step):
                stop = min(start + step, last, entry.stop)
                block = shard.block(start - entry.first, stop - entry.first)
                for a, b in [(0, stop - start)] if alive is None else runs(alive[start:stop]):
                    yield start + a, block[a:b]

    def _in_turn(self, contents: Contents, plane: str, entries: list[Entry]) -> Iterator[Entry]:
        if not self._place.remote:
            yield from entries
            return
        pool = ThreadPoolExecutor(AHEAD)
        try:
            names = deque(contents.name(e, plane) for e in entries)
            coming = deque(pool.submit(self._place.local, names.popleft()) for _ in range(min(AHEAD, len(names))))
            for entry in entries:
                coming.popleft().result()
                if names:
                    coming.append(pool.submit(self._place.local, names.popleft()))
                yield entry
        finally:  # whoever stops looking does not wait for the rest
            pool.shutdown(wait=False, cancel_futures=True)

    def rows(self, contents: Contents, plane: str, numbers: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Rows by number, in the order asked. Raises RunError for a row that is not there."""
        self._must_have(contents, plane)
        out = np.empty((len(numbers), contents.manifest.stride(plane)), np.uint8)
        firsts = np.array([e.first for e in contents.entries], np.int64)
        stops = np.array([e.stop for e in contents.entries], np.int64)
        which = np.searchsorted(firsts, numbers, side="right") - 1
        absent = (which < 0) | (numbers >= stops[which] if len(stops) else True)
        if absent.any():
            raise RunError(
                f"read row {numbers[absent][0]} of plane {plane!r}",
                f"the index holds {sum(e.count for e in contents.entries)} rows, and not that one",
                f"rows 0..{contents.rows - 1} that are not missing" if contents.entries else "an index with rows",
            )
        for w in np.unique(which):
            entry, mine = contents.entries[w], np.flatnonzero(which == w)
            out[mine] = self.shard(contents, entry, plane).take(numbers[mine] - entry.first)
        return out

    def _must_have(self, contents: Contents, plane: str) -> None:
        if plane not in contents.planes():
            works = nearest(plane, contents.planes())
            raise RunError(f"read the plane {plane!r} of {self._place.url}", "it has no such plane", works)


def whole_numbers(given: ArrayLike) -> NDArray[np.int64]:
    """As int64[k]. Raises RunError for others: a mask would silently be taken for rows 0 and 1."""
    found = np.asarray(given).reshape(-1)
    if found.size and found.dtype.kind not in "iu":
        raise RunError("take rows or examples by number", f"an array of {found.dtype}", "whole numbers")
    return found.astype(np.int64)


def runs(flags: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Where flags stand without a break.

    >>> runs(np.array([True, True, False, True]))
    [(0, 2), (3, 4)]
    """
    edges = np.flatnonzero(np.diff(flags.astype(np.int8), prepend=0, append=0)).tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))
