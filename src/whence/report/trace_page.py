"""The page of a trace: which components carry a word, ranked by measured effect, with pictures and the verdict.

One file, no network, no script. Two views of the same numbers: all sites in the order in which they run, as small
multiples by kind on one scale, and the ranked table of the first ones with intervals and closeness to the clean one.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from .bundle import plain
from .folder import TRACE_RECORD, whole_folder
from .fragments import cost, environment, interval, number, small, style, verdict_parts

if TYPE_CHECKING:
    from ..explanation import Explanation
    from ..verdict import Verdict

SHOWN = 12
"""Sites in the ranked table; the record has all."""


@dataclass(frozen=True)
class TraceBundle:
    """What the page is made of. ``explanation``: of `causal_trace`; ``pictures``: name -> uint8 [y, x, rgb] of one
    seed, clean and corrupted first; ``verdict``: of the first site on fresh seeds."""

    explanation: Explanation
    pictures: Mapping[str, Any]
    verdict: Verdict | None = None
    command: Sequence[str] = field(default_factory=tuple)

    def record(self) -> dict[str, Any]:
        """What ``trace.json`` has: the explanation, the verdict, and what it cost all together."""
        e, v = self.explanation, self.verdict
        d = e.details
        rows = [d["sites"][i] for i in d["order"]]
        run: Any = e.run
        runs = e.cost.runs + (int(v.details.get("runs", 0)) if v else 0)
        return {
            "schema": "whence/trace/1",
            "whence": __version__,
            "run": run.record() if run is not None else None,
            **plain({
                "method": e.method, "word": d["word"], "readout": e.readout, "settings": e.settings,
                "total_effect": d["total"], "sites": rows, "verdict": v.record() if v else None,
                "cost": {"runs": runs, "of_them_for_the_verdict": runs - e.cost.runs,
                         "one_by_one": d["runs_one_by_one"], "seconds": round(e.cost.seconds, 1)},
                "notes": e.notes, "command": shlex.join(self.command),
            }),
        }  # fmt: skip


def write_trace(bundle: TraceBundle, out: Path) -> Path:
    """Write the report's folder, whole or not at all, and return the path of its page. Raises OutputError."""
    with whole_folder(out) as folder:
        (folder / TRACE_RECORD).write_text(json.dumps(bundle.record(), indent=1), encoding="utf8")
        (folder / "report.html").write_text(trace_html(bundle), encoding="utf8")
    return Path(out).expanduser().resolve() / "report.html"


def trace_html(bundle: TraceBundle) -> str:
    """The page."""
    from .pictures import picture_uri

    e, d = bundle.explanation, bundle.explanation.details
    rows, order = d["sites"], d["order"]
    most = max((abs(x) for r in rows for x in (r["effect"], *r["interval"]) if abs(x) < 1e9), default=1.0)
    scale = min(most, 2 * max(max(abs(r["effect"]) for r in rows), 1e-9)) or 1.0
    total = sum(d["total"]) / len(d["total"])
    first = rows[order[0]]
    kinds = list(dict.fromkeys(r["kind"] for r in rows))
    pictures = [
        {"name": name, "uri": picture_uri(image), "pixel": small(image)} for name, image in bundle.pictures.items()
    ]
    noise = e.settings["corruption"]
    how = {"noise": f"noise of {noise['scale']:g} standard deviations", "drop": "the word left out"}.get(
        noise["how"], f"the word replaced by “{noise['other']}”"
    )
    return environment().get_template("trace_page.jinja").render(
        css=style("parts.css"), own=style("trace_page.css"), version=__version__, word=d["word"],
        prompt=e.run.settings.prompt if e.run is not None else "",
        claim=f"{first['site']} carries “{d['word']}”",
        evidence=f"first of {len(rows)} sites: indirect effect {number(first['effect'])} "
        f"{interval(tuple(first['interval']))} of {number(total)} that the corruption took; {e.readout}; {cost(e)}",
        intervention=f"{how}; then one site at a time gives the activation of the clean run",
        verdicts=[verdict_parts(bundle.verdict)] if bundle.verdict else [],
        missing="No fresh seeds were asked: --fresh 8 does.",
        pictures=pictures, kinds=[{"name": k, "sites": _strip(rows, k, scale)} for k in kinds],
        ranked=[_ranked(rows[i], scale) for i in order[:SHOWN]], more=max(len(rows) - SHOWN, 0),
        scale=number(scale), notes=e.notes,
        settings=[("readout", e.readout), ("seeds", str(e.settings["seeds"])), ("text", how),
                  ("where", e.settings["where"]), ("model runs", f"{e.cost.runs}; one by one {d['runs_one_by_one']}")],
        command=shlex.join(bundle.command) if bundle.command else "whence trace",
    )  # fmt: skip


def _strip(rows: Sequence[Mapping[str, Any]], kind: str, scale: float) -> list[dict[str, Any]]:
    """Bars of one kind's sites in the order in which they run."""
    return [
        {"share": min(max(r["effect"] / scale, -1), 1), "title": f"{r['site']}: {number(r['effect'])}"}
        for r in rows
        if r["kind"] == kind
    ]


def _ranked(row: Mapping[str, Any], scale: float) -> dict[str, Any]:
    low, high = (min(max(x / scale, -1), 1) for x in row["interval"])
    return {
        "site": row["site"], "kind": row["kind"], "value": number(row["effect"]),
        "ends": interval(tuple(row["interval"])), "share": min(max(row["effect"] / scale, -1), 1), "low": low,
        "high": high, "near": number(row["closeness"]) if row["closeness"] is not None else "in a group",
    }  # fmt: skip
