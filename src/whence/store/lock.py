"""One writer at a time for a place, and nobody kept out by a writer that was killed.

In a folder the operating system holds the lock (a POSIX record lock on ``writer.lock``) and drops it with the process,
however that ends. An object store has no such lock: there ``writer.lock`` is an object that is made only if there is
none, and taken over when the process that it names is gone from this host. (Two that take over one dead writer's
object in the same instant are not told apart.) The file says who writes, for the message of whoever is refused.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..errors import OutputError

LOCK = "writer.lock"
_held: dict[str, int] = {}
"""What this process writes to -> its number: a forked child finds its parent's here, which is not its own."""


def started(pid: int) -> str:
    """When a process of this host was started, in the kernel's ticks; "" if it is gone, "?" where that is not told."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except OSError:
        pass
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "?"
    return "" if fields[0] == "Z" else fields[19]


def hold_file(path: Path) -> Callable[[], None]:
    """Hold the lock of a folder; gives what lets it go. Raises OutputError when another writer holds it."""
    import fcntl  # not on Windows, where indexes can be read

    key = str(path.resolve())
    _not_twice(key, str(path.parent))
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        note = os.read(handle, 4096)
        os.close(handle)
        raise _refused(str(path.parent), note) from None
    except BaseException:
        os.close(handle)
        raise
    owner = _held[key] = os.getpid()

    def release() -> None:
        if os.getpid() == owner and key in _held:
            del _held[key]
            os.ftruncate(handle, 0)
            os.close(handle)

    try:
        os.ftruncate(handle, 0)
        os.write(handle, _note())
    except OSError:
        pass  # a full disk: the lock is held all the same, only its note is missing
    return release


def hold_object(fs: Any, path: str, url: str) -> Callable[[], None]:
    """The same for an object store."""
    _not_twice(url, url)
    for _ in range(2):
        try:
            fs.pipe_file(path, _note(), mode="create")
            break
        except Exception as error:
            # Every store says "there is one already" in its own way; what counts is whether there is one.
            try:
                note = fs.cat_file(path)
            except FileNotFoundError:
                if isinstance(error, FileExistsError):
                    continue
                raise error from None
        if not _gone(note):
            raise _refused(url, note)
        fs.rm_file(path)
    else:
        raise _refused(url, b"")
    owner = _held[url] = os.getpid()

    def release() -> None:
        if os.getpid() == owner and url in _held:
            del _held[url]
            fs.rm_file(path)

    return release


def _note() -> bytes:
    pid = os.getpid()
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return json.dumps({"host": socket.gethostname(), "pid": pid, "started": started(pid), "since": now}).encode()


def _gone(note: bytes) -> bool:
    try:
        who = json.loads(note)
        return bool(who["host"] == socket.gethostname() and started(int(who["pid"])) != who["started"])
    except (ValueError, KeyError, TypeError):
        return False


def _not_twice(key: str, where: str) -> None:
    if _held.get(key) == os.getpid():
        raise OutputError(
            f"write to the index {where}",
            "this process is writing to it already, through another Index",
            "that one, or this one after that one is closed",
        )


def _refused(where: str, note: bytes) -> OutputError:
    try:
        who = json.loads(note)
        found = f"process {who['pid']} of host {who['host']} has been writing to it since {who['since']}"
    except (ValueError, KeyError, TypeError):
        found = "another process is writing to it"
    return OutputError(
        f"write to the index {where}",
        found,
        f"wait until it ends, or end it (where no such process is left, delete {LOCK}); readers need not wait",
    )
