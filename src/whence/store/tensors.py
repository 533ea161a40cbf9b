"""The tensors of an index (bases, curvature): one safetensors file, each read and checked when it is asked for."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import RunError
from .places import Place


def is_tensors(name: str) -> bool:
    return bool(re.fullmatch(r"tensors-[0-9a-f]{8}\.safetensors", name))


def write_tensors(place: Place, tensors: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    """Write them; gives the record for the manifest: the file, its header's checksum and each tensor's."""
    if not tensors:
        return {}
    from safetensors.numpy import save_file

    whole = {name: np.asarray(t, np.asarray(t).dtype.newbyteorder("="), order="C") for name, t in tensors.items()}
    sums = {name: _sum(t) for name, t in whole.items()}
    digest = zlib.crc32("\n".join(f"{name} {sums[name]}" for name in sorted(sums)).encode())
    record: dict[str, Any] = {"file": f"tensors-{digest:08x}.safetensors", "sums": sums}

    def fill(path: Path) -> None:
        save_file(whole, path)
        record["header"], record["bytes"] = _header_sum(path), path.stat().st_size

    place.write(record["file"], fill)
    return record


class Tensors(Mapping[str, NDArray[Any]]):
    """Name -> array, read from the file each time that it is asked for."""

    def __init__(self, place: Place, record: dict[str, Any]) -> None:
        self._place, self._record = place, record
        self._sums: dict[str, str] = record.get("sums", {})
        self._whole = False

    def __len__(self) -> int:
        return len(self._sums)

    def __iter__(self) -> Iterator[str]:
        return iter(self._sums)

    def __getitem__(self, name: str) -> NDArray[Any]:
        if name not in self._sums:
            raise KeyError(f"{name!r} is not among the tensors: {', '.join(self._sums) or 'there are none'}")
        from safetensors import SafetensorError, safe_open

        path = self._path()
        if not self._whole:
            if path.stat().st_size != self._record["bytes"]:
                raise self._damaged(path, f"it has {path.stat().st_size} bytes, not {self._record['bytes']}")
            if _header_sum(path) != self._record["header"]:
                raise self._damaged(path, "its header does not match its checksum")
            self._whole = True
        try:
            with safe_open(path, framework="numpy") as file:
                found: NDArray[Any] = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise self._damaged(path, str(error)) from None
        if _sum(found) != self._sums[name]:
            raise self._damaged(path, f"the tensor {name!r} does not match its checksum")
        return found

    @property
    def nbytes(self) -> int:
        return int(self._record.get("bytes", 0))

    def damage(self) -> list[str]:
        """Why tensors cannot be read; empty if all can."""
        found: list[str] = []
        self._whole = False
        if self._sums and self._place.local(self._record["file"], fresh=True) is None:
            return ["it is missing"]
        for name in self:
            try:
                self[name]
            except RunError as error:
                if error.found not in found:
                    found.append(error.found)
        return found

    def _path(self) -> Path:
        path = self._place.local(self._record["file"])
        if path is None:
            raise self._damaged(Path(self._record["file"]), "it is missing")
        return path

    def _damaged(self, path: Path, reason: str) -> RunError:
        works = "a copy of that file, or an index built again"
        return RunError(f"read the tensors of {self._place.url}", f"{path} is damaged: {reason}", works)


class Joined(Mapping[str, NDArray[Any]]):
    """Several files of tensors as one; of two with one name the earlier file's counts."""

    def __init__(self, parts: Sequence[Tensors]) -> None:
        self._parts = tuple(parts)

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(name for part in self._parts for name in part))

    def __getitem__(self, name: str) -> NDArray[Any]:
        for part in self._parts:
            if name in part:
                return part[name]
        raise KeyError(f"{name!r} is not among the tensors: {', '.join(self) or 'there are none'}")


def _sum(tensor: NDArray[Any]) -> str:
    crc = zlib.crc32(f"{tensor.dtype.str} {tensor.shape}".encode())
    return f"{zlib.crc32(tensor.reshape(-1).view(np.uint8).data, crc):08x}"


def _header_sum(path: Path) -> str:
    with path.open("rb") as handle:
        length = handle.read(8)
        return f"{zlib.crc32(length + handle.read(int.from_bytes(length, 'little') % (1 << 28))):08x}"
