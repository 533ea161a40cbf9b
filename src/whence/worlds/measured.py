"""What the trial of a claim measured, where the answer is no map and no ranking: an effect, a rate, a gain.

A Card names such a trial as ``world.module.function``. The function takes the method's verb (its settings class), the
number of replicates, the model (None: the world's own) and ``advance``, and gives a :class:`Measured`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Measured:
    """One number per replicate: of the method (``values``) and, on the same replicates, of each control.

    ``chance``: the number that is worth nothing. ``replicate``: what is drawn anew ("seed", "prompt", ...).
    ``details``: what else was counted, JSON data.
    """

    name: str
    unit: str
    replicate: str
    values: tuple[float, ...]
    controls: Mapping[str, tuple[float, ...]]
    chance: float = 0.0
    details: Mapping[str, Any] = field(default_factory=dict)


Measure = Callable[..., Measured]
"""``measure(verb, replicates, model, advance) -> Measured``"""
