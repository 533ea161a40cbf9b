"""What a noun looks like in a notebook, and the parts that the page is made of too.

Each function gives one self-contained HTML fragment: its own styles, pictures as data URIs, no scripts, all text
escaped.
"""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..explanation import MAP_KINDS
from .pictures import LOSSLESS, THUMBNAIL, common_range, overlay, picture_uri

if TYPE_CHECKING:
    from jinja2 import Environment, Template

    from ..explanation import Explanation
    from ..method import Card
    from ..readout import Readout
    from ..run import Run
    from ..score import Score
    from ..units import Units
    from ..verdict import Verdict


@cache
def environment() -> Environment:
    """The templates of this folder. Everything printed is escaped; a name that is missing is an error."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )


def style(name: str) -> Any:
    """A style sheet or script of this folder, to be printed as it stands."""
    from markupsafe import Markup

    return Markup((Path(__file__).parent / name).read_text(encoding="utf8"))


def number(x: float | None) -> str:
    """Three digits, a true minus sign, and words for what is no number.

    >>> number(-0.01234), number(1234.5), number(float("inf")), number(None), number(0.00004)
    ('−0.0123', '1234', '∞', 'not known', '4e-05')
    """
    if x is None or math.isnan(x):
        return "not known"
    if math.isinf(x):
        return "∞" if x > 0 else "−∞"
    text = f"{x:.0f}" if abs(x) >= 100 else f"{x:.3g}"
    return text.replace("-", "−") if "e" not in text else text


def interval(ends: tuple[float, float]) -> str:
    """An interval as text: ``[low, high]``; empty where it is not known or has no end.

    >>> interval((0.1, 0.25)), interval((float("-inf"), float("inf")))
    ('[0.1, 0.25]', '')
    """
    return f"[{number(ends[0])}, {number(ends[1])}]" if all(map(math.isfinite, ends)) else ""


def plot_parts(v: Verdict) -> dict[str, Any] | None:
    """Where effect, control and their difference stand on one axis, in percent of its width; None without a number."""
    rows = (
        ("effect", v.effect, v.interval),
        ("control", v.control, v.control_interval),
        ("beyond control", v.beyond, v.beyond_interval),
    )
    if not math.isfinite(v.effect):
        return None
    seen = [x for _, at, ends in rows for x in (at, *ends) if math.isfinite(x)]
    low, high = min(0.0, *seen), max(v.delta, *seen)
    pad = 0.05 * (high - low)
    low, high = low - pad, high + pad

    def place(x: float) -> float | None:
        return round(100 * (x - low) / (high - low), 2) if math.isfinite(x) else None

    return {
        "rows": [
            {
                "name": name, "at": place(at), "value": number(at), "ends": interval(ends),
                "low": place(ends[0]) if interval(ends) else None, "high": place(ends[1]),
            }
            for name, at, ends in rows
        ],
        "zero": place(0.0),
        "delta": place(v.delta),
        "delta_value": number(v.delta),
        "ticks_apart": v.delta > 0.12 * (high - low),
        "alt": "; ".join(f"{name} {number(at)} {interval(ends)}".strip() for name, at, ends in rows),
    }  # fmt: skip


def verdict_parts(v: Verdict) -> dict[str, Any]:
    """A verdict as the templates want it."""
    small = []
    if v.n:
        against = v.details.get("control_name")
        text = [f"{v.readout}{f', {v.unit}' if v.unit and v.unit != v.readout else ''}", f"p = {number(v.p)}"]
        if against:
            text.append(f"control: {against}")
        if v.details.get("claims", 0) > 1:
            text.append(f"q = {number(v.details['q'])} among {v.details['claims']} claims")
        small.append("; ".join(text) + ".")
    why = v.details.get("why")
    if why:
        small.append(f"{str(why)[0].upper()}{str(why)[1:]}.")
    if v.word == "undecided" and v.n and not (v.needed_n and v.needed_n <= v.n):
        small.append(
            f"About {v.needed_n} {v.replicate}s would decide it." if v.needed_n else "No number would decide it."
        )
    return {
        "word": v.word, "scope": v.scope, "n": v.n, "replicate": v.replicate, "claim": v.claim, "small": small,
        "plot": plot_parts(v), "effect": number(v.effect), "interval": interval(v.interval), "beyond": number(v.beyond),
        "control": number(v.control), "evidence": v.details.get("evidence", ""),
        "intervention": v.details.get("intervention", ""),
    }  # fmt: skip


def run_rows(run: Run) -> list[tuple[str, str]]:
    """A run's settings as names and values."""
    s = run.settings
    rows = [
        ("model", f"{run.model_name} ({run.family})"),
        ("fingerprint", run.fingerprint),
        ("seed", str(s.seed)),
        ("steps", str(s.steps)),
        ("guidance", f"{s.guidance:g}{' (off)' if s.guidance == 1 else ''}"),
        ("scheduler", run.scheduler.partition(" ")[0]),
        ("size", f"{s.height} × {s.width} pixels (height × width)"),
        ("images", str(s.images)),
    ]
    if s.negative_prompt:
        rows.append(("negative prompt", s.negative_prompt))
    if "{" in run.scheduler:
        rows.append(("scheduler settings", run.scheduler.partition(" ")[2]))
    return [*rows, ("versions", ", ".join(f"{k} {v}" for k, v in run.versions.items()))]


