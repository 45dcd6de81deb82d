"""What ``run.json`` says of a run: its settings, what it started from, and the versions behind it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

from datasets import Dataset

from geopd.checkpoints import Origin, RunManifest, checkpoint_digest, write_run_manifest
from geopd.training.components import local_folder, projection_of
from geopd.training.config import TrainConfig

__all__ = ["LOG_FILE", "decisive", "origin_of", "settings_of", "tags_of", "write_record"]

LOG_FILE = "training_log.json"
"""The log of a finished run: its presence says that the run has ended."""

_PACKAGES = ("geopd", "torch", "transformers", "trl", "accelerate", "peft", "datasets")
_NEVER = {
    *("output_dir", "hub_token", "local_rank"),
    *("gradient_checkpointing", "gradient_checkpointing_kwargs"),  # mirrors of the newer names
    "accelerator_config",  # always filled in by the Trainer
}
_WITHOUT_EFFECT = (
    "versions",
    "projection_record",
    "planned_updates",
    "run.resume_every",
    "run.monitor",
    *(f"training.{name}" for name in ("report_to", "run_name", "project", "disable_tqdm", "log_level")),
    *(f"training.{name}" for name in ("logging_steps", "logging_strategy", "logging_first_step", "log_completions")),
)
_ROWS_A_READ = 10_000


def settings_of(config: TrainConfig, dataset: Dataset, processes: int) -> dict[str, Any]:
    """Every setting that is not at its library's default, the data's digest and the versions, as JSON types."""
    groups: dict[str, Any] = {}
    for name in ("model", "data", "run", "training", "reward", "teacher", "signal"):
        if (group := getattr(config, name)) is not None:
            groups[name] = _changed(group)
    content = {
        **groups,
        "processes": processes,
        "rows": {"count": len(dataset), "digest": _digest(dataset)},
        "versions": {package: version(package) for package in _PACKAGES},
    }
    found: dict[str, Any] = json.loads(json.dumps(content, default=str))
    return found


def decisive(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings without those that leave the weights as they are: logging, the monitor, versions."""
    kept: dict[str, Any] = {}
    for group, values in settings.items():
        if group in _WITHOUT_EFFECT:
            continue
        kept[group] = (
            {name: value for name, value in values.items() if f"{group}.{name}" not in _WITHOUT_EFFECT}
            if isinstance(values, dict)
            else values
        )
    return kept


def origin_of(config: TrainConfig, run: Path) -> Origin | None:
    """The checkpoint updates are measured from, with its digest; None where it is not on this machine.

    Its path is relative to the run for a neighbour, so that a folder of runs can be moved as a whole, and absolute
    elsewhere.
    """
    name = config.run.origin or config.model.model_name_or_path
    revision = config.model.model_revision if config.run.origin is None else None
    folder = local_folder(name, revision) if name is not None else None
    if folder is None:
        return None
    folder, run = folder.resolve(), run.resolve()
    neighbour = folder.is_relative_to(run.parent.parent)
    return Origin(os.path.relpath(folder, run) if neighbour else str(folder), checkpoint_digest(folder))


def write_record(config: TrainConfig, run: Path, origin: Origin | None, settings: dict[str, Any]) -> None:
    """Write ``run.json``."""
    manifest = RunManifest(config.paradigm, int(config.training.seed), origin, settings, tags_of(config))
    write_run_manifest(run, manifest)


def tags_of(config: TrainConfig) -> dict[str, str]:
    """In what a run differs from its paradigm's baseline, as claims and figures group runs; empty for a baseline.

    Keys: ``alpha`` and ``normalise``, ``token_selection`` and ``rho``, ``rollouts``, ``divergence``, and of a
    projection ``projection`` (the basis's kind), ``k``, ``mode`` and ``lr_scale``.
    """
    tags: dict[str, str] = {}
    if config.paradigm != "sft":
        objective = config.objective
        if config.paradigm == "mix":
            tags |= {"alpha": f"{objective.alpha:g}"} | ({"normalise": "true"} if objective.normalise else {})
        if objective.token_selection != "all":
            tags |= {"token_selection": objective.token_selection, "rho": f"{objective.rho:g}"}
        if objective.rollouts != "student":
            tags["rollouts"] = objective.rollouts
        if config.divergence != "sampled":
            tags["divergence"] = config.divergence
    if config.run.projection is not None:
        projection = projection_of(config)
        basis = projection.read.provenance
        tags |= {"projection": basis.kind, "mode": projection.mode}
        tags |= {"k": str(basis.k)} if basis.k is not None else {}
        tags |= {"lr_scale": projection.lr_scale} if projection.lr_scale != "none" else {}
    return tags


def _changed(group: Any) -> dict[str, Any]:
    found = {}
    for field in dataclasses.fields(group):
        value = getattr(group, field.name)
        default = field.default_factory() if callable(field.default_factory) else field.default
        if field.init and field.name not in _NEVER and value != default and value not in ([], {}):
            found[field.name] = getattr(value, "value", value)
    return found


def _digest(dataset: Dataset) -> str:
    """Of the values of every row in order, however they are stored: about 0.4 s for 100 000 rows of 500 characters."""
    state = hashlib.blake2b(digest_size=16)
    for table in dataset.with_format("arrow").iter(_ROWS_A_READ):
        state.update(json.dumps(table.to_pydict(), sort_keys=True, default=str).encode())
    return state.hexdigest()
