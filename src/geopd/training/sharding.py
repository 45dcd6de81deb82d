"""Weights sharded by rows (FSDP2's ``Shard(0)``): the part a process holds, and sums over all parts."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

__all__ = ["check_rows_whole", "local", "local_part", "sum_over_parts", "whole"]


def check_rows_whole(name: str, weight: Tensor) -> None:
    """Require that every process holds whole rows: only then is a product from the right a local one.

    Raises:
        ValueError: the weight is a DTensor with another placement than ``Shard(0)`` or ``Replicate()``.
    """
    if not isinstance(weight, DTensor):
        return
    for placement in weight.placements:
        if not (placement.is_replicate() or placement.is_shard(0)):
            raise ValueError(
                f"{name}: placed as {placement}, where a projection needs whole rows, Shard(0) or Replicate(): "
                "shard it by rows (FSDP2's default), or use the adapter mode"
            )


def local(weight: Tensor) -> Tensor:
    """The rows this process holds; the tensor itself where it is not sharded."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


def whole(weight: Tensor) -> Tensor:
    """All rows, gathered from every process; the tensor itself where it is not sharded."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def local_part(full: Tensor, weight: Tensor) -> Tensor:
    """The rows of ``full``, which every process has read, that belong to this process's part of ``weight``."""
    full = full.to(weight.device)
    if not isinstance(weight, DTensor):
        return full
    return distribute_tensor(full, weight.device_mesh, weight.placements, src_data_rank=None).to_local()


def sum_over_parts(value: Tensor, weight: Tensor) -> Tensor:
    """A sum over rows, over all processes that hold rows of ``weight``; in place."""
    if isinstance(weight, DTensor):
        mesh: Any = weight.device_mesh
        for dimension, placement in enumerate(weight.placements):
            if placement.is_shard():
                dist.all_reduce(value, group=mesh.get_group(dimension))
    return value
