"""The report page: one file, no network, readable without scripts.

Which word and which method are shown is a choice among radio buttons, so that keyboard, touch and hover work in plain
CSS; the one script adds the strength slider. Maps are grey pictures that an SVG filter colours, so a palette is a
choice too.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..explanation import MAP_KINDS
from .bundle import Bundle, Counterfactual, Trial, command_of, write_report
from .fragments import cost, environment, number, run_rows, small, style, verdict_parts
from .palettes import DEFAULT, PALETTES, anchors, filter_tables
from .pictures import THUMBNAIL, common_range, difference, map_uri, picture_uri

if TYPE_CHECKING:
    from ..explanation import Explanation

__all__ = ["Bundle", "Counterfactual", "Trial", "page_html", "write_report"]

LIMITS = {
    "probability": "A map of attention shows where the model looked for a word, not what the word caused. "
    "A word can be looked at and do nothing, or act through other tokens and show nothing.",
    "text-only softmax": "A text-only softmax lets the words compete with each other: where no word matters, some word "
    "still wins.",
    "output similarity": "Output similarity says which parts of the picture resemble a word inside the model, not what "
    "the word caused. Values of 0 and below are drawn alike.",
    "causal": "A map of change shows what replacing one word did at this seed. Words that act only together, or that "
    "stand in for each other, can each show nothing. Its trial replaces the word in the same pictures that the map was "
    "made of: what that tests is whether other words’ replacements change the same place as much.",
}


def prompt_pieces(bundle: Bundle) -> list[tuple[str, int | None]]:
    """The prompt cut into (text, number of the word or None), nothing lost: joined, the texts are the prompt again.

    Words are found in their order by their names; what an adapter names in another way is not marked.
    """
    prompt, end = bundle.run.settings.prompt, 0
    pieces: list[tuple[str, int | None]] = []
    for i, name in enumerate(bundle.run.words.names):
        at = prompt.lower().find(name.lower(), end)
        if at < 0:
            continue
        pieces += [(prompt[end:at], None)] if at > end else []
        pieces.append((prompt[at : at + len(name)], i))
        end = at + len(name)
    return pieces + ([(prompt[end:], None)] if end < len(prompt) else [])


def _method(e: Explanation, number_of: int) -> dict[str, Any]:
    bars = {"probability": "attention probability", "causal": "change of the pixel, 0 to 1"}
    return {
        "id": f"m{number_of}", "name": e.method, "kind": e.kind, "meaning": MAP_KINDS.get(e.kind, e.readout),
        "bar": bars.get(e.kind, e.kind), "scale": [number(x) for x in common_range(e.scores)],
        "cost": cost(e), "notes": e.notes,
        "limit": LIMITS.get(e.kind, ""), "settings": ", ".join(f"{k}={_short(v)}" for k, v in e.settings.items()),
        "is_map": e.axes[1:] == ("y", "x"),
    }  # fmt: skip


def _short(value: Any) -> str:
    return "/".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _word(bundle: Bundle, e: Explanation, label: str) -> dict[str, Any]:
    """All that one method says of one word."""
    verdicts = [verdict_parts(v) for v in bundle.verdicts(e.method, label)]
    quoted = f"“{label}”"
    said: dict[str, Any] = {
        "map": None, "verdicts": verdicts, "word": verdicts[0]["word"] if verdicts else "untried",
        "claim": verdicts[0]["claim"] if verdicts else f"the word {quoted} drew what its map shows",
        "evidence": "", "intervention": "", "mean": "",
        "missing": f"No word is known that could take its place. --swap {label}=A,B,C names some, and tries the claim.",
    }  # fmt: skip
    if label in e.units.labels:
        scores = e.map_of(label)
        mean, peak = float(scores.mean()), float(scores.max())
        said["evidence"] = (
            f"map by {e.method} ({e.kind}), mean {number(mean)}, peak {number(peak)} of {number(e.scale)} for the "
            f"strongest word; all maps cost {cost(e)}"
        )
        said["mean"] = number(mean)
        if e.axes[1:] == ("y", "x"):
            said["map"] = map_uri(scores, common_range(e.scores))
            said["alt"] = f"map of the word {label} by {e.method}: {e.kind}, peak {number(peak)}, mean {number(mean)}"
    else:
        said["evidence"] = f"{e.method} says nothing of this word"
        said["missing"] = "Without a map there is nothing to try."
    replaced = [c.replacement for c in bundle.counterfactuals if c.word == label]
    by = ", ".join(f"“{r}”" for r in replaced)
    said["intervention"] = f"at the same seed, {quoted} replaced by {by}" if by else "none"
    if verdicts:
        said["evidence"] = verdicts[0]["evidence"] or said["evidence"]
        said["intervention"] = verdicts[0]["intervention"] or said["intervention"]
    return said


def _changes(bundle: Bundle) -> tuple[dict[str, list[dict[str, Any]]], str]:
    """Per word the pictures with it replaced and their differences, all differences on one scale; and that scale."""
    before = bundle.picture
    changes = [(c, difference(before, c.image)) for c in bundle.counterfactuals]
    scale = max([float(d.max()) for _, d in changes] + [1e-6])
    found: dict[str, list[dict[str, Any]]] = {}
    for c, d in changes:
        found.setdefault(c.word, []).append(
            {"name": c.replacement, "prompt": c.prompt, "uri": picture_uri(c.image, THUMBNAIL),
             "map": map_uri(d, (0.0, scale)), "mean": number(float(d.mean()))}
        )  # fmt: skip
    return found, number(scale)


def page_html(bundle: Bundle) -> str:
    """The whole page as text."""
    run, labels = bundle.run, list(bundle.run.words.labels)
    methods = [_method(e, i) for i, e in enumerate(bundle.explanations)]
    changes, change_scale = _changes(bundle)
    words: list[dict[str, Any]] = []
    for i, label in enumerate(labels):
        said = [_word(bundle, e, label) for e in bundle.explanations]
        fates = ["not tried" if s["word"] == "untried" else s["word"] for s in said]
        spoken = ", ".join(f"{fate} by {m['name']}" for fate, m in zip(fates, methods, strict=True))
        words.append({"id": f"w{i}", "label": label, "said": said, "changes": changes.get(label, []), "spoken": spoken})
    counts = [
        [(word, n) for word in ("supported", "refuted", "undecided", "untried") if (n := tally.get(word))]
        for tally in (Counter(w["said"][k]["word"] for w in words) for k in range(len(methods)))
    ]
    height, width = bundle.picture.shape[:2]
    others = [(i, picture_uri(im, THUMBNAIL)) for i, im in enumerate(run.images) if i != bundle.image]
    palettes = [
        {"name": name, "tables": filter_tables(name), "id": f"c{i}",
         "bar": ", ".join(f"rgb({' '.join(f'{255 * v:.0f}' for v in c)})" for c in anchors(name))}
        for i, name in enumerate(PALETTES)
    ]  # fmt: skip
    scopes = list(dict.fromkeys(t.verdict.scope for t in bundle.trials))
    columns = [(k, scope) for k in range(len(methods)) for scope in scopes]
    table = [
        [next((v for v in w["said"][k]["verdicts"] if v["scope"] == scope), None) for k, scope in columns]
        for w in words
    ]
    values: dict[str, Any] = {
        "version": __version__, "prompt": run.settings.prompt, "run": run, "rows": run_rows(run), "methods": methods,
        "words": words, "pieces": prompt_pieces(bundle), "picture": picture_uri(bundle.picture), "others": others,
        "height": height, "width": width, "pixel": "pixel" if small(bundle.picture) else "", "palettes": palettes,
        "default_palette": DEFAULT, "counts": counts, "change_scale": change_scale, "chosen": _first_shown(words),
        "scopes": scopes, "table": table, "columns": columns, "picture_number": bundle.image + 1,
        "command": bundle.command or command_of(bundle), "files": bundle.files(),
        "css": style("parts.css") + style("page.css"), "js": style("page.js"),
    }  # fmt: skip
    return environment().get_template("page.jinja").render(values)


def _first_shown(words: list[dict[str, Any]]) -> str:
    """The word that the page opens with: the first supported one, else the first tried, else the first with a map."""
    ranks = {"supported": 0, "refuted": 1, "undecided": 2, "untried": 3}
    known = [w for w in words if w["said"]]
    return min(known, key=lambda w: ranks.get(w["said"][0]["word"], 3))["id"] if known else "none"
