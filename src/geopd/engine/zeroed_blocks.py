"""Blocks of zeros at one end of a pair alone: what a lost disk block or a copy with holes leaves, told as a warning."""

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


def zeroed_block(tensor: Tensor) -> int | None:
    """The byte of a tensor (contiguous, on the CPU) at which its first block of zeros begins.

    None without one, and for a tensor that begins and ends in zeros: it was made so.
    """
    data = tensor.reshape(-1).view(torch.uint8).numpy()
    words = data[: len(data) // BLOCK * BLOCK].view(np.int64).reshape(-1, BLOCK // 8)
    candidates = np.flatnonzero(words[:, 0] == 0)
    at = next((int(i) for i in candidates if not words[i].any()), None)
    return None if at is None or not (data[:BLOCK].any() or data[-BLOCK:].any()) else at * BLOCK


def tell_zeroed(run: RunPlan, zeroed: Mapping[tuple[Path, str], int]) -> None:
    """Warn of every tensor of a run that has a block of zeros where its origin has none, or the other way about.

    Embeddings and vectors of an origin may hold zeros from the start, so that of these only the later end is told.
    """
    for step, path in run.run.checkpoints:
        for pair in (steps[step] for steps in run.pairs.values() if step in steps):
            ends = ((run.origin, pair.origin_tensor), (path, pair.tuned_tensor))
            before, after = (zeroed.get(end) for end in ends)
            if (before is None) == (after is None) or (after is None and pair.weight.role is not Role.MATRIX):
                continue
            (where, name), at, (other, _) = (ends[0], before, ends[1]) if after is None else (ends[1], after, ends[0])
            run.warnings.append(
                f"{where}: tensor {name}: zeros from byte {at:,} on, where {other} has none: a lost block of its file? "
                "Compare the file's checksum, or copy it again"
            )
