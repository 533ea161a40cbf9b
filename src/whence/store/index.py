"""An index: for every training example one row of bytes in each of several planes, kept where a kill cannot harm it.

    with Index.create("out/ix", Manifest(model=..., data=..., examples=1000, planes={"bits": 144})) as index:
        index.append({"bits": codes})
    index = Index.open("out/ix", model=...)
    for start, codes in index.blocks("bits"): ...

Rows go to shards (shards.py), what is there is told by the manifest (contents.py), both kept by a place (places.py).
``append`` is for one builder: it goes on at ``done``. Many workers ``put`` the ranges that are ``missing`` without
asking anybody, and one process lists what they made with ``adopt``; a worker that dies leaves a range missing.
A reader sees the index as it was when it was opened.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import OutputError, RunError, WhenceError
from .contents import FILE, IDS, Contents, Manifest
from .pending import part_of
from .places import Place, place_of
from .reading import Reader, whole_numbers
from .tensors import Joined, Tensors, write_tensors
from .tombstones import read_tombstones
from .verifying import Damage, damage_of
from .writing import Writer, write_manifest, write_rows


class Index:
    """Made by ``create`` or ``open``."""

    def __init__(self, place: Place, contents: Contents, trust: bool = False, resident: int = 1 << 30) -> None:
        self._place, self._reader = place, Reader(place, trust, resident)
        self._writer: Writer | None = None
        self._ids: NDArray[np.int64] | None = None
        self._free: Callable[[], object] = lambda: None
        self._see(contents)

    @classmethod
    def create(
        cls, place: str | Path, manifest: Manifest, tensors: Mapping[str, NDArray[Any]] | None = None,
        rows_per_shard: int = 65536, options: dict[str, Any] | None = None, cache: str | Path | None = None,
    ) -> Index:  # fmt: skip
        """A new index, open for writing. Raises OutputError where there is one already or none can be written."""
        kept = place_of(place, options, cache)
        manifest = manifest.fit(kept.url)
        asked = f"make the index {kept.url}"
        if rows_per_shard < 1:
            raise OutputError(asked, f"{rows_per_shard} rows per shard", "1 or more")
        release = kept.hold()
        try:
            if kept.read(FILE) is not None:
                raise OutputError(asked, "there is one already", "Index.open to go on with it, or another place")
            contents = Contents(manifest, rows_per_shard, write_tensors(kept, tensors or {}))
            write_manifest(kept, contents)
            index = cls(kept, contents)
            index._write(release)
        except BaseException:
            release()
            raise
        return index

    @classmethod
    def open(
        cls, place: str | Path, model: str | None = None, data: str | None = None, trust: bool = False,
        resident: int = 1 << 30, options: dict[str, Any] | None = None, cache: str | Path | None = None,
    ) -> Index:  # fmt: skip
        """An index that is there. Raises RunError if it is missing, damaged or of another ``model`` or ``data``.

        ``trust`` leaves the checksums of rows out; ``resident``: bytes of shards that stay mapped; ``options`` are
        fsspec's for a store, ``cache`` the folder for what is fetched from it.
        """
        kept = place_of(place, options, cache)
        contents = Contents.decode(kept.read(FILE), kept.url)
        made = contents.manifest
        for what, wanted, found in (("model", model, made.model), ("data", data, made.data)):
            if wanted is not None and wanted != found:
                asked, works = f"use the index {kept.url} with the {what} {wanted}", "or an index built of this one"
                raise RunError(asked, f"it was built of the {what} {found}", f"that {what}, {works}")
        return cls(kept, contents, trust, resident)

    # What is there ------------------------------------------------------------------------------------------------

    @property
    def manifest(self) -> Manifest:
        return self._contents.manifest

    def __len__(self) -> int:
        """Rows, deleted ones and gaps included: one more than the highest row number."""
        return self._contents.rows

    @property
    def done(self) -> int:
        """Examples that are safely kept without a gap: where a build that was stopped goes on."""
        gaps = self._contents.gaps(len(self))
        return gaps[0][0] if gaps else len(self)

    def missing(self) -> list[tuple[int, int]]:
        """Ranges of the planned rows that no shard holds, none longer than a shard: the work that is left."""
        per = self._contents.rows_per_shard
        gaps = self._contents.gaps(self.manifest.examples)
        cuts = [(a, b, range(a - a % per, b, per)) for a, b in gaps]
        return [(max(a, at), min(b, at + per)) for a, b, starts in cuts for at in starts]

    @property
    def alive(self) -> NDArray[np.bool_]:
        """[row]: it is there and not deleted."""
        return self._alive

    @property
    def ids(self) -> NDArray[np.int64]:
        """[row]: what the caller calls it; -1 where the row is missing."""
        if self._ids is None:
            ids = np.full(len(self), -1, np.int64)
            for start, rows in self._reader.blocks(self._contents, IDS, None, None, 0, len(self)):
                ids[start : start + len(rows)] = rows.view("<i8")[:, 0]
            ids.flags.writeable = False
            self._ids = ids
        return self._ids

    @property
    def tensors(self) -> Mapping[str, NDArray[Any]]:
        """Name -> array, each read and checked when it is asked for."""
        return Joined(self._tensors)

    @property
    def nbytes(self) -> dict[str, int]:
        """Plane -> bytes of its shards, headers included."""
        c = self._contents
        return {plane: sum(c.shard(e, plane).size for e in c.entries) for plane in c.planes()}

    @property
    def tensor_bytes(self) -> int:
        return sum(t.nbytes for t in self._tensors)

    # Reading ------------------------------------------------------------------------------------------------------

    def blocks(
        self, plane: str, rows: int | None = None, only_alive: bool = True, first: int = 0, last: int | None = None
    ) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """(number of the first row, uint8[n, stride]) in order, views of the files; ``rows`` at most in each.

        Deleted rows are left out, which cuts blocks where they were; with many of them it is faster to take
        everything (``only_alive=False``) and to drop the rows that are not ``alive`` from the scores.
        """
        alive = self._alive if only_alive and self._contents.deleted else None
        stop = len(self) if last is None else last
        return self._reader.blocks(self._contents, plane, rows, alive, first, stop)

    def rows(self, plane: str, numbers: ArrayLike) -> NDArray[np.uint8]:
        """Rows by number, deleted or not, in the order asked: uint8[k, stride]."""
        return self._reader.rows(self._contents, plane, whole_numbers(numbers))

    def verify(self) -> list[Damage]:
        """Read and check every byte (of a store: fetched anew); gives what is damaged."""
        return list(damage_of(self._place, self._contents, self._tensors, self._reader))

    # Writing ------------------------------------------------------------------------------------------------------

    def append(self, planes: Mapping[str, NDArray[np.uint8]], ids: NDArray[np.int64] | None = None) -> None:
        """Add rows behind the last one: uint8[n, stride] for each plane. Full shards are written at once, the rest
        waits for ``flush`` or ``close``. Raises OutputError if it cannot be written; the rows wait in memory then."""
        self._write().append(planes, ids)

    def flush(self) -> None:
        """Keep the rows that wait. Cheap once, costly often: a shard that is not full is written again each time."""
        if self._writer:
            self._writer.flush()

    def keep(self, tensors: Mapping[str, NDArray[Any]]) -> None:
        """Keep these tensors too, in place of those of the same names: what was learned of the rows."""
        self._write().keep({**dict(self._tensors[0]), **tensors})

    def put(self, first: int, planes: Mapping[str, NDArray[np.uint8]], ids: NDArray[np.int64] | None = None) -> None:
        """Write rows first..first+n as a shard of their own, for ``adopt``. Needs no turn: any process may."""
        part = part_of(self.manifest, planes, ids, first, self._place.url)
        n, per = len(part[IDS]), self._contents.rows_per_shard
        if first < 0 or not 1 <= n <= per:
            works = f"1 to {per} rows, from row 0 or later, such as a range that is `missing`"
            raise OutputError(f"put rows into {self._place.url}", f"{n} rows from row {first}", works)
        write_rows(self._place, self._contents, first, n, part.__getitem__)

    def adopt(self) -> int:
        """List all whole shards that ``put`` wrote for rows that were missing; gives how many rows came in."""
        return self._write().adopt()

    def discard(self, row: int) -> tuple[int, int]:
        """Let go of the shard that holds a row, which is damaged: its range, now ``missing``."""
        return self._write().discard(row)

    def delete(self, ids: ArrayLike) -> None:
        """Delete examples: they are not read again unless asked for. Raises RunError for an id that is not there."""
        self._mark(ids, deleted=True)

    def restore(self, ids: ArrayLike) -> None:
        """Take ``delete`` back."""
        self._mark(ids, deleted=False)

    def close(self) -> None:
        """Keep what waits and let other writers in; reading goes on. Where it cannot be kept nothing is let go, so
        that ``close`` can be asked again."""
        if self._writer:
            self._writer.flush()
            self._free()
            self._writer = None

    def __enter__(self) -> Index:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except WhenceError:
            if kind is None:
                raise
            self._free()  # what ended the work is what is told; rows that were not kept are made again
            self._writer = None

    def __str__(self) -> str:
        planes = ", ".join(f"{name} {stride} B" for name, stride in self.manifest.planes.items())
        held = int(self._alive.sum())
        return f"index {self._place.url}: {held} of {self.manifest.examples} planned examples, {planes} each"

    def _see(self, contents: Contents) -> None:
        tombs = read_tombstones(self._place, contents.deleted)
        alive = contents.there()
        alive[: len(tombs)] &= ~tombs[: len(alive)]
        alive.flags.writeable = False
        self._contents, self._alive, self._ids = contents, alive, None
        self._tensors = Tensors(self._place, contents.learned), Tensors(self._place, contents.tensors)

    def _write(self, release: Callable[[], None] | None = None) -> Writer:
        if self._writer is None:
            self._writer = Writer(self._place, self._contents, self._reader, self._see, release)
            # An index that is dropped without being closed must not keep others out.
            self._free = weakref.finalize(self, self._writer.close)
        return self._writer

    def _mark(self, ids: ArrayLike, deleted: bool) -> None:
        writer = self._write()
        writer.flush()
        writer.mark(np.unique(whole_numbers(ids)), self.ids, deleted)
