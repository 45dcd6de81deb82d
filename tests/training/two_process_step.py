"""Run under torchrun by test_two_processes.py: a few plain gradient steps on fixed responses of unequal length.

two_process_step.py FOLDER OBJECTIVE(json) PROCESSES ACCUMULATION
"""

import json
import os
import sys
import warnings
from pathlib import Path

from datasets import Dataset
from safetensors.torch import save_file

from geopd.problems import character_tokenizer
from geopd.training import OptimiserSettings, Rollouts, ScoreWeightedTrainer, build_model, on_policy_config
from geopd.training.objective import Objective
from geopd.training.teacher import ModelTeacher
from tiny_on_policy import LENGTH, SHAPE, UNEQUAL, FixedResponses, reward

RESPONSES, GROUP = 8, 2


class Trainer(FixedResponses, ScoreWeightedTrainer):
    pass


def main() -> None:
    folder, objective = Path(sys.argv[1]), Objective(**json.loads(sys.argv[2]))
    processes, accumulation = int(sys.argv[3]), int(sys.argv[4])
    tokenizer = character_tokenizer()
    args = on_policy_config(
        OptimiserSettings(2, 0.5, warmup_steps=0, weight_decay=0.0, clip_norm=1e9),
        Rollouts(RESPONSES // GROUP // processes // accumulation, GROUP, LENGTH),
        run=folder,
        seed=3,
    )
    args.optim = "sgd"
    args.logging_steps = 1
    args.gradient_accumulation_steps = args.steps_per_generation = accumulation
    args.generation_batch_size = RESPONSES
    trainer = Trainer(
        model=build_model(SHAPE, tokenizer, 0),
        reward_funcs=reward,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": UNEQUAL}),
        processing_class=tokenizer,
        objective=objective,
        teacher=ModelTeacher(build_model(SHAPE, tokenizer, 1)) if objective.needs_teacher else None,
    )
    assert trainer.accelerator.num_processes == processes
    trainer.train()
    if trainer.accelerator.is_main_process:
        model = trainer.accelerator.unwrap_model(trainer.model)
        save_file({name: value.detach().clone() for name, value in model.named_parameters()}, folder / "end")
        (folder / "log.json").write_text(json.dumps(trainer.state.log_history))
    trainer.accelerator.wait_for_everyone()
    # All is written. Taking gloo's threads down in order can wait for ever on the process that left first.
    os._exit(0)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
