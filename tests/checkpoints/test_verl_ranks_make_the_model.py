"""verl's rank files: DTensors, saved by torch, are put together by their placements; what is missing is named.

One process plays every rank in turn (torch's fake process group), which leaves the same files as several do; that
real ranks do is in ``test_weights_of_real_writers.py``.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from checkpoints_on_disk import q_name, save_tensors, small_weights
from geopd.checkpoints import Checkpoint, CheckpointError, checkpoint_digest, holds_weights, open_checkpoint, open_run
from hostile import poisoned

ALONG_ROWS: tuple[Placement, ...] = (Shard(0),)


def local_part(tensor: Tensor, placements: Sequence[Placement], mesh: Sequence[int], rank: int) -> Tensor:
    """A rank's part, cut as DTensor cuts: ceil-sized chunks, the last ones short or empty."""
    for size, placement, place in zip(mesh, placements, torch.unravel_index(torch.tensor(rank), mesh), strict=True):
        if isinstance(placement, Shard):
            parts = tensor.chunk(size, placement.dim)
            empty = parts[0].narrow(placement.dim, 0, 0)
            tensor = parts[place] if place < len(parts) else empty
    return tensor


def save_ranks(
    folder: Path,
    weights: Mapping[str, Tensor],
    mesh: tuple[int, ...],
    placements: Mapping[str, Sequence[Placement]],
    plain: Mapping[str, Tensor] | None = None,
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    world = torch.Size(mesh).numel()
    for rank in range(world):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
        try:
            names = ("ddp", "fsdp")[-len(mesh) :]
            device_mesh = init_device_mesh("cpu", mesh, mesh_dim_names=names)
            state: dict[str, Any] = dict(plain or {})
            for name, tensor in weights.items():
                how = placements.get(name, (*[Replicate()] * (len(mesh) - 1), Shard(0)))
                local = local_part(tensor, how, mesh, rank).clone()
                state[name] = DTensor.from_local(
                    local, device_mesh, how, run_check=False, shape=tensor.shape, stride=tensor.stride()
                )
            torch.save(state, folder / f"model_world_size_{world}_rank_{rank}.pt")
        finally:
            dist.destroy_process_group()
    (folder / "fsdp_config.json").write_text(json.dumps({"FSDP_version": 2, "world_size": world}))
    return folder


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    return str(caught.value)


def assert_same(checkpoint: Checkpoint, weights: Mapping[str, Tensor]) -> None:
    assert (set(checkpoint.tensors), checkpoint.unreadable) == (set(weights), {})
    for name, tensor in weights.items():
        assert torch.equal(checkpoint.read(name), tensor), name
        assert checkpoint.tensors[name].shape == tuple(tensor.shape)
        assert checkpoint.tensors[name].nbytes == tensor.nbytes


MESHES: dict[str, tuple[tuple[int, ...], Sequence[Placement]]] = {
    "even rows": ((2,), (Shard(0),)),
    "uneven rows": ((5,), (Shard(0),)),
    "uneven columns": ((3,), (Shard(1),)),
    "replicated": ((2,), (Replicate(),)),
    "replicas of shards": ((2, 2), (Replicate(), Shard(0))),
    "shards of shards": ((2, 3), (Shard(0), Shard(0))),
    "rows and columns": ((2, 3), (Shard(0), Shard(1))),
}


@pytest.mark.parametrize("case", MESHES)
def test_ranks_give_the_tensors_and_the_digest_of_safetensors(case: str, tmp_path: Path) -> None:
    mesh, how = MESHES[case]
    weights = small_weights()
    matrices = {name: how for name, tensor in weights.items() if tensor.ndim == 2}
    folder = save_ranks(tmp_path / "global_step_4" / "actor", weights, mesh, matrices)
    checkpoint = open_checkpoint(tmp_path / "global_step_4")
    assert checkpoint.format == "verl FSDP"
    assert_same(checkpoint, weights)
    digest = checkpoint_digest(save_tensors(tmp_path / "plain", weights))
    assert checkpoint.digest() == digest
    assert checkpoint_digest(folder) == digest
    assert checkpoint_digest(next(folder.glob("*_rank_0.pt"))) == digest


def test_ranks_left_without_rows_hold_nothing(tmp_path: Path) -> None:
    """Four rows over three ranks: two, two and none."""
    weights = {"a": torch.arange(20.0).reshape(4, 5)}
    assert_same(open_checkpoint(save_ranks(tmp_path / "c", weights, (3,), {})), weights)


def test_a_plain_tensor_is_the_same_on_every_rank(tmp_path: Path) -> None:
    weights = small_weights()
    plain = {"rotary.inv_freq": torch.arange(4.0)}
    folder = save_ranks(tmp_path / "c", weights, (2,), {}, plain)
    assert_same(open_checkpoint(folder), weights | plain)
    second = folder / "model_world_size_2_rank_1.pt"
    torch.save(torch.load(second, weights_only=False) | {"rotary.inv_freq": torch.ones(4)}, second)
    with pytest.raises(CheckpointError, match=r"rank_1\.pt: tensor rotary\.inv_freq: no shard, and not what rank 0"):
        open_checkpoint(folder).read("rotary.inv_freq")


def test_step_folders_with_an_actor_are_a_run(tmp_path: Path) -> None:
    weights = small_weights()
    for step in (10, 20):
        folder = save_ranks(tmp_path / "run" / f"global_step_{step}" / "actor", weights, (2,), {})
        (folder / "huggingface").mkdir()
        (folder / "huggingface" / "config.json").write_text('{"model_type": "qwen3"}')
        torch.save({"epoch": 1}, folder.parent / "data.pt")
    run = open_run(tmp_path / "run")
    assert [step for step, _ in run.checkpoints] == [10, 20]
    assert run.warnings == ()
    assert open_checkpoint(run.checkpoints[0][1]).config["model_type"] == "qwen3"
    assert not holds_weights(tmp_path / "run")


@pytest.fixture
def ranks(tmp_path: Path) -> Path:
    return save_ranks(tmp_path / "actor", small_weights(), (3,), {})


def test_a_missing_rank_is_named(ranks: Path) -> None:
    (ranks / "model_world_size_3_rank_1.pt").unlink()
    assert refusal(ranks) == (
        f"{ranks}: model_world_size_3_rank_1.pt is missing (1 of 3 ranks are); copy every rank's file here"
    )


def test_two_world_sizes_in_one_folder_are_refused(ranks: Path) -> None:
    shutil.copy(ranks / "model_world_size_3_rank_0.pt", ranks / "model_world_size_2_rank_0.pt")
    assert "holds ranks of 2 world sizes (model_world_size_2_rank_0.pt, model_world_size_3_rank_0.pt)" in refusal(ranks)


def test_files_renamed_to_another_world_size_are_refused(ranks: Path) -> None:
    (ranks / "model_world_size_3_rank_2.pt").unlink()
    for rank in range(2):
        (ranks / f"model_world_size_3_rank_{rank}.pt").rename(ranks / f"model_world_size_2_rank_{rank}.pt")
    assert "fsdp_config.json: says world size 3, and the files here are of 2" in refusal(ranks)
    (ranks / "fsdp_config.json").unlink()
    checkpoint = open_checkpoint(ranks)
    assert not checkpoint.tensors
    assert "its mesh (3,) is not that of 2 ranks" in checkpoint.unreadable[q_name()]


def test_ranks_of_two_saves_do_not_make_a_tensor(ranks: Path, tmp_path: Path) -> None:
    weights = small_weights(rows=26) | {"extra": torch.ones(3, 2)}
    other = save_ranks(tmp_path / "other", weights, (3,), {})
    shutil.copy(other / "model_world_size_3_rank_2.pt", ranks / "model_world_size_3_rank_2.pt")
    checkpoint = open_checkpoint(ranks)
    assert "rank_2.pt: its shape, dtype or placement is not that of rank 0" in checkpoint.unreadable[q_name()]
    assert "rank_0.pt: lacks it, and other ranks hold it" in checkpoint.unreadable["extra"]
    assert "model.norm.weight" in checkpoint.tensors


def test_a_sum_in_parts_is_refused(tmp_path: Path) -> None:
    folder = save_ranks(tmp_path / "c", {"a": torch.ones(4, 2)}, (2,), {"a": (Partial(),)})
    assert "placed by torch.distributed.tensor.placement_types.Partial, which is not read" in refusal(folder)


def test_lora_factors_beside_their_base_layers_are_told(tmp_path: Path) -> None:
    weights = {
        "base_model.model.q.base_layer.weight": torch.ones(4, 2),
        "base_model.model.q.lora_A.default.weight": torch.ones(2, 2),
    }
    (warning,) = open_checkpoint(save_ranks(tmp_path / "c", weights, (2,), {})).warnings
    assert "holds LoRA factors beside their base layers, which are read unmerged" in warning


def test_a_malicious_rank_is_not_run(ranks: Path, tmp_path: Path) -> None:
    poisoned(ranks / "model_world_size_3_rank_2.pt", tmp_path / "canary")
    assert "rank_2.pt: its pickle names" in refusal(ranks)
    assert not (tmp_path / "canary").exists()
