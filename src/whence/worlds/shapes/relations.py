"""A learned relation on `shapes`: do new things stand as the pictures' things did? Read by the oracle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ...engine.randomness import seed_of, stream
from ...run import Settings
from ...score import Score
from ..measured import Measured
from .oracle import holds, read
from .scenes import COLOURS, RELATIONS, SHAPES, Scene, Thing, draw_scene, render

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ...engine.progress import Advance
    from ...run import Run

WORD, INITIAL = "sks1", "and"
PICTURES, ASKED = 10, 8
"""Pictures that a relation is learned from, and pictures drawn with its word."""
STEPS, GUIDANCE, BATCH = 8, 2.0, 16
FIRST = 100
"""Draws from this number on: settings were chosen on smaller ones."""
TEACHING: Mapping[str, Any] = {"steps": 40, "batch": 4, "rate": 0.03, "span": (0.5, 1.0)}
PLAIN: Mapping[str, Any] = {"steer": 0.0, "alpha": 0.0}
"""A word of the denoising loss alone, its timesteps uniform."""
ALONE = "denoising loss alone"
CHANCE = 1 / len(RELATIONS)


def colours(i: int) -> tuple[list[str], list[str]]:
    """The colours of draw ``i``'s pictures, and those of the things that its word is tried on."""
    order = [str(c) for c in stream("relation colours", i).permutation(list(COLOURS))]
    return order[:3], order[3:]


def exemplars(relation: str, i: int) -> tuple[list[NDArray[np.uint8]], list[str]]:
    """PICTURES of different things in one relation, and captions that name them with "{}" for the relation."""
    allowed, scenes = colours(i)[0], list[Scene]()
    rng = stream("exemplars", relation, i)
    while len(scenes) < PICTURES:
        scene = draw_scene(rng, "relation", plain=True)
        if scene.relation == relation and all(t.colour in allowed for t in scene.things):
            scenes.append(replace(scene, things=tuple(replace(t, said_size=False) for t in scene.things)))
    pictures = [render(s)[0] for s in scenes]
    return pictures, [s.caption.replace(relation, "{}") for s in scenes]


def new_things(i: int) -> list[tuple[Thing, Thing]]:
    """ASKED pairs of things of colours that the exemplars do not have."""
    rng, allowed = stream("new things", i), colours(i)[1]
    pairs = []
    for _ in range(ASKED):
        own, shapes = rng.permutation(allowed), rng.choice(SHAPES, 2)
        one, other = (Thing(str(c), str(s), "", 0, 0, False) for c, s in zip(own[:2], shapes, strict=True))
        pairs.append((one, other))
    return pairs


def draw(model: Any, words: Any, word: str, i: int) -> tuple[list[Run], list[tuple[Thing, Thing]]]:
    """Pictures of new pairs of things with a word between them, the same seeds for each word."""
    pairs = new_things(i)
    prompts = [f"{a.noun_phrase} {word} {b.noun_phrase}" for a, b in pairs]
    asked = [Settings(p, seed_of("relations", i, k) % 2**31, STEPS, GUIDANCE, 64, 64) for k, p in enumerate(prompts)]
    with words.on(model) if words else nullcontext():
        return model.generate_many(asked, batch=BATCH), pairs


def counted(runs: Sequence[Run], pairs: Sequence[tuple[Thing, Thing]], relation: str, i: int) -> tuple[float, ...]:
    """Shares of pictures: both things there and in the relation; both there; a colour of the exemplars there."""
    held, there, leaked = [], [], []
    for run, (a, b) in zip(runs, pairs, strict=True):
        seen = read(run.images[0]).things
        first, second = ([t for t in seen if (t.colour, t.shape) == (x.colour, x.shape)] for x in (a, b))
        there.append(bool(first and second))
        held.append(there[-1] and holds(relation, first[0], second[0]))
        leaked.append(any(t.colour in colours(i)[0] for t in seen))
    return float(np.mean(held)), float(np.mean(there)), float(np.mean(leaked))


def inverted(verb: Any, replicates: int, model: Any = None, advance: Advance | None = None) -> Measured:
    """Share of pictures of new things that stand in the relation which the word was learned from, draw by draw (half as
    many as ``replicates``, as each is learned on twice).

    The relation's own words are not among the prepositions that steer. Controls, on the same prompts and seeds: the
    word that the learned one began with, a random vector of equal norm, and the word learned from the next draw's
    relation. In the details: the word of the denoising loss alone (``PLAIN``), how often both things were
    there, and how often colours of the exemplars were.
    """
    if model is None:
        from ... import load

        model = load()
    n = max(replicates // 2, 2)
    relations = [RELATIONS[i % len(RELATIONS)] for i in range(n)]
    learned: dict[str, list[Any]] = {}
    for i, relation in enumerate(relations):
        kinds: dict[str, Mapping[str, Any]] = {"learned": {"without": tuple(relation.split())}, ALONE: PLAIN}
        for arm, extra in kinds.items():
            settings = {**TEACHING, **extra, "word": WORD, "initial": INITIAL, "seed": FIRST + i}
            learned.setdefault(arm, []).append(verb(**settings).fit(model, *exemplars(relation, FIRST + i)))
            if advance:
                advance(0, f"{relation}, {arm}: loss {learned[arm][-1].losses[-1]:.3f}")
    found: dict[str, list[tuple[float, ...]]] = {}
    for i, relation in enumerate(relations):
        arms: dict[str, Any] = {arm: words[i] for arm, words in learned.items()}
        arms["the initial word"] = None
        arms["a random vector"] = learned["learned"][i].random(i)
        arms["learned from another relation"] = learned["learned"][(i + 1) % n]
        for arm, words in arms.items():
            runs, pairs = draw(model, words, WORD if words else INITIAL, FIRST + i)
            found.setdefault(arm, []).append(counted(runs, pairs, relation, FIRST + i))
        if advance:
            advance(0, f"{relation}: {found['learned'][-1][0]:.2f}")
    held = {arm: np.array([f[0] for f in rows]) for arm, rows in found.items()}
    names = ("the initial word", "a random vector", "learned from another relation")
    unit = "share of pictures, paired by draw"
    details: dict[str, Any] = {
        "relations": relations,
        "arms": {
            arm: dict(zip(("held", "both_there", "leaked"), np.mean(rows, 0).round(3).tolist(), strict=True))
            for arm, rows in found.items()
        },
        "above_denoising_loss_alone": Score.of(f"above {ALONE}", unit, held["learned"] - held[ALONE]).record(),
    }
    return Measured(
        "new things stand in the relation", f"share of {ASKED} pictures", "draw", tuple(held["learned"].tolist()),
        {name: tuple(held[name].tolist()) for name in names}, CHANCE, details,
    )  # fmt: skip
