"""The colours of maps and of verdicts: ordered by lightness, so that they read without colour vision and in grey print.

One table serves the baked pictures of notebooks and the page's own colouring (an SVG filter over grey maps).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

PALETTES: Mapping[str, str] = MappingProxyType(
    {
        "viridis": "440154 482878 3e4a89 31688e 26828e 1f9e89 35b779 6dcd59 b4de2c fde725",
        "cividis": "00204d 00306f 2a406c 48526b 5e626e 727374 878479 9e9677 b6a971 d0be67 ead357 ffea46",
        "inferno": "000004 1b0c42 4b0c6b 781c6d a52c60 cf4446 ed6925 fb9a06 f7d03c fcffa4",
        "jet": "00007f 0000ff 007fff 00ffff 7fff7f ffff00 ff7f00 ff0000 7f0000",
    }
)
"""Anchor colours, evenly spaced from 0 to 1. ``jet`` is what older tools use; its lightness is not ordered."""

DEFAULT = "viridis"


def anchors(palette: str = DEFAULT) -> NDArray[np.float64]:
    """The anchor colours of a palette, [anchor, rgb], 0..1."""
    return np.array([[int(h[i : i + 2], 16) for i in (0, 2, 4)] for h in PALETTES[palette].split()]) / 255


def colour(values: NDArray[np.floating], palette: str = DEFAULT) -> NDArray[np.uint8]:
    """Colours of values 0..1 (clipped), [..., rgb].

    >>> colour(np.array([0.0, 1.0])).tolist()
    [[68, 1, 84], [253, 231, 37]]
    """
    table = anchors(palette)
    at = np.linspace(0, 1, len(table))
    clipped = np.clip(values, 0, 1)
    mixed = np.stack([np.interp(clipped, at, c) for c in table.T], -1)
    return np.asarray(np.rint(mixed * 255), np.uint8)


def filter_tables(palette: str) -> tuple[str, str, str]:
    """The palette as the ``tableValues`` of an SVG ``feComponentTransfer``: red, green, blue."""
    red, green, blue = (" ".join(f"{v:.3f}" for v in c) for c in anchors(palette).T)
    return red, green, blue
