"""Named random streams: the same names give the same numbers, whatever else was drawn before.

Two arms of an experiment share their seeds by drawing from streams of the same names; two purposes never share a
stream by accident.

>>> bool((stream("noise", 7).normal(size=3) == stream("noise", 7).normal(size=3)).all())
True
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def seed_of(*names: object) -> int:
    """A seed of 63 bits made of the names' text."""
    text = "\x1f".join(map(str, names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def stream(*names: object) -> np.random.Generator:
    """A numpy generator of its own for these names."""
    return np.random.default_rng(seed_of(*names))


def torch_stream(*names: object) -> torch.Generator:
    """A torch generator (on the CPU, so that every device sees the same numbers) of its own for these names."""
    import torch

    return torch.Generator().manual_seed(seed_of(*names))
