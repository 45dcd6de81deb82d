"""Which rounding a stored update carries: the bf16 steps of W0, and whether the ends lie on the bf16 grid.

u is the distance from |W0| (rounded to bf16) to the next bf16 number away from zero: a power of two per binary
exponent of W0. Four regimes:

- ``none``: W+ is not on the bf16 grid, so the update is as stored (fp32 masters).
- ``on-grid``: both ends are on it. Taken to mean that training started from the stored W0; two casts of masters that
  were off the grid cannot be told from it, and then its noise is understated.
- ``one end``: W0 is off the grid and W+ on it: W+ carries the error of one rounding, u^2/12 whatever the update.
- ``both ends``: the bf16 view of an origin off the grid: E[D | d] = d, Var = u^2 f (1 - f), f = frac(|d|/u).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Float64, Int16, Int32
from numpy.typing import NDArray
from scipy.special import erfc
from torch import Tensor

from geopd.spectral import Operand
from geopd.spectral.norms import row_blocks
from geopd.spectral.selection import Counts

if TYPE_CHECKING:
    from geopd.diagnostics.comparison import Comparison, OriginMatrix

Array = NDArray[np.float64]
ENERGY = {"on-grid": 1 / 12, "one end": 1 / 12, "both ends": 1 / 6}
"""White-noise energy of the rounding, in units of u^2 an entry."""
EXPONENTS = 256
FINITE = 0x7F80
"""First magnitude index that is no finite bf16 number."""
OUTSIDE = "weights beyond the range of bf16 have no step to round by"
CELLS = 12
"""Groups of rows, and of columns, between which steps are counted."""
_MAGNITUDES_EACH = 128  # bf16 numbers of one exponent
_TERMS = np.arange(1, 25, dtype=np.float64) - 0.5
_LEVELS = 32  # octaves of u kept apart from the largest down: the rest is 2^-62 of its energy


def _units() -> Array:
    exponent = np.maximum(np.arange(EXPONENTS), 1)  # subnormals share the smallest normal step
    return np.asarray(np.exp2(exponent - 134.0))  # bias 127, 7 bits of mantissa


UNITS = _units()
"""u for each biased exponent of W0."""
OUTWARD: Array = np.repeat(UNITS, _MAGNITUDES_EACH)
"""u for each bf16 magnitude index: the distance to the next magnitude away from zero."""
INWARD: Array = np.append(OUTWARD[0], OUTWARD[:-1])
"""Distance to the next magnitude towards zero; zero has the same neighbour either way."""


def exponent_counts(magnitude_counts: Counts) -> Array:
    """How many entries each biased exponent holds, from how many each bf16 magnitude holds."""
    counts: Array = magnitude_counts.reshape(EXPONENTS, _MAGNITUDES_EACH).sum(axis=1).astype(np.float64)
    return counts


def grid_energy(step: Array, s: float) -> Array:
    """E[D^2] per entry for each step size u, D = u round(d/u), d Gaussian of scale s.

    u^2 sum_k (2k-1) erfc((k - 1/2) u / (s sqrt 2)) for s <= 2u, and s^2 + u^2/12 beyond, where the two agree to
    rounding.
    """
    series = (2 * _TERMS * erfc(_TERMS * step[:, None] / (s * math.sqrt(2.0)))).sum(axis=1)
    return np.where(s <= 2 * step, step**2 * series, s * s + step**2 / 12)


def white_energy(step: Array, rounding: str) -> Array:
    """Energy per entry of rounding as white noise, for each step size: u^2/12 an end that was rounded."""
    return ENERGY[rounding] * step**2


def grid_product(step: Array, s: float) -> Array:
    """E[D d] per entry for each step size: u s sqrt(2/pi) sum_k exp(-((k - 1/2) u/s)^2 / 2), s^2 beyond s = 2u."""
    series = np.exp(-((_TERMS * step[:, None] / s) ** 2) / 2).sum(axis=1)
    return np.where(s <= 2 * step, step * s * math.sqrt(2 / math.pi) * series, s * s)


@dataclass(frozen=True, slots=True)
class StepCounts:
    """Steps u that occur in a matrix (weight units, ascending), and how many entries of each row and column have them.

    Steps more than 31 octaves below the largest are counted with the smallest kept. ``cells`` holds the counts between
    groups of like rows and like columns (their sum of u^2), (row group, column group, step): what product of a row's
    and a column's scale there is not.
    """

    step: Array
    rows: Array
    cols: Array
    cells: Array
    sizes: tuple[Array, ...]
    """Rows in each row group, columns in each column group."""

    @classmethod
    def of(cls, bins: Operand, magnitude_counts: Counts) -> StepCounts:
        """Counted in row blocks, from the bf16 magnitude of every entry and how often each occurs."""
        (m, n), device = bins.shape, bins.device
        top = int(np.flatnonzero(magnitude_counts)[-1]) // _MAGNITUDES_EACH
        lowest = max(top - _LEVELS + 1, 0)
        rows = torch.zeros(m, _LEVELS, dtype=torch.int64, device=device)
        cols = torch.zeros(n * _LEVELS, dtype=torch.int64, device=device)
        across = torch.arange(n, dtype=torch.int32, device=device) * _LEVELS
        for part in row_blocks(bins.shape):
            level = (exponents(bins[part]).int() - lowest).clamp_(min=0)
            down = torch.arange(len(level), dtype=torch.int32, device=device)[:, None] * _LEVELS
            rows[part] = torch.bincount((level + down).view(-1), minlength=level.shape[0] * _LEVELS).view(-1, _LEVELS)
            cols += torch.bincount((level + across).view(-1), minlength=n * _LEVELS)
        used = slice(0, top - lowest + 1)
        by_row, by_col = (found.view(-1, _LEVELS).double().cpu().numpy()[:, used] for found in (rows, cols))
        step = UNITS[lowest : top + 1]
        down, across = (_groups(found @ (step / step[-1]) ** 2).to(device) for found in (by_row, by_col))
        cells = torch.zeros(CELLS * CELLS * _LEVELS, dtype=torch.int64, device=device)
        for part in row_blocks(bins.shape):
            level = (exponents(bins[part]).int() - lowest).clamp_(min=0)
            level += (down[part, None] * CELLS + across) * _LEVELS
            cells += torch.bincount(level.view(-1), minlength=len(cells))
        counted = cells.view(CELLS, CELLS, _LEVELS).double().cpu().numpy()[..., used]
        sizes = (torch.bincount(side, minlength=CELLS).double().cpu().numpy() for side in (down, across))
        return cls(step, by_row, by_col, counted, tuple(sizes))


def _groups(scales: Array) -> Int32[Tensor, " n"]:
    """The group of each row or column, of equal numbers, by falling scale."""
    found = torch.empty(len(scales), dtype=torch.int32)
    found[np.argsort(-scales, kind="stable")] = torch.arange(len(scales), dtype=torch.int32) * CELLS // len(scales)
    return found


def exponents(bins: Int16[Tensor, "m n"]) -> Int16[Tensor, "m n"]:
    """Biased binary exponent of each entry, from its bf16 magnitude index."""
    return bins >> 7


def units(bins: Int16[Tensor, "m n"]) -> Float64[Tensor, "m n"]:
    """u of every entry, float64, in weight units."""
    return torch.from_numpy(UNITS).to(bins.device)[exponents(bins).long()]


def on_bf16_grid(W: Float[Tensor, "m n"]) -> bool:
    """Whether every entry is a bf16 number, however it is stored."""
    return W.dtype == torch.bfloat16 or all(
        torch.equal(W[rows].bfloat16().to(W.dtype), W[rows]) for rows in row_blocks(W.shape)
    )


def outside_bf16(origin: OriginMatrix) -> bool:
    """Whether an entry of W0 is beyond the range of bf16, and has no step."""
    return bool(origin.magnitude_counts[FINITE:].any())


def overflows(comparison: Comparison, view: str) -> bool:
    """Whether an entry of either end has no finite value or no step in this view's rounding."""
    if outside_bf16(comparison.origin):
        return True
    after = comparison.stored
    return view == "bf16" and any(bool(after[rows].bfloat16().isinf().any()) for rows in row_blocks(after.shape))


def regime(comparison: Comparison, view: str = "native") -> str | None:
    """The rounding regime of an update in a view; None where an end is float16, whose rounding is not modelled."""
    before_on = comparison.origin.on_grid
    if view == "bf16":
        return "on-grid" if before_on else "both ends"
    if not on_bf16_grid(comparison.stored):
        narrow = torch.float16 in (comparison.stored.dtype, comparison.origin.stored.dtype)
        return None if narrow else "none"
    return "on-grid" if before_on else "one end"


def rounded_views(comparison: Comparison) -> tuple[str, ...]:
    """``native``, and ``bf16`` beside it where the native update is as stored: what rounding would have made of it."""
    wide = len(comparison.views) > 1 and regime(comparison) == "none"
    return ("native", "bf16") if wide else ("native",)
