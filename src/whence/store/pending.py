"""Rows that wait for their shard to be full, and what is asked of rows before they may."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from ..errors import OutputError
from .contents import IDS, Manifest

Part = dict[str, NDArray[np.uint8]]


@dataclass(frozen=True)
class Pending:
    """Rows from row ``first`` on, in parts with the count up to each part's end. The first ``listed`` of them are
    in the index already, in a shard that is not full.

    An interrupt between two lines must not leave it between two states: it changes by one step that Python does whole.
    """

    first: int
    listed: int = 0
    parts: list[tuple[int, Part]] = field(default_factory=list)

    @property
    def rows(self) -> int:
        return self.parts[-1][0] if self.parts else 0

    def add(self, *parts: Part) -> None:
        new, stop = [], self.rows
        for part in parts:
            stop += len(part[IDS])
            new.append((stop, part))
        self.parts.extend(new)

    def head(self, plane: str, count: int) -> NDArray[np.uint8]:
        """The first ``count`` rows of a plane."""
        held = [part[plane] for stop, part in self.parts if stop - len(part[IDS]) < count]
        return np.concatenate(held)[:count] if len(held) > 1 else held[0][:count]

    def after(self, count: int) -> Pending:
        """What is left when the first ``count`` rows are in a full shard."""
        rest = Pending(self.first + count)
        left = ((min(stop - count, len(part[IDS])), part) for stop, part in self.parts if stop > count)
        rest.add(*({plane: rows[-n:] for plane, rows in part.items()} for n, part in left))
        return rest

    def now_listed(self, count: int) -> Pending:
        return replace(self, listed=count)


def part_of(
    manifest: Manifest, planes: Mapping[str, NDArray[np.uint8]], ids: NDArray[np.int64] | None, first: int, where: str
) -> Part:
    """The rows with their ids (by default their numbers, from ``first`` on). Raises OutputError if they do
    not fit the index."""
    asked = f"add rows to the index {where}"
    works = ", ".join(f"{name}: uint8[n, {stride}]" for name, stride in sorted(manifest.planes.items()))
    if set(planes) != set(manifest.planes):
        raise OutputError(asked, f"the planes {', '.join(sorted(planes)) or 'none'}", works)
    counts = set()
    for name, rows in planes.items():
        if rows.dtype != np.uint8 or rows.ndim != 2 or rows.shape[1] != manifest.planes[name]:
            raise OutputError(asked, f"{name}: {rows.dtype}{list(rows.shape)}", works)
        counts.add(len(rows))
    if len(counts) > 1:
        raise OutputError(asked, f"planes of {', '.join(map(str, sorted(counts)))} rows", "as many rows in each")
    n = counts.pop()
    given = np.arange(first, first + n) if ids is None else np.asarray(ids)
    if given.shape != (n,) or given.dtype.kind not in "iu":
        raise OutputError(asked, f"ids: {given.dtype}{list(given.shape)}", f"int64[{n}]")
    part = {name: np.ascontiguousarray(rows) for name, rows in planes.items()}
    return {**part, IDS: given.astype("<i8").reshape(n, 1).view(np.uint8)}
