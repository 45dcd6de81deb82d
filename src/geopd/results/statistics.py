"""Intervals and weighted means. Nothing here knows what a table is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtri, stdtrit


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


def wilson_interval(share: float, n: int, level: float = 0.95) -> Interval:
    """Wilson's score interval of a binomial proportion ``share`` observed in ``n`` trials.

    Unlike the normal interval it stays inside [0, 1] and keeps its coverage near the ends.

    Raises:
        ValueError: if ``share`` is no proportion, ``n`` is not positive, or the level is outside (0, 1).
    """
    _check_level(level)
    if not 0 <= share <= 1:
        raise ValueError(f"{share} is not a proportion; give successes over trials")
    if n <= 0:
        raise ValueError(f"a proportion needs at least one trial, got n={n}")
    z = float(ndtri(0.5 + level / 2))
    scale = 1 + z * z / n
    centre = (share + z * z / (2 * n)) / scale
    half = z / scale * float(np.sqrt(share * (1 - share) / n + z * z / (4 * n * n)))
    # The ends may touch 0 and 1; rounding must not push them past.
    return Interval(share, max(0.0, centre - half), min(1.0, centre + half), n)


def weighted_mean(values: Sequence[float], weights: Sequence[float]) -> float:
    """``sum(w * x) / sum(w)``.

    Raises:
        ValueError: if the lengths differ, a weight is negative, or the weights sum to zero.
    """
    x, w = np.asarray(values, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    if x.shape != w.shape:
        raise ValueError(f"{x.size} values but {w.size} weights")
    if (w < 0).any() or not w.sum() > 0:
        raise ValueError("weights must be non-negative with a positive sum")
    return float((w * x).sum() / w.sum())


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level {level} is not between 0 and 1; 0.95 is usual")
