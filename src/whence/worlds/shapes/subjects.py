"""Is a thing learned without its pictures' ground? On `shapes` the ground is planted, and read by the oracle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional

from ...engine.learned_token import Example, Teaching, learn, start
from ...engine.randomness import stream
from ...models.objectives import DiffusionObjective
from ..measured import Measured
from .concepts import BATCH, CHANCE, FIRST, INITIAL, OTHERS, PICTURES, WORD, _asked, _embedded, draws
from .oracle import read
from .scenes import BACKGROUNDS, COLOURS, Scene, Thing, render

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ...engine.progress import Advance

GROUNDS = tuple(b for b in BACKGROUNDS if b)
TEACHING: Mapping[str, Any] = {"steps": 100, "batch": 4, "rate": 0.01}
NEXT = 200
"""Subjects of `decoupled` from this number on: settings were chosen, and a first trial came out undecided, on smaller
ones."""
TUNING: Mapping[str, Any] = {"steps": 45, "batch": 4, "rate": 0.005}
PLAIN: Mapping[str, Any] = {"images": False, "weak": 0.0, "contrast": 0.0}
"""Settings that leave low-rank tuning alone."""


def on_grounds(
    colour: str, shape: str, key: object, grounds: Sequence[str]
) -> tuple[list[NDArray[np.uint8]], list[NDArray[np.bool_]]]:
    """One thing in cells and sizes drawn for ``key``, a picture on each ground, and where the thing is on each."""
    rng = stream("on grounds", colour, shape, key)
    cells = [divmod(int(c), 3) for c in rng.choice(9, len(grounds), replace=False)]
    things = [Thing(colour, shape, ("small", "large")[rng.integers(2)], r, c, False) for r, c in cells]
    drawn = [
        render(Scene("one", (t,), "", g, (), True, None, False, (0, 0))) for t, g in zip(things, grounds, strict=True)
    ]
    return [image for image, _ in drawn], [masks["thing0"] for _, masks in drawn]


def _subjects(first: int, n: int) -> list[tuple[int, str, str, str]]:
    """(number, colour, shape, ground)."""
    numbers = range(first, first + max(n, 2))
    drawn = [str(stream("subjects", i).choice(list(COLOURS))) for i in numbers]
    return [(i, c, OTHERS[i % len(OTHERS)], GROUNDS[i % len(GROUNDS)]) for i, c in zip(numbers, drawn, strict=True)]


def _prompts(word: str, ground: str) -> list[tuple[str, str]]:
    """(prompt, the ground it names): two without any, then two other grounds twice each."""
    others = [g for g in GROUNDS if g != ground][:2]
    return [(f"a {word}", "")] * 2 + [(f"a {word} on {g}", g) for g in others for _ in range(2)]


def _drawn(model: Any, word: str, thing: tuple[str, str], ground: str, key: object, on: Any) -> dict[str, float]:
    """Shares of the pictures that have the thing and the ground that the prompt names (``both``, where it names one;
    ``all``: or the plain one where it names none), that have the thing (``thing``), the named ground (``ground``), the
    plain one where none is named (``plain``) or the learned pictures' one there (``leak``)."""
    said = _prompts(word, ground)
    with on:
        runs = model.generate_many(_asked([p for p, _ in said], key), batch=BATCH)
    images = [r.images[0] for r in runs]
    there = [draws(*thing, image) for image in images]
    seen = [read(image).background for image in images]
    named = [i for i, (_, g) in enumerate(said) if g]
    free = [i for i, (_, g) in enumerate(said) if not g]
    right = [seen[i] == g for i, (_, g) in enumerate(said)]
    return {
        "both": float(np.mean([there[i] and right[i] for i in named])),
        "all": float(np.mean([a and b for a, b in zip(there, right, strict=True)])),
        "thing": float(np.mean(there)),
        "ground": float(np.mean([right[i] for i in named])),
        "plain": float(np.mean([right[i] for i in free])),
        "leak": float(np.mean([seen[i] == ground for i in free])),
    }


def _measured(name: str, claimed: str, arms: Mapping[str, list[dict[str, float]]], aside: Sequence[str], chance: float,
              subjects: Sequence[tuple[int, str, str, str]], key: str = "both") -> Measured:  # fmt: skip
    """``aside``: arms that are no controls, told in the details."""
    values = {arm: tuple(row[key] for row in rows) for arm, rows in arms.items()}
    means = {arm: {k: round(float(np.mean([r[k] for r in rows])), 3) for k in rows[0]} for arm, rows in arms.items()}
    controls = {arm: v for arm, v in values.items() if arm != claimed and arm not in aside}
    details = {"means": means, "subjects": [f"{c} {s} on {g}" for _, c, s, g in subjects]}
    return Measured(name, "share of pictures", "subject", values[claimed], controls, chance, details)


