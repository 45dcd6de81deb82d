"""Do the numbers obey perturbation theory? Checks of every spectrum against its update, at run time.

Weyl: |sigma_i(W+) - sigma_i(W0)| <= ||dW||_2. Mirsky: ||sigma(W+) - sigma(W0)||_2 <= ||dW||_F. Wedin, in the form that
holds: max(sin Theta(U_k), sin Theta(V_k)) <= ||dW||_2 / (sigma_k(W0) - sigma_{k+1}(W+)) where that gap is positive
(arXiv 2606.07082, Gate II, with its second value from W+ instead of W0). All with an upper bound on ||dW||_2 and the
numerical bounds of both spectra. A violation means that a number is wrong.
"""

from __future__ import annotations

import math

import torch

from geopd.diagnostics.comparison import SIDES, Comparison
from geopd.diagnostics.rotation import angles
from geopd.spectral import angle_error

_SLACK = 1 + 1e-9  # of the comparison's own rounding


def violation(comparison: Comparison) -> str | None:
    """The first bound that the measured spectra and angles break, or None."""
    if comparison.update_is_zero or comparison.origin.norm[0] == 0.0:
        return None
    before, after = comparison.origin.decomposition, comparison.after
    norm = sum(comparison.update_norm)
    top = _operator_norm(comparison)
    shift = (after.sigma - before.sigma).abs()
    errors = before.sigma_error + after.sigma_error
    worst = float((shift - errors).max())
    if worst > top * _SLACK:
        return f"Weyl: a singular value moved by {worst:.6g}, more than ||dW||_2 = {top:.6g}"
    length = float(torch.linalg.vector_norm((shift - errors).clamp(min=0.0) / norm))
    if length > _SLACK:
        return f"Mirsky: the singular values moved by {length * norm:.6g}, more than ||dW||_F = {norm:.6g}"
    return _wedin(comparison, top) if comparison.has_angles else None


def _operator_norm(comparison: Comparison) -> float:
    """An upper bound on ||dW||_2: its computed value and error where it was computed, else ||dW||_F."""
    if comparison.has_update_decomposition:
        d = comparison.update_decomposition
        return float(d.sigma[0] + d.sigma_error[0])
    return sum(comparison.update_norm)


def _wedin(comparison: Comparison, top: float) -> str | None:
    before, after, k = comparison.origin.decomposition, comparison.after, comparison.origin.rotation_k
    following, slack = after.following(k), float(before.sigma_error[k - 1])
    if k < after.sigma.numel():
        slack += float(after.sigma_error[k])
    gap = float(before.sigma[k - 1]) - following - slack
    if gap <= 0:
        return None
    for side in SIDES:
        theta = angles(comparison, side)
        if isinstance(theta, str):
            continue
        largest = max(float(theta[-1]) - angle_error((before, after), k), 0.0)
        if math.sin(math.radians(largest)) > top / gap * _SLACK:
            return f"Wedin: the {side} subspace turned by {largest:.6g} degrees, more than asin({top / gap:.6g})"
    return None
