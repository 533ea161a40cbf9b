"""The captioned pictures of the world `emoji`: Noto's emoji, drawn at 64 x 64, with their Unicode names.

The captions are the names as a tokenizer of letters can read them: hyphens are spaces, and the digits of a code number
are read out. About one picture in twenty is held out: no training sees it, so that it is a control for every claim of
the form "this training picture caused that". Only pictures of several words, all of which other pictures teach, are
held out: a caption of unknown words asks nothing of a model.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...engine.randomness import stream

KEY = "whence-emoji-1"
"""The key that decides which pictures are held out."""
HELD_OUT = 48
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class Captioned(NamedTuple):
    """A picture, uint8 [y, x, rgb], and what it is called."""

    caption: str
    picture: NDArray[np.uint8]


def plain(name: str) -> str:
    """A Unicode name in words of letters.

    >>> plain("squared cjk unified ideograph-55b6")
    'squared cjk unified ideograph five five b six'
    """
    return " ".join(re.findall("[a-z]+", re.sub(r"\d", lambda d: f" {_DIGITS[int(d[0])]} ", name.lower())))


@dataclass(frozen=True, eq=False)
class Emoji:
    """Captioned pictures in a fixed order: the ``Examples`` that methods of influence take."""

    captions: tuple[str, ...]
    pictures: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, i: int) -> Captioned:
        return Captioned(self.captions[i], self.pictures[i])

    def label(self, i: int) -> str:
        return self.captions[i]

    def fingerprint(self) -> str:
        """A hash of captions and pictures in their order."""
        h = hashlib.sha256("\n".join(self.captions).encode())
        h.update(self.pictures.tobytes())
        return h.hexdigest()[:16]


@cache
def everything() -> Emoji:
    """All 951 pictures in the order of their code points."""
    with np.load(Path(__file__).parent / "data" / "emoji64.npz", allow_pickle=False) as stored:
        return Emoji(tuple(plain(str(c)) for c in stored["caption"]), stored["images"])


def words() -> list[str]:
    """Each word that occurs in a caption, in alphabetical order."""
    return sorted({w for caption in everything().captions for w in caption.split()})


@cache
def _held_out(key: str) -> frozenset[int]:
    captions = everything().captions
    taught = Counter(w for c in captions for w in set(c.split()))
    chosen: list[int] = []
    for i in stream("emoji", key, "held out").permutation(len(captions)):
        own = set(captions[i].split())
        if len(chosen) < HELD_OUT and len(own) > 1 and all(taught[w] > 1 for w in own):
            chosen.append(int(i))
            taught.subtract(own)
    return frozenset(chosen)


def training_set(key: str = KEY) -> Emoji:
    """The pictures that the model was trained on."""
    return _those(sorted(set(range(len(everything()))) - _held_out(key)))


def held_out(key: str = KEY) -> Emoji:
    """The pictures that no training sees."""
    return _those(sorted(_held_out(key)))


def _those(which: list[int]) -> Emoji:
    everyone = everything()
    return Emoji(tuple(everyone.captions[i] for i in which), everyone.pictures[which])
