"""A checkpoint as canonical matrices: itself a checkpoint, whose tensors are cut from the stored ones as they are read.

One stored tensor is read at a time, memory-mapped where its format allows it; of a stack of experts only the one that
is asked for, where the format can give that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from geopd.checkpoints import Checkpoint, CheckpointError, TensorInfo
from geopd.matrices.cuts import Expert, Piece
from geopd.matrices.layouts import layout_of
from geopd.matrices.naming import canonical_names, unwrapped
from geopd.matrices.quantised import Quantised, block_size, dequantised, weight_of

_SAMPLE = 64  # rows that are compared before two whole embeddings are


@runtime_checkable
class PartSource(Protocol):
    """A source that can read a part of a tensor for less than the whole."""

    def read_part(self, name: str, index: tuple[int, ...]) -> Tensor:
        """``tensor[index]``, for an index of leading dimensions."""
        ...


@dataclass(frozen=True)
class CanonicalCheckpoint(Checkpoint):
    """Canonical matrices of a checkpoint.

    ``refused`` maps quantised weights, by the name they would have, to the reason why they are not read. The digest of
    a tensor is the canonical tensor's, the same in every layout; the digest of the checkpoint is the stored one's.
    """

    stored: Checkpoint = field(kw_only=True)
    refused: dict[str, str] = field(default_factory=dict, kw_only=True)

    def digest(self) -> str:
        """Content digest of the stored checkpoint: the same whether or not it is seen through its layout."""
        return self.stored.digest()

    @cached_property
    def head_is_embedding(self) -> bool:
        """Whether a head is stored that has the embedding's content, rounded to the narrower dtype where they differ.

        A few rows are compared before all of them.
        """
        weights = canonical_names({name: info.shape for name, info in self.tensors.items()})
        heads, embeddings = (
            [self.tensors[name] for name, weight in weights.items() if weight.module == module]
            for module in ("head", "embedding")
        )
        return any(self._same(head, embedding) for head in heads for embedding in embeddings)

    def _same(self, one: TensorInfo, other: TensorInfo) -> bool:
        if one.shape != other.shape:
            return False
        try:
            first, second = self.read(one.name), self.read(other.name)
        except CheckpointError:
            return False  # the task that needs it will say why
        if not (first.is_floating_point() and second.is_floating_point()):
            return False
        narrow = min(first.dtype, second.dtype, key=lambda dtype: dtype.itemsize)  # of the two, what both can be
        return all(torch.equal(first[:rows].to(narrow), second[:rows].to(narrow)) for rows in (_SAMPLE, len(first)))


@dataclass(frozen=True)
class _PieceSource:
    stored: Checkpoint
    pieces: Mapping[str, Piece]
    scales: Mapping[str, str]
    block: tuple[int, int]

    def read(self, name: str) -> Tensor:
        """The canonical tensor, contiguous: a view of what is stored where it can be one."""
        piece = self.pieces[name]
        index: tuple[int, ...] = ()
        if piece.cuts and isinstance(piece.cuts[0], Expert) and isinstance(self.stored.source, PartSource):
            index, piece = (piece.cuts[0].index,), replace(piece, cuts=piece.cuts[1:])
        tensor = self._part(piece.stored, index)
        if piece.stored in self.scales:
            scale = self.scales[piece.stored]
            one = math.prod(self.stored.tensors[scale].shape) == 1
            try:
                tensor = dequantised(piece.stored, tensor, self._part(scale, () if one else index), self.block)
            except CheckpointError as error:
                raise CheckpointError(f"{self.stored.path}: {error}") from error
        return piece.cut(tensor).contiguous()

    def _part(self, name: str, index: tuple[int, ...]) -> Tensor:
        if index and isinstance(self.stored.source, PartSource):
            return self.stored.source.read_part(name, index)
        return self.stored.read(name)


def canonical_view(checkpoint: Checkpoint, *, per_head: bool = False) -> CanonicalCheckpoint:
    """The canonical matrices of a checkpoint; only headers are read.

    Fused and stacked tensors are split, GPT-2's transposed, Mixtral's and torchtitan's renamed, fp8 weights
    dequantised. A tensor that is canonical as it lies keeps its name on disk. What cannot be split is said in the
    warnings; what is quantised otherwise is in ``refused``.

    Args:
        checkpoint: any checkpoint; a canonical one is given back as it is, unless it is to be cut into heads.
        per_head: whether attention matrices are cut into heads, ``layers.0.self_attn.q_proj.heads.3``.
    """
    if isinstance(checkpoint, CanonicalCheckpoint):
        return canonical_view(checkpoint.stored, per_head=True) if per_head else checkpoint
    quantised = Quantised.among(checkpoint.tensors)
    try:
        block = block_size(checkpoint.config if quantised.scales else {})
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.path}: {error}") from error
    left_out = quantised.companions | set(quantised.refused)
    shapes = {name: info.shape for name, info in checkpoint.tensors.items() if name not in left_out}
    lost, guessed = _unreadable(checkpoint, shapes, per_head=per_head)
    layout = layout_of(shapes, checkpoint.config, per_head=per_head)
    source = _PieceSource(checkpoint, layout.pieces, quantised.scales, block)
    tensors = {name: _info(name, piece, checkpoint, quantised.scales) for name, piece in layout.pieces.items()}
    return CanonicalCheckpoint(
        path=checkpoint.path,
        format=checkpoint.format,
        tensors=tensors,
        source=source if left_out or _differs(layout.pieces) else checkpoint.source,
        unreadable={name: reason for name, reason in lost.items() if name not in tensors} | guessed,
        config=checkpoint.config,
        warnings=checkpoint.warnings + tuple(f"{checkpoint.path}: {note}" for note in layout.notes),
        stored=checkpoint,
        refused={weight_of(name): reason for name, reason in quantised.refused.items()},
    )


def _differs(pieces: Mapping[str, Piece]) -> bool:
    return any(piece.cuts or piece.stored != name for name, piece in pieces.items())


def _info(name: str, piece: Piece, checkpoint: Checkpoint, scales: Mapping[str, str]) -> TensorInfo:
    stored = checkpoint.tensors[piece.stored]
    if piece.stored in scales:
        return TensorInfo(name, piece.shape, "F32", 4 * piece.numel)
    if not piece.cuts:
        return replace(stored, name=name)
    return TensorInfo(name, piece.shape, stored.dtype, stored.nbytes * piece.numel // math.prod(stored.shape))


def _unreadable(
    checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]], *, per_head: bool
) -> tuple[dict[str, str], dict[str, str]]:
    """Unreadable tensors under their canonical names: those that have the shape of the same one in another layer."""
    known = {_in_any_layer(name): shape for name, shape in shapes.items()}
    hints = {name: known[key] for name in checkpoint.unreadable if (key := _in_any_layer(name)) in known}
    pieces = layout_of({**shapes, **hints}, checkpoint.config, per_head=per_head).pieces if hints else {}
    guessed = {
        name: checkpoint.unreadable[piece.stored]
        for name, piece in pieces.items()
        if piece.stored in hints and (piece.cuts or name != piece.stored)
    }
    replaced = {pieces[name].stored for name in guessed}
    return {name: reason for name, reason in checkpoint.unreadable.items() if name not in replaced}, guessed


def _in_any_layer(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in unwrapped(name).split("."))
