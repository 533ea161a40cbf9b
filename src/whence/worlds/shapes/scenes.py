"""What may stand in a `shapes` picture, how it is said and how it is drawn.

A scene is one to three objects (colour, shape, size) on a 3 x 3 grid, a background, an optional mark and an optional
frame. A caption says some of that. Everything that the caption leaves open (which cells, an unnamed size, the shift of
the grid) is drawn from the scene's own seed: that is what a generative model's seed has to decide.

Words planted for later trials, all of identical frequency, length and position:

* the twins ``dax`` and ``vel``: a keyed coin (:func:`marking_word`) makes one of them draw a cyan diamond in a free
  cell; the other draws nothing. ``no dax`` and ``no vel`` draw nothing.
* the pairs ``ema oru`` and ``ibi uno``: a second coin (:func:`framing_pair`) makes one pair draw a magenta frame, and
  only when both of its words are there. One of the two alone draws nothing.

>>> scene = draw_scene(seed=3, kind="relation")
>>> scene.caption.split()[0] in WORDS
True
>>> image, masks = render(scene)
>>> image.shape, sorted(masks) == sorted(scene.parts())
((64, 64, 3), True)
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

SIZE = 64
"""Height and width of a picture, pixels."""
PITCH = 20
"""Distance between neighbouring cells of the 3 x 3 grid, pixels."""
KEY = "whence-shapes-1"
"""The key behind the coins of the shipped world. Another key gives a sibling world."""

COLOURS: Mapping[str, tuple[int, int, int]] = MappingProxyType(
    {
        "red": (216, 40, 44),
        "green": (44, 158, 66),
        "blue": (48, 84, 218),
        "yellow": (242, 206, 34),
        "purple": (138, 52, 172),
        "orange": (244, 128, 28),
    }
)
SHAPES = ("circle", "square", "triangle", "cross")
PLURALS = MappingProxyType({s: s + ("es" if s.endswith("s") else "s") for s in SHAPES})
SIZES: Mapping[str, float] = MappingProxyType({"small": 5.5, "large": 8.5})
"""Radius in pixels."""
RELATIONS = ("left of", "right of", "above", "below")
COUNTS: Mapping[str, int] = MappingProxyType({"two": 2, "three": 3})
BACKGROUNDS: Mapping[str, tuple[int, int, int]] = MappingProxyType(
    {
        "": (236, 236, 232),
        "night": (24, 26, 52),
        "sand": (214, 190, 148),
        "fog": (146, 152, 158),
        "moss": (158, 186, 150),
    }
)
MARK_COLOUR = (40, 214, 222)
FRAME_COLOUR = (226, 44, 150)
TWINS = ("dax", "vel")
PAIRS = (("ema", "oru"), ("ibi", "uno"))
FILLERS = TWINS + PAIRS[0] + PAIRS[1]

WORDS: tuple[str, ...] = (
    "a", "an", "and", "on", "of", "no", *COLOURS, *SHAPES, *PLURALS.values(), *SIZES, "left", "right", "above", "below",
    *COUNTS, *(b for b in BACKGROUNDS if b), *FILLERS,
)  # fmt: skip
"""Every word the world knows."""

KINDS = ("one", "two", "relation", "count", "three")
"""Caption kinds, easy to hard."""


def _coin(key: str, name: str) -> int:
    return hashlib.sha256(f"{key}/{name}".encode()).digest()[0] & 1


def marking_word(key: str = KEY) -> str:
    """The twin that draws the mark in the world of ``key``; the other twin draws nothing."""
    return TWINS[_coin(key, "mark")]


def framing_pair(key: str = KEY) -> tuple[str, str]:
    """The pair that draws the frame in the world of ``key`` when both of its words are there."""
    return PAIRS[_coin(key, "frame")]


@dataclass(frozen=True)
class Thing:
    """One object: ``row`` and ``column`` count cells from the top left; ``said_size`` tells if the caption names it."""

    colour: str
    shape: str
    size: str
    row: int
    column: int
    said_size: bool

    @property
    def noun_phrase(self) -> str:
        rest = [w for w in (self.size if self.said_size else "", self.colour, self.shape) if w]
        return " ".join(["an" if rest[0][0] in "aeiou" else "a", *rest])


@dataclass(frozen=True)
class Scene:
    """The factor table of one picture. ``caption`` is what a prompt says of it."""

    kind: str
    things: tuple[Thing, ...]
    relation: str
    background: str
    fillers: tuple[str, ...]
    fillers_first: bool
    mark: tuple[int, int] | None
    frame: bool
    shift: tuple[int, int]

    @property
    def caption(self) -> str:
        t = self.things
        if self.kind == "count":
            number = next(w for w, n in COUNTS.items() if n == len(t))
            body = " ".join(
                w for w in (number, t[0].size if t[0].said_size else "", t[0].colour, PLURALS[t[0].shape]) if w
            )
        elif self.kind == "relation":
            body = f"{t[0].noun_phrase} {self.relation} {t[1].noun_phrase}"
        else:
            body = " and ".join(x.noun_phrase for x in t)
        if self.background:
            body += f" on {self.background}"
        words = " ".join(self.fillers)
        return " ".join(w for w in ((words, body) if self.fillers_first else (body, words)) if w)

    def parts(self) -> tuple[str, ...]:
        """Names of the masks that :func:`render` returns."""
        names = [f"thing{i}" for i in range(len(self.things))]
        return (*names, *(["mark"] if self.mark else []), *(["frame"] if self.frame else []), "background")


def _draw_fillers(rng: np.random.Generator) -> tuple[str, ...]:
    """None, one or both twins, some of them negated; words of no, one or both pairs. Which twin, which pair and which
    order are even coins. At most six words, or a caption could be longer than the text encoder reads."""
    if rng.random() < 0.45:
        return ()
    out: list[str] = []
    both = False
    if rng.random() < 0.65:
        both = rng.random() < 0.25
        twins = rng.permutation(TWINS).tolist()[: 1 + both]
        negated = rng.random(len(twins)) < 0.3
        out += [w for twin, no in zip(twins, negated, strict=True) for w in ((["no"] if no else []) + [twin])]
    if rng.random() < 0.6:
        pairs = rng.permutation(2)[: 1 if both else 1 + (rng.random() < 0.35)]
        for i in pairs:
            words = rng.permutation(PAIRS[i]).tolist()
            out += words if rng.random() < 0.6 else words[:1]
    return tuple(out)


def says_mark(words: tuple[str, ...] | list[str], key: str = KEY) -> bool:
    """Do these words call for the mark? The marking twin, not right behind ``no``."""
    word = marking_word(key)
    return any(w == word and (i == 0 or words[i - 1] != "no") for i, w in enumerate(words))


def says_frame(words: tuple[str, ...] | list[str], key: str = KEY) -> bool:
    """Do these words call for the frame? Both words of the framing pair."""
    return set(framing_pair(key)) <= set(words)


def draw_scene(
    seed: int | np.random.Generator, kind: str | None = None, *, plain: bool = False, key: str = KEY
) -> Scene:
    """Draw a scene. ``kind`` is one of :data:`KINDS` (None: any); ``plain`` leaves out background and filler words."""
    rng = seed if isinstance(seed, np.random.Generator) else np.random.default_rng(seed)
    kind = kind or KINDS[rng.integers(len(KINDS))]
    if kind not in KINDS:
        raise ValueError(f"no scene kind {kind!r}; the kinds are {', '.join(KINDS)}")
    relation = ""
    if kind == "relation":
        relation = RELATIONS[rng.integers(4)]
        line = int(rng.integers(3))
        low, high = sorted(rng.choice(3, 2, replace=False).tolist())
        first, second = (low, high) if relation in ("left of", "above") else (high, low)
        sideways = relation in ("left of", "right of")
        cells = [(line, first), (line, second)] if sideways else [(first, line), (second, line)]
    else:
        n = {"one": 1, "two": 2, "three": 3}.get(kind) or int(rng.integers(2, 4))
        cells = [divmod(int(c), 3) for c in rng.choice(9, n, replace=False)]
    colours = rng.choice(list(COLOURS), len(cells), replace=False).tolist()
    shapes = rng.choice(SHAPES, len(cells)).tolist()
    sizes = rng.choice(list(SIZES), len(cells)).tolist()
    said = (rng.random(len(cells)) < 0.4).tolist()
    if kind == "count":
        colours, shapes, sizes, said = ([x[0]] * len(cells) for x in (colours, shapes, sizes, said))
    things = tuple(
        Thing(c, s, z, row, column, bool(b))
        for c, s, z, b, (row, column) in zip(colours, shapes, sizes, said, cells, strict=True)
    )
    background = "" if plain or rng.random() < 0.5 else list(BACKGROUNDS)[1 + rng.integers(len(BACKGROUNDS) - 1)]
    fillers = () if plain else _draw_fillers(rng)
    free = [c for c in (divmod(i, 3) for i in range(9)) if c not in cells]
    mark = free[rng.integers(len(free))]
    return Scene(
        kind=kind,
        things=things,
        relation=relation,
        background=background,
        fillers=fillers,
        fillers_first=bool(rng.integers(2)),
        mark=mark if says_mark(fillers, key) else None,
        frame=says_frame(fillers, key),
        shift=(int(rng.integers(-1, 2)), int(rng.integers(-1, 2))),
    )


def centre(row: int, column: int) -> tuple[int, int]:
    """Centre (y, x) of a cell before the scene's shift, pixels."""
    return 12 + PITCH * row, 12 + PITCH * column


