"""Hugging Face safetensors: a single file, or shards with ``model.safetensors.index.json``.

A file that is damaged makes its own tensors unreadable, each with the reason, and leaves those of other shards alone.
"""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from geopd.checkpoints.checkpoint import Checkpoint, CheckpointError, TensorInfo, read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_LFS = b"version https://git-lfs"
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
        CheckpointError: if the file is absent, a git-LFS pointer, truncated or no safetensors file.
    """
    try:
        with path.open("rb") as file:
            start = file.read(len(_LFS))
            if start == _LFS:
                raise CheckpointError(f"{path}: a git-LFS pointer, not weights; run `git lfs pull` where it was cloned")
            size = os.fstat(file.fileno()).st_size
            file.seek(0)
            length = _header_length(path, file.read(8), size)
            header = json.loads(file.read(length))
            entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
            infos = {name: _tensor_info(name, entry) for name, entry in entries.items()}
            end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}; check the path and its permissions") from error
    except CheckpointError:
        raise
    except (ValueError, AttributeError, KeyError, TypeError, IndexError) as error:  # whatever garbage can hold
        raise CheckpointError(f"{path}: not a safetensors header; write or download the file again") from error
    expected = 8 + length + end
    if size != expected:
        what = "truncated" if size < expected else "longer than its header says"
        raise CheckpointError(f"{path}: {what} ({size:,} bytes, header says {expected:,}); write or download it again")
    return infos


def _header_length(path: Path, prefix: bytes, size: int) -> int:
    if len(prefix) < 8:
        raise CheckpointError(f"{path}: truncated ({size} bytes); write or download the file again")
    (length,) = struct.unpack("<Q", prefix)
    if length > _MAX_HEADER:
        raise CheckpointError(f"{path}: not a safetensors file (its first bytes are no header length)")
    if 8 + length > size:
        raise CheckpointError(f"{path}: truncated inside its header ({size:,} bytes); write or download it again")
    return int(length)


def _tensor_info(name: str, entry: dict[str, Any]) -> TensorInfo:
    start, end = entry["data_offsets"]
    return TensorInfo(name, tuple(int(n) for n in entry["shape"]), str(entry["dtype"]), int(end) - int(start))


def open_single(path: Path, config: dict[str, Any]) -> Checkpoint:
    """A checkpoint of one safetensors file.

    Raises:
        CheckpointError: as ``read_header``.
    """
    infos = read_header(path)
    return Checkpoint(path, "safetensors", infos, SafetensorsSource(dict.fromkeys(infos, path)), config=config)


def open_sharded(index: Path, config: dict[str, Any]) -> Checkpoint:
    """A checkpoint of shards listed in an index. Shards that cannot be read make their own tensors unreadable.

    Raises:
        CheckpointError: if the index is no index, names a file outside its folder, or no shard can be read.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map; write or download the index again")
    folder = index.parent
    headers: dict[str, dict[str, TensorInfo]] = {}
    broken: dict[str, str] = {}
    for shard in sorted({str(name) for name in weight_map.values()}):
        if Path(shard).name != shard:
            raise CheckpointError(f"{index}: names {shard!r}, which is not a file of its own folder; refused")
        if not (folder / shard).exists():
            broken[shard] = f"{folder / shard}: {INDEX} names it and it is absent; download or write it again"
            continue
        try:
            headers[shard] = read_header(folder / shard)
        except CheckpointError as error:
            broken[shard] = str(error)
    if not headers:
        raise CheckpointError(next(iter(broken.values())) + f" (and {len(broken) - 1} more shards)")
    tensors, shard_of, unreadable = {}, {}, {}
    for name, shard in weight_map.items():
        if shard in broken:
            unreadable[name] = broken[shard]
        elif name not in headers[shard]:
            unreadable[name] = f"{folder / shard}: the index says it is here and it is not; write the checkpoint again"
        else:
            tensors[name], shard_of[name] = headers[shard][name], folder / shard
    return Checkpoint(
        folder,
        "safetensors shards",
        tensors,
        SafetensorsSource(shard_of),
        unreadable,
        config,
        _strays(folder, set(headers) | set(broken)),
    )


def _strays(folder: Path, listed: set[str]) -> tuple[str, ...]:
    stray = sorted(path.name for path in folder.glob("*.safetensors") if path.name not in listed)
    return (f"{folder}: {', '.join(stray)} not in the index: ignored",) if stray else ()
