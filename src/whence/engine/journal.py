"""A journal of finished pieces of a long work, so that a stopped one goes on where it was.

One JSON line per piece, appended when it is finished, in one write, so that several processes can keep one journal; a
line cut short by a crash is ignored and written again.
"""

from __future__ import annotations

import hashlib
import json
import os
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import OutputError


@cache
def source_fingerprint() -> str:
    """Hash of the package's own sources: what another code found is not taken for what this code would find."""
    root = Path(__file__).parents[1]
    found = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        found.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:16]


class Journal:
    """``get`` and ``put`` records by the names of a piece of work. Raises OutputError where it cannot be written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._found: dict[str, Any] = {}
        if path.exists():
            try:
                lines = path.read_text(encoding="utf8", errors="replace").splitlines()
            except OSError as error:
                raise OutputError(f"read the journal {path}", str(error), "a file, or a name that is free") from None
            for line in lines:
                try:
                    row = json.loads(line)
                    self._found[row["piece"]] = row["record"]
                except (ValueError, KeyError, TypeError):
                    continue

    @staticmethod
    def _name(names: tuple[object, ...]) -> str:
        return hashlib.sha256("\x1f".join([source_fingerprint(), *map(str, names)]).encode()).hexdigest()[:24]

    def get(self, *names: object) -> Any:
        """The record of this piece, None if it is not finished."""
        return self._found.get(self._name(names))

    def put(self, record: Any, *names: object) -> None:
        """Keep the record of a finished piece."""
        name = self._name(names)
        self._found[name] = record
        line = json.dumps({"piece": name, "what": list(map(str, names)), "record": record}) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            torn = self.path.exists() and not self.path.read_bytes().endswith(b"\n")
            handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(handle, (("\n" if torn else "") + line).encode())
                os.fsync(handle)
            finally:
                os.close(handle)
        except OSError as error:
            raise OutputError(
                f"keep the journal {self.path}", str(error), "a folder that can be written, with space left"
            ) from None
