"""Pictures and maps as data URIs: what a page that needs no network is made of."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING

import numpy as np

from .palettes import DEFAULT, colour

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image

LOSSLESS = 256
"""Pictures up to this many pixels a side are PNG on the page, larger ones JPEG (``image.png`` is exact)."""
LARGEST = 1024
THUMBNAIL = 384
MAP_SIDE = 128
"""Longest side of a map on the page, pixels; ``maps.npz`` has all of it."""


def _uri(picture: Image, kind: str, **options: object) -> str:
    data = io.BytesIO()
    picture.save(data, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(data.getvalue()).decode()}"


def _within(picture: Image, side: int) -> Image:
    from PIL.Image import Resampling

    ratio = side / max(picture.size)
    if ratio >= 1:
        return picture
    width, height = (max(1, round(s * ratio)) for s in picture.size)
    return picture.resize((width, height), Resampling.BOX if picture.mode == "L" else Resampling.LANCZOS)


def png(image: NDArray[np.uint8]) -> bytes:
    """A picture, uint8 [y, x, rgb], as the bytes of a PNG file."""
    from PIL import Image

    data = io.BytesIO()
    Image.fromarray(image).save(data, "PNG", optimize=True)
    return data.getvalue()


def picture_uri(image: NDArray[np.uint8], side: int = LARGEST) -> str:
    """A picture, uint8 [y, x, rgb], at most ``side`` pixels a side."""
    from PIL import Image

    picture = _within(Image.fromarray(image), side)
    if max(picture.size) <= LOSSLESS:
        return _uri(picture, "PNG", optimize=True)
    return _uri(picture, "JPEG", quality=90, optimize=True)


Range = tuple[float, float]
"""The values drawn at no and at full strength: one range for all maps of a picture."""


def common_range(scores: NDArray[np.floating]) -> Range:
    """The range for all maps of an explanation: up to the largest score; from 0, or from the smallest score where even
    that is more than a tenth of the largest, since a veil over all of the picture would hide what differs.

    >>> common_range(np.array([[0.0, 2.0]])), common_range(np.array([[0.5, 2.0]])), common_range(np.array([-1.0, 0.0]))
    ((0.0, 2.0), (0.5, 2.0), (0.0, 1e-12))
    """
    low, high = float(scores.min()), max(float(scores.max()), 1e-12)
    return (low if 0.1 * high < low < high else 0.0), high


def levels(values: NDArray[np.floating], within: Range) -> NDArray[np.uint8]:
    """A map as grey levels; what lies outside the range is clipped."""
    low, high = within
    share = np.clip((np.asarray(values, np.float64) - low) / (high - low), 0, 1)
    return np.asarray(np.rint(share * 255), np.uint8)


def map_uri(values: NDArray[np.floating], within: Range) -> str:
    """A map, [y, x], as a grey picture on the common range; the page's filter gives it its colours."""
    from PIL import Image

    return _uri(_within(Image.fromarray(levels(values, within)), MAP_SIDE), "PNG", optimize=True)


def overlay(image: NDArray[np.uint8], values: NDArray[np.floating], within: Range) -> NDArray[np.uint8]:
    """A map laid over its picture, uint8 [y, x, rgb]: the stronger the map, the less of the picture shows.

    The picture is turned grey first, so that every colour that is seen is the map's.
    """
    from PIL import Image

    grey = levels(values, within)
    if grey.shape != image.shape[:2]:
        grey = np.asarray(Image.fromarray(grey).resize((image.shape[1], image.shape[0]), Image.Resampling.BICUBIC))
    strength = grey[..., None] / 255
    luminance = (image @ np.array([0.299, 0.587, 0.114]))[..., None]
    mixed = (1 - 0.85 * strength) * luminance + 0.85 * strength * colour(grey / 255, DEFAULT)
    return np.asarray(np.rint(np.clip(mixed, 0, 255)), np.uint8)


def difference(before: NDArray[np.uint8], after: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Mean absolute difference of two pictures over the colours, [y, x], 0..1."""
    return np.asarray(abs(before.astype(np.float32) - after.astype(np.float32)).mean(-1) / 255, np.float32)
