"""A run: one checkpoint, or a folder of step-numbered ones with an optional ``run.json`` that says what made them."""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from geopd.checkpoints.checkpoint import CheckpointError, read_json
from geopd.checkpoints.opening import holds_weights
from geopd.checkpoints.whole_text import write_whole

RUN_MANIFEST = "run.json"
EVALUATIONS = "evaluations.json"
SCHEMA_VERSION = 1
_STEP = re.compile(r"(?:checkpoint|step|global_step|iter)[-_]?0*(\d+)", re.IGNORECASE)
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
        and (manifest.origin is None or isinstance(manifest.origin.path, str))
    ):
        raise CheckpointError(f"{path}: a field has the wrong type; see geopd.checkpoints.RunManifest")
    return manifest


def step_of(name: str) -> int | None:
    """The step a folder name carries (``checkpoint-63``, ``global_step_255``, ``iter_0005375``); None without one."""
    match = _STEP.fullmatch(name)
    return int(match[1]) if match else None


def open_run(path: str | Path, label: str | None = None) -> Run:
    """A run from a checkpoint (a folder or a safetensors file) or a folder of step-numbered checkpoints.

    A step folder without weights (a save cut short) is left out with a warning.

    Raises:
        CheckpointError: if the path holds neither, two folders carry one step, or ``run.json`` is not readable.
    """
    path = Path(path).absolute()
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder")
    steps = _step_folders(path) if path.is_dir() else []
    if not steps:
        step = step_of(path.name)
        home = path.parent if path.is_file() or step is not None else path
        name = home.name if step is not None else path.stem if path.is_file() else path.name
        evaluations = tuple(row for row in _evaluations(home) if step is None or row["step"] == step)
        return Run(label or name, path, ((step, path),), read_run_manifest(home), evaluations)
    warnings = []
    if holds_weights(path):
        warnings.append(f"{path}: has weights of its own beside its step folders: the step folders are the run")
    kept: dict[int, Path] = {}
    for step, folder in steps:
        if not any(folder.iterdir()) or not _may_hold_weights(folder):
            warnings.append(f"{folder}: no weights in it (a save cut short?): left out")
        elif step in kept:
            raise CheckpointError(f"{path}: {kept[step].name} and {folder.name} both carry step {step}; remove one")
        else:
            kept[step] = folder
    if not kept:
        raise CheckpointError(f"{path}: none of its {len(steps)} step folders holds weights")
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


def _may_hold_weights(folder: Path) -> bool:
    # a folder with any weight-like file is opened, so that a format that is not read gets its own clear error
    return holds_weights(folder) or any(
        file.suffix in {".safetensors", ".bin", ".pt", ".pth", ".distcp"} for file in folder.iterdir()
    )


def _evaluations(folder: Path) -> tuple[dict[str, Any], ...]:
    path = folder / EVALUATIONS
    if not path.is_file():
        return ()
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        for row in rows:
            typed = set(row) == set(_EVALUATION) and all(isinstance(row[k], t) for k, t in _EVALUATION.items())
            if not (typed and math.isfinite(row["value"]) and math.isfinite(row["se"])):
                raise TypeError(f"row {row}")
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
        raise CheckpointError(
            f"{path}: not a list of evaluations with {', '.join(_EVALUATION)} ({error}); repair or remove it"
        ) from error
    return tuple(rows)
