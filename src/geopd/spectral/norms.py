"""The Frobenius norm with a bound on its rounding."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float64
from torch import Tensor

from geopd.spectral.decomposition import EPS


def frobenius(W: Float64[Tensor, "m n"]) -> tuple[float, float]:
    """Frobenius norm and a bound on its rounding error, both in the unit of W.

    Rows are summed in float64 and their sums added exactly (math.fsum), so the relative error of the sum of squares is
    at most (n + 2) eps.
    """
    scale = float(W.abs().max()) if W.numel() else 0.0
    if scale == 0.0:
        return 0.0, 0.0
    scaled = W / scale
    norm = scale * math.sqrt(math.fsum(torch.linalg.vecdot(scaled, scaled).tolist()))
    return norm, norm * (W.shape[1] + 2) * EPS
