"""Going on with an interrupted run: resume points at rollout boundaries, and the settings they belong to.

A resume point is the Trainer's own checkpoint (weights, optimiser, schedule, random states) in ``resume/`` of the run's
folder; only the last is kept. At a rollout boundary it determines everything that follows, so the run goes on to the
weights it would have had. Between boundaries the responses being trained on would be missing, so no point is kept.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_callback import TrainerCallback, TrainerState

from geopd.training.weight_files import check_whole, writing

__all__ = [
    "RESUME_FOLDER",
    "ResumePointAtStop",
    "check_same_settings",
    "discard_resume_points",
    "keep_resume_points",
    "last_resume_point",
    "resume_interval",
    "updates_per_rollout",
]

RESUME_FOLDER = "resume"
_USUAL_STEPS = 50
_STATE = "trainer_state.json"


def updates_per_rollout(training: Any) -> int:
    """Optimiser steps between two moments at which new responses are written; 1 for supervised training.

    A rollout lasts ``steps_per_generation * num_iterations`` micro-batches, an optimiser step takes
    ``gradient_accumulation_steps`` of them, so a step ends at a rollout's end every g / gcd(g, a) steps.
    """
    micro = getattr(training, "steps_per_generation", None)
    if micro is None:
        return 1
    micro *= training.num_iterations
    return int(micro // math.gcd(micro, training.gradient_accumulation_steps))


def resume_interval(training: Any, asked: int | None) -> int:
    """Steps between resume points: what was asked, or the first rollout boundary from about 50 on; 0 for none.

    Raises:
        ValueError: what was asked lies between rollouts; the nearest boundaries are named.
    """
    boundary = updates_per_rollout(training)
    if asked is None:
        return boundary * math.ceil(_USUAL_STEPS / boundary)
    if asked < 0 or asked % boundary:
        below = asked // boundary * boundary
        choices = f"{below} or {below + boundary}" if below > 0 else str(boundary)
        raise ValueError(
            f"resume_every={asked}: a rollout lasts {boundary} steps here, and a run can only be taken up between "
            f"rollouts: use {choices}, or 0 for no resume points"
        )
    return asked


def last_resume_point(run: Path, training: Any) -> Path | None:
    """The newest whole resume point of a run, or None; one cut short by the interruption is passed over.

    Raises:
        ValueError: it lies between two rollouts of these settings (the nearest boundary is named), or a file of it is
            damaged.
    """
    points = [
        (int(folder.name.removeprefix("checkpoint-")), folder)
        for folder in (run / RESUME_FOLDER).glob("checkpoint-*")
        if (folder / _STATE).is_file()  # the Trainer writes it last
    ]
    if not points:
        return None
    step, point = max(points)
    boundary = updates_per_rollout(training)
    if step % boundary:
        nearest = round(step / boundary) * boundary
        raise ValueError(
            f"{point} lies between two rollouts (a rollout lasts {boundary} steps): the nearest boundary is step "
            f"{nearest}; remove {run / RESUME_FOLDER} to start over"
        )
    check_whole(point)
    return point


class ResumePointAtStop(TrainerCallback):  # type: ignore[misc]
    """Keeps a resume point where something ends the run early between two rollouts; added behind what may end it."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Ask for the point."""
        early = control.should_training_stop and state.global_step < state.max_steps
        if early and state.global_step % updates_per_rollout(args) == 0:
            control.should_save = True


def keep_resume_points(trainer: Any, run: Path, point: Path | None) -> None:
    """Send the trainer's own checkpoints to ``resume/``, and bring its prompt order to where ``point`` left it.

    TRL's sampler draws each epoch's order from one running generator, which a new process would start afresh.
    """
    folder = str(run / RESUME_FOLDER)
    trainer._get_output_dir = lambda trial=None: folder  # noqa: ARG005
    save = trainer._save_checkpoint

    def saved(*args: Any, **kwargs: Any) -> None:
        place = run / RESUME_FOLDER / f"checkpoint-{trainer.state.global_step}"
        with writing(place, place):
            save(*args, **kwargs)

    trainer._save_checkpoint = saved
    if point is None:
        return
    epochs = int(TrainerState.load_from_json(str(point / _STATE)).epoch or 0)
    original = trainer._get_train_sampler

    def advanced(*args: Any) -> Any:
        sampler = original(*args)
        if getattr(sampler, "generator", None) is not None and getattr(sampler, "shuffle", False):
            for _ in range(epochs):
                torch.randperm(sampler.num_samples, generator=sampler.generator)
        return sampler

    trainer._get_train_sampler = advanced


def discard_resume_points(run: Path) -> None:
    """Remove the resume points of a run that has ended: an optimiser state is twice its weights."""
    shutil.rmtree(run / RESUME_FOLDER, ignore_errors=True)


def check_same_settings(run: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Require that a run goes on as it was begun.

    Args:
        run: the run's folder, for the message.
        before: the settings in its ``run.json``.
        now: the settings of this call.

    Raises:
        ValueError: a setting differs; it is named with both values.
    """
    then, today = _flat(before), _flat(json.loads(json.dumps(now)))
    for key in sorted(then.keys() | today.keys()):
        if then.get(key) != today.get(key):
            if key.startswith("rows."):
                raise ValueError(
                    f"{run} was begun with other data ({key}={_shown(then, key)}, now {_shown(today, key)}): restore "
                    "them to go on, remove the folder, or choose another output_dir"
                )
            raise ValueError(
                f"{run} was begun with {key}={_shown(then, key)} and this call has {_shown(today, key)}: "
                "restore it to go on, remove the folder, or choose another output_dir"
            )


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _shown(settings: dict[str, Any], key: str) -> str:
    return json.dumps(settings[key]) if key in settings else "its default"
