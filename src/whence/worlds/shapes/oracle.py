"""Reads a `shapes` picture back: objects with colour, shape, size and place, background, mark, frame.

Colours by nearest palette entry, objects as connected components, shapes by the best overlap with the generator's own
drawings. Not a network: what it says can be checked by eye. On fresh rendered scenes it is right on at least 99 %
(``tests/worlds/test_shapes_oracle.py``); on generated pictures it says what is *there*, also when that is not what
the prompt asked for.

>>> from .scenes import draw_scene, render
>>> scene = draw_scene(1, "two", plain=True)
>>> sorted(t.colour for t in read(render(scene)[0]).things) == sorted(t.colour for t in scene.things)
True
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from .scenes import (
    BACKGROUNDS,
    COLOURS,
    COUNTS,
    FRAME_COLOUR,
    MARK_COLOUR,
    MARK_RADIUS,
    PLURALS,
    RELATIONS,
    SHAPES,
    SIZE,
    SIZES,
    coverage,
    says_frame,
    says_mark,
)

SMALLEST = 12
"""Fewest pixels of an object; smaller blots are not counted."""
_NAMES = (*COLOURS, "mark", "frame", *(f"on {b}" for b in BACKGROUNDS))
_PALETTE = np.array([*COLOURS.values(), MARK_COLOUR, FRAME_COLOUR, *BACKGROUNDS.values()], np.float32)
_FIRST_BACKGROUND = len(COLOURS) + 2


@dataclass(frozen=True)
class Seen:
    """One object as read: its mask is bool [y, x]; ``overlap`` is the best drawing's intersection over union."""

    colour: str
    shape: str
    size: str
    y: float
    x: float
    overlap: float
    mask: NDArray[np.bool_]


@dataclass(frozen=True)
class Reading:
    """What the oracle sees in one picture."""

    things: tuple[Seen, ...]
    background: str
    mark: NDArray[np.bool_] | None
    frame: bool


@cache
def _drawings() -> tuple[tuple[str, str, NDArray[np.bool_]], ...]:
    y, x = np.mgrid[-12:13, -12:13].astype(np.float32)
    shapes = [(s, z, coverage(s, r, y, x) > 0.5) for s in SHAPES for z, r in SIZES.items()]
    return (*shapes, ("diamond", "", coverage("diamond", MARK_RADIUS, y, x) > 0.5))


def _match(mask: NDArray[np.bool_]) -> tuple[str, str, float]:
    """Shape, size and overlap of the drawing that fits a component best, over shifts of a pixel."""
    best = ("", "", 0.0)
    ys, xs = np.nonzero(mask)
    for shape, size, drawing in _drawings():
        dy, dx = np.nonzero(drawing)
        for sy in (-1, 0, 1):
            for sx in (-1, 0, 1):
                y = dy - 12 + round((ys.min() + ys.max()) / 2 - (dy.min() + dy.max() - 24) / 2) + sy
                x = dx - 12 + round((xs.min() + xs.max()) / 2 - (dx.min() + dx.max() - 24) / 2) + sx
                inside = (y >= 0) & (y < SIZE) & (x >= 0) & (x < SIZE)
                both = int(mask[y[inside], x[inside]].sum())
                overlap = both / (len(ys) + len(dy) - both)
                if overlap > best[2]:
                    best = (shape, size, overlap)
    return best


