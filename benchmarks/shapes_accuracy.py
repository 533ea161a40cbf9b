"""Does the embedded model draw what the prompt says? The oracle's answer per prompt kind, with exact intervals.

Fresh prompts of the world, one seed each, at the model's own steps and guidance; 95 % Clopper-Pearson intervals. "aim"
is what the project wants of the model. ``--write`` also writes the table of the model card.

    python -m benchmarks.shapes_accuracy --json [--pictures 100] [--model DIRECTORY]
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from scipy import stats

import whence
from benchmarks.recording import arguments, publish
from whence.engine.progress import progress
from whence.engine.randomness import stream
from whence.worlds.shapes import oracle, trials
from whence.worlds.shapes.scenes import PAIRS, TWINS, draw_scene

CARD = Path(__file__).parent.parent / "docs" / "model-card-shapes.md"
ROWS = (
    ("one object: colour and shape", "one", ("objects",), 0.95),
    ("one object: colour alone", "one", ("colours",), None),
    ("one object: named size", "one", ("sizes",), None),
    ("two objects: both right", "two", ("objects",), 0.80),
    ("two objects: both colours", "two", ("colours",), None),
    ("relation holds (by colour)", "relation", ("relation",), 0.80),
    ("relation holds and both objects right", "relation", ("relation", "objects"), None),
    ("count: number right", "count", ("number",), 0.70),
    ("count: number, colour and shapes right", "count", ("objects",), None),
    ("three objects: all right", "three", ("objects",), None),
    ("background", None, ("background",), None),
    ("mark there exactly when called for (prompts with a twin)", "twins", ("mark",), None),
    ("frame there exactly when called for (prompts with a pair word)", "pairs", ("frame",), None),
)


def share(values: list[bool]) -> dict:
    """Share with its 95 % Clopper-Pearson interval."""
    k, n = sum(values), len(values)
    low = float(stats.beta.ppf(0.025, k, n - k + 1)) if k else 0.0
    high = float(stats.beta.ppf(0.975, k + 1, n - k)) if k < n else 1.0
    return {"share": k / n, "interval": [low, high], "n": n}


def main() -> None:
    """Run the benchmark."""
    parser = arguments(str(__doc__))
    parser.add_argument("--pictures", type=int, default=100, help="pictures per kind of prompt")
    parser.add_argument("--model", help="the pipeline of another training (default: the embedded model)")
    options = parser.parse_args()
    if options.model and options.write:
        parser.error("--write keeps the embedded model's numbers: leave out --model")
    model = whence.load(options.model) if options.model else whence.load()
    judged: dict[str, list] = {}
    kinds = ("one", "two", "relation", "count", "three")
    with progress("pictures", total=options.pictures * len(kinds), unit="pictures") as advance:
        for kind in kinds:
            scenes = [draw_scene(stream("accuracy", kind, i), kind) for i in range(options.pictures)]
            runs = trials.pictures(model, [s.caption for s in scenes], f"accuracy {kind}")
            for scene, run in zip(scenes, runs, strict=True):
                verdict = oracle.judge(oracle.parse(scene.caption), oracle.read(run.images[0]))
                groups = [kind, *(["twins"] if set(TWINS) & set(scene.fillers) else [])]
                groups += ["pairs"] if set(PAIRS[0] + PAIRS[1]) & set(scene.fillers) else []
                for group in groups:
                    judged.setdefault(group, []).append(verdict)
                advance()
    everything = [v for kind in kinds for v in judged[kind]]
    rows = {}
    for name, group, parts, aim in ROWS:
        values = [all(v[p] for p in parts) for v in (judged[group] if group else everything)]
        rows[name] = share(values) | ({"aim": aim} if aim else {})
    result = {"steps": trials.STEPS, "guidance": trials.GUIDANCE, "fingerprint": model.fingerprint, "rows": rows}
    if options.write:
        lines = ["| prompts | right | 95 % interval | n | aim |", "|---|---|---|---|---|"]
        for name, r in rows.items():
            aim = f"{r['aim']:.0%}" if "aim" in r else ""
            low, high = (f"{100 * v:.0f}" for v in r["interval"])
            lines.append(f"| {name} | {r['share']:.0%} | {low} to {high} % | {r['n']} | {aim} |")
        text = CARD.read_text(encoding="utf8")
        table = "<!-- accuracy -->\n" + "\n".join(lines) + "\n<!-- /accuracy -->"
        CARD.write_text(re.sub(r"<!-- accuracy -->.*<!-- /accuracy -->", lambda _: table, text, flags=re.S))
    publish("shapes_accuracy", result, options)


if __name__ == "__main__":
    np.seterr(all="raise", under="ignore")
    main()
