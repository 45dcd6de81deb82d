"""Files that lie where weights should: what a clone without git-LFS or a failed download leaves."""

from __future__ import annotations

from pathlib import Path

from geopd.checkpoints.checkpoint import CheckpointError

FIRST_BYTES = 64
"""How much of a file's start ``refuse_stand_in`` wants."""


def refuse_stand_in(path: Path, start: bytes) -> None:
    """Refuse a file whose first bytes are a git-LFS pointer's or a web page's.

    Raises:
        CheckpointError: naming the file, what it is, and how to get the weights.
    """
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path}: a git-LFS pointer, not weights; run `git lfs pull` where it was cloned")
    if start.lstrip()[:1] == b"<":
        raise CheckpointError(f"{path}: a web page, not weights (a download that failed?); download it again")