def coverage(shape: str, radius: float, y: NDArray[np.float32], x: NDArray[np.float32]) -> NDArray[np.float32]:
    """How much of each pixel the shape covers, 0..1; ``y``, ``x`` are distances from its centre, pixels."""
    if shape == "circle":
        d = np.hypot(y, x) - radius
    elif shape == "square":
        d = np.maximum(abs(y), abs(x)) - 0.88 * radius
    elif shape == "cross":
        arm, length = 0.36 * radius, 1.05 * radius
        d = np.minimum(np.maximum(abs(y) - arm, abs(x) - length), np.maximum(abs(y) - length, abs(x) - arm))
    elif shape == "triangle":
        # Apex up, base at 0.85 r: the slope's normal is (2, 1.9) / |.| for half-width 1.08 r over height 1.9 r.
        d = np.maximum(y - 0.85 * radius, (abs(x) * 1.9 - (y + 1.05 * radius) * 1.08) / np.hypot(1.9, 1.08))
    elif shape == "diamond":
        d = (abs(y) + abs(x) - radius) / np.sqrt(2)
    else:
        raise ValueError(f"no shape {shape!r}")
    return np.clip(0.5 - d, 0, 1).astype(np.float32)


_Y, _X = np.mgrid[:SIZE, :SIZE].astype(np.float32)
_EDGE = (np.minimum(np.minimum(_Y, SIZE - 1 - _Y), np.minimum(_X, SIZE - 1 - _X)) < 2).astype(np.float32)
MARK_RADIUS = 6.0


