"""A shard: some rows of one plane in one file, mapped into memory and checked when a part is first read.

    magic "WHENCE R" | version, header's bytes, JSON's bytes: 3 uint32 | JSON | crc32 of each 64 KiB of the payload |
    zeros | crc32 of all that | payload: count * stride bytes, from a multiple of 64 on

All little-endian. The file's name carries plane, first row, count, what index it is of, and the header's crc32, which
binds every byte of it. The rows are views of the file: nothing is copied.
"""

from __future__ import annotations

import json
import mmap
import re
import struct
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import RunError

MAGIC, VERSION, PIECE = b"WHENCE R", 1, 1 << 16
_START = struct.Struct("<8sIII")
_NAME = re.compile(r"(.+)-(\d{12})-(\d{7,})-([0-9a-f]{8})-([0-9a-f]{8})\.rows")


@dataclass(frozen=True)
class Shard:
    """What a shard is of. ``index``: the identity of the index that it belongs to."""

    plane: str
    stride: int
    first: int
    count: int
    index: str

    @property
    def payload(self) -> int:
        return self.count * self.stride

    @property
    def _about(self) -> bytes:
        return json.dumps(asdict(self), sort_keys=True).encode()

    @property
    def header(self) -> int:
        """Bytes of the header."""
        pieces = -(-self.payload // PIECE)
        return -(-(_START.size + len(self._about) + 4 * pieces + 4) // 64) * 64

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.header + self.payload

    def head(self, rows: NDArray[np.uint8]) -> tuple[bytes, str]:
        """The header of these rows, and its checksum for the name."""
        data = rows.data.cast("B")
        sums = [zlib.crc32(data[a : a + PIECE]) for a in range(0, self.payload, PIECE)]
        about = self._about
        found = _START.pack(MAGIC, VERSION, self.header, len(about)) + about + np.array(sums, "<u4").tobytes()
        found = found.ljust(self.header - 4, b"\0")
        crc = zlib.crc32(found)
        return found + struct.pack("<I", crc), f"{crc:08x}"


def shard_name(shard: Shard, crc: str) -> str:
    return f"{shard.plane}-{shard.first:012d}-{shard.count:07d}-{shard.index}-{crc}.rows"


def parse_name(name: str) -> tuple[str, int, int, str, str] | None:
    """Plane, first row, count, index and checksum of a shard's file name; None for other files."""
    found = _NAME.fullmatch(name)
    return (found[1], int(found[2]), int(found[3]), found[4], found[5]) if found else None


def write_shard(path: Path, head: bytes, rows: NDArray[np.uint8]) -> None:
    with path.open("wb") as handle:
        handle.write(head)
        handle.write(rows.data.cast("B"))


class Mapped:
    """A shard's rows, mapped. ``checked`` [piece] remembers what was found whole; it outlives the mapping."""

    def __init__(self, path: Path, shard: Shard, crc: str, checked: NDArray[np.bool_]) -> None:
        self._path, self._shard, self._checked = path, shard, checked
        with path.open("rb") as handle:
            head = handle.read(shard.header)
            size = handle.seek(0, 2)
            if size != shard.size:
                raise self.damaged(f"it has {size} bytes, not {shard.size}")
            if f"{zlib.crc32(head[:-4]):08x}" != crc or head[-4:] != struct.pack("<I", int(crc, 16)):
                raise self.damaged("its header does not match its checksum")
            start, about = _START.size, shard._about
            if _START.unpack(head[:start]) != (MAGIC, VERSION, shard.header, len(about)):
                raise self.damaged("its header is not of this version")
            if head[start : start + len(about)] != about:
                raise self.damaged("it is of another plane, other rows or another index")
            mapping = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        self._sums = np.frombuffer(head, "<u4", len(checked), start + len(about))
        self._bytes = np.frombuffer(mapping, np.uint8, offset=shard.header)
        self._rows = self._bytes.reshape(shard.count, shard.stride)

    @property
    def size(self) -> int:
        return self._shard.size

    def block(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Rows start..stop of the shard, a view. Raises RunError where a byte of them, or near them, is damaged."""
        stride = self._shard.stride
        self._check(range(start * stride // PIECE, -(-stop * stride // PIECE)))
        return self._rows[start:stop]

    def take(self, numbers: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Rows by their numbers in the shard, a copy."""
        starts = numbers * self._shard.stride
        lo, hi = starts // PIECE, (starts + self._shard.stride - 1) // PIECE
        for a, b in sorted({*zip(lo.tolist(), hi.tolist(), strict=True)}):
            self._check(range(a, b + 1))
        return self._rows[numbers]

    def check_all(self) -> None:
        self._check(range(len(self._checked)))

    def _check(self, pieces: range) -> None:
        if self._checked[pieces.start : pieces.stop].all():
            return
        for piece in pieces:
            if self._checked[piece]:
                continue
            at = piece * PIECE
            if zlib.crc32(self._bytes[at : at + PIECE].data) != self._sums[piece]:
                row = self._shard.first + at // self._shard.stride
                raise self.damaged(
                    f"its bytes from {self._shard.header + at} on (row {row}) do not match their checksum"
                )
            self._checked[piece] = True

    def damaged(self, reason: str) -> RunError:
        s = self._shard
        return RunError(
            f"read rows {s.first}..{s.first + s.count - 1} of plane {s.plane!r}",
            f"the shard {self._path} is damaged: {reason}",
            "a copy of that file; or `verify` tells all that is damaged, `discard` lets it go and it is built again",
        )


def unchecked(shard: Shard, trust: bool) -> NDArray[np.bool_]:
    """Which pieces of a shard were found whole: none yet, all of them where nothing is to be checked."""
    return np.full(-(-shard.payload // PIECE), trust)
