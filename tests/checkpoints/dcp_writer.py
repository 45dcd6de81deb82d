"""Writes a model as torch distributed checkpoints do, on several gloo processes: ``MODEL OUT WORLD KIND``.

KIND ``torchtitan``: FSDP2 weights, optimiser and train state in one ``dcp.save``; ``accelerate``: accelerate's own
sharded save of an FSDP2 model and its optimiser; ``mesh``: DTensors cut along rows and columns of a 2 x 2 mesh.
"""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.multiprocessing.spawn import spawn


def write(rank: int, world: int, port: int, model_path: str, out: str, kind: str) -> None:
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype="auto")
    {"torchtitan": torchtitan, "accelerate": accelerate, "mesh": mesh}[kind](model, Path(out), world)
    if rank == 0:
        model.config.save_pretrained(out)
    dist.destroy_process_group()


def sharded(model: Any, world: int) -> torch.optim.Optimizer:
    from torch.distributed.fsdp import fully_shard

    devices = init_device_mesh("cpu", (world,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=devices)
    fully_shard(model, mesh=devices)
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.0)  # its state is made, and the weights stay as they are
    model(torch.tensor([[1, 2, 3]])).logits.sum().backward()
    optimiser.step()
    return optimiser


def torchtitan(model: Any, out: Path, world: int) -> None:
    optimiser = sharded(model, world)
    weights = get_model_state_dict(model)
    state = {"optimizer": get_optimizer_state_dict(model, optimiser), "train_state": {"step": torch.tensor(3)}}
    dcp.save(weights | state | {"lr_scheduler": {"last_epoch": 3}}, checkpoint_id=out)


def accelerate(model: Any, out: Path, world: int) -> None:
    from types import SimpleNamespace

    from accelerate import PartialState
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import save_fsdp_model, save_fsdp_optimizer

    PartialState(cpu=True)  # what accelerate's own messages ask for
    optimiser = sharded(model, world)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="SHARDED_STATE_DICT", cpu_offload=False)
    process = SimpleNamespace(
        is_fsdp2=True,
        num_processes=world,
        process_index=dist.get_rank(),
        wait_for_everyone=dist.barrier,
        is_composable_parallelism_enabled=False,
        is_main_process=dist.get_rank() == 0,
    )
    save_fsdp_model(plugin, process, model, str(out))
    save_fsdp_optimizer(plugin, process, optimiser, model, str(out))


def mesh(model: Any, out: Path, world: int) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    devices = init_device_mesh("cpu", (2, world // 2))
    state = {}
    for name, value in model.state_dict().items():
        placements = (Shard(0), Shard(1)) if value.ndim == 2 else (Shard(0), Shard(0))
        state[name] = distribute_tensor(value, devices, placements)
    dcp.save({"app": {"model": state}}, checkpoint_id=out)


def main() -> None:
    model, out, world, kind = sys.argv[1:]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(write, args=(int(world), port, model, out, kind), nprocs=int(world))


if __name__ == "__main__":
    main()
