"""A kilobyte of objects that hold one another twice, 50 deep, wherever a reader would hash, print or compare them."""

from __future__ import annotations

import collections
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec

from hostile import distributed, rewrite_metadata, told_within, torch_zip


class Made:
    """Pickles as the call of a function, and the state of what it makes."""

    def __init__(self, function: object, *args: object, state: object = None) -> None:
        self.reduced = (function, args, state)

    def __reduce__(self) -> Any:
        return self.reduced if self.reduced[2] is not None else self.reduced[:2]


class Held:
    """A storage of four floats."""


class _Pickler(pickle._Pickler):
    def persistent_id(self, held: object) -> object:
        return ("storage", torch.FloatStorage, "0", "cpu", 4) if isinstance(held, Held) else None


def pickled(value: object) -> bytes:
    made = io.BytesIO()
    _Pickler(made, protocol=2).dump(value)
    return made.getvalue()


def zipped(value: object) -> bytes:
    return torch_zip(pickled(value), {"data/0": bytes(16)})


def tuples() -> tuple[object, ...]:
    held: tuple[object, ...] = ()
    for _ in range(50):
        held = (held, held)
    return held


def lists() -> list[object]:
    held: list[object] = []
    for _ in range(50):
        held = [held, held]
    return held


def tensor(**changed: object) -> Made:
    dtype = changed.get("dtype", torch.float32)
    return Made(torch._utils._rebuild_tensor_v3, Held(), 0, (2, 2), (2, 1), False, Made(collections.OrderedDict), dtype)


def in_bin(value: object) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / "pytorch_model.bin").write_bytes(zipped(value))
        return folder

    return write


def in_optimiser(**state: object) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        model, optimiser = {"module": {}, "param_shapes": [{}]}, {"optimizer_state_dict": state}
        (folder / "mp_rank_00_model_states.pt").write_bytes(zipped(model))
        (folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(zipped(optimiser))
        return folder

    return write


def in_index(**state: object) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        index = Made(MetadataIndex, state={"fqn": "w", "offset": (0,), "index": None} | state)
        held = {"state_dict_metadata": {}, "storage_data": {index: None}}
        (folder / ".metadata").write_bytes(pickled(Made(Metadata, state=held)))
        return folder

    return write


def in_transforms(folder: Path) -> Path:
    def transform(metadata: Any) -> None:
        for place in metadata.storage_data.values():
            place.transform_descriptors = lists()

    distributed(folder / "c", {"w": torch.ones(4)})
    rewrite_metadata(folder / "c", transform)
    return folder / "c"


def in_rank(dim: object = 0, shape: object = (2, 2), mesh: object = (1,)) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        layout = Made(torch.device, "cpu", state={"shape": mesh})
        state = {"mesh": Made(DeviceMesh, state={"_layout": layout}), "placements": (Made(Shard, state={"dim": dim}),)}
        attributes = {"_spec": Made(DTensorSpec, state=state), "_local_tensor": tensor()}
        args = (torch._utils._rebuild_wrapper_subclass, DTensor, (DTensor, torch.float32, shape), attributes)
        value = {"w": Made(torch._tensor._rebuild_from_type_v2, *args)}
        (folder / "model_world_size_1_rank_0.pt").write_bytes(zipped(value))
        return folder

    return write


ATTACKS: dict[str, Callable[[Path], Path]] = {
    "a key of an OrderedDict": in_bin(Made(collections.OrderedDict, [[lists(), 1]])),
    "a dtype": in_bin({"w": tensor(dtype=tuples())}),
    "an object as a key": in_bin({Made(torch.device, lists()): 1}),
    "a partition count": in_optimiser(partition_count=lists()),
    "a stage": in_optimiser(partition_count=1, zero_stage=tuples()),
    "a tensor's name in a listing": in_index(fqn=tuples()),
    "an offset in a listing": in_index(offset=tuples()),
    "a chunk's transforms": in_transforms,
    "the dimension of a cut": in_rank(dim=lists()),
    "the shape of a sharded tensor": in_rank(shape=tuples()),
    "the shape of a mesh": in_rank(mesh=tuples()),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_objects_shared_without_end_are_refused_at_once(attack: str, tmp_path: Path) -> None:
    path = ATTACKS[attack](tmp_path)
    said = told_within(5, path)
    assert said.startswith(str(path))
    assert any(word in said for word in ("refused", "again"))


def test_the_rank_file_without_the_attack_is_read(tmp_path: Path) -> None:
    assert told_within(5, in_rank()(tmp_path)) == ""


WRONG_SIZES = {"negative": (-2, -2), "a float": (2.0, 2), "too large by a list": (10**9, [0]), "a dict": ({}, 4)}


@pytest.mark.parametrize("shape", WRONG_SIZES.values(), ids=WRONG_SIZES)
@pytest.mark.parametrize("where", ["shape", "mesh"])
def test_a_shape_of_anything_but_sizes_is_refused(where: str, shape: object, tmp_path: Path) -> None:
    said = told_within(5, in_rank(**{where: shape})(tmp_path))
    assert "model_world_size_1_rank_0.pt: not a readable pickle (a shape, stride or offset that is no" in said
