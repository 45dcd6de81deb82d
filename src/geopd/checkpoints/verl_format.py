"""verl's FSDP checkpoints: one file a rank, ``model_world_size_4_rank_0.pt``, each a state dict of DTensor shards.

A tensor of a (dp_0, ..., dp_k) device mesh is put together from the ranks' local tensors by its placements: along a
mesh dimension with ``Shard(d)`` they are joined along d in rank order (the parts may be uneven), along one with
``Replicate`` the first stands for all. Ranks fill the mesh row by row.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from geopd.checkpoints.checkpoint import Checkpoint, CheckpointError, TensorInfo, read_config, read_json, tensor_info
from geopd.checkpoints.pickled_values import Allow, Constant, Inert, inert
from geopd.checkpoints.torch_zip import ALLOWED, StoredTensor, TorchZip, extents, from_type, shown

_RANK_FILE = re.compile(r"model_world_size_(\d{1,6})_rank_(\d{1,6})\.pt")
_DTENSOR = "DTensor"
_PLACEMENTS = "torch.distributed.tensor.placement_types"
_OLD_PLACEMENTS = "torch.distributed._tensor.placement_types"


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank's part of a tensor: its local tensor, the whole shape, and for each mesh dimension the dimension of the
    tensor that it cuts (None: replicated)."""

    local: StoredTensor
    shape: tuple[int, ...]
    cuts: tuple[int | None, ...]
    mesh: tuple[int, ...]


def _rebuilt(function: Any, kind: Any, args: Any, state: Any) -> Any:
    if kind != _DTENSOR:
        return from_type(function, kind, args, state)
    held = state[1] if isinstance(state, tuple) else state  # (attributes, slots) where the class has slots
    spec, local, shape = held["_spec"].state, held["_local_tensor"], extents(args[2])
    if not isinstance(local, StoredTensor):
        raise ValueError("a DTensor without a local tensor")
    cuts = tuple(_cut(placement, len(shape)) for placement in spec["placements"])
    mesh = _mesh_shape(spec["mesh"].state)
    if len(cuts) != len(mesh) or len(local.shape) != len(shape):
        raise ValueError(f"a DTensor with {len(cuts)} placements on a mesh of {len(mesh)} dimensions")
    return Shard(local, shape, cuts, mesh)


def _cut(placement: Any, dims: int) -> int | None:
    if placement.name.endswith(".Replicate"):
        return None
    if not placement.name.endswith(".Shard"):
        raise ValueError(f"a DTensor placed by {placement.name}, which is not read")
    dim = placement.state["dim"] if placement.state else placement.args[0]
    if type(dim) is not int or not -dims <= dim < dims:
        raise ValueError(f"a DTensor cut along dimension {shown(dim)} of {dims}")
    return dim % dims


def _mesh_shape(state: dict[str, Any]) -> tuple[int, ...]:
    # the mesh is a tensor of ranks up to torch 2.8, a layout of (shape, stride) pairs later
    if isinstance(state.get("mesh"), StoredTensor):
        return tuple(state["mesh"].shape)
    layout = state["_layout"].state
    if "axes" not in layout:
        shape = layout["shape"]
        return extents(shape if isinstance(shape, tuple) else (shape,))
    axes = [axis.state["shape"] for axis in layout["axes"]]
    return extents([math.prod(extents(shape if isinstance(shape, tuple) else (shape,))) for shape in axes])


