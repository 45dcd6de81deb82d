"""A checkpoint as named lazy tensors: what is there, what is not and why, and one tensor in memory at a time."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor


class CheckpointError(ValueError):
    """A checkpoint cannot be read; the text names the file, the tensor where there is one, and the remedy."""


class NotEnoughMemoryError(CheckpointError):
    """A checkpoint was not read for want of memory, which says nothing of the checkpoint: it may be read later."""


INDEX_BYTES = 32 << 20
"""The most that is read of an index of shards, the one kind of JSON file that grows with the model."""
_JSON_BYTES = 4 << 20  # of any other; parsed, JSON takes up to 25 times its size
_LONGEST_PART = 255  # of a path: longer names of files are errors of the file system
_UNFORESEEN = (
    *(ValueError, TypeError, AttributeError, RuntimeError, MemoryError, ArithmeticError, LookupError, EOFError),
    *(re.error, struct.error),
)

_NO_MEMORY = re.compile(r"(cannot|can't) allocate memory|out of memory", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What the header says of a tensor: shape, dtype and stored size; nothing is read for it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int


DTYPES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Every dtype that is read, with the name safetensors gives it: names are the same whatever the format."""


def tensor_info(name: str, shape: Sequence[int], dtype: torch.dtype) -> TensorInfo:
    """What a header says of a tensor of a given shape and dtype (a key of ``DTYPES``), stored without padding."""
    return TensorInfo(name, tuple(shape), DTYPES[dtype], math.prod(shape) * dtype.itemsize)


def holds_conv1d(shapes: Mapping[str, Sequence[int]]) -> bool:
    """Whether tensors are of GPT-2's kind: a fused query, key and value of (inputs, outputs), three times as wide."""
    return any(
        name.endswith("attn.c_attn.weight") and len(shape) == 2 and shape[1] == 3 * shape[0]
        for name, shape in shapes.items()
    )


class TensorSource(Protocol):
    """One format's way to the bytes of a tensor that its header names."""

    def read(self, name: str) -> Tensor:
        """The tensor as stored, on CPU, memory-mapped where the format allows.

        Raises:
            CheckpointError: if the bytes cannot be read.
        """
        ...


@dataclass(frozen=True)
class Checkpoint:
    """Named lazy tensors of one checkpoint.

    ``tensors`` can be read; ``unreadable`` maps the names that the checkpoint promises but cannot give to the reason.
    ``warnings`` are facts worth telling that stop nothing.
    """

    path: Path
    format: str
    tensors: dict[str, TensorInfo]
    source: TensorSource
    unreadable: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in (*self.tensors, *self.unreadable):
            if not (isinstance(name, str) and _is_text(name)):
                raise CheckpointError(
                    f"{self.path}: tensor {ascii(name)[:200]}: a name that is no text; write the checkpoint again"
                )

    def read(self, name: str) -> Tensor:
        """One tensor as stored.

        Raises:
            CheckpointError: if the checkpoint has no such tensor or cannot give it.
        """
        if name in self.unreadable:
            raise CheckpointError(f"{self.path}: tensor {name}: {self.unreadable[name]}")
        if name not in self.tensors:
            raise CheckpointError(f"{self.path}: no tensor named {name}; it holds {len(self.tensors)} others")
        with unreadable_at(self.path, name):
            return self.source.read(name)

    def tensor_digest(self, name: str, look: Callable[[Tensor], None] | None = None) -> str:
        """Content digest of one tensor: blake2b-128 over dtype, shape and bytes, whatever file or format holds it.

        ``look`` is shown the tensor, which is then read once for both.
        """
        tensor = self.read(name)
        with unreadable_at(self.path, name):
            tensor = tensor.contiguous()
        if look is not None:
            look(tensor)
        state = hashlib.blake2b(digest_size=16)
        state.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        with unreadable_at(self.path, name):
            state.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        return state.hexdigest()

    def digest(self) -> str:
        """Content digest of the whole checkpoint: over the digests of its tensors in name order."""
        return combine_digests({name: self.tensor_digest(name) for name in self.tensors})


OpenBase = Callable[[str | None], Checkpoint]
"""Opens the base of an adapter: the one the caller names, else the one the adapter's own config names."""


def combine_digests(tensor_digests: dict[str, str]) -> str:
    """A checkpoint's digest from its tensors' (blake2b-128 over names and digests in name order)."""
    state = hashlib.blake2b(digest_size=16)
    for name in sorted(tensor_digests):
        state.update(f"{name}={tensor_digests[name]}\n".encode())
    return state.hexdigest()


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True


def is_path(value: object) -> bool:
    """Whether a value out of a file can be asked of the file system as a path."""
    if not isinstance(value, str) or "\0" in value or any(len(part) > _LONGEST_PART for part in value.split("/")):
        return False
    try:
        os.fsencode(value)
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True


@contextmanager
def unreadable_at(path: Path, tensor: str | None = None) -> Iterator[None]:
    """Whatever damage raises on the way, foreseen or not, as a ``CheckpointError`` that names the path and tensor.

    A run goes on past a checkpoint that cannot be read, and past nothing else.

    Raises:
        NotEnoughMemoryError: if it was memory that was wanting, which is no damage.
    """
    what = f"{path}: tensor {tensor}" if tensor is not None else str(path)
    try:
        yield
    except NotEnoughMemoryError:
        raise
    except (*_UNFORESEEN, OSError) as error:
        said = f"{type(error).__name__}: {str(error)[:200]}"
        if _wants_memory(error):
            raise NotEnoughMemoryError(f"{what}: not enough memory ({said}); free some and run it again") from error
        if isinstance(error, (CheckpointError, OSError)):
            raise
        raise CheckpointError(f"{what}: not readable ({said}); write or copy it again") from error


def _wants_memory(error: BaseException | None) -> bool:
    """Whether an error, or what it was raised from, is that memory could not be had."""
    while error is not None:
        if isinstance(error, MemoryError):
            return True
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:
            return True
        if isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)):  # torch's has no class of its own on CPUs
            return True
        error = error.__cause__
    return False


def read_json(path: Path, limit: int = _JSON_BYTES) -> dict[str, Any]:
    """A JSON object from a file of at most ``limit`` bytes.

    Raises:
        CheckpointError: as ``parsed_json``, or if the file holds no object.
    """
    value = parsed_json(path, limit)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds {type(value).__name__}, not a JSON object; write it again")
    return value


def parsed_json(path: Path, limit: int = _JSON_BYTES) -> Any:
    """What a JSON file of at most ``limit`` bytes holds.

    Raises:
        CheckpointError: if the file is larger, cannot be read or is not JSON.
    """
    try:
        if (size := path.stat().st_size) > limit:
            raise CheckpointError(f"{path}: {size:,} bytes of JSON, at most {limit:,} are read; is it the right file?")
        return json.loads(path.read_text(encoding="utf-8"))
    except CheckpointError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error}); write or download the file again") from error


def read_config(folder: Path) -> dict[str, Any]:
    """The model's ``config.json`` in a folder; empty where there is none.

    Raises:
        CheckpointError: as ``read_json``.
    """
    file = folder / "config.json"
    return read_json(file) if file.is_file() else {}
