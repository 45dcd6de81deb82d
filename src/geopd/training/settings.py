"""Optimiser settings shared by every stage, and their translation into TRL arguments."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trl import GRPOConfig

    from geopd.training.task import Rollouts

__all__ = ["OptimiserSettings", "on_policy_config", "trainer_arguments"]

_SCHEDULES = ("constant", "cosine", "cosine_to_tenth")


@dataclass(frozen=True, slots=True)
class OptimiserSettings:
    """AdamW and its learning-rate schedule.

    Args:
        steps: optimiser steps.
        learning_rate: peak learning rate.
        schedule: ``constant``, ``cosine`` (to zero) or ``cosine_to_tenth`` (to a tenth of the peak), behind a linear
            warm-up.
        warmup_steps: steps of the linear warm-up.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        epsilon: added to Adam's denominator. One value for every paradigm: with tiny gradients it decides the step
            size, so differing values confound a comparison.
        weight_decay: decoupled weight decay.
        clip_norm: gradients above this norm are scaled down to it.

    Raises:
        ValueError: a setting is out of range.
    """

    steps: int
    learning_rate: float
    schedule: str = "constant"
    warmup_steps: int = 10
    beta1: float = 0.9
    beta2: float = 0.98
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        if self.schedule not in _SCHEDULES:
            raise ValueError(f"schedule {self.schedule!r} is unknown: use one of {', '.join(_SCHEDULES)}")
        if self.steps < 1 or not self.learning_rate > 0:
            raise ValueError(f"steps={self.steps}, learning_rate={self.learning_rate}: both must be positive")


def trainer_arguments(optimiser: OptimiserSettings, run: Path, batch: int, seed: int) -> dict[str, Any]:
    """Keyword arguments common to SFTConfig and GRPOConfig, and keys of ``geopd train``: fp32, no logging service.

    Args:
        optimiser: the optimiser's settings.
        run: the run folder.
        batch: sequences a device and step.
        seed: of data order, sampling and dropout.
    """
    import torch

    schedules: dict[str, dict[str, Any]] = {
        "constant": {"lr_scheduler_type": "constant_with_warmup"},
        "cosine": {"lr_scheduler_type": "cosine"},
        "cosine_to_tenth": {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
    }
    return {
        "output_dir": str(run),
        "max_steps": optimiser.steps,
        "learning_rate": optimiser.learning_rate,
        "warmup_steps": optimiser.warmup_steps,
        "adam_beta1": optimiser.beta1,
        "adam_beta2": optimiser.beta2,
        "adam_epsilon": optimiser.epsilon,
        "weight_decay": optimiser.weight_decay,
        "max_grad_norm": optimiser.clip_norm,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": 1,
        "seed": seed,
        "use_cpu": not torch.cuda.is_available(),
        # fp32 throughout: the study's checkpoints are the master weights.
        "bf16": False,
        "activation_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 10,
        "dataloader_pin_memory": False,
        **schedules[optimiser.schedule],
    }


def on_policy_config(optimiser: OptimiserSettings, rollouts: Rollouts, *, run: Path, seed: int) -> GRPOConfig:
    """GRPO arguments for one update a rollout: prompts * samples responses at temperature 1, all in one batch.

    ``loss_type="dapo"`` divides by the response tokens of the whole batch over all processes; the clipping range is
    the paper's and inactive, since the ratio is 1 with one update a rollout. Nothing is saved.
    """
    from trl import GRPOConfig

    return GRPOConfig(
        **trainer_arguments(optimiser, run, rollouts.prompts * rollouts.samples, seed),
        save_strategy="no",
        num_generations=rollouts.samples,
        steps_per_generation=1,
        num_iterations=1,
        max_completion_length=rollouts.max_new_tokens,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        beta=0.0,
        epsilon=0.2,
        epsilon_high=0.28,
        loss_type="dapo",
        scale_rewards="group",
    )
