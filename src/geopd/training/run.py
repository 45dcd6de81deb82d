"""One training run from its configuration: resolve, train or go on, and leave a run that the rest of geopd can read.

The folder holds ``checkpoint-<step>`` (full weights), ``run.json`` (settings and origin), ``evaluations.json``,
``training_log.json`` once the run has ended, and ``resume/`` until then.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets import Dataset

from geopd.checkpoints import write_whole
from geopd.training.checkpoint_schedule import CheckpointSchedule, check_mergeable
from geopd.training.components import (
    check_config_teacher,
    load_rewards,
    load_rows,
    load_student,
    load_student_tokenizer,
    load_teacher,
    projection_of,
    student_on_meta,
    teacher_size,
)
from geopd.training.config import TrainConfig
from geopd.training.health import TrainingHealth
from geopd.training.planning import TrainPlan, checkpoint_steps, ignored_settings, make_plan, total_updates
from geopd.training.progress import TrainingProgress
from geopd.training.projection import Projection
from geopd.training.resume import (
    ResumePointAtStop,
    discard_resume_points,
    keep_resume_points,
    last_resume_point,
    resume_interval,
)
from geopd.training.run_folder import look_at_folder
from geopd.training.run_record import LOG_FILE, origin_of, settings_of, write_record
from geopd.training.trainers import build_trainer, distillation_arguments, refuse_fsdp_on_cpu
from geopd.training.trl_arguments import OnPolicyArguments
from geopd.training.watching import PlannedEvaluation, check_watched, evaluation_of, monitor_of

__all__ = ["RunOutcome", "plan_run", "train"]

_LOGGER = logging.getLogger(__name__)
_PROMPTS_LOOKED_AT = 256


@dataclass(frozen=True)
class RunOutcome:
    """How a call of :func:`train` went.

    Args:
        run: the run's folder.
        updates: optimiser steps of the whole run; fewer than planned where an alarm ended it.
        resumed_from: the step this call went on from; 0 for the start, ``updates`` where nothing was left to do.
        history: the trainer's log.
        planned: optimiser steps it was to take.
    """

    run: Path
    updates: int
    resumed_from: int
    history: list[dict[str, float]]
    planned: int


def plan_run(config: TrainConfig, processes: int | None = None) -> TrainPlan:
    """Resolve a configuration as far as it goes without weights, and say what it would do.

    Args:
        config: its settings.
        processes: devices to plan for; those of this launch when None.

    Raises:
        ValueError: something does not exist or does not fit.
    """
    refuse_fsdp_on_cpu(config.training)
    tokenizer = load_student_tokenizer(config)
    dataset = load_rows(config)
    processes = processes or config.training.world_size
    folder = look_at_folder(config, settings_of(config, dataset, processes))
    evaluation_of(config, load_rewards(config))
    size, model = student_on_meta(config)
    check_config_teacher(config, tokenizer, model.config.get_text_config().vocab_size)
    if hasattr(model, "peft_config"):
        check_mergeable(model)
    if (monitor := monitor_of(config, fetched=False)) is not None:
        check_watched(monitor, model)
    if config.run.projection is not None:
        projection_of(config).check(config.training)
    if config.divergence != "sampled":
        distillation_arguments(config)
    plan = make_plan(
        config,
        model=size,
        teacher=teacher_size(config),
        rows=len(dataset),
        sequence=_longest_sequence(config, tokenizer, dataset),
        processes=processes,
    )
    notes = []
    if folder.ended is not None:
        notes.append(f"{config.training.output_dir} holds this run, ended at step {folder.ended[-1]['step']}")
    elif folder.begun:
        notes.append(f"{config.training.output_dir} holds this run, interrupted: it would go on")
    if config.run.monitor is not None and monitor is None:
        notes.append(
            "the student is not on this machine yet: whether the monitor fits it is checked once it has been fetched"
        )
    return replace(plan, notes=(*plan.notes, *notes))


def train(
    config: TrainConfig,
    *,
    model: Any = None,
    tokenizer: Any = None,
    dataset: Dataset | None = None,
    rewards: list[Any] | None = None,
    callbacks: Sequence[Any] = (),
    quiet: bool = False,
) -> RunOutcome:
    """Train, or go on where an interrupted call with the same settings stopped.

    Args:
        config: the run's settings; what follows replaces what they name.
        model: the student.
        tokenizer: the student's.
        dataset: prompts or demonstrations in TRL's columns.
        rewards: TRL reward functions.
        callbacks: more callbacks of the Trainer.
        quiet: do not print the log.

    Raises:
        ValueError: something does not exist or does not fit, or the folder holds another run or other weights.
        OSError: a checkpoint or resume point cannot be written.
    """
    refuse_fsdp_on_cpu(config.training)
    run = Path(config.training.output_dir)
    tokenizer = tokenizer if tokenizer is not None else load_student_tokenizer(config)
    dataset = dataset if dataset is not None else load_rows(config)
    rewards = rewards if rewards is not None else load_rewards(config)
    updates = total_updates(config, len(dataset), config.training.world_size)
    settings = settings_of(config, dataset, config.training.world_size)
    folder = look_at_folder(config, settings)
    if folder.ended is not None:
        step = int(folder.ended[-1]["step"])
        return RunOutcome(run, step, step, folder.ended, folder.planned)
    point = last_resume_point(run, config.training) if folder.begun else None
    config, steps = _with_resume_points(config), checkpoint_steps(config, updates)
    evaluation = evaluation_of(config, rewards)
    if (monitor := monitor_of(config, fetched=model is not None)) is not None and model is None:
        check_watched(monitor, student_on_meta(config)[1])
    for note in ignored_settings(config) if config.training.process_index == 0 else ():
        _LOGGER.warning(note)
    model = model if model is not None else load_student(config)
    check_config_teacher(config, tokenizer, model.config.get_text_config().vocab_size)
    projection = projection_of(config) if config.run.projection is not None else None
    if projection is not None:
        projection.check(config.training)
        model = projection.prepare(model)
    trainer = build_trainer(
        config,
        model=model,
        tokenizer=tokenizer,
        dataset=dataset,
        rewards=rewards,
        teacher=load_teacher(config),
        callbacks=list(callbacks),
    )
    student = trainer.accelerator.unwrap_model(trainer.model)
    if hasattr(student, "peft_config"):
        check_mergeable(student)
    CheckpointSchedule(run, steps, trainer.processing_class, replace=folder.begun).attach(trainer)
    _watch(trainer, config, run, steps, evaluation, projection)
    TrainingProgress.replace(trainer, quiet=quiet)
    keep_resume_points(trainer, run, point)
    _run(trainer, config, run, settings, point, projection)
    state = trainer.state
    return RunOutcome(run, int(state.global_step), _step_of(point), list(state.log_history), int(state.max_steps))


def _run(
    trainer: Any,
    config: TrainConfig,
    run: Path,
    settings: dict[str, Any],
    point: Path | None,
    projection: Projection | None,
) -> None:
    """Train, between the first and the last word of ``run.json``."""
    first = trainer.accelerator.is_main_process
    origin = origin_of(config, run) if first else None
    trainer.accelerator.wait_for_everyone()  # behind every process's look at the folder
    if first:
        run.mkdir(parents=True, exist_ok=True)
        (run / LOG_FILE).unlink(missing_ok=True)  # of an end that an alarm made, which this call goes on from
        write_record(config, run, origin, settings)
    trainer.train(resume_from_checkpoint=str(point) if point is not None else None)
    if projection is not None:
        settings = settings | {"projection_record": projection.record(trainer.model)}
    if first:
        write_record(config, run, origin, settings | {"planned_updates": int(trainer.state.max_steps)})
        write_whole(run / LOG_FILE, json.dumps(trainer.state.log_history, indent=1) + "\n")
        if trainer.state.global_step >= trainer.state.max_steps:
            discard_resume_points(run)
    trainer.accelerator.wait_for_everyone()


def _with_resume_points(config: TrainConfig) -> TrainConfig:
    training = copy.copy(config.training)
    every = resume_interval(training, config.run.resume_every)
    training.save_strategy = "steps" if every else "no"
    training.save_steps, training.save_total_limit = every or 500, 1
    return replace(config, training=training)


def _watch(
    trainer: Any,
    config: TrainConfig,
    run: Path,
    steps: tuple[int, ...],
    evaluation: PlannedEvaluation | None,
    projection: Projection | None,
) -> None:
    """Attach everything that looks on or confines while the trainer trains."""
    if projection is not None:
        projection.attach(trainer)
    if config.paradigm != "sft":
        trainer.add_callback(TrainingHealth(rewarded=config.paradigm in ("rlvr", "mix")))
    if evaluation is not None:
        evaluation.schedule(run, steps, trainer.processing_class).attach(trainer)
    if (monitor := monitor_of(config, fetched=True)) is not None:
        monitor.attach(trainer)
    if config.training.save_strategy != "no":
        trainer.add_callback(ResumePointAtStop())


def _longest_sequence(config: TrainConfig, tokenizer: Any, dataset: Dataset) -> int:
    """Tokens of the longest sequence, from the first rows and the settings."""
    rows = dataset.select(range(min(len(dataset), _PROMPTS_LOOKED_AT)))
    if isinstance(config.training, OnPolicyArguments):
        prompt = max(len(_tokens(tokenizer, row["prompt"], True)) for row in rows)
        return prompt + int(config.training.max_completion_length)
    longest = max(sum(len(_tokens(tokenizer, part, False)) for part in row.values() if part) for row in rows) + 1
    return min(longest, config.training.max_length) if config.training.max_length else longest


def _tokens(tokenizer: Any, text: Any, opens: bool) -> list[int]:
    if isinstance(text, list) and text and isinstance(text[0], dict) and "role" in text[0]:
        text = tokenizer.apply_chat_template(text, add_generation_prompt=opens, tokenize=False)
    ids: list[int] = tokenizer(text if isinstance(text, str) else "")["input_ids"]
    return ids


def _step_of(point: Path | None) -> int:
    return int(point.name.rpartition("-")[2]) if point is not None else 0
