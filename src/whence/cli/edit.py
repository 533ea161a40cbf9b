"""`whence edit` and `whence undo`: a change planned, tried, kept, and taken out again."""

from __future__ import annotations

import json as to_json
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..change import Change, Goal
from ..errors import MethodError, OutputError, RunError, nearest
from ..method import card_of, catalogue
from ..method import load as load_method

if TYPE_CHECKING:
    from ..report.edit_page import EditBundle

SHOWN = 4
"""Pictures, before and after, of a model whose pictures no oracle reads."""


@dataclass(frozen=True)
class Asked:
    """The options of the command as typed."""

    model: str
    change: str
    by: str = "diff_quickfix"
    out: Path = Path("whence-edit")
    site: str | None = None
    keep: str | None = None
    prompts: tuple[str, ...] = ()
    seeds: int = 12
    relearn: int = 6
    apply: Path | None = None
    dry: bool = False
    journal: Path | None = None


def planners() -> list[str]:
    """Methods that plan a Change."""
    return [
        n for n, c in catalogue().items() if c.module.startswith("whence.edits") and hasattr(load_method(n), "plan")
    ]


def edit(asked: Asked, json: bool) -> None:
    """Plan, foresee, try, keep. Raises MethodError, PromptError or ModelError for what cannot be done, RunError for too
    few seeds, OutputError for folders that cannot be written: all before any picture is made."""
    goal = Goal.of(asked.change)
    keep = tuple(k.strip() for k in (asked.keep or "").split(",") if k.strip())
    goal = replace(goal, prompts=asked.prompts, keep=keep)
    method = _method(asked)
    if (0 < asked.seeds < 8 and not asked.dry) or asked.seeds < 0 or asked.relearn < 0:
        raise RunError(
            f"--seeds {asked.seeds}, --relearn {asked.relearn}", "too few to tell", "--seeds 8 or more, or 0"
        )
    if asked.apply is not None and asked.apply.exists():
        raise OutputError(f"--apply {asked.apply}", "it is there already", "a new folder")
    if asked.journal is not None and not hasattr(method, "work"):
        raise MethodError(f"--journal with {asked.by}", "it is done in a second", "leave it out")
    from ..report.folder import check_folder
    from ..verbs import load

    check_folder(asked.out)
    model = load(asked.model)
    source = _folder(asked.model) if asked.apply is not None else None
    change = _planned(method, model, goal, asked)
    if asked.dry:
        print(to_json.dumps(change.record(), indent=2) if json else change)
        return
    from ..report.edit_page import write_edit

    bundle = _tried(model, change, asked)
    page = write_edit(bundle, asked.out)
    if source is not None and asked.apply is not None:
        from ..engine.weight_files import edited_copy

        edited_copy(source, asked.apply, change)
    if json:
        told = bundle.record() | {"report": str(page), "applied": str(asked.apply) if asked.apply else None}
        print(to_json.dumps(told, indent=2, ensure_ascii=False, allow_nan=False))
        return
    print(change)
    if bundle.verdict:
        print(bundle.verdict)
    for group, r in bundle.tried.get("rates", {}).items():
        low, high = (100 * x for x in r["interval"])
        moved = f"{100 * r['moved']:+.0f} points [{low:.0f}, {high:.0f}]"
        print(f"{group:<13}{r['before']:.0%} -> {r['after']:.0%}, {moved}, n={r['n']}")
    if bundle.tried.get("relearn"):
        curves = {k: v for k, v in bundle.tried["relearn"].items() if isinstance(v, list)}
        print("relearned    " + "; ".join(f"{k}: {v[-1]:.0%}" for k, v in curves.items()))
    print(f"page         {page}")


def _method(asked: Asked) -> Any:
    known = planners()
    if asked.by not in known:
        card_of(asked.by)
        raise MethodError(f"--by {asked.by}", "it plans no change of a model", nearest(asked.by, known))
    verb = load_method(asked.by)
    if asked.site is None:
        return verb()
    if "site" not in {f.name for f in fields(verb)}:
        raise MethodError(f"--site {asked.site}", f"{asked.by} edits the attention over text", "--by diff_quickfix")
    return verb(site=asked.site)


def _planned(method: Any, model: Any, goal: Goal, asked: Asked) -> Change:
    """The method's change. One that takes steps or pictures to find shows how far it is, and can be gone on with."""
    if not hasattr(method, "work"):
        planned: Change = method.plan(model, goal)
        return planned
    from ..engine.progress import progress

    with progress("finding the change", total=method.work, unit=method.pieces) as advance:
        planned = method.plan(model, goal, path=asked.journal, advance=advance)
    return planned


def _folder(model: str) -> Path:
    """The folder of a model that is copied."""
    if model in ("shapes", "emoji"):
        from ..worlds import emoji, shapes

        found: Path = (emoji if model == "emoji" else shapes).model_directory()
        return found
    if not Path(model).is_dir():
        raise OutputError(f"--apply with the model {model}", "it is no folder here", "the folder of a pipeline")
    return Path(model)


def _tried(model: Any, change: Change, asked: Asked) -> EditBundle:
    from ..engine.progress import progress
    from ..report.edit_page import EditBundle
    from ..worlds.shapes import debiasing, editing

    command = ("whence", *sys.argv[1:]) if len(sys.argv) > 1 else ()
    if asked.seeds and editing.ours(model):
        total = asked.seeds * (2 * len(editing.GROUPS) + 1) + 2 * asked.relearn
        several = len(change.goal.options) > 1
        total = asked.seeds * (3 * debiasing.FEW + 2) if several else total
        with progress("trying the change", total=total, unit="pictures") as advance:
            tried = (
                debiasing.try_shares(model, change, asked.seeds, advance=advance)
                if several
                else editing.try_change(model, change, asked.seeds, asked.relearn, advance=advance)
            )
        note = f"Pictures in {editing.STEPS} steps, guidance {editing.GUIDANCE:g}."
        return EditBundle(change, tried.record(), tried.images, tried.verdict, (note,), command)
    if not asked.seeds:
        return EditBundle(change, {}, (), None, ("Not tried: --seeds 0.",), command)
    from ..engine.rewording import pairs
    from ..worlds.shapes.editing import examples

    prompts = [p.old for p in pairs(model, change.goal, examples(model, change.goal.old))][:SHOWN]
    was = [model.picture(p, seed=i).images[0] for i, p in enumerate(prompts)]
    with change.on(model):
        now = [model.picture(p, seed=i).images[0] for i, p in enumerate(prompts)]
    images = [
        {"group": "target", "prompt": p, "seed": i, "before": a, "after": b}
        for i, (p, a, b) in enumerate(zip(prompts, was, now, strict=True))
    ]
    note = "No oracle reads this model's pictures: what came of it is for the eye."
    return EditBundle(change, {}, images, None, (note,), command)


def undo(change: Path, model: Path, json: bool) -> None:
    """Take a change out of a pipeline's folder, byte for byte. Raises ModelError, OutputError."""
    from ..engine.weight_files import LEDGER, write

    if not (model / "model_index.json").is_file():
        raise OutputError(f"undo in {model}", "no pipeline's folder", "the folder that `whence edit --apply` wrote")
    taken = Change.load(change)
    write(model, taken, "undo")
    if json:
        told = {"undone": taken.key, "goal": str(taken.goal), "model": str(model), "ledger": str(model / LEDGER)}
        print(to_json.dumps(told | {"matrices": sorted(taken.before)}, indent=2, ensure_ascii=False))
        return
    print(f"undone: {taken.goal} ({taken.key}) in {model}: {len(taken.before)} matrices have their own bits again")
