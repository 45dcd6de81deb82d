"""Intervals of means, and what nulls explain of a contrast. Nothing here knows what a table is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit


@dataclass(frozen=True, slots=True)
class Interval:
    """A point estimate with a two-sided confidence interval from ``n`` independent replicates or trials."""

    estimate: float
    low: float
    high: float
    n: int

    @property
    def sign(self) -> int:
        """1 or -1 where the interval excludes zero on that side, else 0."""
        return 1 if self.low > 0 else -1 if self.high < 0 else 0

    def within(self, margin: float) -> bool:
        """Whether the whole interval lies within ``±margin``.

        On a 90% interval this is the two one-sided tests procedure at 5%.
        """
        return -margin < self.low and self.high < margin


def t_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Student-t interval of a mean: ``mean ± t_(n-1) * s / sqrt(n)``, in the values' own unit.

    The replicates must be independent: here one value per seed, never one per matrix.

    Raises:
        ValueError: with fewer than two values, or a level outside (0, 1).
    """
    _check_level(level)
    n = len(values)
    if n < 2:
        raise ValueError(f"an interval needs at least two replicates, got {n}; add seeds")
    array = np.asarray(values, dtype=np.float64)
    mean = float(array.mean())
    half = float(stdtrit(n - 1, 0.5 + level / 2) * array.std(ddof=1) / np.sqrt(n))
    return Interval(mean, mean - half, mean + half, n)


def explained_share(contrast: float, null_contrast: float) -> float | None:
    """Share of a contrast of log values that the matched nulls already have: ``1 - delta r / delta log(value)``.

    ``r = log(value / null)``, so this is ``null_contrast / contrast``, both differences of logs (or their means over
    seeds). 1 means the nulls differ just as much, 0 that they do not differ, below 0 that they differ the other way.
    None where the values are equal.
    """
    return null_contrast / contrast if contrast else None


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level {level} is not between 0 and 1; 0.95 is usual")
