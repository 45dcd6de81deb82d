"""The leading singular triples of a matrix by block Krylov iteration, stopped by their residuals."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from geopd.spectral.decomposition import Decomposition, checked_scale, decompose, orthogonality_loss

_WHOLE = 64, 2048  # min(m, n) up to 64 k, at most 2048: a whole decomposition then costs no more
_BLOCK = 16  # rows a step: enough for matrix products to run at speed, few enough for the degree to grow
_SHARE = 0.4  # of min(m, n): a Krylov space larger than this costs more than the whole decomposition
_SAFE = 1e-15, 1e15  # magnitudes whose squares float32 holds too
_SQUARED = 1e-3  # sigma_k / sigma_1 below which Ritz values are taken without squaring


def leading_triples(
    W: Float[Tensor, "m n"], k: int, tolerance: float = 1e-7, near: Decomposition | None = None
) -> Decomposition:
    """The k largest singular values of W with their vectors, and at least sigma_{k+1}.

    Block Krylov: an orthonormal basis Q of span{X, W^T W X, ...} with full reorthogonalisation, Rayleigh-Ritz on W Q,
    until ||W^T u - sigma v|| <= tolerance sigma_1 for all k; a value is then right to about the tolerance's square over
    the gap. The residuals bound the singular values (Weyl) and, with the gap, the subspaces. Worked in float64, or in
    float32 where W is (results are float64 either way). The start is random from a fixed seed;
    ``near``, the decomposition of a matrix close to W, lends it its vectors to start from. Of a singular value repeated
    more often than the block is wide the space sees no further copies, so random rows outside it are tried at the end.
    Where they find a larger value, or the spectrum is too flat to converge in a basis of 0.4 min(m, n) columns, W is
    decomposed whole (``decompose``).

    Raises:
        ValueError: if W is not finite or not 2-D.
    """
    scale = checked_scale(W)
    p = min(W.shape)
    k = min(k, p)
    if scale == 0.0 or p <= min(_WHOLE[0] * k, _WHOLE[1]) or k >= p // 4:
        return decompose(W, k)
    # a copy only where squares would leave the range of the numbers
    scale = 1.0 if _SAFE[0] < scale < _SAFE[1] else scale
    A = W if W.shape[0] >= W.shape[1] else W.T
    A = A if scale == 1.0 else A / scale
    start = None if near is None else near.right if W.shape[0] >= W.shape[1] else near.left
    found = _krylov(A if A.dtype == torch.float32 else A.double(), k, tolerance, start)
    if found is None:
        return decompose(W, k)
    eps = float(torch.finfo(found[0].dtype).eps)
    sigma, U, V, residuals = (part.double() for part in found)
    top = float(sigma[0])
    rounding = (16 + 2 * math.sqrt(p)) * eps * top
    errors = residuals + rounding
    left, right = (U.contiguous(), V.contiguous()) if W.shape[0] >= W.shape[1] else (V.contiguous(), U.contiguous())
    perturbation = float(torch.linalg.vector_norm(residuals[:k])) / top + rounding / top
    return Decomposition(
        sigma * scale,
        left,
        right,
        errors * scale,
        perturbation,
        False,
        max(orthogonality_loss(left), orthogonality_loss(right)),
        "krylov",
        complete=False,
    )


def _krylov(A: Tensor, k: int, tolerance: float, start: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """sigma (k + 1), U, V (k columns) and the residual of each value, for tall A; None where it does not converge.

    Bases are kept as rows: products of a few rows with A run at twice the speed of a few columns.
    """
    n, limit = A.shape[1], int(_SHARE * A.shape[1])
    Q = torch.empty(limit, n, dtype=A.dtype, device=A.device)
    images = torch.empty(limit, A.shape[0], dtype=A.dtype, device=A.device)
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(_BLOCK, n, dtype=A.dtype, generator=generator).to(A.device)
    if start is not None:
        given = start.T[: _BLOCK - 1].to(A)  # one random row stays: a start without a direction never finds it
        X[: given.shape[0]] = given
    X = _orthonormal_rows(X)
    check, d = 2 * k + (4 if start is None else 1) * _BLOCK, 0
    while d + _BLOCK <= limit:
        Q[d : d + _BLOCK] = X
        images[d : d + _BLOCK] = X @ A.T
        d += _BLOCK
        if d >= check:
            check = int(1.2 * d)
            *found, residual = _ritz(A, Q[:d], images[:d], k)
            if residual <= tolerance:
                highest = float(found[0][-1] + tolerance * found[0][0])
                return None if _missed(A, Q[:d], highest) else (found[0], found[1], found[2], found[3])
        X = images[d - _BLOCK : d] @ A
        for _ in range(2):  # twice is enough to be orthogonal to rounding
            X = _orthonormal_rows(X - (X @ Q[:d].T) @ Q[:d])
    return None


def _missed(A: Tensor, Q: Tensor, highest: float) -> bool:
    """Whether a direction outside the basis has a larger singular value than any left there may have.

    That is a value repeated more often than the block is wide: Krylov spaces see one direction of it for every row of
    the block. Random rows outside the basis, after two power steps, lie mostly along what was missed.
    """
    generator = torch.Generator().manual_seed(1)
    Z = torch.randn(_BLOCK, A.shape[1], dtype=A.dtype, generator=generator).to(A)
    for _ in range(3):
        for _ in range(2):
            Z = _orthonormal_rows(Z - (Z @ Q.T) @ Q)
        image = Z @ A.T
        Z = image @ A
    return float(torch.linalg.matrix_norm(image, ord=2)) > highest


def _orthonormal_rows(X: Tensor) -> Tensor:
    Q: Tensor = torch.linalg.qr(X.T).Q
    return Q.T


def _ritz(A: Tensor, Q: Tensor, images: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    """Leading Ritz values (k + 1) and vectors (k), each value's residual, and the largest of k over sigma_1."""
    squares, turn = torch.linalg.eigh(images @ images.T)
    sigma, turn = squares[-k - 1 :].flip(0).clamp(min=0.0).sqrt(), turn[:, -k - 1 :].flip(1)
    if float(sigma[-1]) > _SQUARED * float(sigma[0]):
        U = (images.T @ turn) / sigma
    else:  # a rank below k, or nearly: squares would show rounding for zeros
        P, R = torch.linalg.qr(images.T)
        left, sigma, righth = torch.linalg.svd(R, full_matrices=False)
        sigma, turn, U = sigma[: k + 1], righth[: k + 1].T, P @ left[:, : k + 1]
    V = Q.T @ turn
    residuals = torch.linalg.vector_norm((U.T @ A).T - V * sigma, dim=0)
    return sigma, U[:, :k], V[:, :k], residuals, float(residuals[:k].max() / sigma[0])
