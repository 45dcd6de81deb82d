"""Writes a model's weights as verl's FSDP checkpoint manager does, on gloo processes: ``MODEL OUT WORLD KIND``.

KIND ``fsdp2``: ``fully_shard`` and ``state_dict()``; ``fsdp1``: the sharded state dict on a device mesh; ``hsdp``:
FSDP2 on a mesh of two replicas.
"""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.multiprocessing.spawn import spawn


def write(rank: int, world: int, port: int, model_path: str, out: str, kind: str) -> None:
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype="auto")
    actor = Path(out) / "actor"
    actor.mkdir(parents=True, exist_ok=True)
    if kind == "fsdp1":
        state = sharded_by_fsdp1(model, world)
    else:
        from torch.distributed.fsdp import fully_shard

        shape, names = ((2, world // 2), ("ddp", "fsdp")) if kind == "hsdp" else ((world,), ("fsdp",))
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        state = fully_shard(model, mesh=mesh).state_dict()
    torch.save(state, actor / f"model_world_size_{world}_rank_{rank}.pt")
    if rank == 0:
        version = 1 if kind == "fsdp1" else 2
        (actor / "fsdp_config.json").write_text(json.dumps({"FSDP_version": version, "world_size": world}))
        model.config.save_pretrained(actor / "huggingface")
    dist.destroy_process_group()


def sharded_by_fsdp1(model: torch.nn.Module, world: int) -> dict[str, object]:
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardedStateDictConfig, StateDictType

    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("fsdp",))
    wrapped = FullyShardedDataParallel(model, device_mesh=mesh, device_id=torch.device("cpu"), use_orig_params=False)
    with FullyShardedDataParallel.state_dict_type(
        wrapped, StateDictType.SHARDED_STATE_DICT, ShardedStateDictConfig(offload_to_cpu=True)
    ):
        return wrapped.state_dict()


def main() -> None:
    model, out, world, kind = sys.argv[1:]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(write, args=(int(world), port, model, out, kind), nprocs=int(world))


if __name__ == "__main__":
    main()
