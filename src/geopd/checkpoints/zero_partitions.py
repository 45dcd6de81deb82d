"""ZeRO's fp32 masters: where in the ranks' flat partitions each parameter lies.

Stages 1 and 2: a parameter group's partitions, rank after rank, are one vector, in which the parameters follow each
other (with the paddings the file lists). Stage 3: each parameter is cut into one part a rank, ceil(numel / ranks)
entries each, the last padded, and on every rank the parts follow each other. The layout is that of DeepSpeed's own
conversion to fp32. Buffers and frozen parameters lie in the model states.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from geopd.checkpoints.checkpoint import CheckpointError
from geopd.checkpoints.torch_zip import StoredTensor, TorchZip, extents, is_size, shown

Piece = tuple[TorchZip, StoredTensor]
"""A run of entries of a flat tensor: its file, and a 1-D view."""


@dataclass(frozen=True, slots=True)
class Segments:
    """A tensor of some shape as pieces, joined in order."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[Piece, ...]

    def fault(self) -> str | None:
        """Why it cannot be read; None where it can."""
        return next((fault for file, part in self.pieces if (fault := file.fault(part))), None)


@dataclass(frozen=True, slots=True)
class SegmentsSource:
    """Joins each tensor from its pieces."""

    segments: dict[str, Segments]

    def read(self, name: str) -> Tensor:
        """The tensor, memory-mapped where it lies in one piece; only its own pieces are read.

        Raises:
            CheckpointError: if a storage is not as its pickle says.
        """
        held = self.segments[name]
        if len(held.pieces) == 1:
            file, part = held.pieces[0]
            return file.read(part).view(held.shape)
        flat, at = torch.empty(math.prod(held.shape), dtype=held.dtype), 0
        for file, part in held.pieces:
            (count,) = part.shape
            flat[at : at + count] = file.read(part)
            at += count
        return flat.view(held.shape)


def dict_in(file: TorchZip, key: str) -> dict[Any, Any]:
    """A dict that a file's pickle holds under a key.

    Raises:
        CheckpointError: if it holds none.
    """
    value = file.value.get(key) if isinstance(file.value, dict) else None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file.path}: has no {key}; is it a DeepSpeed checkpoint, whole?")
    return value


def masters(models: Sequence[TorchZip], optimisers: Sequence[TorchZip]) -> dict[str, Segments]:
    """Every tensor of a checkpoint by name, from the model states and the optimiser states of ranks 0, 1, ...

    Raises:
        CheckpointError: if the states are of no known stage, or do not fit the parameters.
    """
    model = models[0]
    states = [dict_in(file, "optimizer_state_dict") for file in optimisers]
    stage = states[0].get("zero_stage")
    groups = model.value.get("param_shapes") if isinstance(model.value, dict) else None
    if type(stage) is not int or stage not in (1, 2, 3):
        raise CheckpointError(f"{optimisers[0].path}: of ZeRO stage {shown(stage)}; stages 1, 2 and 3 are read")
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise CheckpointError(f"{model.path}: its param_shapes are no list of parameter groups; copy it again")
    key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    flat = [
        [(file, part) for part in _flat_list(file, state, key)] for file, state in zip(optimisers, states, strict=True)
    ]
    try:
        groups = [{name: extents(shape) for name, shape in group.items()} for group in groups]
        if stage == 3:
            found = _spread({name: shape for group in groups for name, shape in group.items()}, flat)
        else:
            paddings = states[0].get("param_alignment_paddings")
            found = _in_groups(groups, flat, paddings)
        shared = model.value.get("shared_params") or {}
        found |= {alias: found[name] for alias, name in shared.items() if name in found}
        found |= _from_models(models, stage, found)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise CheckpointError(
            f"{model.path}: its parameters and the ranks' partitions do not fit ({error}); copy every rank's file of "
            "one save"
        ) from error
    return found


