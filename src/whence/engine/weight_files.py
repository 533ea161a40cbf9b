"""A Change in the files of a pipeline: an edited copy, and undo that gives back every byte.

Only the numbers of the edited matrices are overwritten, in place in a safetensors file's body; header, order and all
else stay. A file is copied, changed and renamed, so that a stop leaves it whole. What was done is a line of ``LEDGER``.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import ModelError, OutputError

LEDGER = "whence-ledger.jsonl"
_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Edit(Protocol):
    """See :class:`whence.change.Change`."""

    @property
    def before(self) -> Mapping[str, Tensor]: ...
    @property
    def after(self) -> Mapping[str, Tensor]: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def model_name(self) -> str: ...
    def entry(self, did: str, fingerprint: str) -> dict[str, Any]: ...


def edited_copy(source: Path, out: Path, change: Edit) -> Path:
    """A copy of a pipeline's folder with the change in its files, written whole or not at all. Raises OutputError where
    ``out`` is there already or cannot be written, ModelError where the files hold other matrices."""
    if out.exists():
        raise OutputError(f"an edited copy in {out}", "it is there already", "--apply with a new folder")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{out.name}-", suffix=".part", dir=out.parent))
        try:
            copy = staging / "model"
            shutil.copytree(source, copy)
            write(copy, change, "apply")
            os.replace(copy, out)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        found = error.strerror or str(error)
        raise OutputError(f"an edited copy in {out}", found, "--apply with a folder of yours") from None
    return out


def write(folder: Path, change: Edit, did: str) -> None:
    """Put the change into a pipeline's files ("apply"), or take it out again ("undo"). All files are checked before the
    first is written. Raises ModelError where they do not hold what must be there, OutputError."""
    before, after = (change.before, change.after) if did == "apply" else (change.after, change.before)
    asked = f"{did} the change in {folder}"
    jobs: dict[Path, list[tuple[int, bytes]]] = {}
    for name in before:
        places = list(_places(folder, name))
        if not places:
            raise ModelError(asked, f"no safetensors file there has {name}", "the pipeline that it was made for")
        for path, dtype, start, size in places:
            was, now = (_bytes(t[name], dtype) for t in (before, after))
            with path.open("rb") as file:
                file.seek(start)
                found = file.read(size)
            if found != was:
                which = "began with" if did == "apply" else "wrote"
                raise ModelError(
                    asked,
                    f"{name} in {path.name} is not what this change {which}: it was made for {change.model_name} "
                    f"{change.fingerprint}, the files are {_print_of(folder)}",
                    "the folder it was made for"
                    if did == "apply"
                    else "the folder it is in, later changes undone first",
                )
            jobs.setdefault(path, []).append((start, now))
    made: dict[Path, Path] = {}
    try:
        for path, parts in jobs.items():
            fresh = path.with_name(f".{path.name}.part")
            made[path] = fresh
            shutil.copyfile(path, fresh)
            with fresh.open("r+b") as file:
                for start, now in parts:
                    file.seek(start)
                    file.write(now)
        for path, fresh in made.items():
            os.replace(fresh, path)
        with (folder / LEDGER).open("a", encoding="utf8") as ledger:
            ledger.write(json.dumps(change.entry(did, _print_of(folder)), sort_keys=True) + "\n")
    except OSError as error:
        raise OutputError(asked, error.strerror or str(error), "a folder of yours, with room in it") from None
    finally:
        for fresh in made.values():
            fresh.unlink(missing_ok=True)


def _places(folder: Path, name: str) -> list[tuple[Path, torch.dtype, int, int]]:
    """Where a matrix stands: file, type, first byte and size. An older layout may have a further name in front of
    it."""
    component, _, own = name.partition(".")
    found = []
    for path in sorted((folder / component).glob("*.safetensors")):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        for key, told in header.items():
            if (key == own or key.endswith(f".{own}")) and told["dtype"] in _TYPES:
                first, last = told["data_offsets"]
                found.append((path, _TYPES[told["dtype"]], 8 + length + first, last - first))
    return found


def _bytes(tensor: Tensor, dtype: torch.dtype) -> bytes:
    return tensor.detach().cpu().to(dtype).contiguous().view(torch.uint8).numpy().tobytes()


def _print_of(folder: Path) -> str:
    """A hash of the folder's safetensors files, 16 hex digits."""
    import hashlib

    found = hashlib.sha256()
    for path in sorted(folder.glob("*/*.safetensors")):
        with path.open("rb") as file:
            found.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()[:16]