_SHARDED: Allow = {
    **ALLOWED,
    "torch._tensor._rebuild_from_type_v2": _rebuilt,
    "torch._utils._rebuild_wrapper_subclass": partial(Inert, "torch._utils._rebuild_wrapper_subclass"),
    "torch.distributed.tensor.DTensor": Constant(_DTENSOR),
    "torch.distributed._tensor.api.DTensor": Constant(_DTENSOR),
    "torch.distributed.tensor._api.DTensor": Constant(_DTENSOR),
    **inert(
        *(f"{home}.{name}" for home in (_PLACEMENTS, _OLD_PLACEMENTS) for name in ("Shard", "Replicate", "Partial")),
        f"{_PLACEMENTS}._StridedShard",
        "torch.distributed.device_mesh.DeviceMesh",
        "torch.distributed._mesh_layout._MeshLayout",
        "torch.distributed._mesh_layout._FlatLayout",
        "torch.distributed.tensor._dtensor_spec.DTensorSpec",
        "torch.distributed.tensor._dtensor_spec.TensorMeta",
        "torch.distributed.tensor._dtensor_spec.ShardOrderEntry",
        "torch.distributed._tensor.placement_types.DTensorSpec",
        "torch.distributed._tensor.placement_types.TensorMeta",
    ),
}


@dataclass(frozen=True, slots=True)
class RanksSource:
    """Joins each tensor from the files of all ranks."""

    files: Sequence[TorchZip]

    def read(self, name: str) -> Tensor:
        """The whole tensor; only its own parts are read.

        Raises:
            CheckpointError: if a rank's storage is not as its pickle says, or copies of a plain tensor differ.
        """
        held = [file.value[name] for file in self.files]
        if isinstance(held[0], StoredTensor):
            first = self.files[0].read(held[0])
            for file, other in zip(self.files[1:], held[1:], strict=True):
                if not torch.equal(file.read(other).view(-1).view(torch.uint8), first.view(-1).view(torch.uint8)):
                    raise CheckpointError(
                        f"{file.path}: tensor {name}: no shard, and not what rank 0 holds; save it again"
                    )
            return first
        shard = held[0]
        parts = [file.read(part.local) for file, part in zip(self.files, held, strict=True)]
        whole = torch.empty(shard.shape, dtype=shard.local.dtype)
        try:
            filled = _fill(whole, parts, shard.cuts, shard.mesh)
        except RuntimeError:  # a part that does not fit where it belongs
            filled = ()
        if filled != shard.shape:
            raise CheckpointError(f"{self.files[0].path}: tensor {name}: its parts do not make its shape {shard.shape}")
        return whole


def _fill(
    whole: Tensor, parts: Sequence[Tensor], cuts: tuple[int | None, ...], mesh: tuple[int, ...]
) -> tuple[int, ...]:
    """Write the parts into the corner of ``whole`` they fill; returns that corner's shape."""
    if not mesh:
        whole[tuple(slice(n) for n in parts[0].shape)] = parts[0]
        return tuple(parts[0].shape)
    cut, each = cuts[0], len(parts) // mesh[0]
    if cut is None:
        return _fill(whole, parts[:each], cuts[1:], mesh[1:])
    filled, corner = 0, tuple(whole.shape)
    for i in range(mesh[0]):
        rest = whole.narrow(cut, filled, whole.shape[cut] - filled)
        found = _fill(rest, parts[i * each : (i + 1) * each], cuts[1:], mesh[1:])
        filled += found[cut]
        corner = found if i == 0 else corner
    return (*corner[:cut], filled, *corner[cut + 1 :])


def _home(path: Path) -> Path | None:
    """The folder with the rank files: the path, or the ``actor`` of a ``global_step_N``."""
    folders = [path.parent] if path.is_file() and _RANK_FILE.fullmatch(path.name) else [path, path / "actor"]
    return next((folder for folder in folders if folder.is_dir() and _rank_files(folder)), None)


def _rank_files(folder: Path) -> dict[tuple[int, int], Path]:
    """(world size, rank) -> file."""
    files = [file for file in folder.glob("model_world_size_*.pt") if file.is_file()]
    matches = [(match, file) for file in files if (match := _RANK_FILE.fullmatch(file.name))]
    return {(int(match[1]), int(match[2])): file for match, file in sorted(matches, key=lambda item: item[1])}


def recognises_verl(path: Path) -> bool:
    """Whether a path is a rank file, a folder of them, or a ``global_step_N`` with them under ``actor``."""
    return _home(path) is not None


