"""Principal angles between subspaces, right down to angles where the arc cosine has lost every digit."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float64
from torch import Tensor

from geopd.spectral.decomposition import Decomposition


def principal_angles(Q0: Float64[Tensor, "n k"], Q1: Float64[Tensor, "n k"]) -> Float64[Tensor, " k"]:
    """Principal angles between the column spaces of two orthonormal bases, in degrees, ascending.

    cos(theta_i) = sigma_i(Q0^T Q1) for large angles, sin(theta_i) = sigma_i((I - Q0 Q0^T) Q1) for small ones, where
    the cosine is flat (Bjorck and Golub, 1973). The complement is projected twice, so a tiny one keeps its digits.
    """
    cross = Q0.T @ Q1
    complement = Q1 - Q0 @ cross
    complement = complement - Q0 @ (Q0.T @ complement)
    triangular = torch.linalg.qr(complement, mode="r").R
    sines = torch.linalg.svdvals(triangular).flip(0).clamp(max=1.0)
    cosines = torch.linalg.svdvals(cross).clamp(max=1.0)
    angles = torch.where(sines * sines < 0.5, torch.arcsin(sines), torch.arccos(cosines))
    return torch.rad2deg(angles)


def angle_error(decompositions: tuple[Decomposition, ...], k: int) -> float:
    """Bound in degrees on how far the decompositions' own errors can move any principal angle of leading subspaces."""
    return min(90.0, sum(math.degrees(math.asin(d.leading_sine(k))) for d in decompositions))
