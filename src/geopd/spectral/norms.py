"""The Frobenius norm with a bound on its rounding, streamed in row blocks."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from geopd.spectral.decomposition import EPS

_BLOCK = 1 << 20  # entries: a float64 block of either side stays in the last-level cache


def row_blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Slices of rows that cover a matrix, each about a million entries; a pure function of the shape."""
    rows = max(1, _BLOCK // max(1, math.prod(shape[1:])))
    return (slice(start, start + rows) for start in range(0, shape[0], rows))


def frobenius(W: Float[Tensor, "m n"], minus: Float[Tensor, "m n"] | None = None) -> tuple[float, float]:
    """||W||_F, or ||W - minus||_F, and a bound on its rounding error, both in the unit of W.

    The difference is taken in float64. Rows are summed in float64 and their sums added exactly (math.fsum), so the
    relative error of the sum of squares is at most (n + 2) eps, and of the difference's entries eps.
    """
    scale = max((float(_block(W, minus, rows).abs().max()) for rows in row_blocks(W.shape)), default=0.0)
    if scale == 0.0:
        return 0.0, 0.0
    squares: list[float] = []
    for rows in row_blocks(W.shape):
        block = _block(W, minus, rows) / scale
        squares += torch.linalg.vecdot(block, block).tolist()
    norm = scale * math.sqrt(math.fsum(squares))
    return norm, norm * (W.shape[1] + 4) * EPS


def _block(W: Tensor, minus: Tensor | None, rows: slice) -> Float64[Tensor, "b n"]:
    return W[rows].double() if minus is None else W[rows].double() - minus[rows].double()
