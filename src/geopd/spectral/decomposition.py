"""All singular values and only the leading singular vectors of a matrix, at the price of one tridiagonalisation.

Three paths, recorded in ``method``. ``direct``: LAPACK's SVD, for small matrices. ``gram``: G = A^T A, tridiagonalised
once; all eigenvalues, only the leading vectors; the other side is A V / sigma. ``qr``: a streamed QR and the SVD of R,
where squaring would cost digits that matter (a leading singular value far below the first). A is never held in float64:
it is streamed in row blocks, always in its tall orientation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float64
from numpy.typing import NDArray
from scipy.linalg import blas, eigh_tridiagonal, lapack
from torch import Tensor

from geopd.spectral.operands import SYRK_ENTRIES, Operand, checked_scale, images, is_tall, tall_blocks

EPS = float(torch.finfo(torch.float64).eps)
_DIRECT = 96  # up to this many singular values LAPACK's SVD costs as much as the detour
_SQUARED = 1e-4  # sigma_k / sigma_1 below which squaring loses the leading vectors' digits
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Decomposition:
    """W = U diag(sigma) V^T: singular values, the leading k vectors of either side, and bounds on their errors.

    ``sigma_error`` bounds each singular value's error. ``perturbation`` bounds what the computed vectors belong to: a
    matrix within it, relative to sigma_1, of W (``squared`` False), or relative to sigma_1^2 of W^T W (True); with the
    gap it bounds the subspaces (Wedin, Davis-Kahan). ``orthogonality`` bounds how far the vectors are from orthonormal.
    ``complete`` tells whether sigma holds all min(m, n) values or only leading ones.
    """

    sigma: Float64[Tensor, " p"]
    left: Float64[Tensor, "m k"]
    right: Float64[Tensor, "n k"]
    sigma_error: Float64[Tensor, " p"]
    perturbation: float
    squared: bool
    orthogonality: float
    method: str
    complete: bool = True

    @property
    def rank(self) -> int:
        """Numerical rank (of what is held): singular values above max(m, n) eps sigma_1 and above their own error."""
        if self.sigma.numel() == 0 or self.sigma[0] == 0:
            return 0
        floor = max(self.left.shape[0], self.right.shape[0]) * EPS * float(self.sigma[0])
        return int((self.sigma > self.sigma_error.clamp(min=floor)).sum())

    def without_vectors(self) -> Decomposition:
        """The same singular values and bounds, the vectors dropped."""
        return replace(self, left=self.left[:, :0].clone(), right=self.right[:, :0].clone())

    def following(self, k: int) -> float:
        """sigma_{k+1}, 0 beyond the last.

        Raises:
            ValueError: if the decomposition was cut off before it.
        """
        if k < self.sigma.numel():
            return float(self.sigma[k])
        if not self.complete:
            raise ValueError(f"only {self.sigma.numel()} leading singular values are held; sigma_{k + 1} is not")
        return 0.0

    def gap(self, k: int) -> float:
        """sigma_k - sigma_{k+1}, with sigma_{p+1} = 0: what holds the leading k-dimensional subspaces in place."""
        return float(self.sigma[k - 1]) - self.following(k)

    def leading_sine(self, k: int) -> float:
        """Bound on the sine of the largest angle between a computed leading k-subspace and the exact one; at most 1.

        The gap is what the errors of sigma_k and sigma_{k+1} leave of it: the latter may be far from converged.
        """
        top = float(self.sigma[0])
        if top == 0.0:
            return 1.0
        above = max(float(self.sigma[k - 1] - self.sigma_error[k - 1]), 0.0) / top
        below = (self.following(k) + (float(self.sigma_error[k]) if k < self.sigma.numel() else 0.0)) / top
        gap = (above - below) * (above + below if self.squared else 1.0)
        if gap <= 2 * self.perturbation:
            return 1.0
        return min(1.0, self.perturbation / (gap - self.perturbation) + self.orthogonality)

    def leading_part_error(self, k: int) -> float:
        """Bound on any entry of the computed rank-k part U_k S_k V_k^T against the exact one.

        The smaller of two. With P the exact and P' the computed leading projector, ||P A - P' A'|| is at most
        ||P - P'|| sigma_1 plus the error of the values. And 2 (sigma_{k+1} + error) holds without a gap, tiny where
        the rank-k part is all there is.
        """
        error = float(self.sigma_error[:k].max()) + self.orthogonality * float(self.sigma[0])
        without_gap = 2 * (self.following(k) + error)
        return min(without_gap, error + 2 * self.leading_sine(k) * float(self.sigma[0]))


def decompose(W: Operand, k: int) -> Decomposition:
    """All singular values of W and its leading k vectors (k is cut to min(m, n)), in float64.

    Raises:
        ValueError: if W is not finite or not 2-D.
    """
    scale = checked_scale(W)
    k = min(k, *W.shape)
    if scale == 0.0:
        return _zero(W, k)
    if min(W.shape) <= _DIRECT:
        return _direct(W, k, scale)
    found = _by_gram(W, k, scale)
    return found if found is not None else _by_qr(W, k, scale)


def _zero(W: Operand, k: int) -> Decomposition:
    m, n = W.shape
    sigma = torch.zeros(min(m, n), dtype=torch.float64, device=W.device)
    left, right = (torch.zeros(size, k, dtype=torch.float64, device=W.device) for size in (m, n))
    return Decomposition(sigma, left, right, sigma, 0.0, False, 0.0, "zero matrix")


def _oriented(W: Operand, tall_left: Tensor, tall_right: Tensor) -> tuple[Tensor, Tensor]:
    return (tall_left, tall_right) if is_tall(W) else (tall_right, tall_left)


def _direct(W: Operand, k: int, scale: float) -> Decomposition:
    """LAPACK gesdd; the bound is the residual ||A - U S V^T||_F + sigma_1 (loss of orthogonality), evaluated."""
    A = next(tall_blocks(W, scale, rows=max(W.shape)))
    U, sigma, Vh = torch.linalg.svd(A, full_matrices=False)
    identity = torch.eye(sigma.numel(), dtype=A.dtype, device=A.device)
    loss = float(torch.linalg.matrix_norm(U.T @ U - identity) + torch.linalg.matrix_norm(Vh @ Vh.T - identity))
    residual = float(torch.linalg.matrix_norm(A - (U * sigma) @ Vh))
    bound = scale * (residual + float(sigma[0]) * loss + 4 * EPS * float(torch.linalg.vector_norm(sigma)))
    left, right = _oriented(W, U[:, :k].contiguous(), Vh[:k].T.contiguous())
    errors = torch.full_like(sigma, bound)
    return Decomposition(sigma * scale, left, right, errors, bound / (scale * float(sigma[0])), False, loss, "direct")


def gram_rounding(n: int, sigma_1: float) -> float:
    """Bound on the rounding of A^T A and of its tridiagonal eigenproblem, in the unit of sigma^2.

    (16 + 2 sqrt n) eps sigma_1^2: rounding errors of the reduction add like a random walk; twice the largest
    difference seen from LAPACK's SVD, whose own error is in it, over spectra and sizes (docs/log.md).
    """
    return (16 + 2 * math.sqrt(n)) * EPS * sigma_1**2


def _by_gram(W: Operand, k: int, scale: float) -> Decomposition | None:
    """None where the leading values reach too far below the first for squaring, or a certificate fails."""
    n = min(W.shape)
    G, squares = _gram(W, scale)
    values, V = _eigen_device(G, k) if W.device.type == "cuda" else _eigen_lapack(G, k)
    sigma = values.clamp(min=0.0).sqrt()
    top = float(sigma[0])
    tau = gram_rounding(n, top)
    # the trace is a checksum of every eigenvalue: sum sigma^2 = ||A||_F^2, whose own summation rounds too
    if abs(float(values.sum()) - squares) > n * tau + max(W.shape) * EPS * squares:
        return None
    if k == 0:
        left, right = _oriented(W, V.new_zeros(max(W.shape), 0), V)
        return Decomposition(sigma * scale, left, right, _squared_error(sigma, tau) * scale, 0.0, True, 0.0, "gram")
    if float(sigma[k - 1]) < _SQUARED * top:
        return None
    U = images(W, scale, V).div_(sigma[:k])
    loss = max(orthogonality_loss(U), orthogonality_loss(V))
    # U = A V / sigma, so the loss of U measures the residual of the vectors too
    if loss > 1e-6:
        return None
    left, right = _oriented(W, U, V)
    errors = _squared_error(sigma, tau) * scale
    return Decomposition(sigma * scale, left, right, errors, tau / top**2, True, loss, "gram")


def _squared_error(sigma: Tensor, tau: float) -> Tensor:
    # |s^2 - s'^2| <= tau gives |s - s'| <= min(sqrt tau, tau / s)
    return torch.clamp(tau / sigma.clamp(min=1e-300), max=math.sqrt(tau))


def orthogonality_loss(Q: Float64[Tensor, "n k"]) -> float:
    """||Q^T Q - I||_F: how far columns are from orthonormal."""
    identity = torch.eye(Q.shape[1], dtype=Q.dtype, device=Q.device)
    return float(torch.linalg.matrix_norm(Q.T @ Q - identity, ord="fro"))


def _gram(W: Operand, scale: float) -> tuple[Tensor, float]:
    """A^T A (lower triangle on the CPU) and ||A||_F^2, streamed."""
    n = min(W.shape)
    rows = max(1, SYRK_ENTRIES // n)
    squares: list[float] = []
    if W.device.type == "cuda":
        total = torch.zeros(n, n, dtype=torch.float64, device=W.device)
        for block in tall_blocks(W, scale, rows=rows):
            total.addmm_(block.T, block)
            squares.append(float(torch.linalg.vector_norm(block)) ** 2)
        return total, math.fsum(squares)
    G: Array = np.zeros((n, n), order="F")
    for block in tall_blocks(W, scale, rows=rows):
        A: Array = block.numpy()
        G = blas.dsyrk(1.0, A.T, beta=1.0, c=G, lower=1, overwrite_c=1)
        squares += np.einsum("ij,ij->i", A, A).tolist()
    return torch.from_numpy(G), math.fsum(squares)


def _eigen_device(G: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(G)
    return values.flip(0), vectors[:, G.shape[0] - k :].flip(1).contiguous()


def _eigen_lapack(G: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """All eigenvalues and the leading k vectors from one tridiagonalisation (dsytrd, dsterf, dstemr, dormqr).

    Without vectors by torch's eigvalsh, whose two-stage reduction takes half the time.
    """
    if k == 0:
        return torch.linalg.eigvalsh(G).flip(0), torch.zeros(G.shape[0], 0, dtype=torch.float64)
    A: Array = G.numpy()
    n = A.shape[0]
    work = int(lapack.dsytrd_lwork(n, lower=1)[0])
    reflectors, d, e, tau, info = lapack.dsytrd(A, lower=1, lwork=work, overwrite_a=1)
    _require(info, "dsytrd")
    values, info = lapack.dsterf(d, e)
    _require(info, "dsterf")
    _, Z = eigh_tridiagonal(d, e, select="i", select_range=(n - k, n - 1), lapack_driver="stemr")
    Z = np.array(Z[:, ::-1], order="F")  # a copy: one column reversed would keep its negative stride
    # dsytrd's Q is 1 + (n-1) reflectors below the first sub-diagonal: a QR's, one row down
    turned, _, info = lapack.dormqr("L", "N", reflectors[1:, : n - 1], tau, Z[1:], lwork=64 * k)
    _require(info, "dormqr")
    Z[1:] = turned
    return _descending(values), torch.from_numpy(np.ascontiguousarray(Z))


def _descending(values: Array) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values[::-1]))


def _require(info: int, routine: str) -> None:
    if info != 0:
        raise np.linalg.LinAlgError(f"LAPACK {routine} returned {info}")


def singular_values(W: Operand) -> tuple[Float64[Tensor, " p"], float]:
    """All singular values by a streamed QR and the SVD of R, and a bound on their error: a few eps sigma_1 each.

    Raises:
        ValueError: if W is not finite or not 2-D.
    """
    scale = checked_scale(W)
    if scale == 0.0:
        return torch.zeros(min(W.shape), dtype=torch.float64, device=W.device), 0.0
    sigma = torch.linalg.svdvals(_triangle(W, scale))
    return sigma * scale, _stable_rounding(sigma, W) * scale


def _stable_rounding(sigma: Tensor, W: Operand) -> float:
    # every row block factors R anew; where the columns share a mean, 1187 blocks were seen to lose 80 eps sigma_1
    refactored = math.sqrt(max(W.shape) / min(W.shape))
    return (16 + 2 * math.sqrt(sigma.numel())) * refactored * EPS * float(sigma[0])


def _triangle(W: Operand, scale: float) -> Tensor:
    R: Tensor | None = None
    for block in tall_blocks(W, scale, rows=min(W.shape)):  # as many rows as R has: fewer would refactor R too often
        R = torch.linalg.qr(block if R is None else torch.cat([R, block]), mode="r").R
    assert R is not None
    return R


def _by_qr(W: Operand, k: int, scale: float) -> Decomposition:
    """Streamed QR, then the SVD of R; backward stable, so the error is a few eps sigma_1 whatever the spectrum."""
    _, sigma, Vh = torch.linalg.svd(_triangle(W, scale), full_matrices=False)
    V = Vh[:k].T.contiguous()
    # columns of tiny singular values lose their orthogonality in A V / sigma: QR restores it, in order of size
    Q, T = torch.linalg.qr(images(W, scale, V))
    U = Q * torch.where(torch.diagonal(T) < 0, -1.0, 1.0)
    bound = scale * _stable_rounding(sigma, W)
    left, right = _oriented(W, U, V)
    errors = torch.full_like(sigma, bound)
    return Decomposition(
        sigma * scale,
        left,
        right,
        errors,
        bound / (scale * float(sigma[0])),
        False,
        max(orthogonality_loss(U), orthogonality_loss(V)),
        "qr",
    )
