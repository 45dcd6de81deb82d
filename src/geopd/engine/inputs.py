"""The checkpoints of a measurement: opened once per process, tensors digested once, their files kept an eye on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path

from torch import Tensor

from geopd.checkpoints import CheckpointError, NotEnoughMemoryError, open_checkpoint
from geopd.engine.memory import mapped_bytes
from geopd.matrices import CanonicalCheckpoint, canonical_view

Stamp = tuple[tuple[str, int, int], ...]
"""Name, bytes and modification time (nanoseconds) of every file that may hold weights or says which does."""
_OF_OTHERS = (".json", ".jsonl", ".txt", ".md", ".log", ".yaml")  # notes that may come later and change no weight
_OF_WEIGHTS = (".index.json", "config.json")
_MAPPED = 1 << 29  # bytes of a worker
_DIGESTED = 1 << 32  # bytes while digesting, which is over soon and would open large checkpoints too often


class InputChangedError(CheckpointError):
    """An input that could be read when the command began is gone, unreadable or another by now."""


def stamp_of(path: Path) -> Stamp:
    """What the file system says of a checkpoint; equal stamps are taken to mean equal content.

    Raises:
        CheckpointError: if the checkpoint is not there.
    """
    try:
        if not path.is_dir():
            status = path.stat()
            return ((path.name, status.st_size, status.st_mtime_ns),)
        statuses = []
        for folder in (path, *(Path(child) for child in _folders(path))):
            with os.scandir(folder) as files:
                inside = "" if folder == path else f"{folder.name}/"
                found = [file for file in files if file.is_file() and _matters(file.name)]
                statuses += [(inside + file.name, file.stat()) for file in found]
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}; check the path and its permissions") from error
    return tuple(sorted((name, status.st_size, status.st_mtime_ns) for name, status in statuses))


def _folders(path: Path) -> list[str]:
    # formats there are that keep their shards in one; a run's checkpoints beside weights are others'
    with os.scandir(path) as children:
        return sorted(child.path for child in children if child.is_dir() and not child.name.startswith("checkpoint"))


def _matters(name: str) -> bool:
    return name.endswith(_OF_WEIGHTS) or not name.endswith(_OF_OTHERS)


@lru_cache(maxsize=16)
def _opened(
    path: Path,
    base: Path | None,
    per_head: bool,
    stamp: Stamp,  # noqa: ARG001 - changed, it is opened anew
) -> CanonicalCheckpoint | str:
    try:
        return canonical_view(open_checkpoint(path, base), per_head=per_head)
    except NotEnoughMemoryError:
        raise  # the next task may have it
    except CheckpointError as error:
        return str(error)  # every task of a run asks again for a step that cannot be opened


def opened(path: Path, base: Path | None = None, *, per_head: bool = False) -> CanonicalCheckpoint:
    """The canonical matrices of the checkpoint at a path, its headers read once per process; ``base``: an adapter's.

    ``per_head``: attention matrices are cut into heads.

    Raises:
        CheckpointError: as ``open_checkpoint``.
    """
    found = _opened(path, base, per_head, stamp_of(path))
    if isinstance(found, str):
        raise CheckpointError(found)
    return found


def close_mapped(limit: int = _MAPPED) -> None:
    """Close the checkpoints that are open once much of their files is mapped; who still reads one is not disturbed.

    The system could take the pages back, but whoever watches this process's memory counts them as its own.
    """
    if (mapped_bytes() or 0) > limit:
        _opened.cache_clear()


def require_unchanged(path: Path, stamp: Stamp | None) -> None:
    """Refuse a checkpoint whose files are not what they were when its stamp was taken; None refuses nothing.

    Raises:
        InputChangedError: naming the checkpoint and the first file that differs.
    """
    if stamp is None:
        return
    try:
        now = stamp_of(path)
    except CheckpointError as error:
        raise InputChangedError(f"{path}: vanished while it was measured ({error})") from error
    if now == stamp:
        return
    differing = sorted({name for name, *_ in set(now) ^ set(stamp)})
    what = "vanished" if differing[0] not in {name for name, *_ in now} else "changed"
    raise InputChangedError(
        f"{path}: {differing[0]} {what} while it was measured; leave checkpoints alone until the command ends and run "
        "it again"
    )


def digest_tensors(
    wanted: Iterable[tuple[Path, str]],
    open_one: Callable[[Path], CanonicalCheckpoint],
    threads: int,
    advance: Callable[[int], None],
    look: Callable[[Path, str, Tensor], None],
) -> dict[tuple[Path, str], str | None]:
    """Content digests of tensors; None for one that cannot be read.

    ``open_one`` opens a checkpoint; ``advance`` is told the bytes done, ``look`` shown every tensor.
    """

    def digest(item: tuple[Path, str]) -> tuple[tuple[Path, str], str | None]:
        path, tensor = item
        value, nbytes = None, 0
        with suppress(CheckpointError):  # the task that needs it will say why
            checkpoint = open_one(path)
            nbytes = checkpoint.tensors[tensor].nbytes if tensor in checkpoint.tensors else 0
            value = checkpoint.tensor_digest(tensor, partial(look, path, tensor))
        close_mapped(_DIGESTED)
        advance(nbytes)
        return item, value

    with ThreadPoolExecutor(threads) as pool:
        return dict(pool.map(digest, wanted))
