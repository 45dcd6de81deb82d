"""What the spectrum of the update would be if it were noise: nulls of the stable rank and the Hill index.

- ``gaussian``: an isotropic Gaussian update of the stored energy, rounded as this one was. Per entry E[D^2] is
  ``grid_energy`` on the grid, s^2 + u^2/12 for a wide origin saved narrow, s^2 where nothing was rounded; u is that of
  W0, so rows and columns differ. None where rounding left fewer than 2% of the entries changed: a few entries have a
  heavier head. A Gaussian that is stored wider changes them all, and has its null whatever this update did.
- ``rounding``: white noise u U(-1/2, 1/2) on W0's own steps; none where the update carries no rounding.

Both are the deterministic leading singular values of geopd.diagnostics.noise_spectrum for the row and column sums of
those variances, so they cost one count of W0's steps by row and column, made once per origin. None is stored where that
closed form is far from draws (``noise_spectrum.holds``), nor of float16, whose rounding is not modelled, nor where
weights lie beyond the range of bf16, which have no step. Stable rank: energy over
the mean of sigma_1^2. Hill: (k-1) / sum log(sigma_i/sigma_k), times 1 + sd^2, with relative sd 1.2/k, the spread of
the k largest points of the Airy process of real matrices (drawn: .30 at k = 4, .14 at 8, .075 at 16, .040 at 32).

Source: geopd, validated in docs/log.md.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from geopd.diagnostics import hill
from geopd.diagnostics.bf16_grid import StepCounts, grid_energy, on_bf16_grid, outside_bf16, regime, white_energy
from geopd.diagnostics.comparison import Comparison, OriginMatrix
from geopd.diagnostics.gaussian_update import scale_for_energy
from geopd.diagnostics.noise_spectrum import NoiseSpectrum, first_square, holds, positions
from geopd.results import Null, setting

Array = NDArray[np.float64]
LEAST_DENSITY = 0.02
"""Share of changed entries below which an update has the heavy head of a few."""
_HILL_SD = 1.2  # relative sd of the Hill index, times k
_STEPS: WeakKeyDictionary[OriginMatrix, StepCounts] = WeakKeyDictionary()
_ROUNDING: WeakKeyDictionary[OriginMatrix, NoiseSpectrum | None] = WeakKeyDictionary()
_GAUSSIAN: WeakKeyDictionary[Comparison, NoiseSpectrum | None] = WeakKeyDictionary()


def nulls_stable_rank(comparison: Comparison) -> list[Null]:
    """Stable rank of a Gaussian update and of rounding alone."""
    found = []
    for name, noise, method in _noises(comparison):
        first = first_square(noise)
        if first is not None:
            mean, sd = 1 / first[0], first[1] / first[0]
            found.append(Null("stable_rank", setting(view="native"), name, mean, sd, 0, method))
    return found


def nulls_hill(comparison: Comparison) -> list[Null]:
    """Hill index of a Gaussian update and of rounding alone, for every k at which the update has one."""
    measured = zip(comparison.parameters.hill_k, hill.measure(comparison), strict=True)
    asked = [(k, item) for k, item in measured if item.value is not None]
    found = []
    for name, noise, method in _noises(comparison) if asked else []:
        for k, item in asked:
            squares = noise.leading(positions(k))
            if squares is None or not squares[0] > squares[-1] > 0:
                continue
            mean = 2 * (k - 1) / float(np.log(squares[:-1] / squares[-1]).sum()) * (1 + (_HILL_SD / k) ** 2)
            found.append(Null("hill_tail", item.setting, name, mean, mean * _HILL_SD / k, 0, method, item.is_default))
    return found


def _noises(comparison: Comparison) -> list[tuple[str, NoiseSpectrum, str]]:
    """Name, spectrum and method of every kind of noise that this update may be and that has a closed form."""
    rounding = regime(comparison)
    if comparison.update_is_zero or rounding is None:
        return []
    found = [("gaussian", _gaussian(comparison), "closed form, edge of a Gaussian as stored")]
    if rounding in ("on-grid", "one end"):
        found.append(("rounding", _rounding(comparison.origin), "closed form, edge of u U(-1/2, 1/2)"))
    return [(name, noise, method) for name, noise, method in found if noise is not None]


def _gaussian(comparison: Comparison) -> NoiseSpectrum | None:
    if comparison not in _GAUSSIAN:
        _GAUSSIAN[comparison] = _as_stored(comparison)
    return _GAUSSIAN[comparison]


def _as_stored(comparison: Comparison) -> NoiseSpectrum | None:
    """Spectrum of a Gaussian update as stored; None where it would not read as a Gaussian."""
    origin = comparison.origin
    if not on_bf16_grid(comparison.stored):
        return _alike(origin)
    if int(comparison.changed_counts("bf16").sum()) < LEAST_DENSITY * comparison.stored.numel():
        return None
    if outside_bf16(origin):
        return None
    s = scale_for_energy(comparison)
    if s is None:
        return None  # no more than rounding: that null stands beside
    step = _steps(origin).step
    unit = max(s, float(step[-1]))  # squares of tiny steps would underflow
    step, s = step / unit, s / unit
    return _noise(origin, grid_energy(step, s) if origin.on_grid else s * s + white_energy(step, "one end"))


def _rounding(origin: OriginMatrix) -> NoiseSpectrum | None:
    if origin not in _ROUNDING:
        steps = None if outside_bf16(origin) else _steps(origin)
        _ROUNDING[origin] = None if steps is None else _noise(origin, (steps.step / steps.step[-1]) ** 2)
    return _ROUNDING[origin]


def _alike(origin: OriginMatrix) -> NoiseSpectrum | None:
    """Entries of one variance."""
    m, n = origin.rows, origin.cols
    noise = NoiseSpectrum(np.full(m, n), np.full(n, m), max(origin.parameters.hill_k))
    one = np.ones((1, 1))
    return noise if holds(noise, max(m, n) ** 0.5 / (m * n), one, (one[0] * m, one[0] * n)) else None


def _noise(origin: OriginMatrix, energy: Array) -> NoiseSpectrum | None:
    """Noise of this energy per entry at each of W0's steps; None where it has no closed form."""
    steps = _steps(origin)
    rows, cols = steps.rows @ energy, steps.cols @ energy
    noise = NoiseSpectrum(rows, cols, max(origin.parameters.hill_k))
    largest = max(float((side @ energy**2).max()) for side in (steps.rows, steps.cols)) ** 0.5
    return noise if holds(noise, largest / float(rows.sum()), steps.cells @ energy, steps.sizes) else None


def _steps(origin: OriginMatrix) -> StepCounts:
    if origin not in _STEPS:
        _STEPS[origin] = StepCounts.of(origin.bins, origin.magnitude_counts)
    return _STEPS[origin]
