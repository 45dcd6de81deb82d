"""What a torch distributed checkpoint's ``.metadata`` says: every tensor's shape, and where each of its chunks lies.

The file is a pickle of a few classes of ``torch.distributed.checkpoint``. They are read as inert stand-ins; none of
them is imported, and a pickle that names anything else is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from geopd.checkpoints.checkpoint import DTYPES, CheckpointError
from geopd.checkpoints.pickled_values import Allow, Constant, Inert, inert, plain_key
from geopd.checkpoints.restricted_pickle import PickleLimits, read_pickle
from geopd.checkpoints.stand_ins import FIRST_BYTES, refuse_stand_in
from geopd.checkpoints.torch_zip import extents, is_dtype, is_size, shown

_HOME = "torch.distributed.checkpoint"
_CLASSES = (
    *(
        f"{_HOME}.metadata.{name}"
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    f"{_HOME}.filesystem._StorageInfo",
    f"{_HOME}.filesystem._StoragePrefix",
    *(f"pathlib.{name}" for name in ("Path", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")),
    *(f"pathlib._local.{name}" for name in ("Path", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")),
    "torch.serialization._get_layout",
    "torch.device",
)
_PLANS = (  # Megatron leaves the ranks' plans in the listing
    *(
        f"{_HOME}.planner.{name}"
        for name in ("BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")
    ),
    *(f"megatron.core.dist_checkpointing.strategies.torch.{name}" for name in ("MCoreMetadata", "MCoreSavePlan")),
)
_LIMITS = PickleLimits()
_MAX_CHUNKS = 8192  # of a tensor cut along more than one dimension


_ALLOWED: Allow = {
    "torch.Size": extents,
    "collections.OrderedDict": lambda pairs=(): {plain_key(key): value for key, value in pairs},
    **{str(dtype): Constant(dtype) for dtype in DTYPES},
    **inert(*_CLASSES, *_PLANS),
}


@dataclass(frozen=True, slots=True)
class Chunk:
    """One chunk of a tensor: its place in the tensor, and the bytes of a file that hold it (in torch.save's format)."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class ChunkedTensor:
    """A tensor and its chunks; ``fault`` says why it cannot be put together."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]
    fault: str | None = None


def read_dcp_metadata(path: Path) -> dict[str, ChunkedTensor]:
    """Every tensor that a ``.metadata`` lists, by name, in the order of the file; entries of other kinds are left out.

    Raises:
        CheckpointError: if the file is absent, no such pickle, or names a class outside the allow-list.
    """
    try:
        if path.stat().st_size > _LIMITS.nbytes:
            raise CheckpointError(f"{path}: has more than {_LIMITS.nbytes:,} bytes, which no listing of tensors has")
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}; check the path and its permissions") from error
    if not data:
        raise CheckpointError(f"{path}: an empty file; write or download it again")
    refuse_stand_in(path, data[:FIRST_BYTES])
    value = read_pickle(data, path, _ALLOWED, limits=_LIMITS)
    try:
        return _tensors(_state(value, "Metadata"))
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: not the metadata of a torch distributed checkpoint ({error}); write or download it again"
        ) from error


def _tensors(metadata: Mapping[str, Any]) -> dict[str, ChunkedTensor]:
    places: dict[str, dict[tuple[int, ...], Any]] = {}
    for index, info in (metadata["storage_data"] or {}).items():
        where = _state(index, "MetadataIndex")
        if where.get("offset") is not None:
            places.setdefault(_name(where["fqn"]), {})[extents(where["offset"])] = info
    found, lists = {}, set()
    for name, entry in metadata["state_dict_metadata"].items():
        if isinstance(entry, Inert) and entry.name.endswith(".TensorStorageMetadata"):
            held = _state(entry, "TensorStorageMetadata")
            if id(held["chunks"]) in lists:
                raise ValueError(f"{name} has the list of chunks of another tensor")
            lists.add(id(held["chunks"]))
            found[_name(name)] = _tensor(held, places.get(name, {}))
    return found


def _name(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"a tensor's name that is no text but {type(value).__name__}")
    return value


def _tensor(entry: Mapping[str, Any], places: Mapping[tuple[int, ...], Any]) -> ChunkedTensor:
    properties = entry["properties"].state
    dtype = properties[0] if isinstance(properties, tuple) else properties["dtype"]
    shape = extents(entry["size"])
    if not is_dtype(dtype):
        raise ValueError(f"dtype {shown(dtype)}")
    chunks: list[Chunk] = []
    fault = None
    for chunk in entry["chunks"]:
        held = _state(chunk, "ChunkStorageMetadata")
        offsets, sizes = extents(held["offsets"]), extents(held["sizes"])
        if len(offsets) != len(shape) or len(sizes) != len(shape):
            raise ValueError(f"a chunk of {len(sizes)} dimensions in a tensor of {len(shape)}")
        if not math.prod(sizes):
            continue  # a rank that the tensor had no rows left for
        if offsets not in places:
            fault = f"no file is named for its chunk at {list(offsets)}"
            continue
        place = _state(places[offsets], "_StorageInfo")
        file, start, length = place["relative_path"], place["offset"], place["length"]
        if not (isinstance(file, str) and is_size(start) and is_size(length)):
            raise ValueError("a chunk's place that is no file, offset and length")
        if place.get("transform_descriptors"):
            fault = "its chunks are transformed (compressed or encrypted by the writer), which is not read"
        if length < math.prod(sizes) * dtype.itemsize:
            fault = f"its chunk at {list(offsets)} of {list(sizes)} is said to take {length:,} bytes, too few for it"
        chunks.append(Chunk(offsets, sizes, file, start, length))
    return ChunkedTensor(shape, dtype, tuple(chunks), fault or _uncovered(shape, chunks) or _shared(chunks))


def _state(value: Any, kind: str) -> Mapping[str, Any]:
    if not isinstance(value, Inert) or value.name.rsplit(".", 1)[-1] != kind or not isinstance(value.state, dict):
        raise ValueError(f"{type(value).__name__} where {kind} should be")
    return value.state


def _uncovered(shape: tuple[int, ...], chunks: list[Chunk]) -> str | None:
    """Why the chunks are no partition of the tensor: they lie in it, do not overlap and together have its size."""
    for chunk in chunks:
        if any(o + n > size for o, n, size in zip(chunk.offsets, chunk.sizes, shape, strict=True)):
            return f"its chunk at {list(chunk.offsets)} of {list(chunk.sizes)} reaches out of its shape {list(shape)}"
    covered, entries = sum(math.prod(chunk.sizes) for chunk in chunks), math.prod(shape)
    if covered != entries:
        return f"its chunks hold {covered:,} of its {entries:,} entries; a rank's file may be from another save"
    if _overlap(chunks):
        return "its chunks overlap; write the checkpoint again"
    return None


def _shared(chunks: list[Chunk]) -> str | None:
    """Why two chunks of a tensor lie in the same bytes, which would make a small file stand for a large tensor."""
    ends: dict[str, int] = {}
    for chunk in sorted(chunks, key=lambda chunk: (chunk.file, chunk.start)):
        if chunk.start < ends.get(chunk.file, 0):
            return f"two of its chunks share bytes of {chunk.file}; write the checkpoint again"
        ends[chunk.file] = chunk.start + chunk.length
    return None


def _overlap(chunks: list[Chunk]) -> bool:
    if len(chunks) < 2:
        return False
    offsets = torch.tensor([chunk.offsets for chunk in chunks])
    ends = offsets + torch.tensor([chunk.sizes for chunk in chunks])
    cut = [i for i in range(offsets.shape[1]) if len(set(offsets[:, i].tolist())) > 1]
    if len(cut) == 1:
        order = torch.argsort(offsets[:, cut[0]])
        return bool((ends[order][:-1, cut[0]] > offsets[order][1:, cut[0]]).any())
    if not cut or len(chunks) > _MAX_CHUNKS:
        return True
    return any(
        bool(((offsets[i] < ends[i + 1 :]) & (offsets[i + 1 :] < ends[i])).all(dim=1).any())
        for i in range(len(chunks) - 1)
    )
