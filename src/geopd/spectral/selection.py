"""Entrywise comparison and exact selection of a share of entries, independent of element order."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

_CHUNK = 1 << 20  # entries: a float64 chunk of either side stays in the last-level cache
N_MAGNITUDES = 1 << 15  # bf16 magnitudes: 15 bits beside the sign


def visibly_changed(W0: Float[Tensor, ...], W1: Float[Tensor, ...], eta: float) -> Bool[Tensor, ...]:
    """Entries that changed visibly: not |w1 - w0| <= eta * max(|w0|, |w1|), evaluated in float64.

    The two must have one dtype; callers round both to bf16 first where the bf16 view is wanted (arXiv 2606.07082,
    section 3).
    """
    changed = torch.empty(W0.shape, dtype=torch.bool, device=W0.device)
    flat0, flat1, out = W0.reshape(-1), W1.reshape(-1), changed.view(-1)
    for start in range(0, flat0.numel(), _CHUNK):
        stop = start + _CHUNK
        a, b = flat0[start:stop].double(), flat1[start:stop].double()
        torch.gt((b - a).abs_(), torch.maximum(a.abs_(), b.abs()).mul_(eta), out=out[start:stop])
    return changed


def magnitude_bins(W: Float[Tensor, ...]) -> Int64[Tensor, ...]:
    """Index of each entry's magnitude after rounding to bf16: its 15 magnitude bits, 0 to 32767, ordered by size."""
    return (W.to(torch.bfloat16).view(torch.int16) & 0x7FFF).long()


@dataclass(frozen=True, slots=True)
class TieSplit:
    """The alpha share of entries with the smallest (or largest) score: all ``inside``, and a ``share`` of the ties.

    A random set of entries then scores exactly alpha in expectation, and element order does not matter.
    """

    inside: Bool[Tensor, ...]
    tied: Bool[Tensor, ...]
    share: float
    threshold: float


def split_at_share(score: Float[Tensor, ...], alpha: float, largest: bool) -> TieSplit:
    """Split entries at the alpha quota of their score; entries tied with the cut share what is left of the quota.

    Raises:
        ValueError: if alpha is not strictly between 0 and 1, or there are no entries.
    """
    if not 0.0 < alpha < 1.0:
        raise ValueError(f"alpha must lie strictly between 0 and 1, not {alpha}")
    n = score.numel()
    if n == 0:
        raise ValueError("no entries to select from")
    quota = alpha * n
    position = min(int(np.floor(quota)), n - 1)
    signed = -score if largest else score
    cut = float(np.partition(signed.reshape(-1).cpu().numpy(), position)[position])
    inside, tied = signed < cut, signed == cut
    share = (quota - int(inside.sum())) / int(tied.sum())
    return TieSplit(inside, tied, share, -cut if largest else cut)


def fractional_overlap(split: TieSplit, changed: Bool[Tensor, ...]) -> float | None:
    """Overlap |M* and M| / |M| of the selected share M* with the changed entries M, ties counted by their share.

    None where nothing changed: the overlap is then undefined, not 0.
    """
    total = int(changed.sum())
    if total == 0:
        return None
    inside, tied = int((changed & split.inside).sum()), int((changed & split.tied).sum())
    return (inside + split.share * tied) / total
