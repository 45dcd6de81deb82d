"""Pickled weights: ``.bin``, ``.pt`` and ``.pth`` files of ``torch.save``, alone or in shards with their index.

Files before torch 1.6 (not a zip) and TorchScript archives (they hold code) are refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from geopd.checkpoints.checkpoint import Checkpoint, CheckpointError, read_config, tensor_info
from geopd.checkpoints.pickled_values import Allow, inert
from geopd.checkpoints.sharded import join_shards
from geopd.checkpoints.torch_zip import ALLOWED, StoredTensor, TorchZip, shown, tensors_of

_INDEX = "pytorch_model.bin.index.json"
_SINGLE = ("pytorch_model.bin", "pytorch_model_fsdp.bin")
_SUFFIXES = frozenset({".bin", ".pt", ".pth"})
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
_WITH_SETTINGS: Allow = {**ALLOWED, **inert("argparse.Namespace")}  # beside the weights in many trainers' files


@dataclass(frozen=True, slots=True)
class TorchZipSource:
    """Reads tensors from one file of ``torch.save``."""

    file: TorchZip
    tensors: dict[str, StoredTensor]

    def read(self, name: str) -> Tensor:
        """The tensor as stored, memory-mapped.

        Raises:
            CheckpointError: if its storage is not as its pickle says.
        """
        return self.file.read(self.tensors[name])


def recognises_torch_zip(path: Path) -> bool:
    """Whether a path is a ``.bin``, ``.pt`` or ``.pth`` file, or a folder with ``pytorch_model.bin`` or its index."""
    if path.is_file():
        return path.suffix in _SUFFIXES
    return any((path / name).is_file() for name in (_INDEX, *_SINGLE))


def open_torch_zip(path: Path) -> Checkpoint:
    """A checkpoint of a path that ``recognises_torch_zip``, with the ``config.json`` beside it.

    Raises:
        CheckpointError: as ``TorchZip`` and ``join_shards``, or if the file holds no tensors by name.
    """
    if path.is_file():
        return _open_file(path, read_config(path.parent))
    config = read_config(path)
    if (path / _INDEX).is_file():
        return join_shards(path / _INDEX, "torch zip shards", "*.bin", config, lambda file: _open_file(file, {}))
    return _open_file(next(path / name for name in _SINGLE if (path / name).is_file()), config)


def _open_file(path: Path, config: dict[str, Any]) -> Checkpoint:
    file = TorchZip(path, _WITH_SETTINGS)
    weights, warnings = _unwrapped(path, file.value)
    warnings += _held_otherwise(path, weights)
    found = tensors_of(weights)
    if not found:
        kind = ", ".join(shown(key) for key in list(weights)[:5])
        raise CheckpointError(f"{path}: holds no tensors by name (a dict of {kind}); save the model's state dict")
    return checkpoint_of(file, found, path, "torch zip", config, warnings)


def checkpoint_of(
    file: TorchZip,
    held: dict[str, StoredTensor],
    path: Path,
    form: str,
    config: dict[str, Any],
    warnings: tuple[str, ...] = (),
) -> Checkpoint:
    """A checkpoint of some tensors of one file; those whose storage is not as the pickle says are unreadable."""
    faults = {name: fault for name, tensor in held.items() if (fault := file.fault(tensor))}
    infos = {name: tensor_info(name, tensor.shape, tensor.dtype) for name, tensor in held.items() if name not in faults}
    return Checkpoint(path, form, infos, TorchZipSource(file, held), faults, config, warnings)


def _unwrapped(path: Path, value: Any) -> tuple[dict[Any, Any], tuple[str, ...]]:
    """The state dict inside the dicts that trainers put around it, and a note of what was passed over.

    A dict under a wrapper's name that holds tensors is the model, whatever tensors (a step, a loss) lie beside it.
    """
    keys: list[str] = []
    beside: list[str] = []
    while isinstance(value, dict) and len(keys) < 4:
        held = tensors_of(value)
        inside = [name for name in _WRAPPERS if isinstance(value.get(name), dict)]
        key = next((name for name in inside if not held or tensors_of(value[name])), None)
        if key is None:
            break
        keys.append(key)
        beside += held
        value = value[key]
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds {type(value).__name__}, not a state dict; save the model's state dict")
    if not keys:
        return value, ()
    also = f", the tensor {beside[0]} too" if beside else ""
    return value, (f"{path}: the weights are those under {'.'.join(keys)}; the rest is ignored{also}",)


def _held_otherwise(path: Path, weights: dict[Any, Any]) -> tuple[str, ...]:
    """What is said of tensors that a state dict holds in lists or dicts and not by names of their own."""
    lists = [
        name
        for name, held in weights.items()
        if isinstance(name, str)
        and isinstance(held, list | tuple | dict)
        and any(isinstance(part, StoredTensor) for part in (held.values() if isinstance(held, dict) else held))
    ]
    if not lists:
        return ()
    what = f"{shown(lists[0])} and {len(lists) - 1} more hold" if len(lists) > 1 else f"{shown(lists[0])} holds"
    return (f"{path}: {what} tensors without names of their own: not read",)
