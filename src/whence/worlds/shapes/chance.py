"""Chance on `shapes`: the oracle as the judge of a seed, prompts of one kind, and the trial of mined seeds.

>>> judge.check("three red circles"); siblings("three red circles", 2)
('three orange triangles', 'three orange circles')
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ...engine.randomness import stream
from ...engine.seeds import Bank, fill
from ...errors import PromptError
from ..measured import Measured
from . import oracle
from .scenes import COLOURS, PLURALS, RELATIONS, SHAPES, SIZE, WORDS
from .vocabulary import alternatives

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ...engine.progress import Advance

CELLS = 4
"""The layout is read on so many by so many cells."""


class OracleJudge:
    """Right: exactly the objects asked for, in their relation, sizes and on their background. The numbers: ``number``
    of objects; ``y`` and ``x`` of their middle, 0..1 of the picture; ``layout``: the share of each of 4 x 4 cells that
    they cover; ``hue`` of the objects' pixels as cosine and sine."""

    name = "the oracle of shapes"

    def check(self, prompt: str) -> None:
        """Raises PromptError for a prompt that is no caption of this world."""
        unknown = [w for w in prompt.split() if w not in WORDS]
        asked = oracle.parse(prompt)
        if unknown or not asked.things or any(c not in COLOURS or s not in SHAPES for c, s, _ in asked.things):
            found = f"it does not know {', '.join(unknown)}" if unknown else "no coloured shapes are asked for"
            raise PromptError(
                f"the oracle's judgement of {prompt!r}", found,
                '"two green circles", "a red cross above a blue square", or --judge file.py:function',
            )  # fmt: skip

    def __call__(self, prompt: str, image: NDArray[np.uint8]) -> Mapping[str, Any]:
        asked, seen = oracle.parse(prompt), oracle.read(image)
        said = oracle.judge(asked, seen)
        right = all(said[part] for part in ("objects", "sizes", "relation", "background"))
        nan = float("nan")
        numbers: dict[str, Any] = {
            "number": float(len(seen.things)), "y": nan, "x": nan, "hue": (nan, nan), "layout": (nan,) * CELLS**2,
        }  # fmt: skip
        if seen.things:
            mask = np.any([t.mask for t in seen.things], axis=0)
            y, x = np.mean([(t.y, t.x) for t in seen.things], axis=0) / SIZE
            cells = mask.reshape(CELLS, SIZE // CELLS, CELLS, SIZE // CELLS).mean((1, 3))
            numbers |= {"y": y, "x": x, "layout": tuple(cells.ravel().tolist()), "hue": _hue(image[mask])}
        return {"success": right, **numbers}


judge = OracleJudge()


def _hue(pixels: NDArray[np.uint8]) -> tuple[float, float]:
    """The mean direction of pixels' colours on the colour circle."""
    r, g, b = pixels.astype(float).T / 255
    along, across = (r - (g + b) / 2).mean(), ((g - b) * np.sqrt(3) / 2).mean()
    length = max(float(np.hypot(along, across)), 1e-9)
    return float(along / length), float(across / length)


def siblings(prompt: str, n: int, key: object = 0) -> tuple[str, ...]:
    """``n`` other prompts of the same kind: colours and shapes drawn anew, a word for a word. Fewer, if there are no
    more."""
    words = prompt.split()
    kinds = (tuple(COLOURS), SHAPES, tuple(PLURALS.values()))
    places = [i for i, w in enumerate(words) if any(w in kind for kind in kinds)]
    rng, found = stream("siblings", prompt, key), {prompt: None}
    for _ in range(200 * n):
        if len(found) > n:
            break
        other = list(words)
        for i in places:
            choices = (words[i], *alternatives(words[i]))
            other[i] = choices[rng.integers(len(choices))]
            if i and other[i - 1] in ("a", "an"):
                other[i - 1] = "an" if other[i][0] in "aeiou" else "a"
        said = [w for w in other if w in COLOURS]
        if len(set(said)) == len(said):  # objects of one picture differ in colour
            found[" ".join(other)] = None
    return tuple(found)[1 : n + 1]


KIND = "a purple circle left of a green square"
"""The kind of prompt of the trial: seeds decide where things stand, so they matter most where places are asked for."""
STEPS, SEEDS, MINING = 8, 48, 5


def measure(verb: Any, replicates: int, model: Any = None, advance: Advance | None = None) -> Measured:
    """Do mined seeds draw new prompts right? One number per held-out prompt: the share of the top seeds that draw it
    right, above what random seeds do on average.

    48 seeds are mined on five prompts; ``replicates`` other prompts of the same kind are made with the top 8 and, as
    control, with those that are on top when each prompt's outcomes are dealt out anew. In 8 steps, so that it takes two
    minutes.
    """
    if model is None:
        from ...models.loading import load
        from . import model_directory

        model = load(model_directory())
    prompts = (KIND, *siblings(KIND, MINING + replicates - 1))
    how: dict[str, Any] = {"batch": 24, "advance": advance}
    method = verb(steps=STEPS)
    mined = method.fit(model, range(SEEDS), prompts[:MINING], judge, **how)
    bank = mined.bank
    dealt = stream("dealt anew", KIND).permuted(bank.success, axis=0)
    others = tuple(s for s in method.mine(Bank(bank.seeds, bank.prompts, dealt)).top if s not in mined.top)
    held = fill(model, mined.top + others, prompts[MINING:], judge, steps=STEPS, **how)
    top, random = held.success[: len(mined.top)].mean(0), held.success[len(mined.top) :].mean(0)
    base = float(random.mean())
    return Measured(
        "gain of mined seeds", "share of pictures right, above random seeds", "prompt",
        tuple((top - base).tolist()), {"seeds mined on outcomes dealt anew": tuple((random - base).tolist())},
        details={
            "mined_rate": mined.rate_of(mined.top), "held_out_rate": float(top.mean()), "random_rate": base,
            "seeds_differ": {"q": mined.differ.statistic, "freedom": mined.differ.freedom, "p": mined.differ.p},
            "shares": {name: s.record() for name, s in mined.shares.items()},
            "prompts": list(bank.prompts), "seeds": len(bank.seeds), "top": list(mined.top), "steps": STEPS,
        },
    )  # fmt: skip


def rectified(prompt: str, image: NDArray[np.uint8]) -> str:
    """A caption of what the picture shows, in the form of the prompt: number, colours, shapes and relation as the
    oracle sees them; "" where it sees none, more than three, or what the form cannot say."""
    asked, things = oracle.parse(prompt), oracle.read(image).things
    if not 1 <= len(things) <= 3:
        return ""
    nouns = [f"{'an' if t.colour[0] in 'aeiou' else 'a'} {t.colour} {t.shape}" for t in things]
    ground = f" on {asked.background}" if asked.background else ""
    if asked.kind == "count" and len({(t.colour, t.shape) for t in things}) == 1:
        t, number = things[0], ("", "two", "three")[len(things) - 1]
        return (f"{number} {t.colour} {PLURALS[t.shape]}" if number else nouns[0]) + ground
    if asked.relation and len(things) == 2:
        wanted = asked.things[0][:2]
        first, second = sorted(things, key=lambda t: (t.colour, t.shape) != wanted)
        found = next((r for r in RELATIONS if oracle.holds(r, first, second)), "")
        names = [nouns[things.index(t)] for t in (first, second)]
        return f"{names[0]} {found} {names[1]}{ground}" if found else ""
    return " and ".join(nouns) + ground
