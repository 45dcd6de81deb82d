"""How many directions would the update spread over without its bf16 rounding? Stable rank without rounding noise.

Rounding to bf16 adds a matrix of nearly white noise to the update, which inflates the raw stable rank of a small one.
D: stored update, u: bf16 step of W0, c: noise energy per u^2 (1/12; 1/6 where both ends were rounded).

1. tau^2 = mean of D^2 - c u^2 over the entries with u <= tau, iterated: the signal's rms, from entries fine enough to
   show it.
2. Y = 1[u <= tau] D p/(p_i p_j), p the kept share, p_i and p_j those of row and column, floored at p/8;
   v = mean Y^2 - tau^2 (its noise), y = sigma_1(Y).
3. A = y^2 - v (m + n), theta^2 = (A + sqrt(A^2 - 4 v^2 m n))/2 (the spike behind y in white noise), and the
   estimate is m n tau^2 / theta^2.
4. Resolved iff all hold: y / (sqrt v (sqrt m + sqrt n)) >= 1.5; mean of D^2 - c u^2 at u in (tau/2, tau] over that
   below within [.85, 1.18], unless over 90% of the entries are kept; max(m max a^2, n max b^2) <= 40 for Y's leading
   vectors a, b, unless the first ratio exceeds 8.

Where resolved it is within 15% of the truth on planted updates (docs/log.md). Undefined where y does not leave the
noise at all. One leading singular triple by block Krylov iteration; the error column bounds its convergence only, not
the model. Where W+ is stored wider than bf16 the value is the raw stable rank, and ``view=bf16`` is stored beside it;
of a single row or column it is 1, like the raw one. No estimate is below 1. Undefined where weights beyond the range of
bf16 have no step u.
Source: geopd; spike formula as in Benaych-Georges and Nadakuditi (2012).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64
from numpy.typing import NDArray
from torch import Tensor

from geopd.diagnostics.bf16_grid import (
    ENERGY,
    EXPONENTS,
    OUTSIDE,
    UNITS,
    exponents,
    overflows,
    regime,
    rounded_views,
)
from geopd.diagnostics.comparison import Comparison
from geopd.diagnostics.parameters import Parameters
from geopd.diagnostics.update_size import ZERO, measure_stable_rank
from geopd.diagnostics.values import ok, undefined
from geopd.results import Measurement, Status, setting
from geopd.spectral import Operand, checked_scale, frobenius, leading_triples, row_blocks

METRICS = ("stable_rank_denoised",)
TOLERANCE = 1e-4  # of the leading singular value of Y: far inside what the estimate itself is good for
EDGE, CLEAR_EDGE = 1.5, 8.0
FLAT = (0.85, 1.18)
MOSTLY_KEPT = 0.9
SPIKE = 40.0
METHOD = "spike in rounding noise, block Krylov"
WIDE = "stored wider than bf16: as stored, no rounding to remove"
Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Denoised:
    """The estimate and its numerical error, None where there is none; and why it is not to be relied on."""

    value: float | None
    error: float | None
    reason: str | None


@dataclass(frozen=True, slots=True)
class _Kept:
    """Entries with u <= tau: the largest exponent kept, tau^2, and the energy ratio of the last octave to the rest."""

    exponent: int
    energy: float
    flatness: float


def default_setting(_: Parameters) -> str:
    """The headline's setting."""
    return setting(view="native")


def measure(comparison: Comparison) -> list[Measurement]:
    """The estimate in the native view, and in the bf16 view too where that view alone carries rounding."""
    return [_measure(comparison, view) for view in rounded_views(comparison)]


def _measure(comparison: Comparison, view: str) -> Measurement:
    name, default = setting(view=view), view == "native"
    if comparison.update_is_zero:
        return undefined(METRICS[0], name, ZERO, default=default)
    rounding = regime(comparison, view)
    if rounding is None:
        return undefined(METRICS[0], name, "float16: its rounding is not modelled", default=default)
    if rounding != "none" and overflows(comparison, view):
        return undefined(METRICS[0], name, OUTSIDE, default=default)
    if rounding == "none":
        raw = measure_stable_rank(comparison)[0]
        note = WIDE if raw.note is None else f"{WIDE}; {raw.note}"
        return replace(raw, metric=METRICS[0], setting=name, note=note, is_default=default)
    found = denoise(comparison.difference(view), comparison.origin.bins, ENERGY[rounding])
    if found.value is None:
        return undefined(METRICS[0], name, found.reason or "", default=default)
    method = f"{METHOD}, {rounding}"
    if found.reason is None:
        return ok(METRICS[0], name, found.value, found.error, method, default=default)
    return Measurement(
        METRICS[0], name, found.value, found.error, Status.UNRESOLVED, method, found.reason, is_default=default
    )


