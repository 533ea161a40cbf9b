"""Score: how good something is, over replicates, with its interval."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Score:
    """Mean of ``values`` (one per replicate, 0..1 for most) with a paired-t interval at ``level``.

    >>> print(Score.of("pointing", "share of pictures", [1.0, 1.0, 0.0, 1.0]))
    pointing 0.750 [-0.046, 1.546] share of pictures, n=4
    """

    name: str
    unit: str
    values: tuple[float, ...]
    mean: float
    interval: tuple[float, float]
    level: float = 0.95
    details: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, unit: str, values: Any, level: float = 0.95, **details: Any) -> Score:
        """From replicate values; needs at least two for an interval (else it is infinite)."""
        import numpy as np
        from scipy import stats

        v = np.asarray(list(values), float)
        if not len(v) or not np.isfinite(v).all():
            raise ValueError(f"{name}: {len(v)} values, {int((~np.isfinite(v)).sum())} of them not finite")
        mean = float(v.mean())
        half = float("inf")
        if len(v) > 1:
            half = float(stats.t.ppf(0.5 + level / 2, len(v) - 1) * v.std(ddof=1) / np.sqrt(len(v)))
        ends = (mean - half, mean + half)
        if len(v) > 1 and (v == 1).all():
            # Scores of 0..1 that all stand at the end: the t interval would be a point. Exact, as for coins.
            ends = (((1 - level) / 2) ** (1 / len(v)), 1.0)
        return cls(name, unit, tuple(map(float, v)), mean, ends, level, details)

    def record(self) -> dict[str, Any]:
        """The JSON record."""
        return {
            "name": self.name,
            "unit": self.unit,
            "mean": self.mean,
            "interval": list(self.interval),
            "level": self.level,
            "n": len(self.values),
            **self.details,
        }

    def _repr_html_(self) -> str:
        from .report.fragments import score_html

        return score_html(self)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.name} {self.mean:.3f} [{low:.3f}, {high:.3f}] {self.unit}, n={len(self.values)}"
