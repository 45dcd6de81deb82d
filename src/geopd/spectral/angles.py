"""Principal angles between subspaces, right down to angles where the arc cosine has lost every digit."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float64
from torch import Tensor

from geopd.spectral.decomposition import Decomposition

_ENTRIES = 1 << 23  # of a block of the complement: 64 MiB


def principal_angles(Q0: Float64[Tensor, "n k"], Q1: Float64[Tensor, "n k"]) -> Float64[Tensor, " k"]:
    """Principal angles between the column spaces of two orthonormal bases, in degrees, ascending.

    cos(theta_i) = sigma_i(Q0^T Q1) for large angles, sin(theta_i) = sigma_i((I - Q0 Q0^T) Q1) for small ones, where
    the cosine is flat (Bjorck and Golub, 1973). The complement is projected twice, so a tiny one keeps its digits; it
    is made and factored in row blocks.
    """
    n, k = Q0.shape
    rows = max(2 * k, _ENTRIES // k)
    blocks = [slice(start, start + rows) for start in range(0, n, rows)]
    cross = Q0.T @ Q1
    again = torch.zeros_like(cross)
    for part in blocks:
        again += Q0[part].T @ (Q1[part] - Q0[part] @ cross)
    triangular = torch.zeros_like(cross)[:0]
    for part in blocks:
        complement = Q1[part] - Q0[part] @ cross - Q0[part] @ again
        triangular = torch.linalg.qr(torch.cat([triangular, complement]), mode="r").R
    sines = torch.linalg.svdvals(triangular).flip(0).clamp(max=1.0)
    small = sines * sines < 0.5
    angles = torch.arcsin(sines)
    if not bool(small.all()):
        angles = torch.where(small, angles, torch.arccos(torch.linalg.svdvals(cross).clamp(max=1.0)))
    return torch.rad2deg(angles)


def angle_error(decompositions: tuple[Decomposition, ...], k: int) -> float:
    """Bound in degrees on how far the decompositions' own errors can move any principal angle of leading subspaces."""
    return min(90.0, sum(math.degrees(math.asin(d.leading_sine(k))) for d in decompositions))
