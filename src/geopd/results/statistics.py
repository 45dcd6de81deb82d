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


def t_interval_of(value: float, sd: float, freedom: int, level: float = 0.95) -> Interval:
    """Student-t interval of one value whose spread is known from elsewhere: ``value ± t_freedom * sd``.

    Raises:
        ValueError: with no degree of freedom, a negative spread, or a level outside (0, 1).
    """
    _check_level(level)
    if freedom < 1 or not sd >= 0:
        raise ValueError(f"a spread of {sd} with {freedom} degrees of freedom makes no interval")
    half = float(stdtrit(freedom, 0.5 + level / 2)) * sd
    return Interval(value, value - half, value + half, 1)


def explained_share(contrast: float, null_contrast: float) -> float | None:
    """Share of a contrast of log values that the matched nulls already have: ``1 - delta r / delta log(value)``.

    ``r = log(value / null)``, so this is ``null_contrast / contrast``, both differences of logs (or their means over
    seeds). 1 means the nulls differ just as much, 0 that they do not differ, below 0 that they differ the other way.
    None where the values are equal.
    """
    return null_contrast / contrast if contrast else None


MOST_REPLICATES = 1000
"""More replicates than this are no answer to how many would settle a question."""


def replicates_needed(
    values: Sequence[float], *, margin: float | None = None, spread: float | None = None
) -> int | None:
    """The smallest number of replicates that would decide either way, at the observed mean ``x`` and spread ``s``.

    Without a margin the least n >= 2 with ``t_(n-1, .975) * s / sqrt(n) < |x|``; with one the least with
    ``t_(n-1, .95) * s / sqrt(n) < |margin - |x||`` (two one-sided tests at 5%). As many decide about every second time,
    since mean and spread are themselves estimates.

    Args:
        values: one number a replicate.
        margin: of an equivalence.
        spread: the standard deviation, where it is known from elsewhere; by default that of the values.

    Returns:
        The number, or None where fewer than two values show no spread, or above ``MOST_REPLICATES``.
    """
    if not values or (len(values) < 2 and spread is None):
        return None
    array = np.asarray(values, dtype=np.float64)
    mean, spread = float(array.mean()), float(array.std(ddof=1)) if spread is None else spread
    room, tail = (abs(mean), 0.975) if margin is None else (abs(margin - abs(mean)), 0.95)
    n = np.arange(2, MOST_REPLICATES + 1)
    enough = stdtrit(n - 1, tail) * spread / np.sqrt(n) < room
    return int(n[enough][0]) if enough.any() else None


def within_share(differences: Sequence[float], contrasts: Sequence[float], share: float) -> bool:
    """Whether ``|mean(differences)| < share * |mean(contrasts)|`` is shown, by two one-sided paired t tests at 5%.

    The margin is itself measured: each test is of the mean of ``d -+ share * c`` over paired replicates, so its
    uncertainty enters.

    Raises:
        ValueError: if the two are not of one length, or hold fewer than two replicates.
    """
    d, c = np.asarray(differences, dtype=np.float64), np.asarray(contrasts, dtype=np.float64)
    if d.shape != c.shape:
        raise ValueError(f"{d.size} differences beside {c.size} contrasts; give one of each per replicate")
    c = c * np.sign(c.mean())
    upper, lower = t_interval(list(d - share * c), 0.90), t_interval(list(d + share * c), 0.90)
    return upper.high < 0 < lower.low


def isotonic(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """The non-decreasing sequence nearest to the values in weighted least squares, by pooling adjacent violators.

    Raises:
        ValueError: if values and weights differ in number, or a weight is not positive.
    """
    if len(values) != len(weights) or any(not w > 0 for w in weights):
        raise ValueError("isotonic: give every value a weight above zero")
    blocks: list[tuple[float, float, int]] = []
    for value, weight in zip(values, weights, strict=True):
        block = (float(value), float(weight), 1)
        while blocks and blocks[-1][0] >= block[0]:
            mean, mass, size = blocks.pop()
            total = mass + block[1]
            block = ((mean * mass + block[0] * block[1]) / total, total, size + block[2])
        blocks.append(block)
    return [mean for mean, _, size in blocks for _ in range(size)]


def first_crossing(x: Sequence[float], y: Sequence[float], level: float) -> float | None:
    """Where the line through ``(x, y)`` first reaches the level from below.

    Returns:
        The ``x``, linearly interpolated; None where ``y`` never reaches the level or starts at or above it.
    """
    if not y or y[0] >= level:
        return None
    for i in range(1, len(y)):
        if y[i] >= level:
            return float(x[i - 1] + (x[i] - x[i - 1]) * (level - y[i - 1]) / (y[i] - y[i - 1]))
    return None


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level {level} is not between 0 and 1; 0.95 is usual")
