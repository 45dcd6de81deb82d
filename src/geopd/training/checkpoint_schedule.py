"""Checkpoints at chosen steps of any Trainer: fp32 weights, config and tokenizer, written atomically."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

__all__ = ["CheckpointSchedule", "StepReport", "save_checkpoint"]


def save_checkpoint(model: Any, tokenizer: Any, run: Path, step: int) -> Path:
    """Write ``run/checkpoint-<step>`` with model.safetensors, config and tokenizer, and return its path.

    The folder appears in one rename, so a reader sees either the whole checkpoint or none.

    Raises:
        ValueError: a floating-point weight is not fp32: the visible mask of an update needs the master weights.
    """
    narrow = [
        name for name, value in model.named_parameters() if value.is_floating_point() and value.element_size() < 4
    ]
    if narrow:
        raise ValueError(f"weight {narrow[0]} is narrower than fp32: train with fp32 master weights to save them")
    target = run / f"checkpoint-{step}"
    partial = run / f".checkpoint-{step}.partial"
    for leftover in (partial, target):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.replace(target)
    return target


class CheckpointSchedule(TrainerCallback):  # type: ignore[misc]
    """Saves a checkpoint after the given optimiser steps, on the main process only.

    Args:
        run: the run folder.
        steps: optimiser steps to save at; 0 saves the initial weights.
        tokenizer: saved beside the weights.
    """

    def __init__(self, run: Path, steps: Iterable[int], tokenizer: Any) -> None:
        self.run = run
        self.steps = frozenset(steps)
        self.tokenizer = tokenizer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Save the initial weights when step 0 is scheduled."""
        self._save_if_due(state, kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Save when the step that just ended is scheduled."""
        self._save_if_due(state, kwargs["model"])

    def _save_if_due(self, state: Any, model: Any) -> None:
        if state.is_world_process_zero and state.global_step in self.steps:
            save_checkpoint(model, self.tokenizer, self.run, state.global_step)


class StepReport(TrainerCallback):  # type: ignore[misc]
    """Calls ``report(step)`` after every optimiser step."""

    def __init__(self, report: Callable[[int], None]) -> None:
        self.report = report

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Report the step that just ended."""
        self.report(state.global_step)
