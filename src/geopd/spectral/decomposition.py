"""Singular values and leading singular vectors, with a bound on their error that is computed, not assumed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

EPS = float(torch.finfo(torch.float64).eps)


@dataclass(frozen=True)
class Decomposition:
    """W = U diag(sigma) V^T: all singular values, the leading k vectors of either side, and how far off they can be.

    ``backward_error`` bounds the spectral norm of E in W + E = U diag(sigma) V^T with orthonormal U, V: every singular
    value is within it (Weyl), and a k-dimensional leading subspace within it over the gap (Wedin).
    """

    sigma: Float64[Tensor, " p"]
    left: Float64[Tensor, "m k"]
    right: Float64[Tensor, "n k"]
    backward_error: float
    method: str

    @property
    def rank(self) -> int:
        """Numerical rank: singular values above max(m, n) * eps * sigma_1, and above the error bound."""
        if self.sigma.numel() == 0 or self.sigma[0] == 0:
            return 0
        longest = max(self.left.shape[0], self.right.shape[0])
        floor = max(longest * EPS * float(self.sigma[0]), self.backward_error)
        return int((self.sigma > floor).sum())

    def gap(self, k: int) -> float:
        """sigma_k - sigma_{k+1}, with sigma_{p+1} = 0: what holds the leading k-dimensional subspaces in place."""
        following = float(self.sigma[k]) if k < self.sigma.numel() else 0.0
        return float(self.sigma[k - 1]) - following


def decompose(W: Float64[Tensor, "m n"], k: int) -> Decomposition:
    """Float64 SVD (LAPACK gesdd, tall orientation) and the leading k vectors of either side (k is cut to p).

    The bound is ||W - U S V^T||_F + sigma_1 (||U^T U - I||_F + ||V^T V - I||_F), evaluated on the result, plus the
    rounding of evaluating it.

    Raises:
        ValueError: if W is not finite or not 2-D.
    """
    if W.ndim != 2:
        raise ValueError(f"a matrix is needed, not a tensor of shape {tuple(W.shape)}")
    if not bool(torch.isfinite(W).all()):
        raise ValueError("not finite: NaN or infinite entries have no singular values")
    # a wide matrix takes gesdd two to three times as long as its transpose, and scaling keeps tiny weights from
    # underflowing when they are squared
    scale = float(W.abs().max()) if W.numel() else 0.0
    if scale == 0.0:
        return _zero(W, k)
    tall = (W if W.shape[0] >= W.shape[1] else W.T) / scale
    U, sigma, Vh = torch.linalg.svd(tall, full_matrices=False)
    bound = scale * _backward_error(tall, U, sigma, Vh)
    left, right = (U, Vh.T) if W.shape[0] >= W.shape[1] else (Vh.T, U)
    k = min(k, sigma.numel())
    return Decomposition(
        sigma * scale, left[:, :k].contiguous(), right[:, :k].contiguous(), bound, "svd(float64, gesdd)"
    )


def _backward_error(W: Tensor, U: Tensor, sigma: Tensor, Vh: Tensor) -> float:
    identity = torch.eye(sigma.numel(), dtype=W.dtype, device=W.device)
    residual = torch.linalg.matrix_norm(W - (U * sigma) @ Vh)
    loss = torch.linalg.matrix_norm(U.T @ U - identity) + torch.linalg.matrix_norm(Vh @ Vh.T - identity)
    rounding = 4 * EPS * float(torch.linalg.vector_norm(sigma))
    return float(residual + sigma[0] * loss) + rounding


def _zero(W: Tensor, k: int) -> Decomposition:
    m, n = W.shape
    p = min(m, n)
    k = min(k, p)
    return Decomposition(W.new_zeros(p), W.new_zeros(m, k), W.new_zeros(n, k), 0.0, "zero matrix")


def leading_part_error(decomposition: Decomposition, k: int) -> float:
    """Bound on any entry of the computed rank-k part U_k S_k V_k^T against the exact one.

    The smaller of two: e (1 + sigma_1 / (gap - e)), since ||P A - P' A'|| <= ||P - P'|| ||A|| + ||A - A'|| and
    ||P - P'|| <= e / (gap - e) (Wedin); and 2 (sigma_{k+1} + e), which holds without a gap and is tiny where the
    rank-k part is all there is.
    """
    error, gap = decomposition.backward_error, decomposition.gap(k)
    following = float(decomposition.sigma[k]) if k < decomposition.sigma.numel() else 0.0
    without_gap = 2 * (following + error)
    if gap <= 2 * error:
        return without_gap
    return min(without_gap, error * (1 + float(decomposition.sigma[0]) / (gap - error)))
