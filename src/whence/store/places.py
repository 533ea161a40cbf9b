"""Where an index is kept: a folder of this machine, or one of an object store (any fsspec URL: s3://, memory://).

A file is there whole or not at all. In a folder it is written under a temporary name, flushed to the disk and renamed;
a store's put does that by itself. What is read from a store is fetched once into a folder of this machine and mapped
from there; it may be deleted at any time. Everything that goes wrong outside becomes one clear error here.
"""

from __future__ import annotations

import hashlib
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from ..errors import OutputError, RunError, WhenceError
from .lock import LOCK, hold_file, hold_object, started


class Place(Protocol):
    """A flat folder of files."""

    @property
    def url(self) -> str: ...

    @property
    def remote(self) -> bool: ...

    def files(self) -> dict[str, int]:
        """Name -> bytes of all that lies here."""

    def read(self, name: str) -> bytes | None:
        """All of a small file; None if it is not there."""

    def local(self, name: str, fresh: bool = False) -> Path | None:
        """A file of this machine with its content (``fresh``: fetched anew); None if it is not there."""

    def write(self, name: str, fill: Callable[[Path], object]) -> None:
        """Put what ``fill`` writes into a temporary file under ``name``, whole or not at all."""

    def settle(self) -> None:
        """What was written under its name stays there even if the power fails now."""

    def remove(self, name: str) -> None:
        """Delete a file, if it is there."""

    def hold(self) -> Callable[[], None]:
        """Become the one writer; gives what ends it."""

    def tidy(self) -> None:
        """Delete temporary files of writers that are gone."""


def place_of(where: str | Path, options: dict[str, Any] | None = None, cache: str | Path | None = None) -> Place:
    """The folder or the store that a path or URL names. ``options`` are fsspec's for the store (endpoint, keys)."""
    # A URL that went through a Path has lost a slash; a name of one letter would be a drive.
    url = re.sub(r"^(\w[\w+.-]+):/(?!/)", r"\1://", str(where)) if isinstance(where, Path) else where
    if "://" not in url:
        return Folder(Path(url))
    with _outside(RunError, f"reach {url}", "a path, or a URL of a store whose fsspec package is installed"):
        import fsspec

        fs, root = fsspec.core.url_to_fs(url, **(options or {}))
    if "file" in (fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,)):
        return Folder(Path(root))
    home = Path(cache) if cache else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "whence"
    return Store(
        url.rstrip("/"), fs, root.rstrip("/"), home / hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:16]
    )


class Folder:
    """A folder of this machine."""

    remote = False

    def __init__(self, path: Path) -> None:
        self.path, self.url = path, str(path)

    def files(self) -> dict[str, int]:
        with _outside(RunError, f"list {self.url}", "a folder that can be read"):
            try:
                with os.scandir(self.path) as entries:
                    return {e.name: e.stat().st_size for e in entries if e.is_file()}
            except FileNotFoundError:
                return {}

    def read(self, name: str) -> bytes | None:
        with _outside(RunError, f"read {self.path / name}", "a file that can be read"):
            try:
                return (self.path / name).read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                return None

    def local(self, name: str, fresh: bool = False) -> Path | None:
        path = self.path / name
        return path if path.is_file() else None

    def write(self, name: str, fill: Callable[[Path], object]) -> None:
        with _outside(OutputError, f"write {self.path / name}", "a folder that can be written, with space left"):
            self.path.mkdir(parents=True, exist_ok=True)
            with _part(self.path, name) as part:
                fill(part)
                _sync(part)
                os.replace(part, self.path / name)

    def settle(self) -> None:
        with _outside(OutputError, f"write to {self.url}", "a folder that can be written"):
            _sync(self.path)

    def remove(self, name: str) -> None:
        with _outside(OutputError, f"delete {self.path / name}", "a folder that can be written"):
            (self.path / name).unlink(missing_ok=True)

    def hold(self) -> Callable[[], None]:
        with _outside(OutputError, f"write to {self.url}", "a folder that can be written"):
            self.path.mkdir(parents=True, exist_ok=True)
            return hold_file(self.path / LOCK)

    def tidy(self) -> None:
        _tidy(self.path)


class Store:
    """A folder of an object store, with the folder of this machine that keeps what was fetched."""

    remote = True

    def __init__(self, url: str, fs: Any, root: str, kept: Path) -> None:
        self.url, self._fs, self._root, self.kept = url, fs, root, kept

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}"

    def files(self) -> dict[str, int]:
        with _outside(RunError, f"list {self.url}", "a store that can be reached and read"):
            self._fs.invalidate_cache()
            try:
                found = self._fs.ls(self._root, detail=True)
            except FileNotFoundError:
                return {}
            return {e["name"].rpartition("/")[2]: int(e["size"]) for e in found if e["type"] == "file"}

    def read(self, name: str) -> bytes | None:
        with _outside(RunError, f"read {self.url}/{name}", "a store that can be reached and read"):
            try:
                return bytes(self._fs.cat_file(self._at(name)))
            except FileNotFoundError:
                return None

    def local(self, name: str, fresh: bool = False) -> Path | None:
        path = self.kept / name
        if path.is_file() and not fresh:
            return path
        works = f"a store that can be reached and read, and space in {self.kept}"
        with _outside(RunError, f"fetch {self.url}/{name}", works):
            self.kept.mkdir(parents=True, exist_ok=True)
            with _part(self.kept, name) as part:
                try:
                    self._fs.get_file(self._at(name), str(part))
                except FileNotFoundError:
                    return None
                os.replace(part, path)
        return path

    def write(self, name: str, fill: Callable[[Path], object]) -> None:
        works = f"a store that can be reached and written, and space in {self.kept}"
        with _outside(OutputError, f"write {self.url}/{name}", works):
            self.kept.mkdir(parents=True, exist_ok=True)
            with _part(self.kept, name) as part:
                fill(part)
                self._fs.put_file(str(part), self._at(name))

    def settle(self) -> None:
        return  # a put that was answered is kept

    def remove(self, name: str) -> None:
        with _outside(OutputError, f"delete {self.url}/{name}", "a store that can be written"):
            try:
                self._fs.rm_file(self._at(name))
            except FileNotFoundError:
                return

    def hold(self) -> Callable[[], None]:
        with _outside(OutputError, f"write to {self.url}", "a store that can be reached and written"):
            return hold_object(self._fs, self._at(LOCK), self.url)

    def tidy(self) -> None:
        _tidy(self.kept)


@contextmanager
def _outside(kind: type[WhenceError], asked: str, works: str) -> Iterator[None]:
    """Stores raise errors of many families; to whoever asked, they are one."""
    try:
        yield
    except WhenceError:
        raise
    except Exception as error:
        raise kind(asked, f"{type(error).__name__}: {error}", works) from error


@contextmanager
def _part(folder: Path, name: str) -> Iterator[Path]:
    """A temporary file that says whose it is, so that it can be cleared away after a kill."""
    part = folder / f".{name}.part-{os.getpid()}-{threading.get_ident()}-{socket.gethostname()}"
    try:
        yield part
    finally:
        part.unlink(missing_ok=True)


def _tidy(folder: Path) -> None:
    for part in folder.glob(".*.part-*"):
        whose = re.fullmatch(r"\..+\.part-(\d+)-\d+-(.+)", part.name)
        if whose and whose[2] == socket.gethostname() and not started(int(whose[1])):
            part.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
