"""What does an explanation cost? Score against forwards for methods that ask the model, between floor and ceiling.

On draws of the world `twins`: each method with rising numbers of samples; mean over draws of AUC and of the correlation
of foretold with real effects, with 95 % t intervals (the draw is the replicate), beside random scores (the floor) and
brute force over all units and pairs (the ceiling).

    python -m benchmarks.score_against_budget --json [--draws 20]
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.recording import arguments, publish
from whence.engine.progress import progress
from whence.method import load
from whence.proving import FULL_DRAWS, Ground
from whence.question import Budget
from whence.score import Score
from whence.worlds import trial

LADDER = {
    "leave_one_out": ("draws", (1, 2, 4, 8, 16)),
    "shapley_sampling": ("orders", (1, 3, 10, 40)),
    "kernel_shap": ("samples", (40, 80, 220, 440)),
    "lime": ("samples", (40, 80, 230, 440)),
}
STRUCTURES = ("single", "and", "or", "xor")


def rungs() -> Iterator[tuple[str, dict[str, int], Any]]:
    """(method, settings, explainer) from cheap to dear, with floor and ceiling."""
    yield "random (floor)", {}, trial.random_scores
    for name, (setting, values) in LADDER.items():
        for value in values:
            yield name, {setting: value}, load(name)(**{setting: value}).explain
    yield "brute force (ceiling)", {}, trial.brute_force


def main() -> None:
    """Run the benchmark."""
    parser = arguments(str(__doc__))
    parser.add_argument("--draws", type=int, default=FULL_DRAWS, help="draws of the world")
    options = parser.parse_args()
    _, drawn = Ground(options.draws)["twins"]
    draws = [replace(d, planted=tuple(replace(p, nulls=()) for p in d.planted)) for d in drawn]
    rows = []
    ladder = list(rungs())
    with progress("trials", total=len(ladder), unit="settings") as advance:
        for name, settings, explain in ladder:
            found = [trial.try_draw(explain, d, STRUCTURES, Budget(forwards=50_000)) for d in draws]
            row: dict[str, Any] = {"method": name, "settings": settings}
            row["forwards"] = round(float(np.mean([t.spent.forwards for f in found for t in f.tried])))
            for metric in ("auc", "effects"):
                score = Score.of(metric, "", [f.mean(metric, STRUCTURES) for f in found])
                row[metric] = {"mean": round(score.mean, 4), "interval": [round(x, 4) for x in score.interval]}
            rows.append(row)
            advance(1, name)
    ceiling, floor = rows[-1], rows[0]
    for row in rows:
        span = ceiling["effects"]["mean"] - floor["effects"]["mean"]
        row["ratio to the ceiling"] = round((row["effects"]["mean"] - floor["effects"]["mean"]) / span, 3)
    result = {"world": "twins", "structures": STRUCTURES, "draws": options.draws, "rows": rows}
    if options.json or options.write:
        publish("score_against_budget", result, options)
        return
    for r in rows:
        print(f"{r['method']:22} {r['settings']!s:22} {r['forwards']:6} forwards  AUC {r['auc']['mean']:.3f}  "
              f"effects {r['effects']['mean']:.3f}")  # fmt: skip


if __name__ == "__main__":
    main()
