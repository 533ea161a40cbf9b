"""What an index is of, and what it holds: the manifest, a JSON file that carries its own checksum.

``manifest.json`` is the one file that is ever replaced, by a rename or a put. All others are named by their content,
written before it lists them and never changed, so whatever moment a writer dies at, the index is the old one or the
new one. What it does not list does not count.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import OutputError, RunError
from .shards import Shard, shard_name

FILE = "manifest.json"
VERSION = 1
IDS = "ids"
"""The plane that every index has beside the named ones: int64, what the caller calls each row."""
_PLANE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@+-]{0,99}")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What an index was made of, fixed when it is made.

    ``model`` and ``data`` are fingerprints; ``examples`` is how many are planned; ``planes``: bytes per example of each
    named plane; ``projection`` and ``settings`` are JSON; ``code`` is the version of the code that makes the rows.
    """

    model: str
    data: str
    examples: int
    planes: dict[str, int]
    projection: dict[str, Any] = field(default_factory=dict)
    method: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    code: str = ""
    version: int = VERSION

    def fit(self, where: str) -> Manifest:
        """The same as it will be read again. Raises OutputError when no index can be made of it."""
        asked = f"make the index {where}"
        for name, stride in self.planes.items():
            if name == IDS or not _PLANE.fullmatch(name):
                works = f"up to 100 letters, digits and any of _.@+-, and not {IDS!r}"
                raise OutputError(asked, f"a plane is called {name!r}", works)
            if not 1 <= stride <= 1 << 30:
                raise OutputError(asked, f"{stride} bytes per example in plane {name!r}", "1 byte to 1 GiB")
        if not self.planes or self.examples < 0:
            raise OutputError(asked, f"{len(self.planes)} planes, {self.examples} examples", "at least one plane")
        try:
            return Manifest(**json.loads(_text(asdict(self))))
        except (TypeError, ValueError) as error:
            raise OutputError(asked, f"its manifest is no JSON: {error}", "numbers, texts, lists and dicts") from None

    def stride(self, plane: str) -> int:
        return 8 if plane == IDS else self.planes[plane]


@dataclass(frozen=True, order=True)
class Entry:
    """Shards that are listed: ``count`` rows from row ``first`` on, and the checksum of each plane's shard."""

    first: int
    count: int
    sums: tuple[tuple[str, str], ...]

    @property
    def stop(self) -> int:
        return self.first + self.count


@dataclass(frozen=True)
class Contents:
    """The manifest with what is there. ``deleted``: the file of tombstones, if any; ``tensors``: see tensors.py;
    ``learned``: tensors that came after rows, which were made without them."""

    manifest: Manifest
    rows_per_shard: int
    tensors: dict[str, Any]
    entries: tuple[Entry, ...] = ()
    deleted: str = ""
    learned: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def identity(self) -> str:
        """Names of shards carry it: rows made with other tensors, or of another model, are not taken for this one's."""
        return hashlib.sha256(_text([asdict(self.manifest), self.tensors]).encode()).hexdigest()[:8]

    @property
    def rows(self) -> int:
        """Rows up to the end of the last shard, the missing ones included."""
        return self.entries[-1].stop if self.entries else 0

    def there(self) -> NDArray[np.bool_]:
        """[row]: a shard holds it."""
        there = np.zeros(self.rows, bool)
        for entry in self.entries:
            there[entry.first : entry.stop] = True
        return there

    def planes(self) -> tuple[str, ...]:
        return (*sorted(self.manifest.planes), IDS)

    def shard(self, entry: Entry, plane: str) -> Shard:
        return Shard(plane, self.manifest.stride(plane), entry.first, entry.count, self.identity)

    def name(self, entry: Entry, plane: str) -> str:
        return shard_name(self.shard(entry, plane), dict(entry.sums)[plane])

    def listing(self, new: Entry) -> Contents:
        """With a further entry, in the place of what it covers."""
        kept = [e for e in self.entries if e.stop <= new.first or e.first >= new.stop]
        return replace(self, entries=tuple(sorted([*kept, new])))

    def gaps(self, stop: int) -> list[tuple[int, int]]:
        """Ranges of rows below ``stop`` that no shard holds."""
        found, at = [], 0
        for entry in self.entries:
            if entry.first > at:
                found.append((at, min(entry.first, stop)))
            at = entry.stop
        return [(a, b) for a, b in [*found, (at, stop)] if a < b]

    def encode(self) -> bytes:
        body = {
            "manifest": asdict(self.manifest),
            "rows_per_shard": self.rows_per_shard,
            "tensors": self.tensors,
            "deleted": self.deleted,
            "learned": self.learned,
            "shards": [[e.first, e.count, dict(e.sums)] for e in self.entries],
        }
        return _sealed(body)

    @classmethod
    def decode(cls, found: bytes | None, where: str) -> Contents:
        """Raises RunError for a manifest that is missing, damaged or of a version that is not known."""
        asked, again = f"open the index {where}", "a copy of it, or an index built again"
        if found is None:
            raise RunError(asked, f"there is no {FILE}", "the folder or URL of an index; `whence index` builds one")
        try:
            body = json.loads(found)
            body.pop("sha256")
            whole = _sealed(body) == found
        except (ValueError, KeyError, TypeError, AttributeError):
            whole = False
        if not whole:
            raise RunError(asked, f"{FILE} is damaged: it does not match its checksum", again)
        version = body.get("manifest", {}).get("version")
        if version != VERSION:
            works = f"the Whence that wrote it, or an index built again with this one (version {VERSION})"
            raise RunError(asked, f"it is of version {version}", works)
        try:
            known = {f.name for f in fields(Manifest)}
            manifest = Manifest(**{k: v for k, v in body["manifest"].items() if k in known})
            entries = tuple(Entry(a, n, tuple(sorted(sums.items()))) for a, n, sums in body["shards"])
            files = [body[key].get("file", "none") for key in ("tensors", "learned")]
            named = [*manifest.planes, *files, body["deleted"] or "none"]
            if not all(map(_PLANE.fullmatch, named)):  # it would lead out of the folder
                raise ValueError(f"names {named}")
            return cls(manifest, body["rows_per_shard"], body["tensors"], entries, body["deleted"], body["learned"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RunError(asked, f"{FILE} is no manifest: {type(error).__name__} {error}", again) from None


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, allow_nan=False, ensure_ascii=True, separators=(",", ":"))


def _sealed(body: dict[str, Any]) -> bytes:
    """One line of checksum, one of JSON per key: a file that a person can look at, the same bytes for the same body."""
    lines = [f'"{key}":{_text(body[key])}' for key in sorted(body)]
    text = ",\n".join(lines)
    return f'{{"sha256":"{hashlib.sha256(text.encode()).hexdigest()}",\n{text}\n}}\n'.encode()
