"""Entrywise comparison, and exact selection of a share of entries, independent of element order."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int16, UInt8
from numpy.typing import NDArray
from torch import Tensor

from geopd.spectral.norms import row_blocks
from geopd.spectral.operands import CACHED, Operand

N_MAGNITUDES = 1 << 15  # bf16 magnitudes: 15 bits beside the sign
_TOP_BITS = 44  # low bits of a float64 that a bucket leaves open: what is left is its exponent and 8 bits of mantissa
Counts = NDArray[np.int64]


def visibly_changed(
    W0: Float[Tensor, "..."], W1: Float[Tensor, "..."], eta: float, *, bf16: bool = False
) -> Bool[Tensor, "..."]:
    """Entries that changed visibly: not |w1 - w0| <= eta * max(|w0|, |w1|), evaluated in float64.

    ``bf16``: with both rounded to bf16 first (arXiv 2606.07082, section 3).
    """
    changed = torch.empty(W0.shape, dtype=torch.bool, device=W0.device)
    flat0, flat1, out = W0.reshape(-1), W1.reshape(-1), changed.view(-1)
    for start in range(0, flat0.numel(), CACHED):
        stop = start + CACHED
        a, b = flat0[start:stop], flat1[start:stop]
        a, b = (part.bfloat16().double() if bf16 else part.double() for part in (a, b))
        torch.gt((b - a).abs_(), torch.maximum(a.abs(), b.abs()).mul_(eta), out=out[start:stop])
    return changed


def magnitude_bins(W: Float[Tensor, "..."]) -> Int16[Tensor, "..."]:
    """Index of each entry's magnitude after rounding to bf16: its 15 magnitude bits, 0 to 32767, ordered by size."""
    return W.to(torch.bfloat16).view(torch.int16) & 0x7FFF


@dataclass(frozen=True)
class Magnitudes:
    """``magnitude_bins`` of a matrix, made where it is sliced: two bytes an entry that need not be held."""

    stored: Float[Tensor, "..."]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix."""
        return tuple(self.stored.shape)

    @property
    def device(self) -> torch.device:
        """Where slices lie."""
        return self.stored.device

    def __getitem__(self, index: Any, /) -> Int16[Tensor, "..."]:
        """The slice's indices."""
        return magnitude_bins(self.stored[index])

    def max(self) -> int:
        """The largest index."""
        return max(int(self[rows].max()) for rows in row_blocks(self.shape))


def count_bins(bins: Operand, where: Bool[Tensor, "..."] | None = None) -> Counts:
    """How many entries (of those in ``where``) each of the 32768 magnitudes holds."""
    total = torch.zeros(N_MAGNITUDES, dtype=torch.int64, device=bins.device)
    for rows in row_blocks(bins.shape):
        chunk = bins[rows].reshape(-1) if where is None else bins[rows][where[rows]]
        total += torch.bincount(chunk.long(), minlength=N_MAGNITUDES)
    counts: Counts = total.cpu().numpy()
    return counts


class Mask(Protocol):
    """A share of a matrix's entries, those tied at the cut counted by a fraction.

    A random set of entries then overlaps it by exactly alpha in expectation, and element order does not matter.
    """

    def weight_by_bin(self, bins: Operand) -> NDArray[np.float64]:
        """How much of each bf16 magnitude of W0 the mask takes."""
        ...

    def overlap(self, changed: Bool[Tensor, "..."], changed_by_bin: Counts) -> float | None:
        """Overlap |M* and M| / |M| of the mask M* with the changed entries M; None where nothing changed."""
        ...


INSIDE, TIED, DOUBTFUL = 1, 2, 4


@dataclass
class TieSplit:
    """The alpha share of entries of smallest (or largest) score: all inside, and a ``share`` of the tied.

    ``codes``: INSIDE or TIED (0 is outside), plus DOUBTFUL where the rounding of the scores leaves the side of the cut
    open.
    """

    codes: UInt8[Tensor, "..."]
    share: float
    _by_bin: NDArray[np.float64] | None = None

    @property
    def inside(self) -> Bool[Tensor, "..."]:
        """Entries beyond the cut."""
        return (self.codes & INSIDE).bool()

    @property
    def tied(self) -> Bool[Tensor, "..."]:
        """Entries at the cut."""
        return (self.codes & TIED).bool()

    def weight_by_bin(self, bins: Operand) -> NDArray[np.float64]:
        """How much of each bf16 magnitude of W0 the mask takes; ``bins`` are those of the matrix it was made for."""
        if self._by_bin is None:
            total = torch.zeros((TIED + 1) * N_MAGNITUDES, dtype=torch.int64, device=bins.device)
            for rows in row_blocks(bins.shape):
                joint = (self.codes[rows] & (INSIDE | TIED)).int().mul_(N_MAGNITUDES).add_(bins[rows])
                total += torch.bincount(joint.reshape(-1), minlength=total.numel())
            by_code = total.view(TIED + 1, -1).double().cpu().numpy()
            self._by_bin = by_code[INSIDE] + self.share * by_code[TIED]
        return self._by_bin

    def overlap(self, changed: Bool[Tensor, "..."], changed_by_bin: Counts) -> float | None:
        """Overlap with the changed entries; None where nothing changed."""
        total = int(changed_by_bin.sum())
        if total == 0:
            return None
        return (self._count(changed, INSIDE) + self.share * self._count(changed, TIED)) / total

    def doubtful(self, changed: Bool[Tensor, "..."]) -> int:
        """How many changed entries rounding leaves on an open side of the cut."""
        return self._count(changed, DOUBTFUL)

    def _count(self, changed: Bool[Tensor, "..."], code: int) -> int:
        chunks = zip(*(torch.split(part.reshape(-1), CACHED) for part in (changed, self.codes)), strict=True)
        return sum(int(torch.count_nonzero((codes & code).bool() & part)) for part, codes in chunks)


