"""Every editing method on EditVal's types: was the edit made, and is the rest as it was, apart and with intervals.

    python -m benchmarks.edit_quality --json [--seeds 6] [--steps 15]

All methods edit the same first pictures of `shapes`; the exact judge of `metrics/editval.py` reads them. First pictures
that do not show their prompt have nothing to edit. Methods of weights and of words are asked only for edits that are
one phrase for another. Rows: the new prompt at the same seed and at another, prompt-to-prompt, Diff-QuickFix, UCE and
TIME (the old prompt on the changed model), and no edit at all. Intervals are t over pairs of one type.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

import whence
from benchmarks.recording import arguments, publish
from whence.engine.progress import progress
from whence.errors import WhenceError
from whence.method import load
from whence.metrics.editval import TYPES, editval
from whence.run import Run, Settings
from whence.score import Score
from whence.worlds.shapes.edits import EDITS, Edit, right_before

WEIGHTS = ("diff_quickfix", "uce", "time")
Editor = Callable[[Edit, Sequence[Settings]], "list[Run] | None"]


def editors(model: Any) -> dict[str, Editor]:
    """Name -> what makes the second pictures; None where the method cannot express the edit."""

    def again(edit: Edit, many: Sequence[Settings], shift: int) -> list[Run]:
        return list(model.generate_many([replace(s, prompt=edit.after, seed=s.seed + shift) for s in many]))

    def by_weights(name: str) -> Editor:
        def work(edit: Edit, many: Sequence[Settings]) -> list[Run] | None:
            if not edit.new:
                return None
            try:
                change = load(name)().plan(model, f"{edit.old} -> {edit.new}")
            except WhenceError as error:  # what it refuses it cannot express
                print(f"{name}, {edit.old} -> {edit.new}: {error.found}", file=sys.stderr)
                return None
            with change.on(model):
                return list(model.generate_many(many))

        return work

    found: dict[str, Editor] = {
        "the new prompt, same seed": lambda edit, many: again(edit, many, 0),
        "the new prompt, another seed": lambda edit, many: again(edit, many, 100_000),
        "prompt_to_prompt": lambda edit, many: load("prompt_to_prompt")().steer(model, many, [edit.after] * len(many)),
        **{name: by_weights(name) for name in WEIGHTS},
        "no edit": lambda edit, many: list(model.generate_many(many)),
    }
    return found


def main() -> None:
    """Run the benchmark."""
    parser = arguments(str(__doc__))
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=15)
    options = parser.parse_args()
    model = whence.load()
    tall, wide = model.default_size
    many = {
        edit: [Settings(edit.before, 3000 + s, options.steps, model.guidance, tall, wide) for s in range(options.seeds)]
        for edit in EDITS
    }
    before = {edit: model.generate_many(settings) for edit, settings in many.items()}
    rows: dict[str, Any] = {}
    made = editors(model)
    with progress("edits", total=len(made) * len(EDITS), unit="edits") as advance:
        for name, editor in made.items():
            pairs: list[tuple[Edit, np.ndarray, np.ndarray, bool]] = []
            for edit in EDITS:
                after = editor(edit, many[edit])
                for a, b in zip(before[edit], after or [], strict=bool(after)):
                    pairs.append((edit, a.images[0], b.images[0], right_before(edit, a.images[0])))
                advance(note=name)
            rows[name] = _row(pairs)
    result = {"steps": options.steps, "seeds": options.seeds, "types": dict(TYPES), "methods": rows}
    publish("edit_quality", result, options)


def _row(pairs: list[tuple[Edit, np.ndarray, np.ndarray, bool]]) -> dict[str, Any]:
    """Scores by type, and over all of them."""
    edits, first, second, there = zip(*pairs, strict=True)
    scores = editval(edits, first, second, there=there)
    success = [v for s in scores.values() for v in s.success.values]
    kept = [v for s in scores.values() if s.preserved for v in s.preserved.values]
    overall = {
        "success": Score.of("success", "share of pictures", success).record(),
        "preserved": Score.of("preserved", "share of the other traits", kept).record(),
    }
    return {"all its types": overall, **{kind: s.record() for kind, s in scores.items()}}


if __name__ == "__main__":
    main()
