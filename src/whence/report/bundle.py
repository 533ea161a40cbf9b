"""Bundle: a run, its explanations and their trials, as one report; and the folder that the report is written to."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import __version__
from .folder import RECORD, SCHEMA, whole_folder
from .pictures import png

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..explanation import Explanation
    from ..run import Run
    from ..verdict import Verdict


@dataclass(frozen=True)
class Counterfactual:
    """The picture, uint8 [y, x, rgb], of the same seed with one word replaced. ``word`` is its label in the run."""

    word: str
    replacement: str
    prompt: str
    image: NDArray[np.uint8]


@dataclass(frozen=True)
class Trial:
    """The verdict on one word's claim by one method. ``word`` is its label in the run."""

    method: str
    word: str
    verdict: Verdict


@dataclass(frozen=True)
class Bundle:
    """What a report is made of. The maps are of picture number ``image``; ``command`` makes the report again.

    Where a word has several verdicts by one method, the first listed is the one shown on the word.
    """

    run: Run
    explanations: Sequence[Explanation]
    trials: Sequence[Trial] = ()
    counterfactuals: Sequence[Counterfactual] = ()
    image: int = 0
    command: str = ""

    def verdicts(self, method: str, word: str) -> list[Verdict]:
        """The verdicts on a word's claim by a method, in the order given."""
        return [t.verdict for t in self.trials if (t.method, t.word) == (method, word)]

    @property
    def picture(self) -> NDArray[np.uint8]:
        """The picture that the maps are of, uint8 [y, x, rgb]."""
        return np.asarray(self.run.images[self.image])

    def files(self) -> list[str]:
        """Names of the pictures' files, in the order of the run's images."""
        return ["image.png", *(f"image-{i + 1}.png" for i in range(1, len(self.run.images)))]

    def record(self) -> dict[str, Any]:
        """The content of ``explanation.json`` (docs/explanation-schema.md). Numbers that are not finite become null."""
        record: dict[str, Any] = plain(
            {
                "schema": SCHEMA,
                "whence": __version__,
                "command": self.command or command_of(self),
                "run": self.run.record(),
                "image": self.image,
                "explanations": [e.record() | {"maps": e.method} for e in self.explanations],
                "trials": [{"method": t.method, "word": t.word, "verdict": t.verdict.record()} for t in self.trials],
                "counterfactuals": [
                    {"word": c.word, "replacement": c.replacement, "prompt": c.prompt} for c in self.counterfactuals
                ],
                "files": {"report": "report.html", "images": self.files(), "maps": "maps.npz"},
            }
        )
        return record

    def json(self) -> str:
        """:meth:`record` as JSON text."""
        return json.dumps(self.record(), indent=2, ensure_ascii=False, allow_nan=False)


def plain(value: Any) -> Any:
    """A value as JSON has it: numpy scalars and arrays, tuples and sets become plain; not finite becomes None.

    >>> plain({"a": (np.float32(0.5), float("inf")), 1: np.arange(2)})
    {'a': [0.5, None], '1': [0, 1]}
    """
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(v) for v in (sorted(value) if isinstance(value, set | frozenset) else value)]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def command_of(bundle: Bundle) -> str:
    """The command line that makes this report again, with every setting spelled out."""
    s = bundle.run.settings
    model = [] if bundle.run.model_name in ("", "shapes", "whence/shapes") else [bundle.run.model_name]
    words = [
        "whence", "explain", *model, "--prompt", s.prompt, "--seed", str(s.seed), "--steps", str(s.steps),
        "--guidance", f"{s.guidance:g}", "--size", f"{s.height}x{s.width}",
        *(["--negative-prompt", s.negative_prompt] if s.negative_prompt else []),
        *(["--images", str(s.images)] if s.images > 1 else []),
        "--by", ",".join(e.method for e in bundle.explanations),
    ]  # fmt: skip
    return shlex.join(words)


def write_report(bundle: Bundle, out: Path) -> Path:
    """Write ``report.html``, the images, ``maps.npz`` and ``explanation.json`` to the folder ``out``; returns it.

    The folder appears whole or not at all. A report that was there before is replaced; other files are never touched
    (OutputError). ``maps.npz`` has one array per method, float32 [word, y, x], and ``<method>.words``, its labels.
    """
    from .page import page_html

    arrays: dict[str, NDArray[Any]] = {}
    for e in bundle.explanations:
        arrays[e.method] = e.scores.astype(np.float32)
        arrays[f"{e.method}.words"] = np.array(e.units.labels)
        if e.spread is not None:
            arrays[f"{e.method}.spread"] = e.spread.astype(np.float32)
    page, record = page_html(bundle), bundle.json() + "\n"
    with whole_folder(out) as folder:
        _write(folder / "report.html", page.encode())
        for name, image in zip(bundle.files(), bundle.run.images, strict=True):
            _write(folder / name, png(image))
        np.savez_compressed(folder / "maps.npz", allow_pickle=False, **arrays)
        _write(folder / RECORD, record.encode())
    return Path(out).expanduser().resolve()


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)
