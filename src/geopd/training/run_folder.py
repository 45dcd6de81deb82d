"""Whose run an output folder holds: nobody's yet, this configuration's, or somebody else's, which is left alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from geopd.checkpoints import holds_weights, read_run_manifest, step_of
from geopd.training.config import TrainConfig
from geopd.training.resume import RESUME_FOLDER, check_same_settings
from geopd.training.run_record import LOG_FILE, decisive

__all__ = ["FolderState", "look_at_folder", "stops_on_alarm"]

_WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth")


@dataclass(frozen=True)
class FolderState:
    """What an output folder holds.

    Args:
        begun: a run of these settings, so that its checkpoints may be written anew.
        ended: the log of that run where nothing is left to do; None otherwise.
        planned: the optimiser steps that an ended run was to take.
    """

    begun: bool
    ended: list[dict[str, float]] | None = None
    planned: int = 0


def look_at_folder(config: TrainConfig, settings: dict[str, Any]) -> FolderState:
    """What the output folder of a configuration holds; nothing is changed.

    A run that ended before its last update counts as ended only while an alarm that stops is still set.

    Args:
        config: names the folder.
        settings: of this call, from :func:`~geopd.training.run_record.settings_of`.

    Raises:
        ValueError: the folder is one that the run reads, holds weights that no run of ``geopd train`` wrote, or a run
            of another paradigm or with other settings; or the log or the last checkpoint of an ended run is damaged.
    """
    run = Path(config.training.output_dir)
    _refuse_inputs(config, run)
    manifest = read_run_manifest(run) if run.is_dir() else None
    if manifest is None:
        _refuse_strange_weights(run)
        return FolderState(begun=False)
    if manifest.paradigm != config.paradigm:
        raise ValueError(
            f"{run} is {_article(manifest.paradigm)} {manifest.paradigm} run and this call is {config.paradigm}: "
            f"choose another output_dir, or remove the folder"
        )
    check_same_settings(run, decisive(manifest.settings), decisive(settings))
    history = _history(run / LOG_FILE)
    if history is None:
        return FolderState(begun=True)
    step = int(history[-1]["step"])
    planned = int(manifest.settings.get("planned_updates", step))
    if step < planned and not stops_on_alarm(config):
        return FolderState(begun=True)
    last = run / f"checkpoint-{step}"
    if not (last.is_dir() and holds_weights(last)):
        raise ValueError(
            f"{last}: the run has ended and its last checkpoint is not there: put it back, or remove {run / LOG_FILE} "
            "to train again"
        )
    return FolderState(begun=True, ended=history, planned=planned)


def stops_on_alarm(config: TrainConfig) -> bool:
    """Whether an alarm of the monitor would end the run."""
    settings = config.run.monitor
    alarms = settings.get("alarms") if isinstance(settings, dict) else None
    return isinstance(alarms, dict) and bool(alarms.get("stop"))


def _refuse_inputs(config: TrainConfig, run: Path) -> None:
    inputs = {
        "model_name_or_path": config.model.model_name_or_path,
        "teacher": config.teacher.teacher if config.teacher is not None else None,
        "origin": config.run.origin,
    }
    for key, name in inputs.items():
        if name is not None and Path(name).exists() and Path(name).resolve() == run.resolve():
            raise ValueError(f"output_dir {run} is the folder that {key} names: choose another output_dir")


def _refuse_strange_weights(run: Path) -> None:
    if not run.is_dir():
        return
    for child in sorted(run.iterdir()):
        steps = child.is_dir() and (step_of(child.name) is not None or child.name == RESUME_FOLDER)
        if steps or (child.is_file() and child.suffix in _WEIGHT_FILES):
            raise ValueError(
                f"{run} holds {child.name} and no run.json, so another program wrote it: choose another output_dir, or "
                "move it away"
            )


def _history(log: Path) -> list[dict[str, float]] | None:
    if not log.is_file():
        return None
    try:
        history: list[dict[str, float]] = json.loads(log.read_text(encoding="utf-8"))
        int(history[-1]["step"])
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"{log} is not the log of a run (cut short?): put it back, or remove it to train again"
        ) from error
    return history


def _article(paradigm: str) -> str:
    return "an" if paradigm in ("sft", "opd", "rlvr", "other") else "a"
