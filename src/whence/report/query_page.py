"""The page of a query: the output, the training examples behind it with their scores, verdict and trust figures.

One file, no network, no script. Examples whose items are equal byte for byte stand as one, with how many there are:
credit among them cannot be told apart.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from .folder import QUERY_RECORD, whole_folder
from .fragments import environment, number, style, verdict_parts

if TYPE_CHECKING:
    from ..objective import Examples
    from ..verdict import Verdict


@dataclass(frozen=True)
class QueryBundle:
    """What the page is made of. ``record``: what `whence query --json` prints; ``picture``: pixels of the output."""

    record: dict[str, Any]
    examples: Examples
    picture: Any = None
    verdicts: Sequence[Verdict] = ()
    command: Sequence[str] = field(default_factory=tuple)


def write_query(bundle: QueryBundle, out: Path) -> Path:
    """Write the report's folder, whole or not at all, and return the path of its page. Raises OutputError."""
    with whole_folder(out) as folder:
        (folder / QUERY_RECORD).write_text(json.dumps(bundle.record, indent=1), encoding="utf8")
        (folder / "report.html").write_text(query_html(bundle), encoding="utf8")
    return Path(out).expanduser().resolve() / "report.html"


def query_html(bundle: QueryBundle) -> str:
    """The page."""
    from .pictures import picture_uri

    record = bundle.record
    top = max((abs(r["score"]) for r in [*record["top"], *record.get("lowest", [])]), default=1.0) or 1.0
    sides = [{"name": "Made it more likely", "examples": _rows(bundle, record["top"], top)}]
    if record.get("lowest"):
        sides.append({"name": "Made it less likely", "examples": _rows(bundle, record["lowest"], top)})
    first = record["top"][0]["label"] if record["top"] else "none"
    small = bundle.picture is not None and max(bundle.picture.shape[:2]) <= 128
    return environment().get_template("query_page.jinja").render(
        css=style("parts.css"), own=style("query_page.css"), version=__version__, title=record["prompt"],
        picture=None if bundle.picture is None else picture_uri(bundle.picture), pixel=small,
        text=record.get("text", ""), claim=f"training on “{first}” and its like made this output likely",
        evidence=f"{record['method']}: {record['examples']} examples scored in {number(record['seconds'])} s, the best "
        "and the lowest of them named below",
        intervention="one step of training on the best examples, against steps on others",
        verdicts=[verdict_parts(v) for v in bundle.verdicts], missing="--verify puts the answer on trial.",
        sides=sides, tokens=record.get("tokens", []), trust=_trust(record), notes=record["notes"],
        command=shlex.join(bundle.command) if bundle.command else "whence query",
    )  # fmt: skip


def _rows(bundle: QueryBundle, found: list[dict[str, Any]], top: float) -> list[dict[str, Any]]:
    from .pictures import THUMBNAIL, picture_uri

    rows: dict[Any, dict[str, Any]] = {}
    for r in found:
        item = bundle.examples[r["example"]]
        pixels = item[1] if isinstance(item, tuple) and getattr(item[1], "ndim", 0) == 3 else None
        key = (r["label"], None if pixels is None else pixels.tobytes())
        if key in rows:
            rows[key]["times"] += 1
            continue
        uri = picture_uri(pixels, THUMBNAIL) if pixels is not None and pixels.dtype == "uint8" else None
        rows[key] = {
            "label": r["label"], "number": r["example"], "value": f"{r['score']:+.2e}", "share": r["score"] / top,
            "picture": uri, "times": 1,
        }  # fmt: skip
    return list(rows.values())


def _trust(record: dict[str, Any]) -> list[tuple[str, str]]:
    trust = record["trust"]
    rows = [("training examples scored", str(record["examples"]))]
    if trust["recall_of_first_stage"] is not None:
        share = f"{trust['recall_of_first_stage']:.0%} on {trust['on_examples']} examples"
        rows += [("scored again in the second stage", str(record["scored_again"])), ("best ones it let through", share)]
    if record["scored_by_ekfac"]:
        rows.append(("scored once more by EK-FAC", str(record["scored_by_ekfac"])))
    for form, values in trust["agreement_with_ekfac"].items():
        rows.append((f"agreement of {form} with EK-FAC, on a sample", f"NDCG@20 {values['ndcg_at_20']}"))
        rows.append(("rank correlation with EK-FAC, on a sample", str(values["spearman"])))
    return rows
