"""The fuzzing harness's valid checkpoints, one of each format, all of the same weights, laid on disk to be damaged."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # fuzz/ lies beside tests/

from fuzz.seeds import SEEDS, Seed
from fuzz.trial import HangError, Trial, keep

__all__ = ["SEEDS", "HangError", "Trial", "keep", "lay", "seed"]


@cache
def seed(name: str) -> Seed:
    """A checkpoint's files, made once."""
    return SEEDS[name]()


def lay(name: str, folder: Path) -> Path:
    """Write a checkpoint's files into a folder, which is returned."""
    for file, data in seed(name).files.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(data)
    return folder
