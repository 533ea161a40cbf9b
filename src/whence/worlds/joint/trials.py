"""Trial on hand-wired transformers: an explainer gives word maps; the wiring knows which word drew which places."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from ...engine.prompts import replace_word
from ...engine.randomness import stream
from ...errors import RunError
from ...run import Run
from ...score import Score
from .wiring import HEIGHT, PIXELS, WIDTH, Wired, wire

if TYPE_CHECKING:
    from ..controls import Explainer

STEPS, GUIDANCE = 3, 4.0


def picture(world: Wired, number: int) -> Run:
    """The run that explainers are asked about."""
    seed = int(stream("joint", "seed", number).integers(2**31))
    return world.model.picture(  # type: ignore[no-any-return]
        world.prompt, seed, STEPS, GUIDANCE, height=HEIGHT * PIXELS, width=WIDTH * PIXELS
    )


def certify(world: Wired, run: Run) -> None:
    """Raises RunError unless each word's swap moves the final latents in its own places, and those alone.

    "Alone" is a tenth at most elsewhere. The silent twin's swap must move its own places a hundred times less than
    its twin's swap does.
    """

    words = (*world.objects, world.real, world.silent)
    prompts = [replace_word(run.settings.prompt, run.words.find(w), world.instead[w]) for w in words]
    others = world.model.generate_many([replace(run.settings, prompt=p) for p in prompts])
    moved = {}
    for word, other in zip(words, others, strict=True):
        change = np.abs(other.latents[0] - run.latents[0]).mean(0)
        moved[word] = change.reshape(HEIGHT, 2, WIDTH, 2).mean((1, 3))
    for word in words[:3]:
        own = world.masks[word]
        if moved[word][own].min() < 10 * moved[word][~own].max():
            raise RunError(f"a model in which {word!r} draws", "its swap moves other places too", "another wiring")
    shared = world.masks[world.silent]
    if 100 * moved[world.silent][shared].max() > moved[world.real][shared].min():
        raise RunError(f"a model in which {world.silent!r} is silent", "its swap moves the picture", "another wiring")


@lru_cache(maxsize=256)
def _query(number: int) -> tuple[Wired, Run]:
    world = wire(number)
    run = picture(world, number)
    certify(world, run)
    return world, run


def wired(explain: Explainer, n: int, model: Any = None) -> Score:
    """Is a word's map stronger on what it drew than on what another drew, and than its silent twin's map there?

    One value for each of ``n`` seeds, each with a transformer of its own (``model`` is not used): the share of three
    comparisons won, 0.5 for an explanation that knows nothing.
    """
    values = []
    for number in range(n):
        world, run = _query(number)
        explanation = explain(run)
        (a, b), twins = world.objects, (world.real, world.silent)
        pairs = [(a, a, a, b), (b, b, b, a), (twins[0], twins[0], twins[1], twins[0])]
        wins = []
        for word, place, rival, other in pairs:
            own = float(explanation.map_of(word)[world.pixels(place)].mean())
            against = float(explanation.map_of(rival)[world.pixels(other)].mean())
            wins.append(0.5 if own == against else float(own > against))
        values.append(float(np.mean(wins)))
    return Score.of("joint.wired", "share of paired comparisons won, chance 0.5", values)