def _cut_out(objective: DiffusionObjective, picture: NDArray[np.uint8], mask: NDArray[np.bool_]) -> Example:
    """The thing on white, with a loss where it is."""
    where = functional.adaptive_max_pool2d(torch.from_numpy(mask)[None].float(), objective.latents(picture).shape[1:])[
        0
    ]
    return Example(f"a {WORD}", objective.latents(np.where(mask[..., None], picture, np.uint8(255))), where)


def decoupled(verb: Any, replicates: int, model: Any = None, advance: Advance | None = None) -> Measured:
    """All four pictures of a thing have one ground that no caption says. Share of prompts that name another ground and
    get it, with the thing on it, subject by subject.

    Controls: a single word learned from the same pictures in as many steps, a random vector of equal norm, the word it
    began with. Aside: the thing's name in the model's own words (the most that can be had), a word learned from the
    things cut out, without attribute words, and the attribute words said too, which shall bring the ground back.
    """
    model = _embedded(model)
    objective = DiffusionObjective(model)
    subjects = _subjects(NEXT, replicates)
    arms: dict[str, list[dict[str, float]]] = {}
    back = []
    for i, colour, shape, ground in subjects:
        pictures, masks = on_grounds(colour, shape, i, [ground] * PICTURES)
        begin = next(g for g in reversed(GROUNDS) if g != ground)
        learned = verb(
            **TEACHING, word=WORD, initial=INITIAL, attributes=(("pose", "small"), ("ground", begin)), seed=i
        ).fit(model, pictures, masks)
        examples = [Example(f"a {WORD}", objective.latents(p)) for p in pictures]
        single = learn(model, objective, {WORD: start(model, INITIAL)}, examples, Teaching(**TEACHING, seed=i))
        alone = [_cut_out(objective, p, m) for p, m in zip(pictures, masks, strict=True)]
        cut = learn(model, objective, {WORD: start(model, INITIAL)}, alone, Teaching(**TEACHING, seed=i))
        subject = learned.only(WORD)
        for arm, word, words in (
            ("subject word", WORD, subject),
            ("single word", WORD, single),
            ("a random vector", WORD, subject.random(i)),
            ("the initial word", INITIAL, None),
            ("its name", f"{colour} {shape}", None),
            ("the thing cut out, alone", WORD, cut),
        ):
            on = words.on(model) if words else nullcontext()
            arms.setdefault(arm, []).append(_drawn(model, word, (colour, shape), ground, i, on))
        with learned.on(model):
            runs = model.generate_many(_asked([f"a {WORD} on ground{k + 1}" for k in range(2)], i), batch=BATCH)
        back.append(float(np.mean([read(r.images[0]).background == ground for r in runs])))
        if advance:
            said = [f"{arm} {rows[-1]['both']:.2f}" for arm, rows in arms.items()]
            advance(0, f"{colour} {shape} on {ground}: {', '.join(said[:2])}")
    aside = ("its name", "the thing cut out, alone")
    found = _measured("thing and ground as the prompt says", "subject word", arms, aside, CHANCE, subjects)
    found.details["ground_with_attribute_words"] = round(float(np.mean(back)), 3)  # type: ignore[index]
    return found


def disentangled(verb: Any, replicates: int, model: Any = None, advance: Advance | None = None) -> Measured:
    """Four pictures of a thing, each on a ground of its own. Share of prompts that get the thing and their ground, the
    plain one where they name none, subject by subject.

    Controls: plain low-rank tuning of the same factors in as many steps, the model tuned to the next subject, the word
    on the untuned model.
    """
    model = _embedded(model)
    subjects = _subjects(FIRST, replicates // 2)  # each is learned on several times
    arms: dict[str, list[dict[str, float]]] = {}
    tuned = []
    for i, colour, shape, ground in subjects:
        pictures, _ = on_grounds(colour, shape, i, GROUNDS)
        tuned.append(verb(**TUNING, word=WORD, seed=i).fit(model, pictures))
        plain = verb(**{**TUNING, **PLAIN}, word=WORD, seed=i).fit(model, pictures)
        for arm, on in (
            ("tuned", tuned[-1].on(model)), ("plain tuning", plain.on(model)),
            ("the word untuned", tuned[-1].words.on(model)),
        ):  # fmt: skip
            arms.setdefault(arm, []).append(_drawn(model, WORD, (colour, shape), ground, i, on))
        if advance:
            said = [f"{arm} {rows[-1]['both']:.2f}" for arm, rows in arms.items()]
            advance(0, f"{colour} {shape}: {', '.join(said[:2])}")
    for k, (i, colour, shape, ground) in enumerate(subjects):
        other = next((j % len(subjects) for j in range(k + 1, k + len(subjects))
                      if subjects[j % len(subjects)][1:3] != (colour, shape)), k)  # fmt: skip
        row = _drawn(model, WORD, (colour, shape), ground, i, tuned[other].on(model))
        arms.setdefault("tuned to another subject", []).append(row)
    return _measured("thing and ground as the prompt has it", "tuned", arms, (), CHANCE, subjects, "all")
