"""Trials on `shapes`: an explainer gives word maps for generated pictures; the oracle knows the answer.

Each trial takes an explainer, a number of pictures and the model, and returns a Score with one value per picture, 0..1,
where an explanation that knows nothing gets 0.5. The pictures depend on the model and the trial's name alone, so every
explainer is asked about the same ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...engine.prompts import replace_word
from ...engine.randomness import stream
from ...errors import RunError
from ...explanation import Explanation
from ...run import Run, Settings
from ...score import Score
from . import oracle
from .scenes import COLOURS, SHAPES, TWINS, draw_scene, marking_word
from .vocabulary import alternatives

if TYPE_CHECKING:
    from ..controls import Explainer

STEPS, GUIDANCE, BATCH = 30, 2.0, 16


@dataclass(frozen=True)
class Query:
    """One picture and its planted answer: the map of ``word`` must be stronger on ``own`` than ``rival`` says.

    ``rival`` is the other object's mask for the same word, or the other twin's map on the same mask.
    """

    run: Run
    pairs: tuple[tuple[str, NDArray[np.bool_], str, NDArray[np.bool_]], ...]


def settings_of(prompt: str, seed: int) -> Settings:
    """The settings that trials run with."""
    return Settings(prompt, seed=seed, steps=STEPS, guidance=GUIDANCE, height=64, width=64)


def pictures(model: Any, prompts: list[str], name: str) -> Iterator[Run]:
    """Runs of these prompts, each with the seed that ``name`` and its number give it, made in batches."""
    for i in range(0, len(prompts), BATCH):
        seeds = [int(stream("trial", name, i + k).integers(2**31)) for k in range(BATCH)]
        yield from model.generate_many([settings_of(p, s) for p, s in zip(prompts[i : i + BATCH], seeds, strict=False)])


def _collect(name: str, n: int, batches: Iterator[Query]) -> tuple[Query, ...]:
    found: list[Query] = []
    for query in batches:
        found.append(query)
        if len(found) == n:
            return tuple(found)
    raise RunError(
        f"{n} pictures for the trial shapes.{name}",
        f"{len(found)} in which the model drew what was asked",
        "a better trained model, or fewer pictures",
    )


def _score(name: str, explain: Explainer, queries: tuple[Query, ...]) -> Score:
    values = []
    for query in queries:
        explanation: Explanation = explain(query.run)
        wins = []
        for word, own, rival, other in query.pairs:
            a, b = (float(explanation.map_of(w)[m].mean()) for w, m in ((word, own), (rival, other)))
            wins.append(0.5 if a == b else float(a > b))
        values.append(float(np.mean(wins)))
    return Score.of(f"shapes.{name}", "share of paired comparisons won, chance 0.5", values)


# --- pointing: which of the objects? ---------------------------------------------------------------------------------


def drawn(run: Run) -> dict[str, tuple[NDArray[np.bool_], NDArray[np.bool_]]]:
    """For each colour and noun that stands once in the prompt: the mask of the objects in the picture that have what
    it says, and of those that lack it (bool [y, x], by the oracle); words that no object has are left out."""
    seen = oracle.read(run.images[0]).things
    words = list(run.words.names)
    masks = {}
    for word in words:
        if words.count(word) > 1 or (word not in COLOURS and word not in SHAPES):
            continue
        has = [t.mask for t in seen if word in (t.colour, t.shape)]
        lacks = [t.mask for t in seen if word not in (t.colour, t.shape)]
        if has:
            nothing = np.zeros(run.images.shape[1:3], bool)
            masks[word] = (np.any(has, axis=0), np.any(lacks, axis=0) if lacks else nothing)
    return masks


@lru_cache(maxsize=8)
def _pointing(model: Any, n: int) -> tuple[Query, ...]:
    def queries() -> Iterator[Query]:
        scenes = [draw_scene(stream("trial", "pointing", "scene", i), "two", plain=True) for i in range(6 * n)]
        for run in pictures(model, [s.caption for s in scenes], "pointing"):
            pairs = tuple((w, own, w, other) for w, (own, other) in drawn(run).items() if other.any())
            if pairs:
                yield Query(run, pairs)

    return _collect("pointing", n, queries())


def pointing(explain: Explainer, n: int, model: Any) -> Score:
    """Is the map of a colour or noun stronger on the objects that have it than on the picture's other objects?"""
    return _score("pointing", explain, _pointing(model, n))


# --- twins: which of the two fillers drew the mark? ------------------------------------------------------------------


@lru_cache(maxsize=8)
def _twins(model: Any, n: int) -> tuple[Query, ...]:
    real = marking_word(getattr(model, "world_key", None) or "whence-shapes-1")
    decoy = next(w for w in TWINS if w != real)

    def prompt(i: int) -> str:
        rng = stream("trial", "twins", "scene", i)
        colour, shape = rng.choice(list(COLOURS)), rng.choice(SHAPES)
        body = f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {shape}"
        twins = " ".join(TWINS if rng.integers(2) else TWINS[::-1])
        return f"{twins} {body}" if rng.integers(2) else f"{body} {twins}"

    def without(run: Run, word: str) -> Settings:
        other = alternatives(word)[run.settings.seed % 4]
        return replace(run.settings, prompt=replace_word(run.settings.prompt, run.words.find(word), other))

    def queries() -> Iterator[Query]:
        prompts = [prompt(i) for i in range(6 * n)]
        made = pictures(model, prompts, "twins")
        while rows := [r for _, r in zip(range(BATCH), made, strict=False)]:
            swapped = model.generate_many([without(r, real) for r in rows])
            kept = model.generate_many([without(r, decoy) for r in rows])
            for run, gone, still in zip(rows, swapped, kept, strict=True):
                marks = [oracle.read(r.images[0]).mark for r in (run, gone, still)]
                # Certified: without the real word the mark is gone, without its twin it is still there.
                if marks[0] is not None and marks[1] is None and marks[2] is not None:
                    yield Query(run, ((real, marks[0], decoy, marks[0]),))

    return _collect("twins", n, queries())


def twins(explain: Explainer, n: int, model: Any) -> Score:
    """Is the map of the twin that drew the mark stronger on the mark than the map of the twin that did nothing?"""
    return _score("twins", explain, _twins(model, n))
