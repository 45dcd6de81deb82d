"""Entrywise comparison, and exact selection of a share of entries, independent of element order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int16
from numpy.typing import NDArray
from torch import Tensor

_CHUNK = 1 << 20  # entries: a float64 chunk of either side stays in the last-level cache
N_MAGNITUDES = 1 << 15  # bf16 magnitudes: 15 bits beside the sign
_TOP_BITS = 44  # low bits of a float64 that a bucket leaves open: what is left is its exponent and 8 bits of mantissa
Counts = NDArray[np.int64]


def visibly_changed(W0: Float[Tensor, "..."], W1: Float[Tensor, "..."], eta: float) -> Bool[Tensor, "..."]:
    """Entries that changed visibly: not |w1 - w0| <= eta * max(|w0|, |w1|), evaluated in float64.

    Callers round both to bf16 first where the bf16 view is wanted (arXiv 2606.07082, section 3).
    """
    changed = torch.empty(W0.shape, dtype=torch.bool, device=W0.device)
    flat0, flat1, out = W0.reshape(-1), W1.reshape(-1), changed.view(-1)
    for start in range(0, flat0.numel(), _CHUNK):
        stop = start + _CHUNK
        a, b = flat0[start:stop].double(), flat1[start:stop].double()
        torch.gt((b - a).abs_(), torch.maximum(a.abs(), b.abs()).mul_(eta), out=out[start:stop])
    return changed


def magnitude_bins(W: Float[Tensor, "..."]) -> Int16[Tensor, "..."]:
    """Index of each entry's magnitude after rounding to bf16: its 15 magnitude bits, 0 to 32767, ordered by size."""
    return W.to(torch.bfloat16).view(torch.int16) & 0x7FFF


def count_bins(bins: Int16[Tensor, "..."], where: Bool[Tensor, "..."] | None = None) -> Counts:
    """How many entries (of those in ``where``) each of the 32768 magnitudes holds."""
    flat, chosen = bins.reshape(-1), None if where is None else where.reshape(-1)
    total = torch.zeros(N_MAGNITUDES, dtype=torch.int64, device=bins.device)
    for start in range(0, flat.numel(), _CHUNK):
        chunk = flat[start : start + _CHUNK]
        if chosen is not None:
            chunk = chunk[chosen[start : start + _CHUNK]]
        total += torch.bincount(chunk.long(), minlength=N_MAGNITUDES)
    counts: Counts = total.cpu().numpy()
    return counts


class Mask(Protocol):
    """A share of a matrix's entries, those tied at the cut counted by a fraction.

    A random set of entries then overlaps it by exactly alpha in expectation, and element order does not matter.
    """

    def weight_by_bin(self, bins: Int16[Tensor, "..."]) -> NDArray[np.float64]:
        """How much of each bf16 magnitude of W0 the mask takes."""
        ...

    def overlap(self, changed: Bool[Tensor, "..."], changed_by_bin: Counts) -> float | None:
        """Overlap |M* and M| / |M| of the mask M* with the changed entries M; None where nothing changed."""
        ...


@dataclass(frozen=True, slots=True)
class TieSplit:
    """The alpha share of entries of smallest (or largest) score: all ``inside``, and a ``share`` of the ``tied``."""

    inside: Bool[Tensor, "..."]
    tied: Bool[Tensor, "..."]
    share: float
    uncertain: Bool[Tensor, "..."] | None = None
    """Entries whose side of the cut the rounding of their scores leaves open; None where there are none."""

    def weight_by_bin(self, bins: Int16[Tensor, "..."]) -> NDArray[np.float64]:
        """How much of each bf16 magnitude of W0 the mask takes."""
        return count_bins(bins, self.inside) + self.share * count_bins(bins, self.tied)

    def overlap(self, changed: Bool[Tensor, "..."], changed_by_bin: Counts) -> float | None:
        """Overlap with the changed entries; None where nothing changed."""
        total = int(changed_by_bin.sum())
        if total == 0:
            return None
        inside, tied = int((changed & self.inside).sum()), int((changed & self.tied).sum())
        return (inside + self.share * tied) / total


@dataclass(frozen=True, slots=True)
class MagnitudeMask:
    """The alpha share of entries of smallest bf16 magnitude, from the joint histogram alone: no entry is visited."""

    weight: NDArray[np.float64]
    """Share of each magnitude that is inside: 1 below the cut, 0 above, a fraction at it."""
    counts: Counts

    def weight_by_bin(self, bins: Int16[Tensor, "..."]) -> NDArray[np.float64]:  # noqa: ARG002 - known already
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


def split_at_share(score: Float[Tensor, "..."], alpha: float, largest: bool) -> TieSplit:
    """Split entries at the alpha quota of their score; entries tied with the cut share what is left of the quota.

    Raises:
        ValueError: if alpha is not strictly between 0 and 1, or there are no entries.
    """
    n = score.numel()
    quota = _quota(alpha, n)
    position = min(int(np.floor(quota)), n - 1)
    signed = -score if largest else score
    cut = float(np.partition(signed.reshape(-1).cpu().numpy(), position)[position])
    inside, tied = signed < cut, signed == cut
    share = (quota - int(inside.sum())) / int(tied.sum())
    return TieSplit(inside, tied, share)


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


def split_blocks(
    blocks: Callable[[], Iterator[Float64[Tensor, "b n"]]], n: int, alpha: float, largest: bool
) -> tuple[float, float]:
    """Cut and tie share of ``split_at_share`` for non-negative scores that are made block by block, never held whole.

    Two passes: a histogram over the leading bits of the scores finds the bucket that holds the cut, the second pass
    collects that bucket and sorts it, so the cut is exact. ``blocks`` is called once a pass and must repeat itself.

    Returns:
        The score at the cut, and the share of the entries equal to it that are inside.

    Raises:
        ValueError: if alpha is not strictly between 0 and 1, or there are no entries.
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
    found = np.sort(
        np.concatenate([values[_bucket(block) == bucket] for block in blocks() for values in [_flat(block)]])
    )
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
