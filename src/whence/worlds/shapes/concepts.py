"""Learned words on `shapes`: does a word redraw what it was learned from, and nothing else? Read by the oracle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ...engine.randomness import seed_of, stream
from ...run import Settings
from ..measured import Measured
from .oracle import read
from .scenes import COLOURS, SHAPES, SIZE, Scene, Thing, draw_scene, render

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ...engine.progress import Advance

INITIAL = "square"
"""The word that a learned one begins with; nothing that is learned has this shape."""
WORD = "sks1"
OTHERS = tuple(s for s in SHAPES if s != INITIAL)
STEPS, GUIDANCE, BATCH = 8, 2.0, 16
TEACHING: Mapping[str, Any] = {"steps": 50, "batch": 4, "rate": 0.01}
PICTURES = 4
FIRST = 100
"""Things and pictures from this number on: settings were chosen on smaller ones."""
CONTEXTS = ("a {} on sand", "a {} left of a {} square")
CHANCE = 1 / (len(COLOURS) * len(SHAPES))
"""Of the right colour and shape where both are guessed."""


def one_thing(colour: str, shape: str, key: object, background: str = "") -> list[NDArray[np.uint8]]:
    """PICTURES of one thing, in cells and sizes drawn for ``key``, on one ground."""
    rng = stream("one thing", colour, shape, key)
    cells = [divmod(int(c), 3) for c in rng.choice(9, PICTURES, replace=False)]
    things = [Thing(colour, shape, ("small", "large")[rng.integers(2)], r, c, False) for r, c in cells]
    return [render(Scene("one", (t,), "", background, (), True, None, False, (0, 0)))[0] for t in things]


def draws(colour: str, shape: str, image: NDArray[np.uint8]) -> bool:
    """Whether there is a thing of this colour and shape."""
    return any((t.colour, t.shape) == (colour, shape) for t in read(image).things)


def _embedded(model: Any) -> Any:
    if model is not None:
        return model
    from ... import load

    return load()


def _asked(prompts: Sequence[str], key: object) -> list[Settings]:
    return [Settings(p, seed_of("concepts", key, i) % 2**31, STEPS, GUIDANCE, 64, 64) for i, p in enumerate(prompts)]


def inverted(verb: Any, replicates: int, model: Any = None, advance: Advance | None = None) -> Measured:
    """Share of new contexts in which the word draws its thing, colour and shape at once, thing by thing.

    Controls, on the same prompts and seeds: a random vector of equal norm, the word that the learned one began with,
    and the word learned from the pictures of the next thing.
    """
    model = _embedded(model)
    colours = [stream("inverted", FIRST + i).choice(list(COLOURS)) for i in range(replicates)]
    things = [(str(c), OTHERS[i % len(OTHERS)]) for i, c in enumerate(colours)]
    learned = []
    for i, (colour, shape) in enumerate(things):
        settings = {**TEACHING, "word": WORD, "initial": INITIAL, "seed": FIRST + i}
        learned.append(verb(**settings).fit(model, one_thing(colour, shape, FIRST + i)))
        if advance:
            advance(0, f"{colour} {shape}: loss {learned[-1].losses[-1]:.3f}")
    arms: dict[str, list[float]] = {}

    def draw(arm: str, i: int, word: str, words: Any) -> None:
        colour, shape = things[i]
        beside = next(c for c in COLOURS if c not in (colour, things[(i + 1) % replicates][0]))
        prompts = [c.format(word, beside) for c in CONTEXTS]
        if words is None:
            runs = model.generate_many(_asked(prompts, i), batch=BATCH)
        else:
            with words.on(model):
                runs = model.generate_many(_asked(prompts, i), batch=BATCH)
        arms.setdefault(arm, []).append(float(np.mean([draws(colour, shape, r.images[0]) for r in runs])))

    for i in range(replicates):
        other = next((k for k in range(i + 1, i + replicates) if things[k % replicates] != things[i]), i + 1)
        draw("learned", i, WORD, learned[i])
        draw("a random vector", i, WORD, learned[i].random(i))
        draw("the initial word", i, INITIAL, None)
        draw("learned from other pictures", i, WORD, learned[other % replicates])
        if advance:
            advance(0, f"{things[i]}: {arms['learned'][-1]:.2f}")
    return Measured(
        "the learned thing is drawn", f"share of {len(CONTEXTS)} contexts", "thing", tuple(arms.pop("learned")),
        {name: tuple(values) for name, values in arms.items()}, CHANCE, {"things": [" ".join(t) for t in things]},
    )  # fmt: skip


# --- the concepts of one picture -------------------------------------------------------------------------------------

EXTRACTING: Mapping[str, Any] = {"split_steps": 10, "steps": 40, "batch": 4, "rate": 0.012}
WHOLE: Mapping[str, Any] = {"split_steps": 0, "steps": 40, "batch": 4, "rate": 0.012}
DRAWN = 3
"""Pictures drawn with each word."""


def on_grid(mask: NDArray[np.bool_], places: int) -> NDArray[np.bool_]:
    """A mask of pixels on a grid of ``places`` x ``places``: where it holds half of a place or more."""
    side = SIZE // places
    return np.asarray(mask.reshape(places, side, places, side).mean((1, 3)) >= 0.5)


def overlap(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    """Intersection over union."""
    return float((one & other).sum() / max((one | other).sum(), 1))


def scattered(masks: NDArray[np.bool_], key: object) -> NDArray[np.bool_]:
    """Random clusters of the sizes of these masks, [concept, y, x], each in one piece and none on another."""
    rng, taken, out = stream("scattered", key), np.zeros(masks.shape[1:], bool), []
    for mask in masks:
        size, best = int(mask.sum()), np.zeros_like(mask)
        for _ in range(20):
            y, x = rng.integers(mask.shape[0]), rng.integers(mask.shape[1])
            far = np.hypot(*(np.indices(mask.shape) - np.array([y, x])[:, None, None])) + 99 * taken
            best = np.zeros_like(mask)
            best.flat[np.argsort(far, axis=None, kind="stable")[:size]] = True
            if not (best & taken).any():
                break
        taken |= best
        out.append(best)
    return np.stack(out)


def _two(i: int) -> Scene:
    """Two objects that differ in colour and in shape, neither of them of the initial word's shape."""
    for attempt in range(1000):
        scene = draw_scene(stream("extracted", i, attempt), "two", plain=True)
        shapes = [t.shape for t in scene.things]
        if shapes[0] != shapes[1] and INITIAL not in shapes:
            return scene
    raise AssertionError("no such scene")


