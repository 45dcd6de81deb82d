"""Writes the fixtures under ``golden/``: checkpoints of DeepSpeed itself, on two gloo processes.

DeepSpeed is no dependency of the tests. To write them again: install deepspeed 0.19.8 in an environment of its own
(``DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed==0.19.8`` beside torch), and there
``DS_ACCELERATOR=cpu python tests/checkpoints/deepspeed_writer.py OUT``. For each ZeRO stage it leaves the checkpoint
folder (without the conversion scripts that DeepSpeed adds) and ``masters.safetensors``, what DeepSpeed's own
conversion to fp32 makes of it. Stages 1 and 3 train in bf16, stage 2 in fp32.
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

WORLD = 2
STAGES = {1: "bf16", 2: "fp32", 3: "bf16"}


class Tiny(nn.Module):
    """Odd sizes (parts are padded), a buffer, a frozen weight, tied weights, and two groups of parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.first = nn.Linear(5, 3)
        self.frozen = nn.Linear(3, 3, bias=False).requires_grad_(False)
        self.second = nn.Linear(3, 5, bias=False)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.tensor([0.5, 2.0, 1.0]))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(self.embed(tokens))) * self.scale.to(self.first.weight.dtype)
        return self.head(self.second(self.frozen(hidden))).float().square().mean()


def write(rank: int, port: int, stage: int, out: str) -> None:
    import deepspeed

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(WORLD), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo")
    torch.manual_seed(0)
    model = Tiny()
    decayed = [model.embed.weight, model.first.weight, model.second.weight]
    optimiser = torch.optim.AdamW([{"params": decayed}, {"params": [model.first.bias], "weight_decay": 0.0}], lr=0.1)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimiser,
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": STAGES[stage] == "bf16"},
        },
    )
    for step in range(2):
        engine.backward(engine(torch.tensor([[rank, 1 + step, 2]])))
        engine.step()
    engine.save_checkpoint(out, tag="global_step2")
    torch.distributed.destroy_process_group()


def main() -> None:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
    from safetensors.torch import save_file

    for stage in STAGES:
        out = Path(sys.argv[1]) / f"zero{stage}"
        shutil.rmtree(out, ignore_errors=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        spawn(write, args=(port, stage, str(out)), nprocs=WORLD)
        state = get_fp32_state_dict_from_zero_checkpoint(str(out))
        save_file({name: tensor.detach().clone() for name, tensor in state.items()}, out / "masters.safetensors")
        for script in out.glob("*.py"):
            script.unlink()


if __name__ == "__main__":
    main()
