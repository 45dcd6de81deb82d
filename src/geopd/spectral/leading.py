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
_ATTEMPTS = 4  # each without the triples that those before it found
_PASS = 64  # rows of a held matrix read at once: they stay in the cache between both products
_EPS32 = float(torch.finfo(torch.float32).eps)
_FLOOR = 8.0  # eps sigma_1^2 / sigma_i: what residuals from squared values cannot fall below, in units of this
_OWN = 1e-3  # of a value itself: a larger residual leaves open which value it is
_RESOLVED = 1e-2  # of the first value: what squares in float32 resolve; smaller ones are left to the next attempt
_PROJECTIONS = 5
_MARGIN = 1.1  # over what power steps find of the largest value outside the basis
_POWER = 8  # steps by which random directions outside the basis turn to what it may have missed


def leading_triples(W: Operand, k: int, tolerance: float = 1e-6) -> Decomposition:
    """The k largest singular values of W with their vectors, and sigma_{k+1}.

    Block Krylov: an orthonormal basis Q of span{X, W^T W X, ...}, fully reorthogonalised, in float32, and Rayleigh-Ritz
    on W^T W until the Ritz vectors' residuals allow. Then in float64: the singular values of W on the leading Ritz
    vectors, and the residuals ||W^T u - sigma v||, which bound the values (Weyl) and, with the gap, the subspaces.
    Where one exceeds tolerance sigma_1, or a thousandth of its own value, the rest is looked for again in what the
    triples found leave of W. A value is right to about its residual's square over the gap.

    That no larger value lies elsewhere is as sure as random directions are: the start is random from a fixed seed, and
    since Krylov spaces see no more copies of a repeated value than the block has rows, random rows outside the basis
    are tried at the end. Where they find a larger value, or the spectrum is too flat to converge in a basis of
    0.4 min(m, n) columns, W is decomposed whole (``decompose``).

    Raises:
        ValueError: if W is not finite or not 2-D.
    """
    scale = checked_scale(W)
    p = min(W.shape)
    k = min(k, p)
    if scale == 0.0 or p <= min(_WHOLE[0] * k, _WHOLE[1]) or k >= p // 4:
        return decompose(W, k)
    found = None
    for _ in range(_ATTEMPTS):
        locked = 0 if found is None else found.locked
        space = _krylov(_tall(W, scale, found), W, k - locked, tolerance)
        if space is None:
            break
        V, top, ceiling = space
        V = V if found is None else torch.cat([found.right[:, :locked], V], dim=1)
        found = _finish(lambda: tall_blocks(W, scale), max(W.shape), V, k, tolerance, _RESOLVED * top)
        if found.locked >= k:
            return _certified(W, scale, found, k, ceiling)
    return decompose(W, k)


@dataclass(frozen=True)
class _Triples:
    """Singular triples of the tall matrix, with every residual; the first ``locked`` are as near as was asked."""

    sigma: Float64[Tensor, " q"]
    left: Float64[Tensor, "m q"]
    right: Float64[Tensor, "n q"]
    residuals: Float64[Tensor, " q"]
    locked: int


def _certified(W: Operand, scale: float, found: _Triples, k: int, ceiling: float) -> Decomposition:
    sigma, top = found.sigma[: k + 1], float(found.sigma[0])
    rounding = (16 + 2 * math.sqrt(min(W.shape))) * EPS * top
    tall = found.left[:, :k].contiguous(), found.right[:, :k].contiguous()
    left, right = tall if is_tall(W) else tall[::-1]
    perturbation = (float(torch.linalg.vector_norm(found.residuals[:k])) + rounding) / top
    loss = max(orthogonality_loss(left), orthogonality_loss(right))
    # a value under the ceiling (sigma_{k+1} above all, which need not have converged) may be as large as that: one more
    # of its size outside the basis would not have been noticed
    errors = torch.maximum(found.residuals[: k + 1] + rounding, ceiling - sigma)
    return Decomposition(
        sigma * scale, left, right, errors * scale, perturbation, False, loss, "krylov", complete=False
    )


