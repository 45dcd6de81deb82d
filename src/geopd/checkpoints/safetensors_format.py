"""Hugging Face safetensors: a single file, or shards with ``model.safetensors.index.json``.

A file that is damaged makes its own tensors unreadable, each with the reason, and leaves those of other shards alone.
"""

from __future__ import annotations

import json
import math
import os
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors
from safetensors import SafetensorError, safe_open
from torch import Tensor

from geopd.checkpoints.checkpoint import DTYPES, Checkpoint, CheckpointError, TensorInfo, read_config
from geopd.checkpoints.sharded import join_shards
from geopd.checkpoints.stand_ins import FIRST_BYTES, refuse_stand_in

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER = "adapter_model.safetensors"  # not weights of its own: read over a base
_WIDTHS = {name: dtype.itemsize for dtype, name in DTYPES.items()}  # bytes
_SMALL_HEADER = 1 << 20  # one above this may be a third of its file: parsed, it takes up to 12 times its size
_MAX_HEADER = 100_000_000  # the safetensors library's own limit, bytes


class SafetensorsSource:
    """Reads tensors from the shard that holds each of them."""

    def __init__(self, shard_of: dict[str, Path]) -> None:
        self._shard_of = shard_of
        # the file descriptor stays open: a checkpoint renamed while it is read is still the one that was opened
        self._open: dict[Path, Any] = {}

    def read(self, name: str) -> Tensor:
        """The tensor as stored, memory-mapped.

        Raises:
            CheckpointError: if the shard no longer gives it.
        """
        path = self._shard_of[name]
        try:
            if path not in self._open:
                self._open[path] = safe_open(path, framework="pt", device="cpu")
            tensor: Tensor = self._open[path].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: tensor {name}: {error}; write or download the file again") from error
        return tensor


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors a safetensors file declares, checked against the file's size; no weights are read.

    Raises:
        CheckpointError: if the file is absent, a git-LFS pointer, truncated or no safetensors file, or if an offset,
            shape or dtype does not fit (naming the tensor).
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = _header_length(path, file.read(FIRST_BYTES), size)
            file.seek(8)
            header = json.loads(file.read(length))
            entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
            infos = {name: _tensor_info(name, entry) for name, entry in entries.items()}
            end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}; check the path and its permissions") from error
    except CheckpointError:
        raise
    except (ValueError, AttributeError, LookupError, TypeError, OverflowError, RecursionError) as error:  # any garbage
        raise CheckpointError(f"{path}: not a safetensors header; write or download the file again") from error
    expected = 8 + length + end
    if size != expected:
        what = "truncated" if size < expected else "longer than its header says"
        raise CheckpointError(f"{path}: {what} ({size:,} bytes, header says {expected:,}); write or download it again")
    _require_sound(path, infos)
    return infos


def _require_sound(path: Path, infos: dict[str, TensorInfo]) -> None:
    """What the library refuses in a header (offsets, dtypes, shapes), said before any tensor is asked for."""
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu"):
            return
    except (SafetensorError, OSError) as error:
        said = str(error)
    # it does not always say which tensor it means
    strange = (name for name, info in infos.items() if f"variant `{info.dtype}`" in said or _size(info) != info.nbytes)
    where = f"tensor {name}: " if (name := next(strange, None)) else ""
    raise CheckpointError(f"{path}: {where}not a readable header ({said[:160]}); write or download the file again")


def _size(info: TensorInfo) -> int:
    """The bytes that a shape takes, -1 for none; those that the header says for a dtype that is not read."""
    if min(info.shape, default=0) < 0:
        return -1
    return math.prod(info.shape) * _WIDTHS[info.dtype] if info.dtype in _WIDTHS else info.nbytes


def _header_length(path: Path, start: bytes, size: int) -> int:
    if len(start) < 8:
        raise CheckpointError(f"{path}: truncated ({size} bytes); write or download the file again")
    (length,) = struct.unpack("<Q", start[:8])
    if length > _MAX_HEADER:
        refuse_stand_in(path, start)
        raise CheckpointError(f"{path}: not a safetensors file (its first bytes are no header length)")
    if 8 + length > size:
        raise CheckpointError(f"{path}: truncated inside its header ({size:,} bytes); write or download it again")
    if length > max(_SMALL_HEADER, size // 3):
        raise CheckpointError(f"{path}: its header takes {length:,} of {size:,} bytes, more than weights need; refused")
    return int(length)


def _tensor_info(name: str, entry: dict[str, Any]) -> TensorInfo:
    start, end = entry["data_offsets"]
    return TensorInfo(name, tuple(int(n) for n in entry["shape"]), str(entry["dtype"]), int(end) - int(start))


def recognises_safetensors(path: Path) -> bool:
    """Whether a path is a safetensors file, or a folder with ``model.safetensors`` or its index."""
    if path.is_file():
        return path.suffix == ".safetensors" and path.name != ADAPTER
    return any((path / name).is_file() for name in (INDEX, SINGLE))


def open_safetensors(path: Path) -> Checkpoint:
    """A checkpoint of a path that ``recognises_safetensors``, with the ``config.json`` beside it.

    Raises:
        CheckpointError: as ``read_header``, or as ``read_json`` for the index and the config.
    """
    if path.is_file():
        return open_single(path, read_config(path.parent))
    if (path / INDEX).is_file():
        return join_shards(
            path / INDEX, "safetensors shards", "*.safetensors", read_config(path), lambda file: open_single(file, {})
        )
    whole = open_single(path / SINGLE, read_config(path))
    if strays := sorted(file.name for file in path.glob("model-*-of-*.safetensors")):
        more = f" and {len(strays) - 1} more" if len(strays) > 1 else ""
        note = f"{path}: {strays[0]}{more} beside {SINGLE} and in no index: ignored; remove what is of another save"
        return replace(whole, warnings=(note,))
    return whole


def open_single(path: Path, config: dict[str, Any]) -> Checkpoint:
    """A checkpoint of one safetensors file.

    Raises:
        CheckpointError: as ``read_header``.
    """
    infos = read_header(path)
    return Checkpoint(path, "safetensors", infos, SafetensorsSource(dict.fromkeys(infos, path)), config=config)
