"""How large is the update and over how many directions is it spread? (arXiv 2606.07082, section 4)

||dW||_F, ||dW||_F / ||W0||_F, ||dW||_op and the stable rank ||dW||_F^2 / ||dW||_op^2, whose nulls are in
``noise_nulls``.
"""

from __future__ import annotations

from geopd.diagnostics.comparison import Comparison
from geopd.diagnostics.values import ok, undefined
from geopd.results import Measurement, setting

METRICS = ("update_norm", "relative_update_norm", "update_operator_norm", "stable_rank")
ZERO = "the update is exactly zero"
NATIVE = setting(view="native")


def measure_norm(comparison: Comparison) -> list[Measurement]:
    """Frobenius norm of dW."""
    norm, error = comparison.update_norm
    return [ok("update_norm", NATIVE, norm, error, "float64 row sums")]


def measure_relative_norm(comparison: Comparison) -> list[Measurement]:
    """Frobenius norm of dW over W0's."""
    norm, error = comparison.update_norm
    size, size_error = comparison.origin.norm
    if size == 0.0:
        return [undefined("relative_update_norm", NATIVE, "the origin is the zero matrix: no scale to compare with")]
    relative = norm / size
    return [
        ok("relative_update_norm", NATIVE, relative, error / size + relative * size_error / size, "float64 row sums")
    ]


def measure_operator_norm(comparison: Comparison) -> list[Measurement]:
    """Largest singular value of dW."""
    d = comparison.update_decomposition
    return [ok("update_operator_norm", NATIVE, float(d.sigma[0]), float(d.sigma_error[0]), d.method)]


def measure_stable_rank(comparison: Comparison) -> list[Measurement]:
    """||dW||_F^2 / ||dW||_op^2; undefined for a zero update, and no epsilon in the denominator."""
    d = comparison.update_decomposition
    if comparison.update_is_zero:
        return [undefined("stable_rank", NATIVE, ZERO)]
    norm, error = comparison.update_norm
    top = float(d.sigma[0])
    value = (norm / top) ** 2
    return [ok("stable_rank", NATIVE, value, 2 * value * (error / norm + float(d.sigma_error[0]) / top), d.method)]
