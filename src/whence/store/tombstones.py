"""Which rows are deleted: one bit a row (the highest of a byte first), in a file named by its length and checksum."""

from __future__ import annotations

import re
import zlib

import numpy as np
from numpy.typing import NDArray

from ..errors import RunError
from .places import Place

_NAME = re.compile(r"deleted-(\d{12,})-([0-9a-f]{8})\.bits")


def is_tombstones(name: str) -> bool:
    return bool(_NAME.fullmatch(name))


def write_tombstones(place: Place, deleted: NDArray[np.bool_]) -> str:
    """Write them; gives the file's name for the manifest, "" where nothing is deleted."""
    if not deleted.any():
        return ""
    bits = np.packbits(deleted).tobytes()
    name = f"deleted-{len(deleted):012d}-{zlib.crc32(bits):08x}.bits"
    place.write(name, lambda path: path.write_bytes(bits))
    return name


def read_tombstones(place: Place, name: str) -> NDArray[np.bool_]:
    """[row], as far as they were written. Raises RunError where they are missing or damaged."""
    if not name:
        return np.zeros(0, bool)
    named, bits = _NAME.fullmatch(name), place.read(name)
    count = int(named[1]) if named else 0
    if not named or bits is None or len(bits) != -(-count // 8) or f"{zlib.crc32(bits):08x}" != named[2]:
        found = "is missing" if bits is None else "does not match its checksum"
        works = "the index opened again, if it was changed a moment ago; or a copy of that file"
        raise RunError(f"tell which rows of {place.url} are deleted", f"{name} {found}", works)
    return np.unpackbits(np.frombuffer(bits, np.uint8), count=count).astype(bool)
