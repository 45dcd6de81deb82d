"""The leading singular triples of a matrix: block Krylov in float32, certified and finished in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from geopd.spectral.decomposition import EPS, Decomposition, decompose, orthogonality_loss
from geopd.spectral.operands import Operand, checked_scale, is_tall, tall_blocks

_WHOLE = 64, 2048  # min(m, n) up to 64 k, at most 2048: a whole decomposition then costs no more
_BLOCK = 16  # rows a step: enough for matrix products to run at speed, few enough for the degree to grow
_SHARE = 0.4  # of min(m, n): a Krylov space larger than this costs more than the whole decomposition
_HELD = 1 << 29  # bytes of a converted copy worth holding; larger matrices are converted anew in every step
_GUARD = 4  # Ritz vectors beyond k + 1 carried through the last steps, which they speed up
_FINISHING = 2  # float64 steps before another attempt
_ATTEMPTS = torch.float32, torch.float32, torch.float64  # the second without what the first found
_PASS = 64  # rows of a held matrix read at once: they stay in the cache between both products
_FLOOR = 8.0  # eps sigma_1^2 / sigma_i: what residuals from squared values cannot fall below, in units of this


def leading_triples(W: Operand, k: int, tolerance: float = 1e-6, near: Decomposition | None = None) -> Decomposition:
    """The k largest singular values of W with their vectors, and sigma_{k+1}.

    Block Krylov: an orthonormal basis Q of span{X, W^T W X, ...}, fully reorthogonalised, in float32, and Rayleigh-Ritz
    on W^T W until the Ritz vectors' residuals allow. Then in float64: the singular values of W on the leading Ritz
    vectors, and the residuals ||W^T u - sigma v||, which bound the values (Weyl) and, with the gap, the subspaces.
    Where one exceeds tolerance sigma_1 the rest is looked for again, first in what the triples found leave of W, then
    in float64. A value is right to about its residual's square over the gap.

    The start is random from a fixed seed; ``near``, the decomposition of a matrix close to W, lends it its vectors. Of
    a singular value repeated more often than the block is wide the space sees no further copies, so random rows outside
    it are tried at the end. Where they find a larger value, or the spectrum is too flat to converge in a basis of
    0.4 min(m, n) columns, W is decomposed whole (``decompose``).

    Raises:
        ValueError: if W is not finite or not 2-D.
    """
    scale = checked_scale(W)
    p = min(W.shape)
    k = min(k, p)
    if scale == 0.0 or p <= min(_WHOLE[0] * k, _WHOLE[1]) or k >= p // 4:
        return decompose(W, k)
    start = None if near is None else near.right if is_tall(W) else near.left
    found = None
    for dtype in _ATTEMPTS:
        V = _krylov(_tall(W, scale, dtype, found), W, k - (found.locked if found else 0), tolerance, start, dtype)
        if V is None:
            break
        space = V if found is None else torch.cat([found.right[:, : found.locked], V], dim=1)
        found = _finish(lambda: tall_blocks(W, scale), max(W.shape), space, k, tolerance)
        if found.locked >= k:
            return _certified(W, scale, found, k)
        start = found.right[:, found.locked :]
    return decompose(W, k)


@dataclass(frozen=True)
class _Triples:
    """Singular triples of the tall matrix, with every residual; the first ``locked`` are as near as was asked."""

    sigma: Float64[Tensor, " q"]
    left: Float64[Tensor, "m q"]
    right: Float64[Tensor, "n q"]
    residuals: Float64[Tensor, " q"]
    locked: int


def _certified(W: Operand, scale: float, found: _Triples, k: int) -> Decomposition:
    sigma, top = found.sigma[: k + 1], float(found.sigma[0])
    rounding = (16 + 2 * math.sqrt(min(W.shape))) * EPS * top
    tall = found.left[:, :k].contiguous(), found.right[:, :k].contiguous()
    left, right = tall if is_tall(W) else tall[::-1]
    perturbation = (float(torch.linalg.vector_norm(found.residuals[:k])) + rounding) / top
    loss = max(orthogonality_loss(left), orthogonality_loss(right))
    errors = (found.residuals[: k + 1] + rounding) * scale
    return Decomposition(sigma * scale, left, right, errors, perturbation, False, loss, "krylov", complete=False)


def _tall(W: Operand, scale: float, dtype: torch.dtype, found: _Triples | None) -> Callable[[], Iterator[Tensor]]:
    """Row blocks of the tall W / scale without its locked triples, in the working precision.

    Held where they are small, else made anew. What is left of W once large triples are taken out keeps its digits in
    float32, which the squares of a spectrum that falls steeply would lose.
    """

    def made() -> Iterator[Tensor]:
        done = 0
        for block in tall_blocks(W, scale):
            if found is not None and found.locked:
                part = found.left[done : done + block.shape[0], : found.locked] * found.sigma[: found.locked]
                block.addmm_(part, found.right[:, : found.locked].T, alpha=-1.0)
            done += block.shape[0]
            yield block.to(dtype)

    if math.prod(W.shape) * dtype.itemsize > _HELD:
        return made
    held = torch.empty(max(W.shape), min(W.shape), dtype=dtype, device=W.device)
    done = 0
    for block in made():
        held[done : done + block.shape[0]] = block
        done += block.shape[0]
    return lambda: iter(torch.split(held, _PASS))


def _krylov(
    blocks: Callable[[], Iterator[Tensor]],
    W: Operand,
    k: int,
    tolerance: float,
    start: Tensor | None,
    dtype: torch.dtype,
) -> Tensor | None:
    """k + 1 leading right vectors and a few more, in float64; None where the space grows too large.

    Bases are kept as rows: products of a few rows with W run at twice the speed of a few columns. With Z = W^T W X for
    every block X of the basis Q, the reorthogonalisation's first products Z Q^T are W^T W in that basis.
    """
    n = min(W.shape)
    limit = int(_SHARE * n)
    Q, Z = (torch.empty(limit, n, dtype=dtype, device=W.device) for _ in range(2))
    H = torch.zeros(limit, limit, dtype=torch.float64, device=W.device)
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(_BLOCK, n, dtype=dtype, generator=generator).to(W.device)
    if start is not None:
        given = start.T[: _BLOCK - 1].to(X)  # one random row stays: a start without a direction never finds it
        X[: given.shape[0]] = given
    X = _orthonormal_rows(X)
    check, d = k + _GUARD + _BLOCK, 0
    while d + _BLOCK <= limit:
        new = slice(d, d + _BLOCK)
        Q[new], Z[new] = X, _squared(blocks, X)
        d += _BLOCK
        inside = Z[new] @ Q[:d].T
        H[new, :d] = inside.double()
        if d >= check:
            check = max(d + _BLOCK, int(1.15 * d))
            V = _ritz(H[:d, :d], Q[:d], Z[:d], k, tolerance)
            if V is not None:
                return None if _missed(blocks, Q[:d], H[:d, :d], k, tolerance) else V.double()
        X = _orthonormal_rows(Z[new] - inside @ Q[:d])
        X = _orthonormal_rows(X - (X @ Q[:d].T) @ Q[:d])  # twice is enough to be orthogonal to rounding
    return None


def _squared(blocks: Callable[[], Iterator[Tensor]], X: Tensor) -> Tensor:
    """W^T W applied to rows, in one pass over W."""
    Z = torch.zeros_like(X)
    for block in blocks():
        Z.addmm_(X @ block.T, block)
    return Z


def _eigen(H: Float64[Tensor, "d d"]) -> tuple[Tensor, Tensor]:
    """Eigenvalues (descending) and eigenvectors of the symmetric matrix whose lower triangle is H's."""
    values, turn = torch.linalg.eigh(H)
    return values.flip(0), turn.flip(1)