def redrawn(model: Any, words: Any, masks: NDArray[np.bool_], scene: Scene, key: object) -> list[float]:
    """For each object, how often the word whose mask is most its own draws it, and not the other one. ``words`` with
    fewer masks than objects can have one word for both."""
    _, truth = render(scene)
    names = list(words.vectors)
    with words.on(model):
        runs = model.generate_many([s for w in names for s in _asked([f"a {w}"] * DRAWN, key)], batch=BATCH)
    out = []
    for i, thing in enumerate(scene.things):
        ious = [overlap(m, on_grid(truth[f"thing{i}"], m.shape[0])) for m in masks]
        own = int(np.argmax(ious)) if max(ious) > 0 else i % len(names)
        others = [t for k, t in enumerate(scene.things) if k != i]
        pictures = [r.images[0] for r in runs[own * DRAWN : (own + 1) * DRAWN]]
        hits = [
            draws(thing.colour, thing.shape, p) and not any(draws(o.colour, o.shape, p) for o in others)
            for p in pictures
        ]
        out.append(float(np.mean(hits)))
    return out


def extracted(verb: Any, replicates: int, model: Any = None, advance: Advance | None = None) -> Measured:
    """How often the words of a picture's concepts redraw their own object and not the other, picture by picture (half
    as many as ``replicates``, as each is learned on three times).

    Controls: words learned on random clusters of the same sizes, and one word for the whole picture. In the details:
    how often the number of concepts is right and how well they overlap the objects, on twice ``replicates`` pictures.
    """
    model = _embedded(model)
    arms: dict[str, list[float]] = {"learned": [], "random clusters of equal sizes": [], "one word of the picture": []}
    for i in range(FIRST, FIRST + max(replicates // 2, 2)):
        scene = _two(i)
        picture, _ = render(scene)
        method = verb(**EXTRACTING, initial=INITIAL, seed=i)
        masks = method.localise(model, picture)
        whole = np.ones((1, *masks.shape[1:]), bool)
        tried = [(method, masks), (method, scattered(masks, i)), (verb(**WHOLE, initial=INITIAL, seed=i), whole)]
        for arm, (how, on) in zip(arms, tried, strict=True):
            if not len(on):
                arms[arm].append(0.0)
                continue
            found = how.fit(model, picture, on)
            arms[arm].append(float(np.mean(redrawn(model, found.words, on, scene, i))))
            if advance:
                advance(0, f"{scene.caption}: {arm} {arms[arm][-1]:.2f}")
    return Measured(
        "own object redrawn, the other not", "share of pictures", "picture", tuple(arms.pop("learned")),
        {name: tuple(values) for name, values in arms.items()}, 0.0, counted(verb, model, replicates),
    )  # fmt: skip


def counted(verb: Any, model: Any, each: int) -> dict[str, Any]:
    """On ``each`` pictures of two and of three objects: how often as many concepts are found, and the mean overlap of
    an object with its best concept; for chance the same overlap with random clusters of equal sizes."""
    details: dict[str, Any] = {"pictures": each}
    for kind, number in (("two", 2), ("three", 3)):
        right, found, chance = [], [], []
        for i in range(each):
            picture, truth = render(draw_scene(stream("counted", kind, i), kind, plain=True))
            masks = verb().localise(model, picture)
            right.append(len(masks) == number)
            random = scattered(masks, i) if len(masks) else masks
            for k in range(number):
                own = on_grid(truth[f"thing{k}"], masks.shape[1])
                found.append(max((overlap(m, own) for m in masks), default=0.0))
                chance.append(max((overlap(m, own) for m in random), default=0.0))
        details[kind] = {
            "number_right": float(np.mean(right)), "overlap": float(np.mean(found)),
            "overlap_of_random": float(np.mean(chance)),
        }  # fmt: skip
    return details
