"""Matrices that need not be held: a tensor as stored, or a difference of two made in float64 where it is sliced."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Float, Float64
from torch import Tensor

CACHED = 1 << 18  # entries converted at once: 2 MiB in float64; ten times faster than pieces that leave the cache
SYRK_ENTRIES = 1 << 22  # of a block that is multiplied with itself: 32 MiB


class Operand(Protocol):
    """What the kernels ask of a matrix: its shape, its device and its slices; a tensor is one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(m, n)."""

    @property
    def device(self) -> torch.device:
        """Where slices lie."""

    def __getitem__(self, index: Any, /) -> Tensor:
        """A slice of rows, or of rows and columns."""


@dataclass(frozen=True)
class Difference:
    """``(after - before) - decay * before``, made in float64 slice by slice: an update is never held whole.

    ``bf16``: of both ends rounded to bf16.
    """

    after: Float[Tensor, "m n"]
    before: Float[Tensor, "m n"]
    decay: float = 0.0
    bf16: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """(m, n)."""
        return tuple(self.after.shape)

    @property
    def device(self) -> torch.device:
        """Where the tensors lie."""
        return self.after.device

    def __getitem__(self, index: Any, /) -> Float64[Tensor, "..."]:
        """The slice in float64."""
        after, before = self.after[index], self.before[index]
        if self.bf16:
            after, before = after.bfloat16(), before.bfloat16()
        before = before.double()
        moved = after.to(torch.float64, copy=True).sub_(before)
        return moved.sub_(before, alpha=self.decay) if self.decay else moved


def checked_scale(W: Operand) -> float:
    """Largest magnitude of W, by which it is divided so that squares neither overflow nor underflow.

    Raises:
        ValueError: if W is not finite or not 2-D.
    """
    if len(W.shape) != 2:
        raise ValueError(f"a matrix is needed, not a tensor of shape {tuple(W.shape)}")
    if math.prod(W.shape) == 0:
        return 0.0
    # a tensor is looked at where it lies; anything else is made block by block
    blocks = [W] if isinstance(W, Tensor) else tall_blocks(W, 1.0)
    ends = [float(end) for block in blocks for end in torch.aminmax(block)]
    if not all(map(math.isfinite, ends)):
        raise ValueError("not finite: NaN or infinite entries have no singular values")
    return max(map(abs, ends))


def is_tall(W: Operand) -> bool:
    """Whether m >= n: the orientation in which kernels work."""
    return W.shape[0] >= W.shape[1]


def tall_blocks(W: Operand, scale: float, rows: int = 0) -> Iterator[Float64[Tensor, "b p"]]:
    """Row blocks of W / scale in float64 in its tall orientation, each overwritten by the next.

    Of ``rows`` rows, or as many as fit a cache; a function of the shape alone.
    """
    long, short = max(W.shape), min(W.shape)
    piece = max(1, CACHED // short)
    rows = min(rows or piece, long)
    buffer = torch.empty(rows, short, dtype=torch.float64, device=W.device)
    for start in range(0, long, rows):
        stop = min(start + rows, long)
        for first in range(start, stop, piece):
            last = min(first + piece, stop)
            made = W[first:last] if is_tall(W) else W[:, first:last].T
            buffer[first - start : last - start] = made if scale == 1.0 else made.double() / scale
        yield buffer[: stop - start]


def images(W: Operand, scale: float, V: Float64[Tensor, "p k"]) -> Float64[Tensor, "q k"]:
    """The tall W / scale applied to columns, streamed."""
    found = torch.empty(max(W.shape), V.shape[1], dtype=torch.float64, device=W.device)
    rows = max(1, SYRK_ENTRIES // min(W.shape))
    for part, block in enumerate(tall_blocks(W, scale, rows=rows)):
        torch.mm(block, V, out=found[part * rows : part * rows + block.shape[0]])
    return found
