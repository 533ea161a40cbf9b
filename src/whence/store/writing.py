"""Writing an index: whole shards first, then the manifest that lists them, so that a kill at any moment is harmless.

What a stopped writer left unlisted is written again by the next one under the same name, or cleared away once other
rows stand in its place. Files that a new manifest no longer lists stay until the next writer comes: readers that were
opened before may still want them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import OutputError, RunError
from .contents import FILE, IDS, Contents, Entry
from .pending import Pending, part_of
from .places import Place
from .reading import Reader
from .shards import Shard, parse_name, shard_name, unchecked, write_shard
from .tensors import is_tensors, write_tensors
from .tombstones import is_tombstones, read_tombstones, write_tombstones


def write_rows(place: Place, contents: Contents, first: int, count: int, plane_rows: Callable[[str], Any]) -> Entry:
    """Write the shards of rows first..first+count: what a manifest may list. Any process may, at any time."""
    sums = {}
    for plane in contents.planes():
        rows = plane_rows(plane)
        shard = Shard(plane, contents.manifest.stride(plane), first, count, contents.identity)
        head, sums[plane] = shard.head(rows)
        place.write(shard_name(shard, sums[plane]), partial(write_shard, head=head, rows=rows))
    return Entry(first, count, tuple(sorted(sums.items())))


def write_manifest(place: Place, contents: Contents) -> None:
    """From here on the index is this one. What it lists must not be lost when the power fails, so that comes first."""
    place.settle()
    place.write(FILE, lambda path: path.write_bytes(contents.encode()))
    place.settle()


class Writer:
    """The one writer of an index, from when it is made until ``close``. ``see`` is told of every change."""

    def __init__(
        self, place: Place, seen: Contents, reader: Reader, see: Callable[[Contents], None],
        release: Callable[[], None] | None = None,
    ) -> None:  # fmt: skip
        self._place, self._reader, self._see = place, reader, see
        self._owner, self._waiting = os.getpid(), Pending(0)
        self.close = release or place.hold()
        try:
            # Another writer may have come and gone since the index was opened.
            self.contents = seen if release else Contents.decode(place.read(FILE), place.url)
            if self.contents.identity != seen.identity:
                works = "to open it again"
                raise RunError(f"write to the index {place.url}", "another index was put in its place", works)
            if not release:
                self._see(self.contents)
            self._clear_away()
        except BaseException:
            self.close()
            raise

    @property
    def waiting(self) -> int:
        """Rows that are in memory alone."""
        return self._waiting.rows - self._waiting.listed

    def append(self, planes: Mapping[str, NDArray[np.uint8]], ids: NDArray[np.int64] | None) -> None:
        self._mine()
        waiting = self._waiting if self._waiting.parts else self._tail()
        part = part_of(self.contents.manifest, planes, ids, waiting.first + waiting.rows, self._place.url)
        n, per = len(part[IDS]), self.contents.rows_per_shard
        # In pieces of a shard at most, each with memory of its own: what is written lets its memory go.
        pieces = [{name: rows[at : at + per].copy() for name, rows in part.items()} for at in range(0, n, per)]
        waiting.add(*pieces)
        self._waiting = waiting
        self._drain(full=True)

    def flush(self) -> None:
        self._mine()
        self._drain(full=False)

    def keep(self, tensors: Mapping[str, NDArray[Any]]) -> None:
        """Tensors in place of those that are there: a file of their own first, then the manifest that names it."""
        self._mine()
        self._drain(full=False)
        self._keep(replace(self.contents, learned=write_tensors(self._place, tensors)))

    def _tail(self) -> Pending:
        """Where rows are added: behind a last shard that is full; one that is not is written again with more rows."""
        c = self.contents
        gaps = c.gaps(c.rows)
        if gaps:
            found = f"rows {gaps[0][0]}..{gaps[0][1] - 1} are missing"
            raise OutputError(
                f"append to the index {self._place.url}", found, "`put` those rows and `adopt` them first"
            )
        if not c.entries or c.entries[-1].count >= c.rows_per_shard:
            return Pending(c.rows)
        last = c.entries[-1]
        waiting, part = Pending(last.first, last.count), {}
        for plane in c.planes():
            shard = self._reader.open(c, last, plane, unchecked(c.shard(last, plane), False))
            part[plane] = shard.block(0, last.count).copy()
        waiting.add(part)
        return waiting

    def _drain(self, full: bool) -> None:
        per = self.contents.rows_per_shard
        try:
            while self._waiting.rows >= per or (not full and self.waiting > 0):
                w, count = self._waiting, min(per, self._waiting.rows)
                entry = write_rows(self._place, self.contents, w.first, count, partial(w.head, count=count))
                self._keep(self.contents.listing(entry))
                self._waiting = w.after(count) if count == per else w.now_listed(count)
        except OutputError as error:
            kept = f"{self.contents.rows} rows are kept, {self.waiting} more wait in memory"
            raise OutputError(
                error.asked, f"{error.found} ({kept})", f"{error.would_work}; then `flush`"
            ) from error.__cause__

    def adopt(self) -> int:
        """List what `put` wrote; gives how many rows came in."""
        self.flush()
        self._waiting = Pending(0)
        now = self.contents
        found: dict[tuple[int, int], dict[str, str]] = {}
        for name, size in sorted(self._place.files().items()):
            named = parse_name(name)
            if named and named[0] in now.planes() and named[3] == now.identity:
                plane, first, count, identity, crc = named
                if size == Shard(plane, now.manifest.stride(plane), first, count, identity).size:
                    found.setdefault((first, count), {}).setdefault(plane, crc)
        for (first, count), sums in sorted(found.items()):
            if set(sums) == set(now.planes()) and not _covered(now, first, first + count):
                now = now.listing(Entry(first, count, tuple(sorted(sums.items()))))
        gained = sum(e.count for e in now.entries) - sum(e.count for e in self.contents.entries)
        if gained:
            self._keep(now)
        return gained

    def discard(self, row: int) -> tuple[int, int]:
        self.flush()
        self._waiting = Pending(0)
        for entry in self.contents.entries:
            if entry.first <= row < entry.stop:
                names = [self.contents.name(entry, plane) for plane in self.contents.planes()]
                self._keep(replace(self.contents, entries=tuple(e for e in self.contents.entries if e != entry)))
                for name in names:  # at once, or `adopt` would take them in again
                    self._place.remove(name)
                return entry.first, entry.stop
        raise RunError(f"discard row {row}", f"no shard of {self._place.url} holds it", f"0..{self.contents.rows - 1}")

    def mark(self, wanted: NDArray[np.int64], ids: NDArray[np.int64], deleted: bool) -> None:
        """Delete the rows that have the wanted ones of ``ids`` [row], or take that back."""
        self._mine()
        hit = np.isin(ids, wanted) & self.contents.there()
        unknown = np.setdiff1d(wanted, ids[hit])
        if len(unknown):
            asked = f"{'delete' if deleted else 'restore'} {len(wanted)} examples of {self._place.url}"
            some = ", ".join(map(str, unknown[:5].tolist()))
            raise RunError(asked, f"{len(unknown)} ids are not in it: {some}", "ids that it has (`ids`)")
        before = read_tombstones(self._place, self.contents.deleted)
        bits = np.zeros(max(len(before), len(ids)), bool)
        bits[: len(before)] = before
        bits[np.flatnonzero(hit)] = deleted
        name = write_tombstones(self._place, bits)
        if name != self.contents.deleted:
            self._keep(replace(self.contents, deleted=name))

    def _mine(self) -> None:
        if os.getpid() != self._owner:
            found = "the index was opened for writing by the process that this one was forked from"
            raise OutputError(f"write to the index {self._place.url}", found, "`put`, or an Index opened here")

    def _keep(self, contents: Contents) -> None:
        write_manifest(self._place, contents)
        self.contents = contents
        self._see(contents)

    def _clear_away(self) -> None:
        self._place.tidy()
        c = self.contents
        files = c.deleted, c.tensors.get("file"), c.learned.get("file")
        listed = {*files, *(c.name(e, plane) for e in c.entries for plane in c.planes())}
        for name in self._place.files():
            named = parse_name(name)
            stale = named is not None and _covered(c, named[1], named[1] + named[2])
            if name not in listed and (stale or is_tombstones(name) or is_tensors(name)):
                self._place.remove(name)


def _covered(contents: Contents, first: int, stop: int) -> bool:
    """Whether any of these rows is listed."""
    return any(e.first < stop and first < e.stop for e in contents.entries)
