"""How large is the update and over how many directions is it spread? (arXiv 2606.07082, section 4)

||dW||_F, ||dW||_F / ||W0||_F, ||dW||_op and the stable rank ||dW||_F^2 / ||dW||_op^2. Null of the stable rank: a
homogeneous Gaussian matrix, m n / (sqrt m + sqrt n)^2, where at least 2% of the entries changed.
"""

from __future__ import annotations

import math

from geopd.diagnostics.bf16_grid import on_bf16_grid
from geopd.diagnostics.comparison import Comparison
from geopd.diagnostics.values import ok, undefined
from geopd.results import Measurement, Null, setting

METRICS = ("update_norm", "relative_update_norm", "update_operator_norm", "stable_rank")
ZERO = "the update is exactly zero"
NATIVE = setting(view="native")
LEAST_DENSITY = 0.02
"""Share of changed entries below which m n / (sqrt m + sqrt n)^2 is more than 4% off."""


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


def _is_sparse(comparison: Comparison) -> bool:
    """Whether the update is of bf16 numbers few of which changed: its spectrum then has the heavy head of a few."""
    if not on_bf16_grid(comparison.stored):
        return False
    return int(comparison.changed_counts("bf16").sum()) < LEAST_DENSITY * comparison.stored.numel()


def nulls_stable_rank(comparison: Comparison) -> list[Null]:
    """Stable rank of a homogeneous Gaussian matrix of this shape; none below a density of 2%, where it is not valid."""
    if comparison.update_is_zero or comparison.origin.p == 1 or _is_sparse(comparison):
        return []
    m, n = comparison.origin.rows, comparison.origin.cols
    mean = m * n / (math.sqrt(m) + math.sqrt(n)) ** 2
    return [Null("stable_rank", NATIVE, "gaussian", mean, None, 0, "mn/(sqrt m + sqrt n)^2, entries alike")]
