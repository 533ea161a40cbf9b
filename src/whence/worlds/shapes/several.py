"""Several words from one picture of `shapes`: does each give its own thing's colour, and nothing else of the picture?

The method is told the things' nouns, which here are their shapes, as it is told the class of each thing where it was
published. So a shape tells nothing: what a word can have learned is a colour, and it is asked of the thing's own noun
and of a noun that the picture does not have.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np

from ...engine.randomness import seed_of, stream
from ...run import Settings
from ...score import Score
from ..measured import Measured
from .concepts import on_grid, overlap, scattered
from .oracle import read
from .scenes import COLOURS, SHAPES, Scene, draw_scene, render

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ...engine.progress import Advance

STEPS, GUIDANCE, BATCH = 8, 2.0, 16
EACH = 2
"""Pictures drawn of each prompt."""
FIRST = 100
"""Pictures from this number on: settings were chosen on smaller ones."""
TEACHING: Mapping[str, Any] = {"steps": 30, "batch": 4, "rate": 0.01}
UNMASKED: Mapping[str, Any] = {"sampling": "together", "align": 0.0}
"""Words of one caption that says both, trained together, with no attention loss (and no masks)."""
CHANCE = 1 / len(COLOURS)


def scene(i: int, kind: str = "two") -> Scene:
    """Two or three objects that all differ in colour and in shape."""
    for attempt in range(1000):
        found = draw_scene(stream("several", kind, i, attempt), kind, plain=True)
        if len({t.shape for t in found.things}) == len(found.things):
            return found
    raise AssertionError("no such scene")


def redrawn(model: Any, crafted: Any, drawn: Scene, key: object) -> float:
    """How often a word draws its noun, the thing's own or another, in its thing's colour and nothing in the others'.
    ``crafted`` None: the nouns alone."""
    shapes = [t.shape for t in drawn.things]
    new = next(s for s in SHAPES if s not in shapes)
    asked, prompts = [], []
    for i, thing in enumerate(drawn.things):
        for noun in (thing.shape, new):
            own = f"a {list(crafted.words.vectors)[i]} {noun}" if crafted else f"a {noun}"
            prompts += [own] * EACH
            asked += [(i, noun)] * EACH
    seeds = [seed_of("several", key, k) % 2**31 for k in range(len(prompts))]
    with crafted.words.on(model) if crafted else nullcontext():
        runs = model.generate_many(
            [Settings(p, s, STEPS, GUIDANCE, 64, 64) for p, s in zip(prompts, seeds, strict=True)], batch=BATCH
        )
    hits = []
    for (i, noun), run in zip(asked, runs, strict=True):
        seen = [(t.colour, t.shape) for t in read(run.images[0]).things]
        others = {t.colour for k, t in enumerate(drawn.things) if k != i}
        hits.append((drawn.things[i].colour, noun) in seen and not any(c in others for c, _ in seen))
    return float(np.mean(hits))


def crafted(verb: Any, replicates: int, model: Any = None, advance: Advance | None = None) -> Measured:
    """How often words give their own thing's colour to a noun and not the other thing's, picture by picture (half as
    many as ``replicates``, as each is learned on three times).

    Controls: the words learned on random clusters of the masks' sizes, and the nouns alone. In the details: the words
    of the same captions trained together without masks and attention loss, as long (``unmasked``).
    """
    if model is None:
        from ... import load

        model = load()
    arms: dict[str, list[float]] = {"learned": [], "random clusters": [], "the nouns alone": [], "unmasked": []}
    n = max(replicates // 2, 2)
    for i in range(FIRST, FIRST + n):
        drawn = scene(i)
        picture, _ = render(drawn)
        nouns = [t.shape for t in drawn.things]
        method = verb(**TEACHING, seed=i)
        masks = method.localise(model, picture, nouns)
        tried = {
            "learned": (method, masks), "random clusters": (method, scattered(masks, i)),
            "unmasked": (verb(**TEACHING, **UNMASKED, seed=i), np.ones_like(masks)),
        }  # fmt: skip
        for arm, (how, on) in tried.items():
            # A noun without a place of its own is a miss, for the random clusters too.
            found = how.fit(model, picture, nouns, on) if on.any((1, 2)).all() else None
            arms[arm].append(redrawn(model, found, drawn, i) if found else 0.0)
            if advance:
                advance(0, f"{drawn.caption}: {arm} {arms[arm][-1]:.2f}")
        arms["the nouns alone"].append(redrawn(model, None, drawn, i))
    unmasked = arms.pop("unmasked")
    more = np.array(arms["learned"]) - np.array(unmasked)
    details = {
        "unmasked": Score.of("unmasked", "share of pictures", unmasked).record(),
        "above_unmasked": Score.of("above unmasked", "share of pictures, paired", more.tolist()).record(),
    }
    return Measured(
        "own colour given, not the other's", "share of pictures", "picture", tuple(arms.pop("learned")),
        {name: tuple(values) for name, values in arms.items()}, CHANCE, details,
    )  # fmt: skip


def _overlaps(verb: Any, model: Any, each: int, kind: str) -> dict[str, list[float]]:
    """Mean overlap of an object with its noun's mask, with the next noun's, and with a random cluster of that size,
    picture by picture."""
    found: dict[str, list[float]] = {"own": [], "another noun's mask": [], "random clusters": []}
    for i in range(FIRST, FIRST + each):
        drawn = scene(i, kind)
        picture, truth = render(drawn)
        masks = verb().localise(model, picture, [t.shape for t in drawn.things])
        own = [on_grid(truth[f"thing{k}"], masks.shape[1]) for k in range(len(masks))]
        for arm, tried in zip(found, (masks, np.roll(masks, 1, 0), scattered(masks, i)), strict=True):
            found[arm].append(float(np.mean([overlap(m, o) for m, o in zip(tried, own, strict=True)])))
    return found


def located(verb: Any, replicates: int, model: Any = None, advance: Advance | None = None) -> Measured:
    """How well nouns' masks overlap their objects, on pictures of two; three in the details.

    Controls: the mask of another noun, and random clusters of equal sizes."""
    if model is None:
        from ... import load

        model = load()
    found = _overlaps(verb, model, replicates, "two")
    three = _overlaps(verb, model, replicates, "three")
    unit = "intersection over union"
    return Measured(
        "overlap of a noun's mask with its object", unit, "picture", tuple(found.pop("own")),
        {name: tuple(values) for name, values in found.items()}, 0.0,
        {"three": {name: Score.of(name, unit, values).record() for name, values in three.items()}},
    )  # fmt: skip