@dataclass(frozen=True, slots=True)
class MagnitudeMask:
    """The alpha share of entries of smallest bf16 magnitude, from the joint histogram alone: no entry is visited."""

    weight: NDArray[np.float64]
    """Share of each magnitude that is inside: 1 below the cut, 0 above, a fraction at it."""
    counts: Counts

    def weight_by_bin(self, bins: Operand) -> NDArray[np.float64]:  # noqa: ARG002 - known already
        """How much of each bf16 magnitude of W0 the mask takes."""
        return self.weight * self.counts

    def overlap(self, changed: Bool[Tensor, "..."], changed_by_bin: Counts) -> float | None:  # noqa: ARG002
        """Overlap with the changed entries; None where nothing changed."""
        total = int(changed_by_bin.sum())
        return float(self.weight @ changed_by_bin) / total if total else None


def _quota(alpha: float, n: int) -> float:
    if not 0.0 < alpha < 1.0:
        raise ValueError(f"alpha must lie strictly between 0 and 1, not {alpha}")
    if n == 0:
        raise ValueError("no entries to select from")
    return alpha * n


def smallest_magnitudes(counts: Counts, alpha: float) -> MagnitudeMask:
    """The alpha share of entries of smallest bf16 magnitude, from how many entries each magnitude holds.

    Raises:
        ValueError: if alpha is not strictly between 0 and 1, or there are no entries.
    """
    quota = _quota(alpha, int(counts.sum()))
    upto = np.cumsum(counts)
    cut = int(np.searchsorted(upto, quota, side="right"))
    below = int(upto[cut - 1]) if cut else 0
    weight = np.zeros(len(counts))
    weight[:cut] = 1.0
    weight[cut] = (quota - below) / counts[cut]
    return MagnitudeMask(weight, counts)


def split_at_share(
    blocks: Callable[[], Iterator[Float64[Tensor, "b n"]]],
    shape: tuple[int, ...],
    alpha: float,
    largest: bool,
    margin: float = 0.0,
) -> TieSplit:
    """Split entries at the alpha quota of their score; entries tied with the cut share what is left of the quota.

    The scores, non-negative, are made in row blocks and never held whole; ``blocks`` is called three times and must
    repeat itself. Where they carry rounding of up to half the ``margin``, entries that near the cut are DOUBTFUL.

    Raises:
        ValueError: if alpha is not strictly between 0 and 1, or there are no entries.
    """
    cut, share = _cut(blocks, math.prod(shape), alpha, largest)
    codes, done, doubtful = None, 0, 0
    for block in blocks():
        if codes is None:
            codes = torch.empty(shape, dtype=torch.uint8, device=block.device)
        inside = block > cut if largest else block < cut
        made = inside.to(torch.uint8).mul_(INSIDE).add_(block == cut, alpha=TIED)
        if margin:
            near = (block - cut).abs_() <= margin
            made.add_(near, alpha=DOUBTFUL)
            doubtful += int(torch.count_nonzero(near))
        codes[done : done + len(block)] = made
        done += len(block)
    assert codes is not None
    # one entry alone within rounding of the cut is the cut
    return TieSplit(codes & (DOUBTFUL - 1) if doubtful == 1 else codes, share)


def _cut(
    blocks: Callable[[], Iterator[Float64[Tensor, "b n"]]], n: int, alpha: float, largest: bool
) -> tuple[float, float]:
    """The score at the cut, and the share of the entries equal to it that are inside.

    Two passes: a histogram over the leading bits of the scores finds the bucket that holds the cut, the second pass
    collects that bucket and sorts it, so the cut is exact.
    """
    quota = _quota(alpha, n)
    buckets = np.zeros(1 << (63 - _TOP_BITS), dtype=np.int64)
    for block in blocks():
        buckets += np.bincount(_bucket(block), minlength=len(buckets))
    order = buckets[::-1] if largest else buckets
    upto = np.cumsum(order)
    position = int(np.searchsorted(upto, min(quota, n - 0.5), side="right"))
    before = int(upto[position - 1]) if position else 0
    bucket = len(buckets) - 1 - position if largest else position
    # into place: small results kept between large blocks would leave holes that no block fits again
    found, held = np.empty(buckets[bucket]), 0
    for block in blocks():
        inside = _flat(block)[_bucket(block) == bucket]
        found[held : held + len(inside)] = inside
        held += len(inside)
    found.sort()
    ordered = found[::-1] if largest else found
    cut = float(ordered[min(int(quota) - before, len(ordered) - 1)])
    ahead = before + int((found > cut).sum() if largest else (found < cut).sum())
    return cut, (quota - ahead) / int((found == cut).sum())


def _flat(block: Tensor) -> NDArray[np.float64]:
    flat: NDArray[np.float64] = block.reshape(-1).cpu().numpy()
    return flat


def _bucket(block: Tensor) -> NDArray[np.int64]:
    # non-negative floats are ordered as their bits; -0.0 would not be
    bits: NDArray[np.int64] = (_flat(block) + 0.0).view(np.int64) >> _TOP_BITS
    return bits
