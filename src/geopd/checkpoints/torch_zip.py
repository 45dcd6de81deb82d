"""The file ``torch.save`` writes: a zip of stored entries, one a pickle, the others the bytes of its storages.

The pickle is read by ``restricted_pickle``; a tensor is a view of the mapped file at its storage's entry.
"""

from __future__ import annotations

import math
import mmap
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from geopd.checkpoints.checkpoint import DTYPES, CheckpointError
from geopd.checkpoints.pickled_values import Allow, Constant, Global, inert, plain_key
from geopd.checkpoints.restricted_pickle import read_pickle
from geopd.checkpoints.stand_ins import FIRST_BYTES, refuse_stand_in
from geopd.checkpoints.zip_directory import ZIP_FAULTS, entry_place, zip_entries

_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"  # the magic number that opens torch's format before 1.6
_STORAGES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
}


@dataclass(frozen=True, slots=True)
class Storage:
    """A storage a pickle refers to: the key of its entry, its bytes, and the dtype of its class (None: untyped)."""

    key: str
    nbytes: int
    dtype: torch.dtype | None


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as a view of a storage; offset and strides in entries."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def extents(values: object = ()) -> tuple[int, ...]:
    """A pickled shape, stride or offset.

    Raises:
        ValueError: if it is none.
    """
    if not isinstance(values, list | tuple) or len(values) > 64 or not all(is_size(n) for n in values):
        raise ValueError("a shape, stride or offset that is no short tuple of sizes")
    return tuple(values)


def is_size(n: object) -> bool:
    """Whether a pickled value can be a size: of a dimension, or in bytes."""
    return type(n) is int and 0 <= n < 1 << 62


def is_dtype(value: object) -> TypeGuard[torch.dtype]:
    """Whether a pickled value is a dtype that is read."""
    return isinstance(value, torch.dtype) and value in DTYPES


def shown(value: object) -> str:
    """A pickled value in a message: a number, dtype or short text as it is, anything else by its type alone."""
    plain = value is None or isinstance(value, bool | float | torch.dtype) or is_size(value)
    return str(value) if plain else repr(value) if isinstance(value, str) and len(value) < 99 else type(value).__name__


def _stored(storage: Any, offset: Any, size: Any, stride: Any, dtype: Any) -> StoredTensor:
    if not isinstance(storage, Storage) or not is_dtype(dtype):
        raise ValueError(f"a tensor of dtype {shown(dtype)} over {type(storage).__name__}")
    shape, strides, (start,) = extents(size), extents(stride), extents((offset,))
    if len(shape) != len(strides):
        raise ValueError(f"shape {shape} with strides {strides}")
    entries = storage.nbytes // dtype.itemsize
    last = start + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    # a view that repeats entries would claim more memory than the file has bytes
    if math.prod(shape) and (last >= entries or math.prod(shape) > entries):
        raise ValueError(f"a tensor of shape {shape} and strides {strides} over a storage of {entries} entries")
    return StoredTensor(storage, dtype, start, shape, strides)


def _tensor_v2(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> StoredTensor:
    if rest[2:] and rest[2]:  # after whether it has a gradient, and its hooks: torch's own way to say that every entry
        # is negated or conjugated when it is read
        raise ValueError("a tensor with a negative or conjugate bit; save its .resolve_neg().resolve_conj() instead")
    return _stored(storage, offset, size, stride, storage.dtype)


def _tensor_v3(storage: Any, offset: Any, size: Any, stride: Any, _grad: Any, _hooks: Any, dtype: Any, *_: Any) -> Any:
    return _stored(storage, offset, size, stride, dtype)


def from_type(function: Any, _kind: Any, args: Any, _state: Any) -> Any:
    """A tensor that carries Python attributes, without them."""
    if not (isinstance(function, Global) and type(args) is tuple):
        raise ValueError("a tensor rebuilt by something other than a known function")
    return function.build(*args)


def _dict(*args: Any) -> dict[Any, Any]:
    if args and not (len(args) == 1 and isinstance(args[0], list)):
        raise ValueError("a dict made from something other than pairs")
    return {plain_key(key): value for key, value in (args[0] if args else ())}


def storage_of(identity: Any) -> Storage:
    """The storage that a persistent id of torch's names.

    Raises:
        ValueError: if it is none.
    """
    kind, dtype, key, _location, count = identity
    if kind != "storage" or not isinstance(key, str) or type(count) is not int or not 0 <= count < 1 << 60:
        raise ValueError("a persistent id that is no storage")
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise ValueError("a storage of no known class")
    return Storage(key, count * (dtype.itemsize if dtype else 1), dtype)


def view_of(mapped: mmap.mmap, tensor: StoredTensor, first: int) -> Tensor:
    """A tensor, contiguous, whose storage begins at a byte of a mapped file; a view of it where it lies so there."""
    if not math.prod(tensor.shape):
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    first += tensor.offset * tensor.dtype.itemsize
    span = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride, strict=True))
    if first % tensor.dtype.itemsize:
        raw = torch.frombuffer(mapped, dtype=torch.uint8, count=span * tensor.dtype.itemsize, offset=first)
        flat = raw.clone().view(tensor.dtype)
    else:
        flat = torch.frombuffer(mapped, dtype=tensor.dtype, count=span, offset=first)
    return flat.as_strided(tensor.shape, tensor.stride).contiguous()


