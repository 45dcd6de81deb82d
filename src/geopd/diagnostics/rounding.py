"""How much of the stored update is bf16 rounding?

``rounding_noise_share`` is the share of ||dW||^2 that is not along the intended update d: 1 - cos^2(dW, d). In [0, 1]
and without a unit. By regime (geopd.diagnostics.bf16_grid):

- ``none``: 0, the update is as stored. The bf16 view is stored beside it, where d is known and nothing is modelled.
- ``on-grid``: d taken as Gaussian, its scale s solved from the stored energy; with E[D^2] and E[D d] per entry
  (``grid_energy``, ``grid_product``) it is 1 - (sum E[D d])^2 / (sum E[D^2] sum s^2). It tends to the white-noise share
  sum(u^2/12)/||dW||^2 from s of about .65 median u on, and to 1 below, where the mask decides what is seen.
- ``one end``: sum(u^2/12)/||dW||^2 at every size (the error of W+ alone, uniform), at most 1.

Source: geopd, validated in docs/log.md. What rounding alone scores: geopd.diagnostics.noise_nulls.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from geopd.diagnostics.bf16_grid import (
    OUTSIDE,
    UNITS,
    exponent_counts,
    grid_energy,
    grid_product,
    overflows,
    regime,
    rounded_views,
    white_energy,
)
from geopd.diagnostics.comparison import Comparison
from geopd.diagnostics.gaussian_update import scale_of_stored
from geopd.diagnostics.parameters import Parameters
from geopd.diagnostics.update_size import ZERO
from geopd.diagnostics.values import ok, undefined
from geopd.results import Measurement, setting
from geopd.spectral import row_blocks

Array = NDArray[np.float64]
METRICS = ("rounding_noise_share",)
TOO_NOISY = 0.1
"""Noise share above which stable rank, Hill index and Sim_K read the rounding and not the update (docs/log.md)."""
SOLVED = 1e-9
"""Numerical error of the closed forms; how far the model is off is in docs/log.md, not in the error column."""
_VERDICTS: WeakKeyDictionary[Comparison, Measurement] = WeakKeyDictionary()


def default_setting(_: Parameters) -> str:
    """The headline's setting."""
    return setting(view="native")


def measure(comparison: Comparison) -> list[Measurement]:
    """The share in the native view, and in the bf16 view too where the native one has no rounding."""
    return [_native(comparison), *(_seen(comparison, view) for view in rounded_views(comparison)[1:])]


def noise_verdict(comparison: Comparison) -> str | None:
    """Why stable rank, Hill index and Sim_K of this update are not to be relied on; None where rounding is minor."""
    share = _native(comparison).value
    if share is None or share <= TOO_NOISY:
        return None
    return f"bf16 rounding makes {share:.0%} of the stored update's energy, over {TOO_NOISY:.0%}"


def _native(comparison: Comparison) -> Measurement:
    if comparison not in _VERDICTS:
        _VERDICTS[comparison] = _measure_native(comparison)
    return _VERDICTS[comparison]


def _measure_native(comparison: Comparison) -> Measurement:
    name = setting(view="native")
    if comparison.update_is_zero:
        return undefined(METRICS[0], name, ZERO)
    rounding = regime(comparison)
    if rounding is None:
        return undefined(METRICS[0], name, "float16: its rounding is not modelled")
    if rounding == "none":
        return ok(METRICS[0], name, 0.0, 0.0, "as stored", note="stored wider than bf16: no rounding")
    if overflows(comparison, "native"):
        return undefined(METRICS[0], name, OUTSIDE)
    counts = exponent_counts(comparison.origin.magnitude_counts)
    step, counts = UNITS[counts > 0], counts[counts > 0]
    norm = comparison.update_norm[0]
    if rounding == "one end":
        share = float(counts @ white_energy(step, rounding)) / norm**2
        return ok(METRICS[0], name, min(1.0, share), SOLVED, "u^2/12, one end")
    share, s = on_grid_share(counts, step, norm)
    return ok(METRICS[0], name, share, SOLVED, f"closed form, on-grid, intended rms {s:.3g}")


def on_grid_share(counts: Array, step: Array, norm: float) -> tuple[float, float]:
    """Share of a stored update's energy that on-grid rounding explains, and the rms of the intended update.

    ``counts``, ``step``: entries per step size u and the sizes; ``norm``: ||dW||_F > 0. All in weight units.
    """
    s = scale_of_stored(counts, step, norm)
    along = float(counts @ grid_product(step, s))
    share = 1 - along**2 / (float(counts @ grid_energy(step, s)) * counts.sum() * s * s)
    return float(min(max(share, 0.0), 1.0)), s


def _seen(comparison: Comparison, view: str) -> Measurement:
    """The share in a view whose intended update is known: it is the native one."""
    name = setting(view=view)
    if comparison.update_is_zero:
        return undefined(METRICS[0], name, ZERO, default=False)
    if overflows(comparison, view):
        return undefined(METRICS[0], name, OUTSIDE, default=False)
    scale = comparison.update_norm[0]
    in_view, wide = comparison.difference(view), comparison.difference()
    squared, along = 0.0, 0.0
    for rows in row_blocks(comparison.stored.shape):  # embeddings do not fit in float64 at once
        seen = in_view[rows] / scale
        squared += float((seen * seen).sum())
        along += float((seen * (wide[rows] / scale)).sum())
    if squared == 0.0:
        return undefined(METRICS[0], name, "no entry changed in this view", default=False)
    share = min(max(1 - along**2 / squared, 0.0), 1.0)
    error = comparison.stored.numel() ** 0.5 * 2.0**-50
    return ok(METRICS[0], name, share, error, "1 - cos^2 to the wide update", default=False)