def _ritz(H: Tensor, Q: Tensor, Z: Tensor, k: int, tolerance: float) -> Tensor | None:
    """Leading Ritz vectors (columns) once the residuals of the first k are small enough, else None."""
    values, turn = _eigen(H)
    count = min(k + 1 + _GUARD, H.shape[0])
    turn = turn[:, :count].to(Q)
    V, images = Q.T @ turn, Z.T @ turn
    squares = values[:count].clamp(min=0.0)
    top = math.sqrt(float(squares[0]))
    residuals = torch.linalg.vector_norm((images - V * squares.to(Q)).double(), dim=0)[:k]
    # of W^T W: divided by sigma they are those of W; below rounding of the squares they cannot fall
    allowed = torch.clamp(tolerance * top * squares[:k].sqrt(), min=_FLOOR * torch.finfo(Q.dtype).eps * top**2)
    return V if bool((residuals <= allowed).all()) else None


def _missed(blocks: Callable[[], Iterator[Tensor]], Q: Tensor, H: Tensor, k: int, tolerance: float) -> bool:
    """Whether a direction outside the basis has a larger singular value than any left there may have.

    That is a value repeated more often than the block is wide: Krylov spaces see one direction of it for every row of
    the block. Random rows outside the basis, after two power steps, lie mostly along what was missed.
    """
    values = _eigen(H)[0].clamp(min=0.0).sqrt()
    highest = float(values[k] + max(tolerance, _FLOOR * torch.finfo(Q.dtype).eps) * values[0])
    Z = torch.randn(_BLOCK, Q.shape[1], dtype=Q.dtype, generator=torch.Generator().manual_seed(1)).to(Q)
    for _ in range(3):
        for _ in range(2):
            Z = _orthonormal_rows(Z - (Z @ Q.T) @ Q)
        outside, Z = Z, _squared(blocks, Z)
    return math.sqrt(max(0.0, float(torch.linalg.eigvalsh((Z @ outside.T).double())[-1]))) > highest


def _orthonormal_rows(X: Tensor) -> Tensor:
    Q: Tensor = torch.linalg.qr(X.T).Q
    return Q.T


def _finish(
    blocks: Callable[[], Iterator[Tensor]], long: int, start: Float64[Tensor, "n q"], k: int, tolerance: float
) -> _Triples:
    """The singular triples of W, of ``long`` rows, on the span of ``start``, in float64; iterated once if need be."""
    for _ in range(_FINISHING):
        Vh = torch.linalg.qr(start).Q.T.contiguous()
        forward, done = Vh.new_empty(Vh.shape[0], long), 0
        for block in blocks():
            # into place: small results kept between large blocks would leave holes that no block fits again
            forward[:, done : done + block.shape[0]] = Vh @ block.T
            done += block.shape[0]
        P, R = torch.linalg.qr(forward.T)
        turn, sigma, turned = torch.linalg.svd(R)
        Uh, Vh = (P @ turn).T.contiguous(), turned @ Vh
        back, done = torch.zeros_like(Vh), 0
        for block in blocks():
            back.addmm_(Uh[:, done : done + block.shape[0]], block)
            done += block.shape[0]
        residuals = torch.linalg.vector_norm(back - Vh * sigma[:, None], dim=1)
        near = residuals[:k] <= tolerance * float(sigma[0])
        if bool(near.all()):
            break
        start = back.T
    return _Triples(sigma, Uh.T, Vh.T, residuals, int(near.long().cumprod(0).sum()))
