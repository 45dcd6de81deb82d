"""The checkpoints of a measurement: opened once per process, their tensors digested once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

from geopd.checkpoints import Checkpoint, CheckpointError, open_checkpoint


@lru_cache(maxsize=16)
def _opened(path: Path, stamp: tuple[int, int]) -> Checkpoint:  # noqa: ARG001 - a changed file is opened anew
    return open_checkpoint(path)


def opened(path: Path) -> Checkpoint:
    """The checkpoint at a path, its headers read once per process.

    Raises:
        CheckpointError: as ``open_checkpoint``.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}; check the path and its permissions") from error
    return _opened(path, (status.st_mtime_ns, status.st_ino))


def digest_tensors(
    wanted: Iterable[tuple[Path, str]], threads: int, advance: Callable[[int], None]
) -> dict[tuple[Path, str], str | None]:
    """Content digests of tensors; None for one that cannot be read. ``advance`` is told the bytes done."""

    def digest(item: tuple[Path, str]) -> tuple[tuple[Path, str], str | None]:
        path, tensor = item
        checkpoint = opened(path)
        try:
            value = checkpoint.tensor_digest(tensor)
        except CheckpointError:
            value = None  # the task that needs it will say why
        advance(checkpoint.tensors[tensor].nbytes)
        return item, value

    with ThreadPoolExecutor(threads) as pool:
        return dict(pool.map(digest, wanted))
