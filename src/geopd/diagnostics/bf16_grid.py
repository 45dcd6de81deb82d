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

import numpy as np
import torch
from jaxtyping import Float, Float64, Int16
from numpy.typing import NDArray
from torch import Tensor

from geopd.diagnostics.comparison import Comparison
from geopd.spectral.norms import row_blocks

ENERGY = {"on-grid": 1 / 12, "one end": 1 / 12, "both ends": 1 / 6}
"""White-noise energy of the rounding, in units of u^2 an entry."""
EXPONENTS = 256


def _units() -> NDArray[np.float64]:
    exponent = np.maximum(np.arange(EXPONENTS), 1)  # subnormals share the smallest normal step
    return np.asarray(np.exp2(exponent - 134.0))  # bias 127, 7 bits of mantissa


UNITS = _units()
"""u for each biased exponent of W0."""


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


def seen_update(comparison: Comparison, view: str) -> Float64[Tensor, "m n"]:
    """The update in a view, float64: as stored (``native``), or between the ends rounded to bf16."""
    if view == "native":
        return comparison.update()
    dW = comparison.stored.bfloat16().double()
    for rows in row_blocks(dW.shape):
        dW[rows] -= comparison.origin.stored[rows].bfloat16().double()
    return dW
