"""Readout: the number being explained. A function of a picture (uint8 [y, x, rgb]) with a name and a unit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Readout:
    """``measure(image)`` gives the number, in ``unit``; larger means more of ``name``."""

    name: str
    unit: str
    measure: Callable[[NDArray[np.uint8]], float]

    def _repr_html_(self) -> str:
        from .report.fragments import readout_html

        return readout_html(self)

    def __call__(self, image: NDArray[np.uint8]) -> float:
        return float(self.measure(image))


def change_from(reference: NDArray[np.uint8]) -> Readout:
    """How far a picture is from ``reference``: mean absolute difference of its pixels, 0..1."""

    def measure(image: NDArray[np.uint8]) -> float:
        return float(abs(image.astype(float) - reference.astype(float)).mean() / 255)

    return Readout("change of the picture", "mean absolute difference, 0..1", measure)
