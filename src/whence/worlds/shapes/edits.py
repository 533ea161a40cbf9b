"""Edits of `shapes` pictures and their exact judge: did the edit do what was asked, and is the rest as it was?

An edit is a prompt, another prompt, and its kind. What is on the first picture counts, not what its prompt asked for:
the judge reads both pictures, takes as target what the second prompt asks for and the first did not, and as the rest
everything of the first picture that the edit does not name.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from .oracle import Reading, Seen, judge, parse, read
from .scenes import SIZE

NEAR = 6.0
"""Pixels that an object may move and still be where it was."""


@dataclass(frozen=True)
class Edit:
    """``kind``: one of the types of `metrics/editval.py`. ``old`` and ``new``: the words that are exchanged, where one
    stands for the other; of pictures of anything, the names of what was there and what shall be. ``relation``: where
    the new shall stand to the old, for a detector."""

    kind: str
    before: str
    after: str
    old: str = ""
    new: str = ""
    relation: str = ""


EDITS: tuple[Edit, ...] = (
    Edit("object_addition", "a red circle", "a red circle and a blue square"),
    Edit("object_addition", "a green triangle on sand", "a green triangle and a purple circle on sand"),
    Edit("positional_addition", "a red circle", "a red circle left of a blue square"),
    Edit("positional_addition", "a yellow square", "a yellow square above a green circle"),
    Edit("position_replacement", "a red circle left of a blue square", "a red circle right of a blue square"),
    Edit("position_replacement", "a green square above a red triangle", "a green square below a red triangle"),
    Edit("object_replacement", "a red circle left of a blue square", "a green triangle left of a blue square"),
    Edit("object_replacement", "a purple square above a red cross", "a blue circle above a red cross"),
    Edit("color", "a red circle left of a blue square", "a green circle left of a blue square", "red", "green"),
    Edit("color", "a yellow triangle and a red square", "a purple triangle and a red square", "yellow", "purple"),
    Edit("shape", "a red circle left of a blue square", "a red triangle left of a blue square", "circle", "triangle"),
    Edit("shape", "a green cross above a purple square", "a green circle above a purple square", "cross", "circle"),
    Edit("size", "a small red circle left of a blue square", "a large red circle left of a blue square", "small",
         "large"),
    Edit("size", "a large green triangle", "a small green triangle", "large", "small"),
    Edit("background", "a red circle left of a blue square on sand", "a red circle left of a blue square on night",
         "sand", "night"),
    Edit("background", "a green triangle on fog", "a green triangle on moss", "fog", "moss"),
)  # fmt: skip
"""Two of each kind that the world has."""


@dataclass(frozen=True)
class Judged:
    """``success``: what was asked for is there. ``preserved``: share of the first picture's other traits that are as
    they were (None: not judged). ``moved``: mean change of the pixels that belong to no edited thing, 0..255."""

    success: bool
    preserved: float | None
    moved: float | None = None


def right_before(edit: Edit, image: NDArray[np.uint8]) -> bool:
    """Whether the first picture shows what its prompt asks for: else there is nothing to edit."""
    return all(judge(parse(edit.before), read(image)).values())


def judged(edit: Edit, before: NDArray[np.uint8], after: NDArray[np.uint8]) -> Judged:
    """Both pictures uint8 [y, x, rgb] of 64 x 64 pixels."""
    first, second = read(before), read(after)
    target, old = parse(edit.after), parse(edit.before)
    wanted = [t for t in target.things if t not in old.things]
    gone = [t for t in old.things if t not in target.things]
    named = [t for t in first.things if any(_is(t, g) for g in gone)]
    if edit.kind == "position_replacement":
        named = list(first.things)
    rest = [t for t in first.things if not any(t is n for n in named)]
    success, drawn = _found(wanted, second)
    # What was exchanged must not stand there still, beside the new.
    success &= not any(_is(t, g) for g in gone for t in second.things if not any(t is d for d in drawn))
    if edit.kind in ("positional_addition", "position_replacement"):
        success &= judge(target, second)["relation"]
    if edit.kind == "background":
        success &= second.background == target.background
    traits = [_still(t, second.things) for t in rest]
    for thing in named:  # it stays but for what was to change
        near = [t for t in second.things if _near(thing, t)]
        if edit.kind == "position_replacement":
            traits.append(any(_alike(thing, t) for t in second.things))
        elif edit.kind in ("color", "shape", "size"):
            traits.append(any(edit.kind == "size" or t.size == thing.size for t in near))
    traits += [(first.mark is None) == (second.mark is None), first.frame == second.frame]
    traits += [first.background == second.background] if edit.kind != "background" else []
    # As many other things as before: an edit that was not made takes nothing away from the rest.
    traits.append(len(second.things) - len(drawn) == len(first.things) - min(len(gone), len(drawn)))
    apart = _apart(first, second, rest, edit)
    change = np.abs(before.astype(float) - after).mean(-1)
    return Judged(bool(success), float(np.mean(traits)), float(change[apart].mean()) if apart.any() else 0.0)


def _found(wanted: list[tuple[str, str, str]], seen: Reading) -> tuple[bool, list[Seen]]:
    """Whether each is there, as an object of its own; and these objects."""
    left, found = list(seen.things), []
    for asked in wanted:
        match = next((i for i, t in enumerate(left) if _is(t, asked)), None)
        if match is not None:
            found.append(left.pop(match))
    return len(found) == len(wanted), found


def _is(seen: Seen, asked: tuple[str, str, str]) -> bool:
    colour, shape, size = asked
    return seen.colour == colour and seen.shape == shape and (not size or seen.size == size)


def _near(a: Seen, b: Seen) -> bool:
    return bool(np.hypot(a.y - b.y, a.x - b.x) <= NEAR)


def _alike(a: Seen, b: Seen) -> bool:
    return (a.colour, a.shape, a.size) == (b.colour, b.shape, b.size)


def _still(thing: Seen, others: Iterable[Seen]) -> bool:
    return any(_alike(t, thing) and _near(t, thing) for t in others)


def _apart(first: Reading, second: Reading, rest: list[Seen], edit: Edit) -> NDArray[np.bool_]:
    """Pixels of no edited thing, before or after, with a pixel around it; for a background, those of the things."""
    if edit.kind == "background":
        return _union([t.mask for t in first.things])
    moved = [t.mask for t in first.things if not any(t is r for r in rest)]
    moved += [t.mask for t in second.things if not _still(t, rest)]
    apart: NDArray[np.bool_] = ~ndimage.binary_dilation(_union(moved))
    return apart


def _union(masks: list[NDArray[np.bool_]]) -> NDArray[np.bool_]:
    found = np.zeros((SIZE, SIZE), bool)
    for mask in masks:
        found |= mask
    return found
