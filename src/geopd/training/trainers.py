"""From a configuration and what it names to the TRL trainer that does it."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import torch
from datasets import Dataset
from trl import DistillationConfig, DistillationTrainer, GRPOConfig, SFTTrainer, get_peft_config

from geopd.training.config import TrainConfig
from geopd.training.score_weighted import ScoreWeightedTrainer
from geopd.training.score_weighted_arguments import check_temperature
from geopd.training.teacher import ModelTeacher, Teacher
from geopd.training.trl_arguments import OnPolicyArguments

__all__ = ["DIVERGENCE_BETAS", "build_trainer", "distillation_arguments", "refuse_fsdp_on_cpu", "unrewarded"]

DIVERGENCE_BETAS = {"reverse_kl": 1.0, "forward_kl": 0.0, "jsd": 0.5}
"""TRL's interpolation coefficient: 0 is KL(teacher || student), 1 is KL(student || teacher)."""

_GROUPED_ONLY = {"num_generations", "generation_batch_size", "steps_per_generation"}


def build_trainer(
    config: TrainConfig,
    *,
    model: Any,
    tokenizer: Any,
    dataset: Dataset,
    rewards: list[Any],
    teacher: Teacher | None,
    callbacks: list[Any],
) -> Any:
    """The trainer of a configuration; nothing runs yet.

    Args:
        config: its settings.
        model: the student, prepared for a projection if there is one.
        tokenizer: the student's.
        dataset: prompts or demonstrations.
        rewards: reward functions; may be empty for opd.
        teacher: what the objective needs.
        callbacks: added to the trainer's own.

    Raises:
        ValueError: the settings do not fit each other, or this machine.
    """
    refuse_fsdp_on_cpu(config.training)
    common = {
        "model": model,
        "train_dataset": dataset,
        "processing_class": tokenizer,
        "callbacks": callbacks,
        "peft_config": get_peft_config(config.model),
    }
    if config.paradigm == "sft":
        return SFTTrainer(args=config.training, **common)
    if config.divergence != "sampled":
        assert isinstance(teacher, ModelTeacher)  # the configuration has seen to it
        return DistillationTrainer(args=distillation_arguments(config), teacher_model=teacher.model, **common)
    return ScoreWeightedTrainer(
        args=config.training,
        reward_funcs=rewards or [unrewarded],
        objective=config.objective,
        teacher=teacher,
        **common,
    )


def unrewarded(completions: list[Any], **_: Any) -> list[float]:
    """The reward of pure distillation without a verifier: 0, at weight 0. GRPO wants some reward to log."""
    return [0.0] * len(completions)


def distillation_arguments(config: TrainConfig) -> DistillationConfig:
    """The same settings for TRL's DistillationTrainer.

    Raises:
        ValueError: a setting of GRPO's was changed that this trainer does not have, the temperature is not positive, or
            a rollout would span several updates.
    """
    training = config.training
    assert isinstance(training, OnPolicyArguments)
    check_temperature(training)
    if training.steps_per_generation != training.gradient_accumulation_steps:
        raise ValueError(
            f"divergence={config.divergence} samples anew for every update: leave steps_per_generation and "
            "generation_batch_size out"
        )
    known = {field.name for field in dataclasses.fields(DistillationConfig) if field.init}
    ours = {field.name: field for field in dataclasses.fields(OnPolicyArguments)}
    theirs = {field.name for field in dataclasses.fields(GRPOConfig)}
    for name in sorted(theirs - known - _GROUPED_ONLY):
        default = ours[name].default
        if getattr(training, name) != default and name != "scale_rewards":
            raise ValueError(f"{name} belongs to the score-weighted loss: leave it out, or set divergence to sampled")
    values = {name: getattr(training, name) for name in ours if name in known and name != "gradient_checkpointing"}
    return DistillationConfig(**values | {"beta": DIVERGENCE_BETAS[config.divergence], "gradient_checkpointing": None})


def refuse_fsdp_on_cpu(training: Any) -> None:
    """Refuse an FSDP setting on CPU, where the Trainer would replicate the model and say nothing.

    Raises:
        ValueError: it is asked for there.
    """
    asked = bool(training.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true")
    if asked and torch.device(training.device).type == "cpu":
        raise ValueError("fsdp on CPU is replaced by plain replication without a word: leave it out, or train on GPUs")
