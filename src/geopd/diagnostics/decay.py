"""How much of the update is weight decay? The component along W0, and spectral shift and stable rank without it.

decay_coefficient c = <dW, W0> / ||W0||_F^2, without a unit: -sum(lr wd) for pure decoupled decay (-2.9e-3 for the SFT
schedule of arXiv 2606.07082), about 0 for an update that ignores W0. dW' = dW - c W0 is what is left, orthogonal to W0.

- Stable rank without it: ||dW'||_F^2 / ||dW'||_op^2, block Krylov. Undefined where dW' is nothing but rounding.
- Spectral shift without it, for no further decomposition: W+ = (1 + c) W0 + dW', so
  sigma(W+)/(1 + c) = sigma(W0 + dW'/(1 + c)) exactly, and the value is
  ||sigma(W+)/(1 + c) - sigma(W0)|| / ||sigma(W0)||: the shift under dW'/(1 + c), decay undone. The shift under dW'
  itself differs by at most |c/(1 + c)| ||dW'||_F / ||W0||_F (Mirsky), a relative c or so. Undefined where c <= -1.

Both are written as setting ``decay=removed;view=native`` beside the plain values. Source: geopd.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from geopd.diagnostics import spectral_shift
from geopd.diagnostics.comparison import Comparison
from geopd.diagnostics.parameters import Parameters
from geopd.diagnostics.update_size import ZERO
from geopd.diagnostics.values import ok, resolved_within, undefined
from geopd.results import Measurement, setting
from geopd.spectral import Difference, frobenius, leading_triples, row_blocks

METRICS = ("decay_coefficient",)
REMOVED = setting(decay="removed", view="native")
NO_ORIGIN = "the origin is the zero matrix: nothing to decay"
EPS = float(torch.finfo(torch.float64).eps)
RELATIVE_LIMIT = 1e-3


def default_setting(_: Parameters) -> str:
    """The headline's setting."""
    return setting(view="native")


def coefficient(comparison: Comparison) -> tuple[float, float]:
    """c and its rounding bound; W0 must not be zero. Streamed in row blocks, rows added exactly."""
    size, moved_size = comparison.origin.norm[0], comparison.update_norm[0]
    products: list[float] = []
    magnitudes: list[float] = []
    for rows in row_blocks(comparison.stored.shape):
        before = comparison.origin.stored[rows].double()
        moved = (comparison.stored[rows].double() - before) / moved_size
        unit = before / size
        products += torch.linalg.vecdot(moved, unit).tolist()
        magnitudes += torch.linalg.vecdot(moved.abs(), unit.abs()).tolist()
    ratio = moved_size / size
    error = ratio * EPS * (comparison.stored.shape[1] + 8) * math.fsum(magnitudes)
    return ratio * math.fsum(products), error


def measure(comparison: Comparison) -> list[Measurement]:
    """c = <dW, W0> / ||W0||_F^2; exactly 0 for a zero update, undefined for a zero origin."""
    name = setting(view="native")
    if comparison.origin.norm[0] == 0.0:
        return [undefined(METRICS[0], name, NO_ORIGIN)]
    if comparison.update_is_zero:
        return [ok(METRICS[0], name, 0.0, 0.0, "float64 row sums")]
    value, error = coefficient(comparison)
    return [ok(METRICS[0], name, value, error, "float64 row sums")]


def measure_stable_rank(comparison: Comparison) -> list[Measurement]:
    """Stable rank of dW' = dW - c W0; its error is the residual of the leading triple."""
    reason = ZERO if comparison.update_is_zero else NO_ORIGIN if comparison.origin.norm[0] == 0.0 else None
    if reason is not None:
        return [undefined("stable_rank", REMOVED, reason, default=False)]
    c, error = coefficient(comparison)
    scale = comparison.update_norm[0]
    rest = Difference(comparison.stored, comparison.origin.stored, decay=c)
    norm, _ = frobenius(rest)
    # what rounding of the weights and of c leaves of an update that is nothing but decay
    floor = (4 * EPS + error) * comparison.origin.norm[0] / scale
    if norm / scale <= floor:
        return [undefined("stable_rank", REMOVED, "the update is nothing but decay", default=False)]
    found = leading_triples(rest, 1)
    top, residual = float(found.sigma[0]), float(found.sigma_error[0])
    value = (norm / top) ** 2
    bound = 2 * value * ((residual + floor * scale) / top + floor * scale / norm + rest.shape[1] * EPS)
    method = f"{found.method} on dW - c W0"
    return [resolved_within("stable_rank", REMOVED, value, bound, RELATIVE_LIMIT * value, method, default=False)]


def measure_spectral_shift(comparison: Comparison) -> list[Measurement]:
    """NSS of the update dW'/(1 + c), from the two spectra that the plain value needs anyway."""
    plain = spectral_shift.measure(comparison)[0]
    if plain.value is None:
        return [replace(plain, setting=REMOVED, is_default=False)]
    if comparison.update_is_zero:
        return [ok("spectral_shift", REMOVED, 0.0, 0.0, plain.method, default=False)]
    c, c_error = coefficient(comparison)
    if 1 + c <= c_error:
        return [undefined("spectral_shift", REMOVED, f"c = {c:.3g}: nothing of W0 is left to compare", default=False)]
    found = spectral_shift.spectra(comparison)
    size = float(torch.linalg.vector_norm(found.before))
    value = float(torch.linalg.vector_norm(found.after / (1 + c) - found.before)) / size
    # the bound of the plain value covers both spectra; dividing by 1 + c magnifies one of them
    growth = float(torch.linalg.vector_norm(found.after)) / size
    error = (found.error / size * max(1.0, 1 + c) + (c_error + 4 * EPS) * growth / (1 + c)) / (1 + c)
    method = f"sigma(W+)/(1 + c), {found.method}"
    return [Measurement("spectral_shift", REMOVED, value, error, plain.status, method, plain.note, is_default=False)]
