"""How far did the spectrum move? Normalised spectral shift (arXiv 2606.07082, section 3).

NSS = ||sigma(W+) - sigma(W0)||_2 / ||sigma(W0)||_2 over all singular values in descending order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from geopd.diagnostics.comparison import Comparison
from geopd.diagnostics.values import ok, resolved_within, undefined
from geopd.results import Measurement, setting
from geopd.spectral import singular_values

METRICS = ("spectral_shift",)
REFINE = 1e-3  # relative error bound beyond which the values are computed again without squaring


@dataclass(frozen=True, slots=True)
class Spectra:
    """Both spectra in units of sigma_1(W0), the Euclidean norm of their errors together, and how they were made.

    In those units squares of tiny weights do not underflow.
    """

    before: Float64[Tensor, " p"]
    after: Float64[Tensor, " p"]
    error: float
    method: str


def spectra(comparison: Comparison) -> Spectra:
    """The decompositions' singular values, or values without squaring where those are too coarse for their shift."""
    before, after = comparison.origin.decomposition, comparison.after
    unit = float(before.sigma[0])
    shift = float(torch.linalg.vector_norm((after.sigma - before.sigma) / unit))
    error = float(torch.linalg.vector_norm((before.sigma_error + after.sigma_error) / unit))
    if error <= REFINE * shift or not (before.squared or after.squared):
        return Spectra(before.sigma / unit, after.sigma / unit, error, after.method)
    (old, old_error), (new, new_error) = comparison.origin.exact_sigma, singular_values(comparison.stored)
    error = math.sqrt(old.numel()) * (old_error + new_error) / unit
    return Spectra(old / unit, new / unit, error, "qr, values only")


def measure(comparison: Comparison) -> list[Measurement]:
    """NSS; its error is ||e0 + e+||_2 / ||sigma(W0)||_2 from the bounds on every singular value."""
    name = setting(view="native")
    decomposition = comparison.origin.decomposition
    if float(decomposition.sigma[0]) == 0.0:
        return [undefined(METRICS[0], name, "the origin is the zero matrix: no scale to compare with")]
    if comparison.update_is_zero:
        return [ok(METRICS[0], name, 0.0, 0.0, decomposition.method)]
    found = spectra(comparison)
    size = float(torch.linalg.vector_norm(found.before))
    shift = float(torch.linalg.vector_norm(found.after - found.before))
    return [resolved_within(METRICS[0], name, shift / size, found.error / size, REFINE * shift / size, found.method)]
