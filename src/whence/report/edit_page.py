"""The page of an edit: what was foreseen, what came of it, pictures before and after with a wipe and their difference.

One file, no network. The wipe is a slider over the two pictures; without scripts both stand side by side.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import __version__
from .folder import EDIT_RECORD, whole_folder
from .fragments import environment, interval, number, style, verdict_parts
from .pictures import difference, map_uri, picture_uri

if TYPE_CHECKING:
    from ..change import Change
    from ..verdict import Verdict

SCHEMA = "whence/edit/1"
GROUPS = {
    "target": "prompts with the old phrase are drawn as the new one",
    "paraphrases": "the same in other kinds of captions: counts, relations, three objects",
    "neighbours": "prompts of other words of its kind show what they ask for",
    "unrelated": "number, shapes, places and background in prompts without the phrase",
    "named": "prompts that name one of the phrases show it",
}


@dataclass(frozen=True)
class EditBundle:
    """What the page is made of. ``tried``: what `worlds.shapes.editing.Tried.record` gives, empty where no oracle reads
    the model's pictures. ``images``: dicts with "group", "prompt", "seed", "before", "after" and, where read,
    "held"."""

    change: Change
    tried: dict[str, Any]
    images: Sequence[dict[str, Any]] = ()
    verdict: Verdict | None = None
    notes: Sequence[str] = ()
    command: Sequence[str] = field(default_factory=tuple)

    def record(self) -> dict[str, Any]:
        """The JSON record, without pictures and matrices."""
        return {"schema": SCHEMA, "change": self.change.record(), **self.tried, "notes": list(self.notes)}


def write_edit(bundle: EditBundle, out: Path) -> Path:
    """The report's folder: page, record and the change itself, written whole or not at all. Returns the path of the
    page. Raises OutputError."""
    with whole_folder(out) as folder:
        (folder / EDIT_RECORD).write_text(json.dumps(bundle.record(), indent=1, allow_nan=False), encoding="utf8")
        (folder / "report.html").write_text(edit_html(bundle), encoding="utf8")
        bundle.change.save(folder)
    return Path(out).expanduser().resolve() / "report.html"


def edit_html(bundle: EditBundle) -> str:
    """The page."""
    change, p = bundle.change, bundle.change.predicted
    v = verdict_parts(bundle.verdict) if bundle.verdict else None
    return environment().get_template("edit_page.jinja").render(
        css=style("parts.css"), own=style("edit_page.css"), version=__version__, goal=str(change.goal),
        claim=v["claim"] if v else f"prompts with “{change.goal.old}” are drawn as “{change.goal.new}”",
        evidence=f"{change.method}: {change.extent}; foreseen before "
        f"anything changed: {1 - p['edit']:.0%} of the way there, kept values move by {p['keep']:.1%}",
        intervention=v["intervention"] if v else "the model with the change and without it, at the same seeds",
        verdicts=[v] if v else [], missing="No oracle reads this model’s pictures.",
        rates=[_row(name, told) for name, told in bundle.tried.get("rates", {}).items()],
        figures=[_figure(i, im) for i, im in enumerate(bundle.images)], relearn=_relearn(bundle.tried.get("relearn")),
        rows=_rows(change),
        matrices=[(r["name"], *(number(r[k]) for k in ("edit", "keep", "size"))) for r in change.foreseen],
        notes=bundle.notes, command=shlex.join(bundle.command) if bundle.command else "whence edit",
    )  # fmt: skip


def _row(name: str, told: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": name, "says": GROUPS.get(name, ""), "before": f"{told['before']:.0%}", "after": f"{told['after']:.0%}",
        "moved": f"{100 * told['moved']:+.0f} points".replace("-", "−"), "n": told["n"],
        "interval": interval((100 * told["interval"][0], 100 * told["interval"][1])),
        "left": 100 * min(told["before"], told["after"]), "width": 100 * abs(told["moved"]), "at": 100 * told["after"],
    }  # fmt: skip


def _figure(i: int, im: dict[str, Any]) -> dict[str, Any]:
    held = im.get("held")
    return {
        "id": f"f{i}", "prompt": im["prompt"], "seed": im["seed"], "group": im["group"],
        "before": picture_uri(im["before"]), "after": picture_uri(im["after"]),
        "difference": map_uri(difference(im["before"], im["after"]), (0.0, 1.0)),
        "moved": number(float(np.mean(difference(im["before"], im["after"])))),
        "said": f"as claimed: {_word(held[0])} before, {_word(held[1])} after" if held else "",
    }  # fmt: skip


def _word(held: bool) -> str:
    return "yes" if held else "no"


def _relearn(told: dict[str, Any] | None) -> dict[str, Any] | None:
    if not told:
        return None
    curves = {k: v for k, v in told.items() if isinstance(v, list)}
    top = max(1.0, *(max(v) for v in curves.values()))
    low = min(0.0, *(min(v) for v in curves.values()))

    def points(curve: Sequence[float]) -> str:
        wide = max(len(curve) - 1, 1)
        return " ".join(
            f"{4 + 292 * i / wide:.1f},{96 - 92 * (y - low) / (top - low):.1f}" for i, y in enumerate(curve)
        )

    one = 96 - 92 * (1 - low) / (top - low)
    return {"steps": told["steps"], "one": f"{one:.1f}",
            "curves": [(name, points(c), f"{c[-1]:.0%}", i) for i, (name, c) in enumerate(curves.items())]}  # fmt: skip


def _rows(change: Change) -> list[tuple[str, str]]:
    settings = ", ".join(f"{k} {v}" for k, v in change.settings.items())
    return [
        ("method", change.method), ("settings", settings), ("model", change.model_name),
        ("made for", change.fingerprint), ("change", change.key), ("numbers set", f"{change.parameters:,}"),
        ("planned in", f"{change.seconds:.2f} s"),
    ]  # fmt: skip