def denoise(D: Operand, bins: Operand, c: float) -> Denoised:
    """The estimate from an update, the bf16 magnitude indices of W0 and the noise energy per u^2."""
    m, n = D.shape
    scale = checked_scale(D)
    if scale == 0.0:
        return Denoised(None, None, "no entry changed in this view")
    if min(m, n) == 1:
        return Denoised(1.0, 0.0, None)
    kept = _keep(D, bins, c, scale)
    if kept is None:
        return Denoised(None, None, "no energy above rounding at any step size of W0")
    Y = _filled(D, bins, kept.exponent, scale)
    v = frobenius(Y)[0] ** 2 / (m * n) - kept.energy
    found = leading_triples(Y, 1, tolerance=TOLERANCE)
    y, residual, a, b = float(found.sigma[0]), float(found.sigma_error[0]), found.left[:, 0], found.right[:, 0]
    theta2 = _spike(y, v, m, n)
    if theta2 is None:
        return Denoised(None, None, "the leading singular value does not leave the rounding noise")
    value = max(1.0, m * n * kept.energy / theta2)
    lower = _spike(y - residual, v, m, n)
    error = max(1.0, m * n * kept.energy / lower) - value if lower else None
    edge = math.inf if v <= 0 else y / (math.sqrt(v) * (math.sqrt(m) + math.sqrt(n)))
    spike = max(m * float(a.abs().max()) ** 2, n * float(b.abs().max()) ** 2)
    return Denoised(value, error, _doubt(edge, Y.share, kept.flatness, spike))


def _doubt(edge: float, share: float, flatness: float, spike: float) -> str | None:
    if edge < EDGE:
        return f"leading singular value is {edge:.2f} of the rounding noise's edge, under {EDGE}"
    if share <= MOSTLY_KEPT and not FLAT[0] <= flatness <= FLAT[1]:
        return f"energy depends on the step size of W0 (ratio {flatness:.2f}): entries are not alike"
    if edge <= CLEAR_EDGE and spike > SPIKE:
        return f"leading vectors sit on few rows or columns (peak {spike:.0f} times the mean)"
    return None


def _keep(D: Operand, bins: Operand, c: float, scale: float) -> _Kept | None:
    """Iterate tau over the binary exponents of W0, D in units of ``scale``; None where no energy is left."""
    count, energy = np.zeros(EXPONENTS), np.zeros(EXPONENTS)
    for rows in row_blocks(D.shape):
        levels, block = exponents(bins[rows]).reshape(-1).long(), D[rows].double().reshape(-1) / scale
        count += torch.bincount(levels, minlength=EXPONENTS).cpu().numpy()
        energy += torch.bincount(levels, block * block, minlength=EXPONENTS).cpu().numpy()
    step = UNITS / scale
    # exponent 0 and 1 share one step; everything is cumulative, so only the order counts
    signal = energy - c * step**2 * count
    counts, signals = np.cumsum(count), np.cumsum(signal)
    tau, seen = math.sqrt(float(energy.sum() / count.sum())), set[int]()
    while tau >= step[0]:
        top = int(np.searchsorted(step, tau, side="right")) - 1
        found = signals[top] / counts[top] if counts[top] else 0.0
        if found <= 0:
            tau /= 2
            continue
        following = int(np.searchsorted(step, math.sqrt(found), side="right")) - 1
        if following == top or following in seen:
            top = min(top, following)
            return _kept(top, count, signal) if counts[top] and signals[top] > 0 else None
        seen.add(top)
        tau = math.sqrt(found)
    return None


def _kept(top: int, count: Array, signal: Array) -> _Kept:
    below, above = count[:top].sum(), count[top]
    lower = signal[:top].sum() / below if below else 0.0
    flatness = signal[top] / above / lower if above and lower > 0 else math.nan
    return _Kept(top, float(signal[: top + 1].sum() / count[: top + 1].sum()), float(flatness))


@dataclass(frozen=True)
class _Filled:
    """Y, which has the signal's expectation at every entry, made slice by slice; ``share`` is p."""

    update: Operand
    bins: Operand
    exponent: int
    rows: Float64[Tensor, " m"]
    cols: Float64[Tensor, " n"]
    share: float

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.bins.shape)

    @property
    def device(self) -> torch.device:
        return self.bins.device

    def __getitem__(self, index: Any, /) -> Float64[Tensor, "..."]:
        rows, cols = index if isinstance(index, tuple) else (index, slice(None))
        dropped = exponents(self.bins[rows, cols]) > self.exponent
        block = self.update[rows, cols].double() * self.rows[rows, None]
        return block.mul_(self.cols[cols]).masked_fill_(dropped, 0.0)


def _filled(D: Operand, bins: Operand, exponent: int, scale: float) -> _Filled:
    """Y in units of ``scale``, from the shares of the entries kept in each row and column."""
    m, n = D.shape
    counts = (
        torch.empty(m, dtype=torch.float64, device=bins.device),
        torch.zeros(n, dtype=torch.float64, device=bins.device),
    )
    for block in row_blocks(D.shape):
        mask = exponents(bins[block]) <= exponent
        counts[0][block] = mask.sum(dim=1).double()
        counts[1].add_(mask.sum(dim=0))
    rows, cols = counts[0] / n, counts[1] / m
    p = float(rows.mean())
    return _Filled(D, bins, exponent, p / rows.clamp(min=p / 8) / scale, 1 / cols.clamp(min=p / 8), p)


def _spike(y: float, v: float, m: int, n: int) -> float | None:
    """theta^2 of the spike whose noisy singular value is y, in white noise of variance v; None inside the bulk."""
    A = y * y - v * (m + n)
    rest = A * A - 4 * v * v * m * n
    return (A + math.sqrt(rest)) / 2 if A > 0 and rest >= 0 else None