ALLOWED: Allow = {
    "collections.OrderedDict": _dict,
    "torch.Size": extents,
    "torch._utils._rebuild_tensor_v2": _tensor_v2,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
    "torch._tensor._rebuild_from_type_v2": from_type,
    "torch.Tensor": Constant("torch.Tensor"),
    "torch.nn.parameter.Parameter": Constant("torch.nn.parameter.Parameter"),
    **inert("torch.device", "torch.serialization._get_layout"),
    "torch.storage.UntypedStorage": Constant(None),
    **{f"torch.{name}Storage": Constant(dtype) for name, dtype in _STORAGES.items()},
    **{str(dtype): Constant(dtype) for dtype in DTYPES},
}
"""What tensors, parameters and state dicts are made of; a format adds the classes that its trainer pickles beside."""


class TorchZip:
    """A zip that ``torch.save`` wrote, opened: ``value`` is its pickle's, with a ``StoredTensor`` for each tensor.

    Raises:
        CheckpointError: if the file is no such zip, or its pickle is refused (see ``read_pickle``).
    """

    def __init__(self, path: Path, allow: Allow | None = None) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                _check_start(path, file.read(FIRST_BYTES))
                self._entries = _directory(path, file)
                size = os.fstat(file.fileno()).st_size
                # copy on write, as torch wants memory it could write to; the file itself is never changed
                self._mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror or error}; check the path and its permissions") from error
        start, nbytes = self._place(self._pickle_name())
        self.value: Any = read_pickle(self._mapped[start : start + nbytes], path, allow or ALLOWED, storage_of)

    @property
    def nbytes(self) -> int:
        """The file's size."""
        return len(self._mapped)

    def _pickle_name(self) -> str:
        found = [name for name in self._entries if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(found) != 1:
            raise CheckpointError(f"{self.path}: a zip without torch's data.pkl; name a file that torch.save wrote")
        self._root = found[0].removesuffix("data.pkl")
        if any(name.startswith((f"{self._root}code/", f"{self._root}constants.pkl")) for name in self._entries):
            raise CheckpointError(
                f"{self.path}: a TorchScript archive, which holds code; refused: save the model's state dict instead"
            )
        if f"{self._root}byteorder" in self._entries:
            start, nbytes = self._place(f"{self._root}byteorder")
            if self._mapped[start : start + min(nbytes, 8)] != b"little":
                raise CheckpointError(f"{self.path}: written big-endian; save it again on a little-endian machine")
        return found[0]

    def _place(self, name: str) -> tuple[int, int]:
        """Where an entry's bytes start in the file, and how many there are."""
        try:
            return entry_place(self._mapped, self._entries[name], 0, len(self._mapped))
        except ValueError as error:
            raise CheckpointError(f"{self.path}: entry {name} {error}; write or download the file again") from error

    def fault(self, tensor: StoredTensor) -> str | None:
        """Why a tensor's bytes cannot be read; None where they can."""
        name = f"{self._root}data/{tensor.storage.key}"
        if name not in self._entries:
            return f"{self.path}: its storage {name} is not in the file; write or download the file again"
        try:
            _, nbytes = self._place(name)
        except CheckpointError as error:
            return str(error)
        if nbytes < tensor.storage.nbytes:
            return f"{self.path}: {name} has {nbytes:,} bytes of {tensor.storage.nbytes:,}; write or download it again"
        return None

    def read(self, tensor: StoredTensor) -> Tensor:
        """One tensor, contiguous, mapped where it lies so in the file.

        Raises:
            CheckpointError: if its storage is absent, short or compressed.
        """
        if fault := self.fault(tensor):
            raise CheckpointError(fault)
        start, _ = self._place(f"{self._root}data/{tensor.storage.key}")
        return view_of(self._mapped, tensor, start)


def _check_start(path: Path, start: bytes) -> None:
    if not start:
        raise CheckpointError(f"{path}: an empty file; write or download it again")
    refuse_stand_in(path, start)
    if start.startswith(_LEGACY):
        raise CheckpointError(
            f"{path}: torch's format before 1.6, pickles one after another, which is not read; load it in torch "
            "with weights_only=True and save it again"
        )
    if not start.startswith(b"PK\x03\x04"):
        raise CheckpointError(f"{path}: not a file that torch.save writes (no zip); write or download it again")


def _directory(path: Path, file: Any) -> dict[str, zipfile.ZipInfo]:
    try:
        entries = zip_entries(file)
    except ZIP_FAULTS as error:
        raise CheckpointError(f"{path}: a damaged or truncated zip ({error}); write or download it again") from error
    named = {entry.filename: entry for entry in entries}
    if len(named) < len(entries):
        raise CheckpointError(f"{path}: two entries of its zip have one name; write or download it again")
    return named


def tensors_of(value: dict[Any, Any]) -> dict[str, StoredTensor]:
    """The entries of a state dict that are tensors, under their names."""
    return {name: held for name, held in value.items() if isinstance(name, str) and isinstance(held, StoredTensor)}