class _Vector:
    """Pieces that follow each other."""

    def __init__(self, pieces: list[Piece]) -> None:
        self.pieces = pieces
        self._starts = [0, *accumulate(part.shape[0] for _, part in pieces)]
        self.size = self._starts[-1]

    def cut(self, start: int, count: int) -> list[Piece]:
        """The pieces that make the entries from ``start`` on.

        Raises:
            ValueError: if there are not so many.
        """
        found: list[Piece] = []
        end = start + count
        if end > self.size:
            raise ValueError(f"entries {start:,} to {end:,} of a partition of {self.size:,}")
        for i in range(max(0, bisect_right(self._starts, start) - 1), len(self.pieces)):
            (file, part), at = self.pieces[i], self._starts[i]
            if at >= end:
                break
            first, last = max(start, at), min(end, at + part.shape[0])
            if first < last:
                found.append((file, replace(part, offset=part.offset + first - at, shape=(last - first,))))
        return found


def _flat_list(file: TorchZip, state: dict[Any, Any], key: str) -> list[StoredTensor]:
    parts = state.get(key)
    if not isinstance(parts, list) or not all(isinstance(part, StoredTensor) and part.stride == (1,) for part in parts):
        raise CheckpointError(f"{file.path}: has no {key}, the flat fp32 partitions; save the optimiser state too")
    if (nbytes := sum(part.shape[0] * part.dtype.itemsize for part in parts)) > file.nbytes:
        raise CheckpointError(f"{file.path}: its {key} claim {nbytes:,} bytes of {file.nbytes:,}; copy it again")
    return parts


def _in_groups(
    groups: list[dict[str, tuple[int, ...]]], flat: list[list[Piece]], paddings: list[list[int]] | None
) -> dict[str, Segments]:
    ranks = len(flat)
    found: dict[str, Segments] = {}
    for i, shapes in enumerate(groups):
        vector = _Vector([parts[i] for parts in flat])
        after = paddings[i] if paddings else [0] * len(shapes)
        if not all(is_size(padding) for padding in after):
            raise ValueError(f"the paddings of group {i} are no numbers of entries")
        at = 0
        for (name, shape), padding in zip(shapes.items(), after, strict=True):
            count = math.prod(shape)
            found[name] = Segments(shape, vector.pieces[0][1].dtype, tuple(vector.cut(at, count)))
            at += count + padding
        available = vector.size
        # every partition is aligned, which leaves the vector longer than its parameters by less than that
        align = 2 * ranks
        if -(-at // align) != -(-available // align):
            raise ValueError(f"group {i} holds {available:,} entries, its parameters {at:,}")
    return found


def _spread(shapes: dict[str, tuple[int, ...]], flat: list[list[Piece]]) -> dict[str, Segments]:
    ranks, at = len(flat), 0
    vectors = [_Vector(parts) for parts in flat]
    found: dict[str, Segments] = {}
    for name, shape in shapes.items():
        count = math.prod(shape)
        each = -(-count // ranks)
        pieces: list[Piece] = []
        for rank, vector in enumerate(vectors):
            pieces += vector.cut(at, max(0, min(each, count - rank * each)))
        found[name] = Segments(shape, flat[0][0][1].dtype, tuple(pieces))
        at += each
    for rank, vector in enumerate(vectors):
        if vector.size != at:
            raise ValueError(f"rank {rank} holds {vector.size:,} entries, its parts of the parameters {at:,}")
    return found


def _from_models(models: Sequence[TorchZip], stage: int, trained: Container[str]) -> dict[str, Segments]:
    """Buffers, and the parameters that were not trained: whole in the model states but for stage 3's."""
    first = models[0]
    frozen = first.value.get("frozen_param_shapes") or {}
    buffers = first.value.get("buffer_names") or ()
    module = dict_in(first, "module")
    found = {
        name: Segments(tensor.shape, tensor.dtype, ((first, _flat(tensor)),))
        for name, tensor in module.items()
        if isinstance(tensor, StoredTensor) and name not in trained and (stage < 3 or name in buffers)
    }
    if stage == 3:
        for name, shape in frozen.items():
            parts = [(file, _flat(file.value["frozen_param_fragments"][name])) for file in models]
            whole = extents(shape)
            found[name] = Segments(whole, parts[0][1].dtype, tuple(_Vector(parts).cut(0, math.prod(whole))))
    return found


def _flat(tensor: StoredTensor) -> StoredTensor:
    count, expected = math.prod(tensor.shape), 1
    for n, stride in zip(reversed(tensor.shape), reversed(tensor.stride), strict=True):
        if n != 1 and stride != expected:
            raise ValueError(f"a tensor with strides {tensor.stride}, which is not laid out row by row")
        expected *= n
    return replace(tensor, shape=(count,), stride=(1,))
