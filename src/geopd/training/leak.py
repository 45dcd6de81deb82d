"""How much of a training increment left the subspace it should have stayed in.

With D = W_t - W_t0 the increment since the projection started, the leak of a matrix is the share of its energy outside
the span of V, ||D - D V V^T||_F^2 / ||D||_F^2, or outside the mask; over matrices the energies are added up first.
Undefined (None) where nothing moved. Only the increment is confined: what W_t0 itself carries is not part of it.

- From an adapter, D = B A with the A the model holds, against the V of the basis file: K x K products, no copy of W.
- From weights, D is taken against the starting checkpoint, read from disk one matrix at a time.
- After rounding to bf16, D = bf16(W_t) - bf16(W_t0): rounding leaks by itself, so this is a figure of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from geopd.checkpoints import open_checkpoint
from geopd.matrices import canonical_names, canonical_view
from geopd.spectral import row_blocks
from geopd.training.adapter_projection import ADAPTER, adapted_layers
from geopd.training.basis import Basis
from geopd.training.named_parameters import named_parameters
from geopd.training.sharding import local, local_part, sum_over_parts, whole

__all__ = [
    "Leak",
    "StartWeights",
    "base_checksums",
    "leak_of_adapter",
    "leak_of_checkpoint",
    "leak_of_weights",
    "outside_energy",
]

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes an entry


@dataclass(frozen=True)
class Leak:
    """Energies of the increment by matrix: in all, and outside the basis (squared Frobenius norms)."""

    total: dict[str, float] = field(default_factory=dict)
    outside: dict[str, float] = field(default_factory=dict)

    @property
    def share(self) -> float | None:
        """Share outside over all matrices; None where nothing moved."""
        total = sum(self.total.values())
        return sum(self.outside.values()) / total if total > 0 else None

    @property
    def by_matrix(self) -> dict[str, float | None]:
        """Share outside of every matrix; None where it did not move."""
        return {name: self.outside[name] / total if total > 0 else None for name, total in self.total.items()}

    @property
    def worst(self) -> tuple[str, float] | None:
        """The matrix that leaks most, with its share; None where nothing moved."""
        moved = {name: share for name, share in self.by_matrix.items() if share is not None}
        return max(moved.items(), key=lambda item: item[1]) if moved else None


class StartWeights:
    """The weights training started from, read lazily from a checkpoint on disk by canonical name.

    Raises:
        ValueError: nothing readable lies there (a ``CheckpointError``).
    """

    def __init__(self, path: str | Path) -> None:
        self.checkpoint = canonical_view(open_checkpoint(path))
        shapes = {name: info.shape for name, info in self.checkpoint.tensors.items()}
        self._stored = {weight.name: stored for stored, weight in canonical_names(shapes).items()}

    def read(self, name: str) -> Tensor:
        """One matrix as stored.

        Raises:
            ValueError: the checkpoint has no such matrix.
        """
        if name not in self._stored:
            raise ValueError(
                f"{self.checkpoint.path}: no matrix {name} in it, which the basis names: give the checkpoint that "
                "training started from as the projection's `start`"
            )
        return self.checkpoint.read(self._stored[name])


def outside_energy(D: Float[Tensor, "m n"], basis: Basis, name: str, rows: Tensor | None = None) -> Float[Tensor, "2"]:
    """(||D||_F^2, its part outside the basis), float64, streamed in row blocks; ``rows`` is D's part of a mask."""
    energies = torch.zeros(2, dtype=torch.float64, device=D.device)
    V = None if basis.is_mask else basis.vectors[name].to(D.device, torch.float64)
    mask = (basis.mask(name).to(D.device) if rows is None else rows) if V is None else None
    for block in row_blocks(tuple(D.shape)):
        part = D[block].double()
        left = part - (part @ V) @ V.T if V is not None else part.masked_fill(_of(mask, block), 0.0)
        energies[0] += (part * part).sum()
        energies[1] += (left * left).sum()
    return energies


def _of(mask: Tensor | None, block: slice) -> Tensor:
    assert mask is not None
    return mask[block]


