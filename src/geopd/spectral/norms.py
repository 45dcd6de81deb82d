"""The Frobenius norm with a bound on its rounding, streamed in row blocks."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from geopd.spectral.decomposition import EPS
from geopd.spectral.operands import CACHED, Operand

_SAFE = 1e-250, 1e250  # sums of squares that lost nothing to underflow and did not overflow


def row_blocks(shape: tuple[int, ...], entries: int = CACHED) -> Iterator[slice]:
    """Slices of rows that cover a matrix, each of about so many entries; a pure function of the shape."""
    rows = max(1, entries // max(1, math.prod(shape[1:])))
    return (slice(start, start + rows) for start in range(0, shape[0], rows))


def frobenius(W: Operand) -> tuple[float, float]:
    """||W||_F and a bound on its rounding error, both in the unit of W.

    Rows are summed in float64 and their sums added exactly (math.fsum), so the relative error of the sum of squares is
    at most (n + 2) eps, and of a difference's entries eps. Divided by the largest entry first where squares would leave
    the range of the numbers.
    """
    squared, scale = _sum_of_squares(W, 1.0), 1.0
    if not _SAFE[0] < squared < _SAFE[1]:
        scale = max((float(W[rows].double().abs().max()) for rows in row_blocks(W.shape)), default=0.0)
        if scale == 0.0:
            return 0.0, 0.0
        squared = _sum_of_squares(W, scale)
    norm = scale * math.sqrt(squared)
    return norm, norm * (W.shape[1] + 4) * EPS


def _sum_of_squares(W: Operand, scale: float) -> float:
    squares: list[float] = []
    for rows in row_blocks(W.shape):
        block = W[rows].double()
        if scale != 1.0:
            block = block / scale
        squares += torch.linalg.vecdot(block, block).tolist()
    return math.fsum(squares) if all(map(math.isfinite, squares)) else math.inf
