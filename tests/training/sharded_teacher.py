"""Run under torchrun by test_two_processes.py: a teacher sharded like its student scores and writes as a whole one.

sharded_teacher.py FOLDER
"""

import json
import os
import sys
import warnings
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import GenerationConfig

from geopd.problems import character_tokenizer
from geopd.training import build_model
from geopd.training.teacher import ModelTeacher
from tiny_on_policy import SHAPE


def main() -> None:
    folder = Path(sys.argv[1])
    accelerator = Accelerator(cpu=True)
    tokenizer = character_tokenizer()
    model = build_model(SHAPE, tokenizer, 1)
    # accelerate turns FSDP on the CPU into DDP, so the plugin is set behind its back.
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, reshard_after_forward=True)
    teacher = ModelTeacher(model)
    teacher.prepare(accelerator, temperature=0.9, batch_size=2)
    assert all(isinstance(value, DTensor) for value in teacher.model.parameters())
    generator = torch.Generator().manual_seed(accelerator.process_index)
    prompts = torch.randint(0, 20, (4, 5), generator=generator)
    answers = torch.randint(0, 20, (4, 6), generator=generator)
    found = teacher.token_logps(prompts, torch.ones_like(prompts), answers, torch.ones_like(answers), 0.9)
    settings = GenerationConfig(
        max_new_tokens=2 + 4 * accelerator.process_index,  # sharded forwards must stay in step none the less
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    written = teacher.generate(prompts.tolist(), settings, torch.device("cpu"))
    rank = accelerator.process_index
    save_file({"prompts": prompts, "answers": answers, "logps": found}, folder / f"scores{rank}")
    (folder / f"written{rank}.json").write_text(json.dumps(written))
    accelerator.wait_for_everyone()
    # All is written. Taking gloo's threads down in order can wait for ever on the process that left first.
    os._exit(0)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