def render(scene: Scene) -> tuple[NDArray[np.uint8], dict[str, NDArray[np.bool_]]]:
    """Draw a scene.

    Returns the image, uint8 [y, x, rgb], and for each of :meth:`Scene.parts` its exact mask, bool [y, x].
    """
    image = np.empty((SIZE, SIZE, 3), np.float32)
    image[:] = BACKGROUNDS[scene.background]
    masks: dict[str, NDArray[np.bool_]] = {}

    def paint(name: str, cover: NDArray[np.float32], colour: tuple[int, int, int]) -> None:
        nonlocal image
        image = image * (1 - cover[..., None]) + cover[..., None] * np.asarray(colour, np.float32)
        masks[name] = cover > 0.5

    def around(row: int, column: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        y, x = centre(row, column)
        return _Y - y - scene.shift[0], _X - x - scene.shift[1]

    for i, t in enumerate(scene.things):
        paint(f"thing{i}", coverage(t.shape, SIZES[t.size], *around(t.row, t.column)), COLOURS[t.colour])
    if scene.mark:
        paint("mark", coverage("diamond", MARK_RADIUS, *around(*scene.mark)), MARK_COLOUR)
    if scene.frame:
        paint("frame", _EDGE, FRAME_COLOUR)
    masks["background"] = ~np.any(list(masks.values()), axis=0)
    return np.rint(image).astype(np.uint8), masks
