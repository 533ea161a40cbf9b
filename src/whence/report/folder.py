"""Where does a report go? Into a folder that is written whole or not at all.

Everything is written to a hidden folder beside the target and renamed into place at the end. A full disk, an
interruption or any other failure on the way leaves what was there before, and no rest.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import OutputError

SCHEMA = "whence/explanation/1"
RECORD = "explanation.json"
TEXT_RECORD = "report.json"
QUERY_RECORD = "query.json"
TRACE_RECORD = "trace.json"
SEEDS_RECORD = "seeds.json"
EDIT_RECORD = "edit.json"
OURS = ("report.html", "maps.npz", RECORD, TEXT_RECORD, QUERY_RECORD, TRACE_RECORD, SEEDS_RECORD,
        EDIT_RECORD, "change.safetensors")  # fmt: skip
"""Files of a report, beside ``image.png``, ``image-2.png`` and so on."""
SCHEMAS = {
    RECORD: "whence/explanation/", TEXT_RECORD: "whence-text-explanation/", QUERY_RECORD: "whence/query/",
    TRACE_RECORD: "whence/trace/", SEEDS_RECORD: "whence/seeds/", EDIT_RECORD: "whence/edit/",
}  # fmt: skip
"""A report's record, of pictures or of text, and how its schema begins. One may take the other's place."""


def _is_ours(path: Path) -> bool:
    return path.name in OURS or (path.name.startswith("image") and path.suffix == ".png")


def _schema(record: Path) -> str:
    try:
        return str(json.loads(record.read_text(encoding="utf8"))["schema"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _foreign(out: Path) -> list[str]:
    """What stands in the folder that no report put there; everything, if no report's record is there."""
    entries = sorted(out.iterdir())
    ours = any(_schema(out / name).startswith(schema) for name, schema in SCHEMAS.items())
    return [p.name for p in entries if not (ours and _is_ours(p) and p.is_file())]


def _reason(error: OSError) -> tuple[str, str]:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full", "free some space, or --out on another disk"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "it cannot be written to", "--out with a directory of yours"
    return (error.strerror or str(error)).lower(), "--out with a directory that can be made"


def _staging(out: Path) -> Path:
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}-", suffix=".part", dir=out.parent))
    os.chmod(staging, 0o777 & ~_umask())  # mkdtemp makes folders private; a report is an ordinary folder
    return staging


@contextmanager
def _parents(out: Path) -> Iterator[None]:
    """Parents that did not exist before go away again unless something stays in them."""
    made = [p for p in out.parents if not p.exists()]
    try:
        yield
    finally:
        for parent in made:
            with suppress(OSError):
                parent.rmdir()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def check_folder(out: Path) -> Path:
    """Can a report be written here? Returns the resolved path, leaving nothing behind; else raises OutputError.

    Asked before work starts: it makes a folder beside the target and takes it away again.
    """
    out = Path(out).expanduser().resolve()
    asked = f"a report in {out}"
    if out.exists() and not out.is_dir():
        raise OutputError(asked, "a file of this name", "--out with another directory")
    try:
        if out.is_dir():
            if foreign := _foreign(out):
                names = ", ".join(foreign[:4]) + (f" and {len(foreign) - 4} more" if len(foreign) > 4 else "")
                raise OutputError(asked, f"files that no report wrote: {names}", f"--out {out / 'whence-out'}")
            if out == Path.cwd() or os.path.ismount(out):
                found = "the current directory" if out == Path.cwd() else "a mount point"
                raise OutputError(asked, f"{found}, which cannot be replaced whole", f"--out {out / 'whence-out'}")
            if not os.access(out, os.W_OK | os.X_OK):
                raise OutputError(asked, "it cannot be written to", "--out with a directory of yours")
        with _parents(out):
            _staging(out).rmdir()
    except OSError as error:
        raise OutputError(asked, *_reason(error)) from None
    return out


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """Yields an empty folder to write into; it takes the place of ``out`` when the block ends without an error.

    On any error, an interruption included, it is removed and ``out`` stays as it was. Raises OutputError for a
    folder with other files in it and when writing fails (full disk, no permission).
    """
    out = check_folder(out)
    try:
        with _parents(out):
            staging = _staging(out)
            try:
                yield staging
                _replace(staging, out)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise OutputError(f"a report in {out}", *_reason(error)) from error


def _replace(staging: Path, out: Path) -> None:
    if not out.exists():
        staging.rename(out)
        return
    # A folder with files in it cannot be renamed over: the old one steps aside, and back if anything goes wrong.
    old = staging.with_suffix(".old")
    try:
        out.rename(old)
        staging.rename(out)
    except BaseException:
        if old.exists() and not out.exists():
            old.rename(out)
        raise
    finally:
        if out.exists():
            shutil.rmtree(old, ignore_errors=True)