def _tall(W: Operand, scale: float, found: _Triples | None) -> Callable[[], Iterator[Tensor]]:
    """Row blocks of the tall W / scale without its locked triples, in float32.

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
            yield block.float()

    if 4 * math.prod(W.shape) > _HELD:
        return made
    held = torch.empty(max(W.shape), min(W.shape), device=W.device)
    done = 0
    for block in made():
        held[done : done + block.shape[0]] = block
        done += block.shape[0]
    return lambda: iter(torch.split(held, _PASS))


def _krylov(
    blocks: Callable[[], Iterator[Tensor]], W: Operand, k: int, tolerance: float
) -> tuple[Tensor, float, float] | None:
    """k + 1 leading right vectors and a few more, in float64, the largest value, and what nothing elsewhere exceeds.

    None where the space grows too large, or misses something larger.

    Bases are kept as rows: products of a few rows with W run at twice the speed of a few columns. With Z = W^T W X for
    every block X of the basis Q, the reorthogonalisation's first products Z Q^T are W^T W in that basis.
    """
    n = min(W.shape)
    limit = int(_SHARE * n)
    Q, Z = (torch.empty(limit, n, device=W.device) for _ in range(2))
    H = torch.zeros(limit, limit, dtype=torch.float64, device=W.device)
    generator = torch.Generator().manual_seed(0)
    X = _orthonormal_rows(torch.randn(_BLOCK, n, generator=generator).to(W.device))
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
                values = _eigen(H[:d, :d])[0].clamp(min=0.0).sqrt()
                ceiling = float(
                    values[k].clamp(min=_RESOLVED * values[0]) + max(tolerance, _FLOOR * _EPS32) * values[0]
                )
                least = float(values[:k][values[:k] >= _RESOLVED * values[0]].min())
                elsewhere = _largest_elsewhere(blocks, Q[:d], least)
                if elsewhere > ceiling:  # the rest has not converged; its largest value is near that, not above least
                    ceiling = _MARGIN * elsewhere
                    if ceiling >= least:
                        return None
                return V.double(), float(values[0]), ceiling
        X = _outside(_orthonormal_rows(Z[new] - inside @ Q[:d]), Q[:d])
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
    allowed = torch.clamp(tolerance * top * squares[:k].sqrt(), min=_FLOOR * _EPS32 * top**2)
    return V if bool(((residuals <= allowed) | (squares[:k] < (_RESOLVED * top) ** 2)).all()) else None


def _largest_elsewhere(blocks: Callable[[], Iterator[Tensor]], Q: Tensor, enough: float) -> float:
    """The largest singular value outside the basis, from below; no further than ``enough``.

    Above all of a value repeated more often than the block is wide: Krylov spaces see one direction of it for every row
    of the block. Random rows outside the basis turn towards it under power steps.
    """
    Z, found = torch.randn(_BLOCK, Q.shape[1], generator=torch.Generator().manual_seed(1)).to(Q), 0.0
    for _ in range(_POWER + 1):
        outside = _outside(_orthonormal_rows(Z), Q)
        Z = _squared(blocks, outside)
        found = math.sqrt(max(0.0, float(torch.linalg.eigvalsh((Z @ outside.T).double())[-1])))
        if found >= enough:
            break
    return found


def _outside(X: Tensor, Q: Tensor) -> Tensor:
    """Orthonormal rows outside the span of Q, from orthonormal rows of any direction.

    Once is enough where little was inside; rows that were nothing but rounding of what is inside need more.
    """
    for _ in range(_PROJECTIONS):
        rest = X - (X @ Q.T) @ Q
        shortest = float(torch.linalg.vector_norm(rest, dim=1).min())
        X = _orthonormal_rows(rest)
        if shortest > 0.5:
            break
    return X


def _orthonormal_rows(X: Tensor) -> Tensor:
    Q: Tensor = torch.linalg.qr(X.T).Q
    return Q.T


def _finish(
    blocks: Callable[[], Iterator[Tensor]],
    long: int,
    start: Float64[Tensor, "n q"],
    k: int,
    tolerance: float,
    least: float,
) -> _Triples:
    """The singular triples of W, of ``long`` rows, on the span of ``start``, in float64; iterated once if need be.

    Locked are those as near as was asked, in order from the first, and not below ``least``.
    """
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
        vanishing = sigma[:k] <= max(long, Vh.shape[1]) * EPS * float(sigma[0])
        own = (residuals[:k] <= _OWN * sigma[:k]) & (sigma[:k] >= least)
        near = (residuals[:k] <= tolerance * float(sigma[0])) & (own | vanishing)
        if bool(near.all()):
            break
        start = back.T
    return _Triples(sigma, Uh.T, Vh.T, residuals, int(near.long().cumprod(0).sum()))
