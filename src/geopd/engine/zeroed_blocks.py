"""Zeros at one end of a pair alone: what a lost disk block, a copy with holes or a shard that was never filled leaves.

They are told as warnings.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from geopd.engine.run_plan import RunPlan
from geopd.matrices import Role

BLOCK = 1024
"""Bytes. A lost block of 4096 holds at least three whole ones of these, wherever in a tensor it begins."""
WHOLE = -1
"""What ``zeroed_block`` says of a tensor that is zero throughout."""


def zeroed_block(tensor: Tensor) -> int | None:
    """The byte of a tensor (contiguous, on the CPU) at which its first block of zeros begins; ``WHOLE`` for all of it.

    None without one, and for a tensor that begins and ends in zeros and holds others between: it was made so.
    """
    data = tensor.reshape(-1).view(torch.uint8).numpy()
    if not data[:BLOCK].any() and not data[-BLOCK:].any():
        return None if data.any() or not len(data) else WHOLE
    words = data[: len(data) // BLOCK * BLOCK].view(np.int64).reshape(-1, BLOCK // 8)
    candidates = np.flatnonzero(words[:, 0] == 0)
    at = next((int(i) for i in candidates if not words[i].any()), None)
    return None if at is None else at * BLOCK


def tell_zeroed(run: RunPlan, zeroed: Mapping[tuple[Path, str], int]) -> None:
    """Warn of every tensor of a run that has zeros where its origin has none, or the other way about.

    Told is a tensor that is zero throughout at one end, and a block of zeros where the other end has no block.
    Embeddings and vectors of an origin may hold zeros from the start, so that of these only the later end is told.
    """
    for step, path in run.run.checkpoints:
        for pair in (steps[step] for steps in run.pairs.values() if step in steps):
            ends = ((run.origin, pair.origin_tensor), (path, pair.tuned_tensor))
            before, after = (zeroed.get(end) for end in ends)
            if (before is None) == (after is None) and (before == WHOLE) == (after == WHOLE):
                continue
            at_origin = after is None or before == WHOLE
            if at_origin and pair.weight.role is not Role.MATRIX:
                continue
            (where, name), (other, _) = ends if at_origin else ends[::-1]
            run.warnings.append(f"{where}: tensor {name}: {_said(before if at_origin else after, other)}")


def _said(at: int | None, other: Path) -> str:
    if at == WHOLE:
        return (
            f"zeros throughout, where {other} has other values: a shard that was never filled? Compare the file's "
            "checksum, or copy it again"
        )
    return (
        f"zeros from byte {at:,} on, where {other} has none: a lost block of its file? Compare the file's checksum, or "
        "copy it again"
    )
