"""Run under torchrun by test_train_sharded.py: save and evaluate a model whose every parameter is sharded (FSDP2).

sharded_run.py FOLDER full|lora|tied
"""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate import Accelerator
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from geopd.problems import character_tokenizer, distinct_problems, verify
from geopd.training import CheckpointSchedule, VerifiableTask, accuracy, build_model
from tiny_runs import SHAPE


def main() -> None:
    folder, lora, tied = Path(sys.argv[1]), sys.argv[2] == "lora", sys.argv[2] == "tied"
    tokenizer, accelerator = character_tokenizer(), Accelerator(cpu=True)
    model = build_model(SHAPE, tokenizer, 0)
    with torch.no_grad():
        model.lm_head.weight.mul_(40)  # sharper than at initialisation, so that responses differ in length
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    if lora:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)  # the same adapter on both processes
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        if accelerator.is_main_process:
            torch.save(model.state_dict(), folder / "state.pt")
    mesh = init_device_mesh("cpu", (2,))
    inner = model.get_base_model() if lora else model
    for layer in inner.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(value, DTensor) for value in model.parameters())
    trainer = SimpleNamespace(
        accelerator=accelerator,
        model=model,
        model_wrapped=model,
        is_fsdp_enabled=False,
        is_deepspeed_enabled=False,
        add_callback=lambda _: None,
    )
    schedule = CheckpointSchedule(folder, [3], tokenizer)
    schedule.attach(trainer)
    state = SimpleNamespace(global_step=3, is_world_process_zero=accelerator.is_main_process)
    schedule.on_step_end(None, state, None, model=model)
    if not (lora or tied):
        # 5 problems for 2 processes: one is decoded twice and counted once
        task = VerifiableTask(distinct_problems("selection", 5, 0), lambda p: p.prompt.strip(), judged)
        value = accuracy(
            model,
            tokenizer,
            task,
            temperature=0.0,
            max_new_tokens=10,
            seed=0,
            prompts_a_batch=2,
            accelerator=accelerator,
        )
        if accelerator.is_main_process:
            (folder / "accuracy.json").write_text(json.dumps(value))
    accelerator.wait_for_everyone()
    os._exit(0)  # all is written; taking gloo's threads down in order can wait for ever


def judged(problem, text) -> float:
    """A verdict that an untrained model earns sometimes."""
    return max(verify(problem, text), float(sum(map(ord, text)) % 2))


if __name__ == "__main__":
    main()
