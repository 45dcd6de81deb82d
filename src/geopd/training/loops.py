"""Two ways to train: on demonstrations (TRL's SFTTrainer) and on the student's own responses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from datasets import Dataset
from trl import GRPOConfig, SFTConfig, SFTTrainer

from geopd.problems import Demonstration
from geopd.training.checkpoint_schedule import CheckpointSchedule, StepReport
from geopd.training.score_weighted import ScoreWeightedTrainer
from geopd.training.settings import OptimiserSettings, trainer_arguments
from geopd.training.task import Rollouts, VerifiableTask

__all__ = [
    "LogHistory",
    "on_policy_config",
    "supervised_dataset",
    "train_on_policy",
    "train_supervised",
    "verified_reward",
]

P = TypeVar("P")
LogHistory = list[dict[str, float]]

_IGNORED = -100


def supervised_dataset(texts: Sequence[Demonstration], tokenizer: Any, *, mask_prompt: bool) -> Dataset:
    """Token columns ``input_ids`` and ``labels``: prompt, response and end token.

    Args:
        texts: demonstrations.
        tokenizer: adds no tokens of its own; the end token is appended here.
        mask_prompt: whether the loss ignores the prompt (fine-tuning) or includes it (pretraining).
    """
    prompts = tokenizer([text.prompt for text in texts])["input_ids"]
    responses = tokenizer([text.response for text in texts])["input_ids"]
    ids = [[*p, *r, tokenizer.eos_token_id] for p, r in zip(prompts, responses, strict=True)]
    labels = [[_IGNORED] * len(p) + row[len(p) :] if mask_prompt else row for p, row in zip(prompts, ids, strict=True)]
    return Dataset.from_dict({"input_ids": ids, "labels": labels})


def train_supervised(
    model: Any,
    tokenizer: Any,
    texts: Sequence[Demonstration],
    optimiser: OptimiserSettings,
    *,
    batch: int,
    run: Path,
    save_at: Iterable[int],
    seed: int,
    mask_prompt: bool = True,
    report: Callable[[int], None] | None = None,
) -> LogHistory:
    """Cross-entropy training on demonstrations, in the order given.

    The order is kept (no shuffling), so a curriculum is a list. Checkpoints appear in ``run`` at ``save_at``.

    Raises:
        ValueError: there are fewer demonstrations than ``steps * batch``: every step must see new ones.
    """
    needed = optimiser.steps * batch
    if len(texts) < needed:
        raise ValueError(f"{len(texts)} demonstrations for {optimiser.steps} steps of {batch}: pass at least {needed}")
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            **trainer_arguments(optimiser, run, batch, seed),
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
            train_sampling_strategy="sequential",
        ),
        train_dataset=supervised_dataset(texts, tokenizer, mask_prompt=mask_prompt),
        processing_class=tokenizer,
        callbacks=_callbacks(run, save_at, tokenizer, report),
    )
    _without_printing(trainer)
    trainer.train()
    return list(trainer.state.log_history)


def on_policy_config(optimiser: OptimiserSettings, rollouts: Rollouts, *, run: Path, seed: int) -> GRPOConfig:
    """GRPO arguments for one update a rollout: prompts * samples responses at temperature 1, all in one batch.

    ``loss_type="dapo"`` divides by the response tokens of the whole batch over all processes; the clipping range is
    the paper's and inactive, since the ratio is 1 with one update a rollout.
    """
    return GRPOConfig(
        **trainer_arguments(optimiser, run, rollouts.prompts * rollouts.samples, seed),
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


def train_on_policy(
    model: Any,
    tokenizer: Any,
    task: VerifiableTask[P],
    optimiser: OptimiserSettings,
    rollouts: Rollouts,
    *,
    alpha: float,
    teacher: Any = None,
    run: Path,
    save_at: Iterable[int],
    seed: int,
    report: Callable[[int], None] | None = None,
) -> LogHistory:
    """Score-weighted training on the student's own responses; alpha and the teacher choose the paradigm.

    Args:
        model: the student, in fp32.
        tokenizer: shared by student and teacher.
        task: training problems, drawn in a seeded random order.
        optimiser: the optimiser's settings.
        rollouts: responses a step.
        alpha: weight of distillation, in [0, 1].
        teacher: needed when alpha > 0.
        run: checkpoints are written here.
        save_at: optimiser steps to save at.
        seed: of prompt order and sampling.
        report: called with the step after every optimiser step.

    Raises:
        ValueError: two problems share a prompt, or alpha and the teacher do not fit.
    """
    trainer = ScoreWeightedTrainer(
        model=model,
        reward_funcs=verified_reward(task),
        args=on_policy_config(optimiser, rollouts, run=run, seed=seed),
        train_dataset=Dataset.from_dict({"prompt": list(task.by_prompt())}),
        processing_class=tokenizer,
        callbacks=_callbacks(run, save_at, tokenizer, report),
        alpha=alpha,
        teacher=teacher,
    )
    _without_printing(trainer)
    trainer.train()
    return list(trainer.state.log_history)


def verified_reward(task: VerifiableTask[P]) -> Callable[..., list[float]]:
    """The task's verifier as a TRL reward function of (prompts, completions)."""
    problems = task.by_prompt()

    def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        return [task.verifier(problems[text], answer) for text, answer in zip(prompts, completions, strict=True)]

    return reward


def _callbacks(run: Path, save_at: Iterable[int], tokenizer: Any, report: Callable[[int], None] | None) -> list[Any]:
    callbacks: list[Any] = [CheckpointSchedule(run, save_at, tokenizer)]
    return [*callbacks, StepReport(report)] if report else callbacks


def _without_printing(trainer: Any) -> None:
    """Drop the callback that prints each log line; the same figures stay in the trainer's history."""
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
