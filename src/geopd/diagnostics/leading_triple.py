"""Leading singular values of one matrix by Lanczos, without its decomposition; seeded, so the same every time."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Float64
from numpy.typing import NDArray
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor

TOLERANCE = 1e-10  # relative, of the squared singular values
_SMALL = 32  # at or below this min(m, n) a dense SVD is cheaper than starting Lanczos


def leading_triple(Y: Float64[Tensor, "m n"]) -> tuple[float, Float64[Tensor, " m"], Float64[Tensor, " n"], float]:
    """sigma_1, its left and right vectors, and a residual: some singular value lies within it of the one returned.

    The residual is ||Y^T a - sigma b|| with Y b = sigma a exactly by construction. Y is scaled by the caller.
    """
    if min(Y.shape) <= _SMALL:
        U, sigma, Vh = torch.linalg.svd(Y, full_matrices=False)
        return float(sigma[0]), U[:, 0], Vh[0], float(sigma[0]) * max(Y.shape) * 2**-52
    _, vectors = _lanczos(Y, 1, TOLERANCE)
    b = torch.from_numpy(vectors[:, -1].copy()).to(Y)
    if Y.shape[0] < Y.shape[1]:
        b = Y.T @ b
    b = b / torch.linalg.vector_norm(b)
    image = Y @ b
    sigma1 = float(torch.linalg.vector_norm(image))
    a = image / sigma1
    return sigma1, a, b, float(torch.linalg.vector_norm(Y.T @ a - sigma1 * b)) + sigma1 * max(Y.shape) * 2**-52


def leading_values(Y: Float[Tensor, "m n"], k: int, tolerance: float) -> NDArray[np.float64]:
    """The k largest singular values, descending, each to about ``tolerance`` relative."""
    if min(Y.shape) <= max(_SMALL, 3 * k):
        dense: NDArray[np.float64] = torch.linalg.svdvals(Y.double())[:k].cpu().numpy()
        return dense
    squares, _ = _lanczos(Y, k, tolerance)
    values: NDArray[np.float64] = np.sqrt(np.sort(np.asarray(squares, dtype=np.float64))[::-1])
    return values


def _lanczos(Y: Float[Tensor, "m n"], k: int, tolerance: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Largest eigenvalues and vectors of the smaller Gram matrix of Y, applied as two products."""
    array = Y.cpu().numpy()
    tall = array if array.shape[0] >= array.shape[1] else array.T
    p = tall.shape[1]
    gram = LinearOperator((p, p), matvec=lambda x: tall.T @ (tall @ x.reshape(-1)), dtype=array.dtype)
    start = np.random.default_rng(0).standard_normal((p,)).astype(array.dtype)
    try:
        values, vectors = eigsh(gram, k=k, v0=start, tol=tolerance, ncv=min(p - 1, max(20, 4 * k)), maxiter=50 * p)
    except ArpackNoConvergence as unfinished:  # a flat spectrum: the residual says how far it got
        values, vectors = unfinished.eigenvalues, unfinished.eigenvectors
        if len(values) < k:
            raise
    return values, vectors
