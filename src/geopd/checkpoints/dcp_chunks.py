"""One chunk of a torch distributed checkpoint: a file of ``torch.save`` inside a larger file, mapped where it lies."""

from __future__ import annotations

import io
import mmap
import os
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from geopd.checkpoints.checkpoint import CheckpointError
from geopd.checkpoints.dcp_metadata import Chunk
from geopd.checkpoints.restricted_pickle import PickleLimits, read_pickle
from geopd.checkpoints.torch_zip import ALLOWED, StoredTensor, storage_of, view_of
from geopd.checkpoints.zip_directory import ZIP_FAULTS, entry_place, zip_entries

_LIMITS = PickleLimits(nbytes=1 << 16, instructions=10_000, objects=1_000)  # one tensor's


class _Window(io.RawIOBase):
    """Bytes ``start`` to ``start + length`` of a mapped file, as a file of their own."""

    def __init__(self, mapped: mmap.mmap, start: int, length: int) -> None:
        self._mapped, self._start, self._length, self._at = mapped, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        if self._at < 0:
            raise ValueError("before the chunk's start")
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        stop = self._length if size < 0 else min(self._at + size, self._length)
        found = self._mapped[self._start + self._at : self._start + stop] if stop > self._at else b""
        self._at += len(found)
        return found


class ChunkFile:
    """A ``.distcp`` file, mapped; it stays readable where the folder is removed meanwhile.

    Raises:
        CheckpointError: if it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                # copy on write, as torch wants memory it could write to; the file itself is never changed
                self._mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: {error}; check the path and its permissions") from error

    def read(self, chunk: Chunk, dtype: torch.dtype) -> Tensor:
        """The tensor of a chunk, a view of the mapped file.

        Raises:
            CheckpointError: if no tensor of the chunk's shape and dtype lies there.
        """
        try:
            entries, root = self._directory(chunk)
            end = chunk.start + chunk.length
            first, nbytes = entry_place(self._mapped, entries[f"{root}data.pkl"], chunk.start, end)
            held = read_pickle(self._mapped[first : first + nbytes], self.path, ALLOWED, storage_of, _LIMITS)
            if not isinstance(held, StoredTensor) or held.shape != chunk.sizes or held.dtype != dtype:
                raise ValueError(f"no {dtype} tensor of shape {list(chunk.sizes)} in it")
            first, nbytes = entry_place(self._mapped, entries[f"{root}data/{held.storage.key}"], chunk.start, end)
            if nbytes < held.storage.nbytes:
                raise ValueError(f"{nbytes:,} bytes of its {held.storage.nbytes:,}")
        except (*ZIP_FAULTS, KeyError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(
                f"{self.path}: no readable chunk at byte {chunk.start:,} ({error}); write or download it again"
            ) from error
        return view_of(self._mapped, held, first)

    def _directory(self, chunk: Chunk) -> tuple[dict[str, zipfile.ZipInfo], str]:
        if chunk.start + chunk.length > len(self._mapped):
            raise ValueError("it runs past the end of the file")
        window = _Window(self._mapped, chunk.start, chunk.length)
        entries = {entry.filename: entry for entry in zip_entries(window)}
        roots = [name.removesuffix("data.pkl") for name in entries if name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise ValueError("no tensor that torch.save wrote")
        return entries, roots[0]
