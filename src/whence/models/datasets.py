"""Training sets from files, as Examples: texts (.txt, .jsonl) and captioned pictures (a folder, .npz).

* ``.txt``: one text per block of lines, blocks parted by empty lines.
* ``.jsonl`` or ``.jsonl.gz``: one object per line with ``text``, and ``prompt`` where only the text has a loss.
* a folder with ``metadata.jsonl`` of ``file_name`` and ``text`` (datasets' imagefolder), or pictures, each with a
  ``.txt`` of the same name beside it.
* ``.npz``: pictures [picture, y, x, colour] of 0..255 (``x``, ``images`` or ``pictures``) and their captions.

Nothing is held in memory but where things are; a picture is read when it is asked for.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import RunError
from ..objective import Examples, Listed

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
FORMS = "a .txt or .jsonl of texts, a folder of captioned pictures, or an .npz of pictures and captions"


def short(text: str, length: int = 60) -> str:
    """The beginning of a text on one line."""
    line = " ".join(text.split())
    return line if len(line) <= length else f"{line[: length - 1]}…"


def examples_from(path: Path) -> Examples:
    """The training set in a file or folder. Raises RunError that says which forms there are."""
    if path.is_dir():
        return PictureFolder(path)
    if not path.is_file():
        raise RunError(f"the training set {path}", "no such file or folder", FORMS)
    name = path.name.removesuffix(".gz")
    if name.endswith(".npz"):
        return _from_npz(path)
    if name.endswith((".txt", ".jsonl", ".json")):
        return _texts(path, name)
    raise RunError(f"the training set {path}", f"no form that ends in {path.suffix!r}", FORMS)


def _texts(path: Path, name: str) -> Examples:
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf8")
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"the training set {path}", str(error), "UTF-8 text") from None
    items: list[Any] = []
    if name.endswith(".txt"):
        items = [block.strip() for block in text.split("\n\n") if block.strip()]
    else:
        for number, line in enumerate(filter(str.strip, text.splitlines()), 1):
            try:
                row = json.loads(line)
                items.append((row["prompt"], row["text"]) if row.get("prompt") else row["text"])
            except (ValueError, KeyError, TypeError, AttributeError):
                found = f"line {number} is {short(line)!r}"
                raise RunError(f"texts of {path}", found, '{"text": "..."} on each line') from None
    if not items:
        raise RunError(f"the training set {path}", "it holds no text", FORMS)
    return Listed(tuple(items), tuple(short(i if isinstance(i, str) else " ".join(i)) for i in items))


def _from_npz(path: Path) -> Examples:
    try:
        with np.load(path, allow_pickle=False) as found:
            arrays = {k: found[k] for k in found.files}
    except (OSError, ValueError) as error:
        raise RunError(f"the training set {path}", str(error), "an .npz of plain arrays") from None
    pictures = next((a for a in arrays.values() if a.ndim == 4 and a.dtype == np.uint8 and a.shape[-1] == 3), None)
    captions = next((a for a in arrays.values() if a.ndim == 1 and a.dtype.kind == "U"), None)
    if pictures is None or captions is None or len(pictures) != len(captions):
        held = ", ".join(f"{k} {a.dtype}{list(a.shape)}" for k, a in arrays.items())
        raise RunError(f"pictures of {path}", held, "uint8 [picture, y, x, 3] and as many captions")
    rows = tuple((str(c), p) for c, p in zip(captions, pictures, strict=True))
    return Listed(rows, tuple(short(c) for c, _ in rows))


class PictureFolder:
    """Captioned pictures of a folder; read when asked for, cut to a square in the middle and brought to ``size``."""

    def __init__(self, folder: Path, size: int | None = None) -> None:
        self.folder, self.size = folder, size
        listing = folder / "metadata.jsonl"
        rows: list[tuple[str, Path]] = []
        if listing.is_file():
            for line in filter(str.strip, listing.read_text(encoding="utf8").splitlines()):
                try:
                    row = json.loads(line)
                    rows.append((str(row["text"]), folder / row["file_name"]))
                except (ValueError, KeyError, TypeError):
                    raise RunError(
                        f"captions of {listing}", short(line), '{"file_name": "...", "text": "..."} on each line'
                    ) from None
        else:
            for picture in sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES):
                caption = picture.with_suffix(".txt")
                if not caption.is_file():
                    raise RunError(f"a caption of {picture.name}", f"no {caption.name} beside it", FORMS)
                rows.append((caption.read_text(encoding="utf8").strip(), picture))
        missing = next((p for _, p in rows if not p.is_file()), None)
        if missing or not rows:
            raise RunError(f"pictures of {folder}", f"no file {missing}" if missing else "none is there", FORMS)
        self.rows: Sequence[tuple[str, Path]] = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int, /) -> tuple[str, Any]:
        caption, path = self.rows[number]
        with Image.open(path) as image:
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            square = image.convert("RGB").crop((left, top, left + side, top + side))
        if self.size:
            square = square.resize((self.size, self.size), Image.Resampling.LANCZOS)
        return caption, np.asarray(square)

    def label(self, number: int) -> str:
        return short(self.rows[number][0])

    def fingerprint(self) -> str:
        """Of captions, names and sizes of the files."""
        found = hashlib.sha256(str(self.size).encode())
        for caption, path in self.rows:
            found.update(f"{caption}\x1f{path.name}\x1f{path.stat().st_size}\x1e".encode())
        return found.hexdigest()[:16]
