"""The weights of a model in memory, under the names they have on disk: adapters added, shards gathered.

Nothing in the model is changed: no adapter is merged in place, no parameter is replaced.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from geopd.checkpoints import Checkpoint
from geopd.matrices import Piece, Role, Selection, WeightName, canonical_names, canonical_view
from geopd.training.named_parameters import WRAPPERS, live_pieces
from geopd.training.sharding import whole

__all__ = ["LiveMatrix", "expert_stacks", "live_matrices"]

_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


@dataclass(frozen=True, slots=True)
class LiveMatrix:
    """One watched matrix of a model.

    It is looked up in its module at every use, since sharding and optimisers exchange parameter objects.

    Args:
        weight: its canonical name, layer and module.
        shape: (m, n), of the whole matrix however it is sharded.
        origin_tensor: its name in the origin's files.
        owner: the module that holds the parameter.
        attribute: the parameter's name in it.
        adapters: the PEFT layers around the owner whose deltas are added to this parameter.
        piece: where the matrix lies in the parameter: all of it, or a cut of a fused or transposed one.
    """

    weight: WeightName
    shape: tuple[int, int]
    origin_tensor: str
    owner: nn.Module
    attribute: str
    adapters: tuple[Any, ...]
    piece: Piece

    @property
    def parameter(self) -> Tensor:
        """The parameter as the model holds it now: possibly a shard."""
        found: Tensor = getattr(self.owner, self.attribute)
        return found

    @torch.no_grad()
    def gather(self) -> tuple[Tensor, Tensor | None]:
        """The whole base weight (m, n) and the sum of the active adapters' deltas, scale B A, or None without any.

        The effective weight is their sum; they are returned apart because rounding it would cost a small delta its
        digits. Merged adapters are in the base weight already. Under FSDP2 and ZeRO-3 this is a collective: every
        process calls it for the same matrices in the same order.
        """
        active = [
            (layer, name)
            for layer in self.adapters
            if not layer.merged and not layer.disable_adapters
            for name in layer.active_adapters
            if name in layer.lora_A or name in layer.lora_embedding_A
        ]
        parts = [self.parameter, *(p for layer, name in active for p in _adapter_parameters(layer, name))]
        with _unpartitioned(parts):
            base = whole(self.parameter).detach()
            if _is_partitioned(self.parameter):
                base = base.clone()  # the gathered storage is freed on leaving
            deltas = [whole(layer.get_delta_weight(name)).to(base.device) for layer, name in active]
        total = None
        for delta in deltas:
            total = delta.to(torch.float32) if total is None else total + delta
        return self.piece.cut(base), None if total is None else self.piece.cut(total)


def live_matrices(model: nn.Module, origin: Checkpoint, patterns: Sequence[str]) -> list[LiveMatrix]:
    """The matrices of a model that the patterns select, in name order, each with its tensor in the origin.

    Args:
        model: any module tree with the parameter names of a causal language model; PEFT, torch.compile, activation
            checkpointing, FSDP2 and ZeRO-3 around it are seen through.
        origin: W0 on disk; only headers are read.
        patterns: presets and globs over canonical names, as ``geopd.matrices.Selection`` takes them.

    Raises:
        ValueError: no matrix is selected; a selected one is quantised, adapted by something other than plain LoRA,
            sharded by FSDP version 1, or has no float tensor of its shape in the origin.
    """
    _refuse_flat_parameters(model)
    origin = canonical_view(origin)
    found, pieces, names = _named(model)
    selection = Selection(tuple(patterns))
    chosen = {name: weight for name, weight in names.items() if weight.role in _MATRICES and selection.full(weight)}
    if not chosen:
        known = [weight.name for weight in names.values() if weight.role in _MATRICES]
        raise ValueError(
            f"matrices={list(patterns)} select none of the model's {len(known)} matrices "
            f"({', '.join(known[:3])}, ...): name a preset (layers, attention, all) or a glob over these names; "
            "tied weights have one name"
        )
    stored = _stored_names(origin)
    matched = []
    for name, weight in sorted(chosen.items(), key=lambda item: item[1].name):
        piece = pieces[name]
        _, owner, attribute, adapters = found[piece.stored]
        _require_readable(weight.name, getattr(owner, attribute), adapters)
        m, n = piece.shape
        tensor = _origin_tensor(weight.name, (m, n), stored, origin)
        matched.append(LiveMatrix(weight, (m, n), tensor, owner, attribute, adapters, piece))
    return matched


def expert_stacks(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Canonical names of what the patterns ask for and nothing watches: parameters of more than two dimensions."""
    _, pieces, names = _named(model)
    selection = Selection(tuple(patterns))
    return sorted(
        weight.name for name, weight in names.items() if len(pieces[name].shape) > 2 and selection.entrywise(weight)
    )


def _named(model: nn.Module) -> tuple[dict[str, _Found], dict[str, Piece], dict[str, WeightName]]:
    """Parameters by their paths; the matrices in them by name, stacks of experts whole; and what these are called."""
    found = {item[0]: item for item in _distinct(_walk(model))}
    pieces = live_pieces(model, {name: _shape(getattr(item[1], item[2])) for name, item in found.items()})
    return found, pieces, canonical_names({name: piece.shape for name, piece in pieces.items()})