def read(image: NDArray[np.uint8]) -> Reading:
    """Read one picture, uint8 [y, x, rgb] of 64 x 64 pixels."""
    if image.shape != (SIZE, SIZE, 3):
        raise ValueError(f"the oracle reads {SIZE}x{SIZE} rgb pictures, not {image.shape}")
    distance = ((image[:, :, None].astype(np.float32) - _PALETTE) ** 2).sum(-1)
    label = distance.argmin(-1)
    inner = label[4:-4, 4:-4]
    votes = np.bincount(inner[inner >= _FIRST_BACKGROUND].ravel(), minlength=len(_NAMES))
    ground = int(votes.argmax())
    # Blended edge pixels fall on third colours: keep a pixel only where it is nearer its colour than the ground.
    background = _PALETTE[ground]
    things, mark = [], None
    for i, colour in enumerate((*COLOURS, "mark")):
        own = np.sqrt(((image - _PALETTE[i]) ** 2).sum(-1))
        other = np.sqrt(((image - background) ** 2).sum(-1))
        solid = ndimage.binary_opening(label == i, np.ones((2, 2)))
        grown = ndimage.binary_propagation(solid, mask=ndimage.binary_dilation(solid) & (own < other))
        parts, n = ndimage.label(grown, np.ones((3, 3)))
        for k in range(1, n + 1):
            mask = parts == k
            if mask.sum() < SMALLEST:
                continue
            shape, size, overlap = _match(mask)
            if colour == "mark":
                mark = mask if mark is None else mark | mask
                continue
            y, x = ndimage.center_of_mass(mask)
            things.append(Seen(colour, shape, size, float(y), float(x), overlap, mask))
    edge = np.concatenate([label[0], label[-1], label[:, 0], label[:, -1]])
    frame = bool((edge == list(_NAMES).index("frame")).mean() > 0.5)
    return Reading(tuple(things), _NAMES[ground][3:], mark, frame)


# --- does a picture show what a caption says? ------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """What a caption asks for: objects (colour, shape, size or ""), how they relate, and the rest."""

    things: tuple[tuple[str, str, str], ...]
    relation: str
    background: str
    mark: bool
    frame: bool
    kind: str


def parse(caption: str) -> Asked:
    """Read a caption of the world's own grammar (:attr:`Scene.caption`)."""
    words = caption.split()
    singular = {p: s for s, p in PLURALS.items()}
    things: list[tuple[str, str, str]] = []
    colour = size = background = relation = ""
    number = 1
    kind = ""
    for i, word in enumerate(words):
        if word in COLOURS:
            colour = word
        elif word in SIZES:
            size = word
        elif word in COUNTS:
            number, kind = COUNTS[word], "count"
        elif word in SHAPES or word in singular:
            things += [(colour, singular.get(word, word), size)] * number
            colour = size = ""
        elif word == "on" and i + 1 < len(words):
            background = words[i + 1]
        elif word in ("above", "below", "left", "right"):
            relation = f"{word} of" if word in ("left", "right") else word
    kind = kind or ("relation" if relation else ("", "one", "two", "three")[min(len(things), 3)])
    return Asked(tuple(things), relation, background, says_mark(words), says_frame(words), kind)


def holds(relation: str, a: Seen, b: Seen) -> bool:
    dy, dx = b.y - a.y, b.x - a.x
    along = {"left of": dx, "right of": -dx, "above": dy, "below": -dy}[relation]
    across = dy if relation in RELATIONS[:2] else dx
    return along > 6 and abs(across) < along


def judge(asked: Asked, seen: Reading) -> Mapping[str, bool]:
    """Which parts of what was asked are there.

    ``objects``: exactly the objects asked for, by colour and shape; ``sizes``: and their named sizes; ``colours`` and
    ``shapes``: as multisets alone; ``number``: as many objects as asked; ``relation``, ``background``, ``mark``,
    ``frame``. A relation that was not asked for counts as there.
    """
    want = sorted((c, s) for c, s, _ in asked.things)
    have = sorted((t.colour, t.shape) for t in seen.things)
    sized = all(
        any(t.colour == c and t.shape == s and t.size == z for t in seen.things) for c, s, z in asked.things if z
    )
    relation = True
    if asked.relation and len(asked.things) >= 2:
        first, second = ([t for t in seen.things if t.colour == c] for c, _, _ in asked.things[:2])
        relation = bool(first and second) and holds(asked.relation, first[0], second[0])
    return {
        "objects": want == have,
        "sizes": want == have and sized,
        "colours": sorted(c for c, _ in want) == sorted(c for c, _ in have),
        "shapes": sorted(s for _, s in want) == sorted(s for _, s in have),
        "number": len(want) == len(have),
        "relation": relation,
        "background": asked.background == seen.background,
        "mark": asked.mark == (seen.mark is not None),
        "frame": asked.frame == seen.frame,
    }