def open_verl(path: Path) -> Checkpoint:
    """A checkpoint of the rank files of a path that ``recognises_verl``; its config is the one under ``huggingface``.

    Raises:
        CheckpointError: if files of two world sizes lie there, a rank's file is missing, ``fsdp_config.json`` says
            another world size, or a file cannot be read.
    """
    folder = _home(path)
    assert folder is not None
    found = _rank_files(folder)
    world = _world_size(folder, found)
    files = [TorchZip(found[world, rank], _SHARDED) for rank in range(world)]
    for file in files:
        if not isinstance(file.value, dict):
            raise CheckpointError(f"{file.path}: holds {type(file.value).__name__}, not a state dict; save it again")
    tensors: dict[str, TensorInfo] = {}
    unreadable: dict[str, str] = {}
    for name in sorted({name for file in files for name in file.value if isinstance(name, str)}):
        outcome = _described(name, files)
        if isinstance(outcome, TensorInfo):
            tensors[name] = outcome
        elif outcome is not None:
            unreadable[name] = outcome
    config = read_config(folder / "huggingface") or read_config(folder)
    return Checkpoint(folder, "verl FSDP", tensors, RanksSource(files), unreadable, config, _notes(folder, tensors))


def _world_size(folder: Path, found: dict[tuple[int, int], Path]) -> int:
    sizes = sorted({world for world, _ in found})
    if len(sizes) > 1:
        named = ", ".join(next(file.name for (world, _), file in found.items() if world == size) for size in sizes)
        raise CheckpointError(f"{folder}: holds ranks of {len(sizes)} world sizes ({named}): remove the stale ones")
    (world,) = sizes
    if missing := [rank for rank in range(world) if (world, rank) not in found]:
        lost = f"model_world_size_{world}_rank_{missing[0]}.pt"
        raise CheckpointError(
            f"{folder}: {lost} is missing ({len(missing)} of {world} ranks are); copy every rank's file here"
        )
    settings = folder / "fsdp_config.json"
    said = read_json(settings).get("world_size", world) if settings.is_file() else world
    if said != world:
        raise CheckpointError(f"{settings}: says world size {said}, and the files here are of {world}; copy them again")
    return world


def _described(name: str, files: Sequence[TorchZip]) -> TensorInfo | str | None:
    """What a name holds over all ranks, or why it cannot be read; None where it is no tensor."""
    held = [file.value.get(name) for file in files]
    if not any(isinstance(part, StoredTensor | Shard) for part in held):
        return None
    if absent := next(
        (file.path for file, part in zip(files, held, strict=True) if not isinstance(part, StoredTensor | Shard)), None
    ):
        return f"{absent}: lacks it, and other ranks hold it; save the checkpoint again"
    first = held[0]
    for file, part in zip(files, held, strict=True):
        if type(part) is not type(first) or _layout(part) != _layout(first):
            return f"{file.path}: its shape, dtype or placement is not that of rank 0; save the checkpoint again"
        if fault := file.fault(part if isinstance(part, StoredTensor) else part.local):
            return fault
    if isinstance(first, StoredTensor):
        return tensor_info(name, first.shape, first.dtype)
    if math.prod(first.mesh) != len(files):
        return f"{files[0].path}: its mesh {first.mesh} is not that of {len(files)} ranks: not read"
    entries = sum(math.prod(part.local.shape) for part in held)
    copies = math.prod(n for n, cut in zip(first.mesh, first.cuts, strict=True) if cut is None)
    # checked before any memory is claimed for the whole
    if entries != copies * math.prod(first.shape):
        return f"{files[0].path}: its shards hold {entries:,} entries, and its shape is {first.shape}; save it again"
    return tensor_info(name, first.shape, first.local.dtype)


def _layout(part: StoredTensor | Shard) -> object:
    if isinstance(part, StoredTensor):
        return part.shape, part.dtype
    return part.shape, part.local.dtype, part.cuts, part.mesh


def _notes(folder: Path, tensors: dict[str, TensorInfo]) -> tuple[str, ...]:
    if any(".lora_A." in name for name in tensors):
        return (f"{folder}: holds LoRA factors beside their base layers, which are read unmerged; see lora_adapter",)
    return ()