def small(image: Any) -> bool:
    """Is a picture so small that it is shown with its pixels visible?"""
    return bool(max(image.shape[:2]) <= LOSSLESS // 2)


def _fragment(source: str, **values: Any) -> str:
    head = '<div class="whence" style="padding:12px"><style>{{ css }}</style>{% import "parts.jinja" as parts %}'
    template: Template = environment().from_string(head + source + "</div>")
    return template.render(css=style("parts.css"), **values)


_STRIP = """<p><strong>{{ title }}</strong> <span class="soft">{{ sub }}</span></p>
<div class="strip" style="margin:8px 0">{% for f in figures %}
<figure><img class="{{ f.css }}" src="{{ f.uri }}" alt="{{ f.alt }}" width="96">
<figcaption>{{ f.name }} <span class="soft">{{ f.value }}</span></figcaption></figure>{% endfor %}</div>
{% for note in notes %}<p class="soft">{{ note }}</p>{% endfor %}"""


def run_html(run: Run) -> str:
    """A run: its pictures and how they were made."""
    figures = [
        {"uri": picture_uri(im, THUMBNAIL), "alt": f"picture {i + 1} of {run.settings.prompt!r}", "name": f"{i + 1}",
         "value": "", "css": "pixel" if small(im) else ""}
        for i, im in enumerate(run.images)
    ]  # fmt: skip
    rest = "<details><summary>recipe</summary>{{ parts.settings(rows) }}</details>"
    s = run.settings
    sub = f"{run.model_name}, seed {s.seed}, {s.steps} steps, guidance {s.guidance:g}"
    return _fragment(_STRIP + rest, title=s.prompt, sub=sub, figures=figures, notes=(), rows=run_rows(run))


def explanation_html(explanation: Explanation) -> str:
    """An explanation: every unit's map on one common scale, over the picture where the run is known.

    Scores that are no maps are a table of totals.
    """
    e = explanation
    sub = f"{e.kind}: {MAP_KINDS.get(e.kind, e.readout)}"
    within = common_range(e.scores)
    notes = [f"all on one scale, {number(within[0])} to {number(within[1])}; cost {cost(e)}", *e.notes]
    if e.axes[1:] != ("y", "x"):
        rows = [(label, number(float(t))) for label, t in zip(e.units.labels, e.totals, strict=True)]
        source = _STRIP + "{{ parts.settings(rows) }}"
        return _fragment(source, title=e.method, sub=sub, figures=(), notes=notes, rows=rows)
    import numpy as np

    pictures = getattr(e.run, "images", None)
    image = (
        pictures[int(e.settings.get("image", 0))]
        if pictures is not None
        else np.full((*e.scores.shape[1:], 3), 255, np.uint8)
    )
    figures = [
        {"uri": picture_uri(overlay(image, m, within), THUMBNAIL), "alt": f"map of {label}", "name": label,
         "value": number(float(m.mean())), "css": "pixel" if small(image) else ""}
        for label, m in zip(e.units.labels, e.scores, strict=True)
    ]  # fmt: skip
    return _fragment(_STRIP, title=e.method, sub=sub, figures=figures, notes=notes)


def verdict_html(verdict: Verdict) -> str:
    """A verdict: claim, evidence, intervention, verdict."""
    v = verdict_parts(verdict)
    source = "{{ parts.lines(v.claim, v.evidence or 'not given', v.intervention or 'not given', [v], '') }}"
    return _fragment(source, v=v)


_ROWS = """<p><strong>{{ title }}</strong> <span class="soft">{{ sub }}</span></p>{{ parts.settings(rows) }}"""


def units_html(units: Units) -> str:
    """Units: what can be switched."""
    rows = [(str(i), label) for i, label in enumerate(units.labels)]
    return _fragment(_ROWS, title=f"{len(units)} units", sub=f"each a {units.kind}", rows=rows)


def readout_html(readout: Readout) -> str:
    """A readout: the number that is explained."""
    return _fragment(_ROWS, title=readout.name, sub=f"a readout, in: {readout.unit}", rows=[])


def score_html(score: Score) -> str:
    """A score: mean, interval and how many replicates; each of them as a dot on the axis of the interval."""
    seen = [x for x in (*score.interval, *score.values, 0.0, 1.0) if math.isfinite(x)]
    low, high = min(seen), max(seen)

    def place(x: float) -> float:
        return round(2 + 96 * (min(max(x, low), high) - low) / (high - low), 2)

    line = """<svg width="100%" height="22" style="max-width:32rem" role="img" aria-label="{{ sub }}">
<line x1="{{ ends[0] }}%" x2="{{ ends[1] }}%" y1="11" y2="11" stroke="currentColor" stroke-width="3"/>
{% for x in dots %}<circle cx="{{ x }}%" cy="11" r="3" fill="none" stroke="currentColor"/>{% endfor %}
<line x1="{{ mean }}%" x2="{{ mean }}%" y1="3" y2="19" stroke="currentColor" stroke-width="2"/></svg>
<p class="soft">{{ low }} to {{ high }}</p>"""
    sub = f"{number(score.mean)} {interval(score.interval)} {score.unit}, n={len(score.values)}, level {score.level:g}"
    rows = [(str(k), str(v)) for k, v in score.details.items()]
    return _fragment(
        _ROWS + line, title=score.name, sub=sub, rows=rows, ends=[place(x) for x in score.interval],
        dots=[place(x) for x in score.values], mean=place(score.mean), low=number(low), high=number(high),
    )  # fmt: skip


def card_html(card: Card) -> str:
    """A card: what a method claims, and how that is tried."""
    trial, planted = str(card.falsifier.get("trial") or "none"), str(card.falsifier.get("planted", ""))
    rows = [
        ("paper", card.paper), ("systems", ", ".join(card.systems) or "none"), ("units", ", ".join(card.units)),
        ("works on", ", ".join(card.works_on)), ("needs", ", ".join(card.needs)), ("costs", card.cost),
        ("claims", card.claim), ("is tried by", f"{trial}: {planted}" if planted else trial),
        ("departs from the paper", card.departs or "nowhere"), ("avoid", card.avoid),
    ]  # fmt: skip
    return _fragment(_ROWS, title=card.name, sub=card.question, rows=rows)


def cost(explanation: Explanation) -> str:
    """What an explanation cost, in words."""
    c = explanation.cost
    return f"{c.runs} model run{'s' if c.runs != 1 else ''}, {number(c.seconds)} s"
