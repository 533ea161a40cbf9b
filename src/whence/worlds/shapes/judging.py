"""Edits whose truth is drawn: the trial of judges of edits. No model is asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...engine.randomness import stream
from ..measured import Measured
from .edits import Edit
from .scenes import BACKGROUNDS, COLOURS, SHAPES, SIZES, Scene, Thing, draw_scene, render

if TYPE_CHECKING:
    from ...engine.progress import Advance

KINDS = ("color", "shape", "size", "background", "object_addition", "object_replacement")


@dataclass(frozen=True)
class Case:
    """One edit and a second picture, with the truth: whether the edit was made, and whether anything else changed."""

    edit: Edit
    before: NDArray[np.uint8]
    after: NDArray[np.uint8]
    made: bool
    clean: bool


def cases(seed: int) -> list[Case]:
    """For each kind: the edit alone, nothing at all, the edit and a slip, a slip alone."""
    rng = stream("judging", seed)
    found = []
    for kind in KINDS:
        scene = draw_scene(rng, "two", plain=True)
        things = tuple(replace(t, said_size=True) for t in scene.things)
        scene = replace(scene, things=things, background="sand" if kind == "background" else "")
        target = _edited(scene, kind, rng)
        edit = Edit(kind, scene.caption, target.caption)
        for made, clean in ((True, True), (False, True), (True, False), (False, False)):
            after = target if made else scene
            after = after if clean else _slip(after, rng)
            found.append(Case(edit, render(scene)[0], render(after)[0], made, clean))
    return found


def measure(verb: Callable[..., Any], replicates: int, model: Any = None, advance: Advance | None = None) -> Measured:
    """Scene by scene: the share of cases in which both were told, whether the edit was made and whether the rest
    stayed. The controls judge by the mean change of the pixels, at the best two thresholds in hindsight, and by dice.
    """
    own, distances, truths = [], [], []
    for seed in range(replicates):
        right = []
        for case in cases(seed):
            scores = verb([case.edit], [case.before], [case.after])[case.edit.kind]
            made, clean = scores.success.mean == 1, scores.preserved.mean == 1
            right.append((made, clean) == (case.made, case.clean))
            distances.append(float(np.abs(case.before.astype(float) - case.after).mean()))
            truths.append((case.made, case.clean))
        own.append(float(np.mean(right)))
        if advance:
            advance(0, f"scene {seed}")
    each = len(distances) // replicates
    hindsight = _by_distance(np.array(distances), np.array(truths)).reshape(replicates, each).mean(1)
    dice = stream("judging", "dice").integers(0, 2, (replicates, each, 2)).astype(bool)
    thrown = (dice == np.array(truths).reshape(replicates, each, 2)).all(-1).mean(1)
    return Measured(
        "both were told", "share of cases", "scene", tuple(own),
        {"the distance of the pictures": tuple(hindsight), "dice": tuple(thrown)}, chance=0.25,
        details={"kinds": list(KINDS)},
    )  # fmt: skip


def _by_distance(distance: NDArray[np.float64], truth: NDArray[np.bool_]) -> NDArray[np.float64]:
    """What thresholds on the distance can tell at best: far means made, near means clean."""
    lines = np.quantile(distance, np.linspace(0, 1, 41))
    tried = [((distance > a) == truth[:, 0]) & ((distance < b) == truth[:, 1]) for a in lines for b in lines]
    best: NDArray[np.float64] = max(tried, key=np.mean).astype(float)
    return best


def _edited(scene: Scene, kind: str, rng: np.random.Generator) -> Scene:
    first = scene.things[0]
    free_colours = [c for c in COLOURS if c not in {t.colour for t in scene.things}]
    if kind == "background":
        return replace(scene, background=str(rng.choice([b for b in BACKGROUNDS if b not in ("", "sand")])))
    if kind == "object_addition":
        return replace(scene, kind="three", things=(*scene.things, _another(scene, free_colours[0], rng)))
    changed = {
        "color": lambda: replace(first, colour=free_colours[0]),
        "shape": lambda: replace(first, shape=str(rng.choice([s for s in SHAPES if s != first.shape]))),
        "size": lambda: replace(first, size=next(s for s in SIZES if s != first.size)),
        "object_replacement": lambda: replace(
            first, colour=free_colours[0], shape=str(rng.choice([s for s in SHAPES if s != first.shape]))
        ),
    }[kind]()
    return replace(scene, things=(changed, *scene.things[1:]))


def _another(scene: Scene, colour: str, rng: np.random.Generator) -> Thing:
    taken = {(t.row, t.column) for t in scene.things}
    row, column = next(c for c in (divmod(int(i), 3) for i in rng.permutation(9)) if c not in taken)
    return Thing(colour, str(rng.choice(SHAPES)), "large", row, column, True)


def _slip(scene: Scene, rng: np.random.Generator) -> Scene:
    """Something that nobody asked for: the second thing in another colour, another place, another shape, or gone."""
    second = scene.things[1]
    taken = {(t.row, t.column) for t in scene.things}
    row, column = next(c for c in (divmod(int(i), 3) for i in rng.permutation(9)) if c not in taken)
    colours = [c for c in COLOURS if c not in {t.colour for t in scene.things}]
    what = int(rng.integers(4))
    new = (
        replace(second, colour=str(rng.choice(colours))),
        replace(second, row=row, column=column),
        replace(second, shape=str(rng.choice([s for s in SHAPES if s != second.shape]))),
    )
    things = (scene.things[0], *([new[what]] if what < 3 else []), *scene.things[2:])
    return replace(scene, things=things)