_MATRICES = frozenset({Role.MATRIX, Role.EMBEDDING})
_Found = tuple[str, nn.Module, str, tuple[Any, ...]]


def _walk(module: nn.Module, path: str = "", adapters: tuple[Any, ...] = ()) -> Iterator[_Found]:
    """Every parameter that the forward pass uses, by the name it would have without wrappers and adapters."""
    if _is_a(module, "peft.tuners.tuners_utils", "BaseTunerLayer"):
        yield from _walk(module.get_submodule("base_layer"), path, (*adapters, module))
        return
    if _is_a(module, "peft.utils.other", "ModulesToSaveWrapper"):
        wrapper: Any = module
        yield from _walk(wrapper.modules_to_save[wrapper.active_adapters[0]], path)
        return
    if _is_a(module, "peft.utils.other", "AuxiliaryTrainingWrapper"):
        yield from _walk(module.get_submodule("original_module"), path, (module,))
        return
    for attribute, _ in module.named_parameters(recurse=False):
        # a PEFT layer adapts one parameter of its base: "weight", unless it says which
        around = tuple(layer for layer in adapters if getattr(layer, "parameter_name", "weight") == attribute)
        yield f"{path}{attribute}", module, attribute, around
    for child_name, child in module.named_children():
        yield from _walk(child, path if child_name in WRAPPERS else f"{path}{child_name}.")


def _is_a(module: nn.Module, home: str, name: str) -> bool:
    # a model can hold a PEFT layer only where PEFT is loaded; importing it to ask would cost seconds
    loaded = sys.modules.get(home)
    return loaded is not None and isinstance(module, getattr(loaded, name))


def _distinct(found: Iterable[_Found]) -> Iterator[_Found]:
    """Tied parameters once, under the first name, as ``named_parameters`` gives them."""
    seen: set[int] = set()
    for item in found:
        parameter = getattr(item[1], item[2])
        if id(parameter) not in seen:
            seen.add(id(parameter))
            yield item


def _refuse_flat_parameters(model: nn.Module) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    for name, module in model.named_modules():
        if isinstance(module, FullyShardedDataParallel):
            raise ValueError(
                f"module {name or type(module).__name__} is sharded by FSDP version 1, whose parameters are flat: "
                "set fsdp_version to 2"
            )


def _stored_names(origin: Checkpoint) -> dict[str, str]:
    """Tensors of the origin by canonical name."""
    lost = dict.fromkeys(origin.unreadable, (1, 1))  # an unreadable tensor has no shape; its name is the same
    names = canonical_names({name: info.shape for name, info in origin.tensors.items()} | lost)
    return {weight.name: name for name, weight in names.items()}


def _origin_tensor(name: str, shape: tuple[int, int], stored: dict[str, str], origin: Checkpoint) -> str:
    if name not in stored:
        raise ValueError(
            f"{origin.path}: has no tensor for the model's {name} ({_dims(shape)}): pass the checkpoint that training "
            "started from, with the same architecture"
        )
    tensor = stored[name]
    if tensor in origin.unreadable:
        raise ValueError(f"{origin.path}: tensor {tensor}: {origin.unreadable[tensor]}")
    info = origin.tensors[tensor]
    if info.shape != shape:
        raise ValueError(
            f"{origin.path}: tensor {tensor} is {_dims(info.shape)} and the model's {name} is {_dims(shape)}: pass the "
            "checkpoint that training started from"
        )
    if info.dtype not in _FLOATS:
        raise ValueError(f"{origin.path}: tensor {tensor} is stored as {info.dtype}: pass an origin of float weights")
    return tensor


def _dims(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _require_readable(name: str, parameter: Tensor, adapters: tuple[Any, ...]) -> None:
    if parameter.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(
            f"the model's {name} is held as {str(parameter.dtype).removeprefix('torch.')} (quantised): leave it out of "
            "`matrices`, or train on float weights"
        )
    for layer in adapters:
        variants = getattr(layer, "lora_variant", {})
        if not _is_a(layer, "peft.tuners.lora", "LoraLayer") or any(a in variants for a in layer.active_adapters):
            raise ValueError(
                f"the model's {name} is adapted by {type(layer).__module__}.{type(layer).__name__}, not by plain LoRA: "
                "its effective weight is no sum; leave it out of `matrices`"
            )
    if _is_partitioned(parameter) and find_spec("deepspeed") is None:
        raise ValueError(f"the model's {name} is partitioned by ZeRO-3 and deepspeed is not installed: install it")


def _adapter_parameters(layer: Any, name: str) -> list[Tensor]:
    held = (layer.lora_A, layer.lora_B, layer.lora_embedding_A, layer.lora_embedding_B)
    found: list[Tensor] = []
    for part in held:
        if name in part:
            found += [part[name]] if isinstance(part[name], Tensor) else list(part[name].parameters())
    return found


def _shape(parameter: Tensor) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _is_partitioned(parameter: Tensor) -> bool:
    return hasattr(parameter, "ds_shape")


def _unpartitioned(parameters: list[Tensor]) -> AbstractContextManager[Any]:
    partitioned = [parameter for parameter in parameters if _is_partitioned(parameter)]
    if not partitioned:
        return nullcontext()
    gathered: AbstractContextManager[Any] = import_module("deepspeed").zero.GatheredParameters(partitioned)
    return gathered
