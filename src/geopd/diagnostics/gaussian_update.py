"""The size-matched Gaussian null of the entrywise metrics: what an update without any structure would have scored.

The null is an isotropic Gaussian update of scale s before rounding. Matching the *stored* update keeps it from being
rounded twice: s is solved so that the energy after rounding equals ||dW||^2 (sparsity), or the density after rounding
equals the observed one (overlaps). The regimes are those of geopd.diagnostics.bf16_grid. All expectations are sums over
the bf16 magnitude bins of W0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import erfc

from geopd.diagnostics.bf16_grid import (
    FINITE,
    INWARD,
    OUTWARD,
    UNITS,
    exponent_counts,
    grid_energy,
    on_bf16_grid,
    outside_bf16,
    regime,
    white_energy,
)
from geopd.diagnostics.comparison import Comparison

Array = NDArray[np.float64]
_MAGNITUDES = (np.arange(FINITE, dtype=np.uint32) << 16).view(np.float32).astype(np.float64)
_EXACT = 1e-12  # relative, of a sum over bins: a root no better than this is one
_MARGIN = 1e-9  # by which a bracket is widened: exp(log x) may fall short of x
_VISIBLE_STEP = 2.0**-8  # smallest relative step of bf16: below it eta decides nothing in the bf16 view
_DENSITIES: WeakKeyDictionary[Comparison, dict[str, Array | None]] = WeakKeyDictionary()


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


def closed_regime(comparison: Comparison, view: str) -> str | None:
    """The rounding regime where visible changes have a closed form; None where none is valid."""
    if outside_bf16(comparison.origin):
        return None
    found = regime(comparison, view)
    if found == "one end":
        return None  # W0's own place in its rounding cell decides
    if found != "none" and comparison.parameters.eta >= _VISIBLE_STEP:
        return None
    return found  # None for float16, whose steps are comparable to eta


def visible_probability(index: NDArray[np.int64], s: float, form: str, eta: float) -> Array:
    """Probability that an entry of each magnitude bin changes visibly under a Gaussian change of scale s.

    on-grid: Q(h+/s) + Q(h-/s) with the exact half-gaps h to the neighbouring bf16 numbers. both ends:
    E[min(1, |d| / u)], W0 uniform within its rounding cell of width u. none: |d| > eta max(|w|, |w + d|) solved for d
    on either side. Q(x) = erfc(x / sqrt 2) / 2.
    """
    root = s * math.sqrt(2.0)
    if form == "on-grid":
        result = 0.5 * erfc(OUTWARD[index] / 2 / root) + 0.5 * erfc(INWARD[index] / 2 / root)
    elif form == "both ends":
        u = OUTWARD[index]
        steps = np.minimum(u / root, 1e3)  # beyond it both terms have their limits, and squares would overflow
        result = erfc(steps) + math.sqrt(2 / math.pi) * (s / u) * -np.expm1(-(steps**2))
    else:
        cut = eta * _MAGNITUDES[index]
        result = 0.5 * erfc(cut / (1 - eta) / root) + 0.5 * erfc(cut / root)
    return np.asarray(result, dtype=np.float64)


def _solve(increasing: Callable[[float], float], target: float, start: float) -> float | None:
    if abs(increasing(start) - target) <= _EXACT * target:
        return start
    low = high = start
    while increasing(low) > target:
        low /= 8
        if low < 1e-290:
            return None
    while increasing(high) < target:
        high *= 8
        if high > 1e290:
            return None
    ends = math.log(low) - _MARGIN, math.log(high) + _MARGIN
    root: float = brentq(lambda x: increasing(math.exp(x)) - target, *ends, xtol=1e-13)
    return math.exp(root)


def scale_for_energy(comparison: Comparison) -> float | None:
    """Scale s of the Gaussian whose energy, stored as this update was, is ||dW||^2; None below the rounding floor."""
    rms = comparison.update_norm[0] / math.sqrt(comparison.stored.numel())
    if not on_bf16_grid(comparison.stored):
        return rms
    counts = exponent_counts(comparison.origin.magnitude_counts)
    step, counts = UNITS[counts > 0], counts[counts > 0]
    if comparison.origin.on_grid:
        return scale_of_stored(counts, step, comparison.update_norm[0])
    # a wide origin saved narrow: the stored update holds the rounding of one end
    rest = rms**2 - float(counts @ white_energy(step, "one end")) / counts.sum()
    return math.sqrt(rest) if rest > 0 else None


def scale_of_stored(counts: Array, step: Array, norm: float) -> float:
    """Scale of the Gaussian update whose norm after rounding onto the grid is ``norm`` > 0.

    ``counts``, ``step``: entries per step size u and the sizes, in the unit of the norm.
    """
    found = _solve(lambda s: float(counts @ grid_energy(step, s)), norm**2, norm / math.sqrt(counts.sum()))
    assert found is not None, "the energy rises from 0 without bound"
    return found


def gaussian_sparsity(comparison: Comparison, view: str) -> tuple[float, float, str] | None:
    """Mean and sd of the sparsity of a Gaussian update of the same stored energy; None where no closed form holds."""
    form = closed_regime(comparison, view)
    if form is None or comparison.update_is_zero:
        return None
    bins = _bins(comparison, view)
    s = scale_for_energy(comparison)
    if s is None:
        return None
    p = visible_probability(bins.index, s, form, comparison.parameters.eta)
    n = bins.count.sum()
    sd = math.sqrt(float(bins.count @ (p * (1 - p)))) / n
    return 1.0 - float(bins.count @ p) / n, sd, f"closed form, {form}, energy-matched"


def gaussian_overlap(comparison: Comparison, view: str, weight: Array) -> tuple[float, str] | None:
    """Expected overlap of a mask with the visible changes of a Gaussian update of the observed density.

    ``weight``: how many entries of each bf16 magnitude of W0 the mask takes.
    """
    p = _density_matched(comparison, view)
    if p is None:
        return None
    bins = _bins(comparison, view)
    method = f"closed form, {closed_regime(comparison, view)}, density-matched"
    return float(weight[bins.index] @ p) / float(bins.count @ p), method


def _density_matched(comparison: Comparison, view: str) -> Array | None:
    """Probability of a visible change per non-empty bin, of the observed density in all; solved once for all masks."""
    kept = _DENSITIES.setdefault(comparison, {})
    if view not in kept:
        kept[view] = _match_density(comparison, view)
    return kept[view]


def _match_density(comparison: Comparison, view: str) -> Array | None:
    form = closed_regime(comparison, view)
    bins = _bins(comparison, view)
    total = float(bins.changed.sum())
    if form is None or total == 0:
        return None
    if total == bins.count.sum():
        return np.ones(len(bins.index))
    eta = comparison.parameters.eta
    start = float(OUTWARD[bins.index].mean())
    s = _solve(lambda x: float(bins.count @ visible_probability(bins.index, x, form, eta)), total, start)
    return None if s is None else visible_probability(bins.index, s, form, eta)


def permuted_overlap(comparison: Comparison, view: str, weight: Array) -> tuple[float, float]:
    """Mean and sd of a mask's overlap when the changes are permuted among entries of equal |W0|.

    sum_b changed_b (mask share of bin b) / changed: keeps norm, density and low-magnitude overlap exactly.
    ``weight``: how many entries of each bf16 magnitude of W0 the mask takes.
    """
    bins = _bins(comparison, view)
    share = weight[bins.index] / bins.count
    total = bins.changed.sum()
    spare = np.maximum(bins.count - 1, 1)
    variance = bins.changed * share * (1 - share) * (bins.count - bins.changed) / spare
    return float(bins.changed @ share / total), math.sqrt(float(variance.sum())) / float(total)
