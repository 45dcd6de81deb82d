"""A run: one checkpoint, or a folder of step-numbered ones with an optional ``run.json`` that says what made them."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from geopd.checkpoints.checkpoint import CheckpointError, is_path, parsed_json, read_json
from geopd.checkpoints.hub import hub_name, located
from geopd.checkpoints.opening import holds_weights, name_instead, step_of
from geopd.checkpoints.whole_text import write_whole

RUN_MANIFEST = "run.json"
EVALUATIONS = "evaluations.json"
SCHEMA_VERSION = 1
_LATEST = "latest"  # DeepSpeed's: the weights above its step folders are those of one of them
# where NeMo-RL puts the weights of a step, by its backend
_INSIDE = ("policy/weights", "policy/weights/model", "policy/weights/iter_0000000")
_EVALUATION: dict[str, Any] = {
    "step": int,
    "benchmark": str,
    "decoding": str,
    "n": int,
    "value": (int, float),
    "se": (int, float),
}


@dataclass(frozen=True, slots=True)
class Origin:
    """The checkpoint a run started from: its path (absolute, or relative to the run's folder) and content digest."""

    path: str
    digest: str | None = None


@dataclass(frozen=True, slots=True)
class RunManifest:
    """What made a run: its paradigm (sft, opd, rlvr, mix, other), seed, origin, settings and free-form tags."""

    paradigm: str
    seed: int | None = None
    origin: Origin | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Run:
    """A labelled sequence of checkpoints in step order; the step of a lone checkpoint without a number is None."""

    label: str
    path: Path
    checkpoints: tuple[tuple[int | None, Path], ...]
    manifest: RunManifest | None = None
    evaluations: tuple[dict[str, Any], ...] = ()
    warnings: tuple[str, ...] = ()

    def origin_path(self) -> Path:
        """Where the run's origin lies, after its ``run.json``.

        Raises:
            CheckpointError: if the run does not say.
        """
        if self.manifest is None or self.manifest.origin is None:
            raise CheckpointError(f"{self.path}: no origin in {RUN_MANIFEST}; name the base checkpoint instead")
        folder = self.path if (self.path / RUN_MANIFEST).is_file() else self.path.parent
        return Path(os.path.normpath(folder / self.manifest.origin.path))


def write_run_manifest(run_dir: str | Path, manifest: RunManifest) -> Path:
    """Write ``run.json`` atomically; returns its path."""
    text = json.dumps({"schema_version": SCHEMA_VERSION, **asdict(manifest)}, indent=1, sort_keys=True, allow_nan=False)
    return write_whole(Path(run_dir) / RUN_MANIFEST, text + "\n")


def read_run_manifest(run_dir: str | Path) -> RunManifest | None:
    """The ``run.json`` of a folder; None where there is none.

    Raises:
        CheckpointError: if the file is there and does not follow the schema.
    """
    path = Path(run_dir) / RUN_MANIFEST
    if not path.is_file():
        return None
    value = read_json(path)
    version = value.pop("schema_version", None)
    if version != SCHEMA_VERSION:
        raise CheckpointError(f"{path}: schema_version {version!r}, this version reads {SCHEMA_VERSION}")
    origin = value.pop("origin", None)
    try:
        manifest = RunManifest(origin=Origin(**origin) if origin else None, **value)
    except TypeError as error:
        raise CheckpointError(f"{path}: {error}; see geopd.checkpoints.RunManifest for the fields") from error
    if not (
        isinstance(manifest.paradigm, str)
        and isinstance(manifest.settings, dict)
        and isinstance(manifest.tags, dict)
        and (manifest.seed is None or isinstance(manifest.seed, int))
        and (manifest.origin is None or is_path(manifest.origin.path))
    ):
        raise CheckpointError(f"{path}: a field has the wrong type; see geopd.checkpoints.RunManifest")
    return manifest


def open_run(path: str | Path, label: str | None = None) -> Run:
    """A run from a checkpoint (a folder, a file or a hub id) or a folder of step-numbered checkpoints.

    A step folder without weights (a save cut short) is left out with a warning.

    Raises:
        CheckpointError: if the path holds neither, two folders carry one step, ``run.json`` is not readable, or, for
            a hub id, as ``located``.
    """
    path = located(path).absolute()
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder")
    step = step_of(path.name)
    alone = not path.is_dir() or (step is not None and holds_weights(path))
    steps = [] if alone else _step_folders(path)
    if not steps:
        home = path.parent if path.is_file() or step is not None else path
        name = home.name if step is not None else path.stem if path.is_file() else hub_name(path) or path.name
        evaluations = tuple(row for row in _evaluations(home) if step is None or row["step"] == step)
        return Run(label or name, path, ((step, _weights_of(path)),), read_run_manifest(home), evaluations)
    warnings = []
    if holds_weights(path) and not (path / _LATEST).is_file():
        warnings.append(f"{path}: has weights of its own beside its step folders: the step folders are the run")
    kept: dict[int, Path] = {}
    for step, folder in steps:
        if not any(folder.iterdir()) or not _may_hold_weights(folder):
            warnings.append(f"{folder}: no weights in it (a save cut short?): left out")
        elif step in kept:
            raise CheckpointError(f"{path}: {kept[step].name} and {folder.name} both carry step {step}; remove one")
        else:
            kept[step] = _weights_of(folder)
    if not kept:
        raise CheckpointError(f"{path}: none of its {len(steps)} step folders holds weights; {name_instead(path)}")
    return Run(
        label or path.name,
        path,
        tuple(sorted(kept.items())),
        read_run_manifest(path),
        _evaluations(path),
        tuple(warnings),
    )


def _step_folders(path: Path) -> list[tuple[int, Path]]:
    numbered = [(step_of(child.name), child) for child in path.iterdir() if child.is_dir()]
    return sorted((step, child) for step, child in numbered if step is not None)


def _weights_of(folder: Path) -> Path:
    """Where in a step's folder its weights lie: the folder itself unless they are in a place known to be one."""
    if holds_weights(folder):
        return folder
    return next((inner for place in _INSIDE if holds_weights(inner := folder / place)), folder)


def _may_hold_weights(folder: Path) -> bool:
    # a folder with any weight-like file is opened, so that a format that is not read gets its own clear error
    return holds_weights(_weights_of(folder)) or any(
        file.suffix in {".safetensors", ".bin", ".pt", ".pth", ".distcp"} for file in folder.iterdir()
    )


def _evaluations(folder: Path) -> tuple[dict[str, Any], ...]:
    path = folder / EVALUATIONS
    if not path.is_file():
        return ()
    try:
        rows = parsed_json(path)
        if not isinstance(rows, list):
            raise TypeError(f"it holds {type(rows).__name__}")
        for row in rows:
            typed = set(row) == set(_EVALUATION) and all(isinstance(row[k], t) for k, t in _EVALUATION.items())
            if not (typed and math.isfinite(row["value"]) and math.isfinite(row["se"])):
                raise TypeError(f"row {str(row)[:200]}")
    except (TypeError, OverflowError) as error:
        raise CheckpointError(
            f"{path}: not a list of evaluations with {', '.join(_EVALUATION)} ({error}); repair or remove it"
        ) from error
    return tuple(rows)
