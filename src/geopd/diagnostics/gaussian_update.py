"""The size-matched Gaussian null of the entrywise metrics: what an update without any structure would have scored.

The null is an isotropic Gaussian update of scale s before rounding. Matching the *stored* update keeps it from being
rounded twice: s is solved so that the energy after rounding equals ||dW||^2 (sparsity), or the density after rounding
equals the observed one (overlaps). Two rounding regimes: W0 on the bf16 grid (training started from it) and off it
(both ends are cast). All expectations are sums over the bf16 magnitude bins of W0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import erfc

from geopd.diagnostics.bf16_grid import on_bf16_grid
from geopd.diagnostics.comparison import Comparison
from geopd.spectral import Mask

Array = NDArray[np.float64]
_FINITE = 0x7F80  # first magnitude index that is no finite bf16 number
_MAGNITUDES = (np.arange(_FINITE, dtype=np.uint32) << 16).view(np.float32).astype(np.float64)
_STEPS = np.diff(_MAGNITUDES)
# distance to the next magnitude away from zero (the ULP), and towards zero; zero has the same neighbour either way
_OUTWARD: Array = np.append(_STEPS, _STEPS[-1])
_INWARD: Array = np.append(_STEPS[0], _STEPS)
_VISIBLE_STEP = 2.0**-8  # smallest relative step of bf16: below it eta decides nothing in the bf16 view


@dataclass(frozen=True)
class _Bins:
    """Non-empty magnitude bins of W0: their index, how many entries each holds, and how many of those changed."""

    index: NDArray[np.int64]
    count: Array
    changed: Array


def _bins(comparison: Comparison, view: str) -> _Bins:
    count = comparison.origin.magnitude_counts
    index = np.flatnonzero(count)
    return _Bins(index, count[index].astype(np.float64), comparison.changed_counts(view)[index].astype(np.float64))


def _regime(comparison: Comparison, view: str) -> str | None:
    """``on-grid``, ``off-grid`` or ``native``; None where no closed form is valid."""
    if comparison.origin.magnitude_counts[_FINITE:].any():
        return None  # weights beyond the range of bf16 have no step to round by
    if view == "bf16":
        if comparison.parameters.eta >= _VISIBLE_STEP:
            return None
        return "on-grid" if comparison.origin.on_grid else "off-grid"
    if torch.float16 in (comparison.origin.stored.dtype, comparison.stored.dtype):
        return None  # its steps are comparable to eta
    if not on_bf16_grid(comparison.stored):
        return "native"
    # bf16 numbers, however stored: they move in bf16's steps
    return "on-grid" if comparison.origin.on_grid and comparison.parameters.eta < _VISIBLE_STEP else None


def visible_probability(index: NDArray[np.int64], s: float, regime: str, eta: float) -> Array:
    """Probability that an entry of each magnitude bin changes visibly under a Gaussian change of scale s.

    on-grid: Q(h+/s) + Q(h-/s) with the exact half-gaps h to the neighbouring bf16 numbers. off-grid:
    E[min(1, |d| / u)], W0 uniform within its rounding cell of width u. native: |d| > eta max(|w|, |w + d|) solved
    for d on either side. Q(x) = erfc(x / sqrt 2) / 2.
    """
    root = s * math.sqrt(2.0)
    if regime == "on-grid":
        result = 0.5 * erfc(_OUTWARD[index] / 2 / root) + 0.5 * erfc(_INWARD[index] / 2 / root)
    elif regime == "off-grid":
        u = _OUTWARD[index]
        steps = np.minimum(u / root, 1e3)  # beyond it both terms have their limits, and squares would overflow
        result = erfc(steps) + math.sqrt(2 / math.pi) * (s / u) * -np.expm1(-(steps**2))
    else:
        cut = eta * _MAGNITUDES[index]
        result = 0.5 * erfc(cut / (1 - eta) / root) + 0.5 * erfc(cut / root)
    return np.asarray(result, dtype=np.float64)


def stored_energy(index: NDArray[np.int64], count: Array, s: float) -> float:
    """Expected energy of a Gaussian update of scale s after rounding onto the grid, summed over entries.

    Per entry u^2 sum_k (2k-1) erfc((k - 1/2) u / (s sqrt 2)) for s <= 2u, and s^2 + u^2/12 beyond, where the two agree
    to rounding.
    """
    units, inverse = np.unique(_OUTWARD[index], return_inverse=True)
    counts = np.bincount(inverse, weights=count)
    k = np.arange(1, 25, dtype=np.float64)
    series = (2 * k - 1) * erfc((k - 0.5) * units[:, None] / (s * math.sqrt(2.0)))
    energy = np.where(s <= 2 * units, units**2 * series.sum(axis=1), s**2 + units**2 / 12)
    return float(counts @ energy)


def _solve(increasing: Callable[[float], float], target: float, start: float) -> float | None:
    low = high = start
    while increasing(low) > target:
        low /= 8
        if low < 1e-290:
            return None
    while increasing(high) < target:
        high *= 8
        if high > 1e290:
            return None
    if low == high:
        return low
    root: float = brentq(lambda x: increasing(math.exp(x)) - target, math.log(low), math.log(high), xtol=1e-13)
    return math.exp(root)


def scale_for_energy(comparison: Comparison) -> float | None:
    """Scale s of the Gaussian whose energy, stored as this update was, is ||dW||^2; None below the rounding floor."""
    bins = _bins(comparison, "bf16")
    rms = comparison.update_norm[0] / math.sqrt(comparison.stored.numel())
    if not on_bf16_grid(comparison.stored):
        return rms
    energy = comparison.update_norm[0] ** 2
    if comparison.origin.on_grid:
        return _solve(lambda s: stored_energy(bins.index, bins.count, s), energy, rms)
    # a wide origin saved narrow: the stored update holds the rounding of one end, u^2/12 an entry
    rest = energy / comparison.stored.numel() - float(bins.count @ _OUTWARD[bins.index] ** 2) / bins.count.sum() / 12
    return math.sqrt(rest) if rest > 0 else None


def gaussian_sparsity(comparison: Comparison, view: str) -> tuple[float, float, str] | None:
    """Mean and sd of the sparsity of a Gaussian update of the same stored energy; None where no closed form holds."""
    regime = _regime(comparison, view)
    if regime is None or comparison.update_is_zero:
        return None
    bins = _bins(comparison, view)
    s = scale_for_energy(comparison)
    if s is None:
        return None
    p = visible_probability(bins.index, s, regime, comparison.parameters.eta)
    n = bins.count.sum()
    sd = math.sqrt(float(bins.count @ (p * (1 - p)))) / n
    return 1.0 - float(bins.count @ p) / n, sd, f"closed form, {regime}, energy-matched"


def gaussian_overlap(comparison: Comparison, view: str, mask: Mask) -> tuple[float, str] | None:
    """Expected overlap of a mask with the visible changes of a Gaussian update of the observed density."""
    regime = _regime(comparison, view)
    bins = _bins(comparison, view)
    total, n = bins.changed.sum(), bins.count.sum()
    if regime is None or total == 0:
        return None
    eta = comparison.parameters.eta
    method = f"closed form, {regime}, density-matched"
    inside = mask.weight_by_bin(comparison.origin.bins)[bins.index]
    if total == n:
        return float(inside.sum() / n), method
    start = float(_OUTWARD[bins.index].mean())
    s = _solve(lambda x: float(bins.count @ visible_probability(bins.index, x, regime, eta)), float(total), start)
    if s is None:
        return None
    p = visible_probability(bins.index, s, regime, eta)
    return float(inside @ p) / float(bins.count @ p), method


def permuted_overlap(comparison: Comparison, view: str, mask: Mask) -> tuple[float, float]:
    """Mean and sd of a mask's overlap when the changes are permuted among entries of equal |W0|.

    sum_b changed_b (mask share of bin b) / changed: keeps density and low-magnitude overlap exactly.
    """
    bins = _bins(comparison, view)
    share = mask.weight_by_bin(comparison.origin.bins)[bins.index] / bins.count
    total = bins.changed.sum()
    spare = np.maximum(bins.count - 1, 1)
    variance = bins.changed * share * (1 - share) * (bins.count - bins.changed) / spare
    return float(bins.changed @ share / total), math.sqrt(float(variance.sum())) / float(total)
