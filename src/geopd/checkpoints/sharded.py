"""Shards and the index that says which of them holds which tensor, whatever format the shards are in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from geopd.checkpoints.checkpoint import INDEX_BYTES, Checkpoint, CheckpointError, TensorInfo, read_json
from geopd.checkpoints.containment import file_within

_MOST_SHARDS = 10_000  # the largest models have a few hundred


@dataclass(frozen=True, slots=True)
class ShardedSource:
    """Reads each tensor from the shard that holds it."""

    shard_of: dict[str, Checkpoint]

    def read(self, name: str) -> Tensor:
        """The tensor as its shard gives it.

        Raises:
            CheckpointError: as the shard's own source.
        """
        return self.shard_of[name].read(name)


def join_shards(
    index: Path, form: str, pattern: str, config: dict[str, Any], open_shard: Callable[[Path], Checkpoint]
) -> Checkpoint:
    """A checkpoint of the shards an index lists. A shard that cannot be read makes its own tensors unreadable.

    ``form`` is the checkpoint's format; files that match ``pattern`` and are not listed are told in a warning.

    Raises:
        CheckpointError: if the index is no index, names a file outside its folder, or no shard can be read.
    """
    weight_map = read_json(index, INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map; write or download the index again")
    if not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{index}: its weight_map names something that is no file; write or download it again")
    if (count := len(set(weight_map.values()))) > _MOST_SHARDS:
        raise CheckpointError(f"{index}: names {count:,} shards, at most {_MOST_SHARDS:,} are looked for; refused")
    folder = index.parent
    shards: dict[str, Checkpoint] = {}
    broken: dict[str, str] = {}
    for shard in sorted({str(name) for name in weight_map.values()}):
        file = file_within(folder, shard, index)
        if not file.is_file():
            broken[shard] = f"{file}: {index.name} names it and it is absent; download or write it again"
            continue
        try:
            shards[shard] = open_shard(file)
        except CheckpointError as error:
            broken[shard] = str(error)
    if not shards:
        raise CheckpointError(next(iter(broken.values())) + f" (and {len(broken) - 1} more shards)")
    tensors: dict[str, TensorInfo] = {}
    unreadable: dict[str, str] = {}
    for name, shard in weight_map.items():
        if shard in broken:
            unreadable[name] = broken[shard]
        elif name in shards[shard].tensors:
            tensors[name] = shards[shard].tensors[name]
        else:
            lost = f"{folder / shard}: the index says it is here and it is not; write the checkpoint again"
            unreadable[name] = shards[shard].unreadable.get(name, lost)
    warnings = [*_strays(folder, pattern, set(shards) | set(broken))]
    warnings += _doubles(folder, weight_map, shards)
    warnings += [warning for shard in shards.values() for warning in shard.warnings]
    source = ShardedSource({name: shards[weight_map[name]] for name in tensors})
    return Checkpoint(folder, form, tensors, source, unreadable, config, tuple(warnings))


def _doubles(folder: Path, weight_map: dict[str, str], shards: dict[str, Checkpoint]) -> list[str]:
    """What is said of tensors that lie in another shard too than the index takes them from."""
    told = []
    for shard, opened in shards.items():
        doubled = sorted(name for name in opened.tensors if weight_map.get(name, shard) != shard)
        if doubled:
            more = f" (and {len(doubled) - 1} more such)" if len(doubled) > 1 else ""
            first = doubled[0]
            told.append(f"{folder / shard}: also holds {first}, which the index takes from {weight_map[first]}{more}")
    return told


def _strays(folder: Path, pattern: str, listed: set[str]) -> tuple[str, ...]:
    stray = sorted(path.name for path in folder.glob(pattern) if path.name not in listed)
    return (f"{folder}: {', '.join(stray)} not in the index: ignored",) if stray else ()
