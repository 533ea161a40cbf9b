"""Directions on `shapes`: which attributes of a picture a direction changes, read by the oracle, and the trial.

A direction is applied to pictures at the same seeds; what differs between the picture with it and the one without is
read attribute by attribute. Objects are the same where they stand within CLOSE pixels of each other, so that another
number of objects is no change of the colours of those that stayed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ...engine.randomness import seed_of, stream
from ...run import Settings
from ..measured import Measured
from . import oracle
from .scenes import draw_scene, render

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ...engine.progress import Advance
    from .oracle import Reading

ATTRIBUTES = ("background", "frame", "mark", "number", "place", "colour", "shape", "size")
CLOSE = 8.0
STEPS, PICTURES, STRENGTH, UNTIL, BATCH = 8, 32, 2.0, 0.8, 16
FIRST = 100
"""Pictures from this number on: settings were chosen, and an undecided trial held, on smaller ones."""
LEARNING = {"directions": 6, "steps": 30, "rate": 0.1}
MOST = 8.0
"""The strongest a random direction is applied to change as much as a learned one."""


def changed(before: Reading, after: Reading) -> frozenset[str]:
    """The ATTRIBUTES in which two pictures differ."""
    found = {name for name in ("background", "frame") if getattr(before, name) != getattr(after, name)}
    found |= {"mark"} if (before.mark is None) != (after.mark is None) else set()
    pairs, left = [], list(after.things)
    for thing in before.things:
        near = min(left, key=lambda o: np.hypot(o.y - thing.y, o.x - thing.x), default=None)
        if near is not None and np.hypot(near.y - thing.y, near.x - thing.x) <= CLOSE:
            left.remove(near)
            pairs.append((thing, near))
    found |= {"number"} if len(before.things) != len(after.things) else set()
    found |= {"place"} if len(pairs) < min(len(before.things), len(after.things)) else set()
    found |= {a for a in ("colour", "shape", "size") if any(getattr(x, a) != getattr(y, a) for x, y in pairs)}
    return frozenset(found)


def name_of(effects: Sequence[frozenset[str]]) -> str:
    """What to call a direction: the attribute that it changes alone most often; "" if it never changes just one."""
    alone = Counter(next(iter(e)) for e in effects if len(e) == 1)
    return min(alone, key=lambda a: (-alone[a], ATTRIBUTES.index(a))) if alone else ""


def one_at_a_time(effects: Sequence[Sequence[frozenset[str]]]) -> NDArray[np.float64]:
    """For each seed the share of directions that change the attribute they are named by, and no other.

    ``effects[direction][seed]``. For each seed a direction has the name that the other seeds give it, so that no
    picture has a say in what it is tried for.
    """
    hits = np.zeros((len(effects), len(effects[0])))
    for k, own in enumerate(effects):
        for s, effect in enumerate(own):
            name = name_of([e for i, e in enumerate(own) if i != s])
            hits[k, s] = bool(name) and effect == {name}
    return np.asarray(hits.mean(0))


def measure(verb: Any, replicates: int, model: Any = None, advance: Advance | None = None) -> Measured:
    """Do learned directions change one attribute at a time? One number per seed (see :func:`one_at_a_time`).

    Directions are learned from drawn scenes without their captions, then applied to pictures of one or two objects, a
    prompt for each seed. Controls, on the same seeds and prompts: random directions of the same norms, and the same
    ones as strong as they must be to change the prediction as much as the learned ones do (MOST times at most).
    """
    if model is None:
        from ...models.loading import load
        from . import model_directory

        model = load(model_directory())
    scenes = [draw_scene(stream("directions", i)) for i in range(PICTURES)]
    pictures = [render(s)[0] for s in scenes]
    learned = verb(**LEARNING).fit(model, pictures, advance=advance)
    random = learned.random("trial")
    kinds = ("one", "two")
    numbers = range(FIRST, FIRST + replicates)
    asked = [draw_scene(stream("directions", "asked", i), kinds[i % 2], plain=True).caption for i in numbers]
    seeds = [seed_of("directions", i) % 2**31 for i in numbers]
    many = [Settings(p, seed, STEPS, 2.0, 64, 64) for p, seed in zip(asked, seeds, strict=True)]
    before = [oracle.read(r.images[0]) for r in model.generate_many(many, batch=BATCH)]

    def effects(directions: Any, strengths: Sequence[float]) -> list[list[frozenset[str]]]:
        jobs = [(s, {k: lam}) for k, lam in enumerate(strengths) for s in many]
        runs = directions.apply([s for s, _ in jobs], [d for _, d in jobs], BATCH, UNTIL)
        if advance:
            advance(len(jobs), "pictures with directions")
        seen = [oracle.read(r.images[0]) for r in runs]
        return [
            [changed(b, a) for b, a in zip(before, seen[k * len(many) : (k + 1) * len(many)], strict=True)]
            for k in range(len(strengths))
        ]

    k = len(learned.d)
    ratio = np.minimum(np.asarray(learned.reach(pictures[:8])) / np.asarray(random.reach(pictures[:8])), MOST)
    arms = {
        "learned": effects(learned, [STRENGTH] * k),
        "random directions of equal norm": effects(random, [STRENGTH] * k),
        "random directions of equal change": effects(random, (STRENGTH * ratio).tolist()),
    }
    values = {name: one_at_a_time(arm) for name, arm in arms.items()}
    names = [name_of(e) for e in arms["learned"]]
    return Measured(
        "one attribute at a time", "share of directions that change the attribute of their name alone", "seed",
        tuple(values.pop("learned").tolist()), {n: tuple(v.tolist()) for n, v in values.items()},
        details={
            "names": names,
            "changes": {n: [dict(Counter(a for e in own for a in e)) for own in arm] for n, arm in arms.items()},
            "seeds": [list(map(sorted, own)) for own in arms["learned"]],
            "strengths_of_equal_change": (STRENGTH * ratio).tolist(), "loss": [learned.losses[0], learned.losses[-1]],
            "combined": _combined(learned, names, many, before),
        },
    )  # fmt: skip


def _combined(learned: Any, names: Sequence[str], many: Sequence[Settings], before: Sequence[Reading]) -> Any:
    """Two directions of different names at once: in how many pictures both attributes, and no other, change."""
    first = next((i for i, n in enumerate(names) if n), None)
    second = next((j for j, n in enumerate(names) if first is not None and n and n != names[first]), None)
    if first is None or second is None:
        return None
    runs = learned.apply(many, [{first: STRENGTH, second: STRENGTH}] * len(many), BATCH, UNTIL)
    found = [changed(b, oracle.read(r.images[0])) for b, r in zip(before, runs, strict=True)]
    both = {names[first], names[second]}
    return {
        "names": sorted(both), "n": len(many), "both": sum(both <= f for f in found),
        "both_alone": sum(both == f for f in found),
    }  # fmt: skip