def leak_of_adapter(model: Any, basis: Basis, dtype: torch.dtype | None = None) -> Leak:
    """The leak of B A, from the factors alone; with ``dtype``, of what merging into weights of it stores.

    ||B A||^2 = tr(B (A A^T) B^T), and with R = A - (A V) V^T the part outside is tr(B (R R^T) B^T).

    Raises:
        ValueError: the model holds no adapter on a matrix of the basis.
    """
    leak = Leak()
    for name, layer in adapted_layers(model, basis).items():
        A, B = (whole(part[ADAPTER].weight.detach()).double() for part in (layer.lora_A, layer.lora_B))
        B = layer.scaling[ADAPTER] * B
        if dtype is not None:
            weight = layer.get_base_layer().weight.detach()
            W, delta = local(weight).double(), local_part(B @ A, weight)
            D = (W + delta).to(dtype).double() - W.to(dtype).double()
            _add(leak, name, sum_over_parts(outside_energy(D, basis, name), weight))
            continue
        V = basis.vectors[name].to(A)
        R = A - (A @ V) @ V.T
        _add(leak, name, torch.stack([(B @ (X @ X.T) * B).sum() for X in (A, R)]))
    return leak


def leak_of_weights(
    model: Any,
    basis: Basis,
    start: StartWeights,
    *,
    loaded_as: dict[str, torch.dtype] | None = None,
    dtype: torch.dtype | None = None,
) -> Leak:
    """The leak of a model's weights against those it started from; every process of a sharded one must call it.

    Args:
        model: the model being trained, without adapters.
        basis: the basis.
        start: where training started, on disk.
        loaded_as: dtype every matrix was loaded in, where that differs from its present one (fp32 masters of a model
            loaded in bf16 start from the rounded weights).
        dtype: round both ends to it first, as saving in it would.

    Raises:
        ValueError: the start lacks a matrix of the basis, or holds another shape.
    """
    leak = Leak()
    for name, weight, before in _pairs(model, basis, start):
        began = before.to((loaded_as or {}).get(name, weight.dtype)).to(weight.dtype)
        now, then = local(weight), local_part(began, weight)
        if dtype is not None:
            now, then = now.to(dtype), then.to(dtype)
        rows = local_part(basis.mask(name), weight) if basis.is_mask else None
        D = now.double() - then.double()
        _add(leak, name, sum_over_parts(outside_energy(D, basis, name, rows), weight))
    return leak


def base_checksums(model: Any, basis: Basis, loaded_as: dict[str, torch.dtype] | None = None) -> dict[str, int]:
    """A checksum of every frozen weight under an adapter, the sum of its bits as integers.

    The adapter's leak says nothing of the weight beneath it, which merging and unmerging in place moves by rounding.
    A model without storage (on the meta device, for planning) has none.
    """
    sums = {}
    for name, layer in adapted_layers(model, basis).items():
        weight = layer.get_base_layer().weight.detach()
        if weight.is_meta:
            continue
        rows = local(weight).to((loaded_as or {}).get(name, weight.dtype)).contiguous()
        bits = rows.view(_INTEGERS[rows.element_size()]).sum(dtype=torch.int64)
        sums[name] = int(sum_over_parts(bits, weight))
    return sums


def leak_of_checkpoint(start: str | Path, end: str | Path, basis: Basis, dtype: torch.dtype | None = None) -> Leak:
    """The leak between two checkpoints on disk, as stored; with ``dtype``, after rounding both ends to it.

    Raises:
        ValueError: a checkpoint cannot be read, lacks a matrix of the basis, or holds another shape.
    """
    first, last = StartWeights(start), StartWeights(end)
    leak = Leak()
    for name in basis.names:
        before, after = first.read(name), last.read(name)
        _check_shapes(name, tuple(after.shape), tuple(before.shape), start)
        if dtype is not None:
            before, after = before.to(dtype), after.to(dtype)
        _add(leak, name, outside_energy(after.double() - before.double(), basis, name))
    return leak


def _pairs(model: Any, basis: Basis, start: StartWeights) -> Iterator[tuple[str, Tensor, Tensor]]:
    parameters = named_parameters(model)
    for name in basis.names:
        weight, before = parameters[name].parameter.detach(), start.read(name)
        _check_shapes(name, tuple(weight.shape), tuple(before.shape), start.checkpoint.path)
        yield name, weight, before


def _check_shapes(name: str, now: tuple[int, ...], then: tuple[int, ...], path: str | Path) -> None:
    if now != then:
        raise ValueError(
            f"{path}: {name} is {' x '.join(map(str, then))} there and {' x '.join(map(str, now))} now: give the "
            "checkpoint that training started from"
        )


def _add(leak: Leak, name: str, energies: Tensor) -> None:
    leak.total[name], leak.outside[name] = energies.tolist()
