"""One task: one matrix over all checkpoints of all runs that share its origin.

W0 is read and decomposed once and lent to every checkpoint; one run's part is committed as soon as it is finished.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from geopd.checkpoints import CheckpointError
from geopd.diagnostics import Comparison, Diagnostic, OriginMatrix, UpdateSubspace
from geopd.diagnostics.rotation import SIDES, angles
from geopd.engine.inputs import opened
from geopd.engine.options import MeasureOptions
from geopd.matrices import WeightName
from geopd.results import Identity, Measurement, Part, Status, row

FINAL = "final"  # how vectors name the step of a checkpoint without a number


@dataclass(frozen=True, slots=True)
class Location:
    """A tensor on disk."""

    checkpoint: Path
    tensor: str


@dataclass(frozen=True, slots=True)
class RunSteps:
    """One run's side of a task: where the matrix lies at each step, and the name of the part it becomes."""

    run: str
    key: str
    steps: tuple[tuple[int | None, Location], ...]


@dataclass(frozen=True, slots=True)
class Task:
    """One canonical matrix, where its origin lies, and the runs that it is compared with."""

    weight: WeightName
    shape: tuple[int, ...]
    origin: Location
    runs: tuple[RunSteps, ...]
    options: MeasureOptions
    full: bool

    @property
    def diagnostics(self) -> tuple[Diagnostic, ...]:
        """What is asked of this matrix: embeddings, heads and vectors are entrywise only, unless asked."""
        return tuple(d for d in self.options.diagnostics if self.full or d.group == "entrywise")

    def identity(self, run: str, step: int | None) -> Identity:
        """The identity columns of this matrix's rows."""
        rows, cols = as_matrix_shape(self.shape)
        return Identity(run, step, self.weight.name, self.weight.layer, self.weight.module, rows, cols)


def as_matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """A vector counts as one column."""
    return (shape[0], shape[1]) if len(shape) == 2 else (shape[0], 1)


def read_matrix(location: Location) -> Tensor:
    """A finite matrix from disk.

    Raises:
        CheckpointError: if it cannot be read or holds NaN or infinite entries; the text names file, tensor and count.
    """
    tensor = opened(location.checkpoint).read(location.tensor)
    bad = tensor.numel() - int(torch.isfinite(tensor).sum())
    if bad:
        raise CheckpointError(
            f"{location.checkpoint}: tensor {location.tensor}: {bad} of {tensor.numel()} entries are NaN or infinite; "
            "use an earlier checkpoint"
        )
    return tensor.reshape(as_matrix_shape(tuple(tensor.shape)))


def failed_part(task: Task, run: RunSteps, reason: str, *, retry: bool = False) -> Part:
    """A part that says, for every metric asked of this matrix, that it failed and why."""
    rows = [row(task.identity(run.run, step), item) for step, _ in run.steps for item in _failures(task, reason)]
    return Part(run.key, rows, [], {}, _record(task, run, 0.0, "none", reason, retry=retry))


def _failures(task: Task, reason: str) -> list[Measurement]:
    parameters = task.options.parameters
    return [
        Measurement(metric, diagnostic.setting(parameters), None, None, Status.FAILED, "none", reason)
        for diagnostic in task.diagnostics
        for metric in diagnostic.metrics
    ]


def _record(
    task: Task, run: RunSteps, seconds: float, method: str, failure: str | None, *, retry: bool = False
) -> dict[str, Any]:
    return {
        "run": run.run,
        "matrix": task.weight.name,
        "seconds": seconds,
        "method": method,
        "failure": failure,
        "retry": retry,
        "threads": torch.get_num_threads(),
    }


def perform(task: Task) -> list[Part]:
    """Measure one matrix over all its checkpoints: one part a run.

    What the inputs make impossible (damaged or non-finite tensors) becomes ``failed`` rows with the reason.
    """
    started = time.perf_counter()
    try:
        origin = OriginMatrix(read_matrix(task.origin), task.options.parameters)
    except CheckpointError as error:
        return [failed_part(task, run, str(error)) for run in task.runs]
    parts = []
    for run in task.runs:
        parts.append(_measure_run(task, run, origin, started))
        started = time.perf_counter()
    return parts


def _measure_run(task: Task, run: RunSteps, origin: OriginMatrix, started: float) -> Part:
    diagnostics = task.diagnostics
    measurements: list[dict[str, Any]] = []
    nulls: list[dict[str, Any]] = []
    vectors: dict[str, np.ndarray] = {}
    failure = None
    final: UpdateSubspace | None = None
    many = len(run.steps) > 1
    similarity = any("subspace_similarity" in d.metrics for d in diagnostics)
    # the last checkpoint first: the others are compared with its subspace
    for step, location in reversed(run.steps):
        identity = task.identity(run.run, step)
        last = step == run.steps[-1][0]
        try:
            comparison = Comparison(origin, read_matrix(location), final)
        except CheckpointError as error:
            failure = str(error)
            measurements += [row(identity, item) for item in _failures(task, failure)]
            if last and many and similarity:
                # without the last update there is nothing to be similar to
                final = None
            continue
        if last and many and similarity:
            final = UpdateSubspace(comparison.update_decomposition)
            comparison.final = UpdateSubspace(final.decomposition, is_this=True)
        for diagnostic in diagnostics:
            measurements += [row(identity, item) for item in diagnostic.measure(comparison)]
            nulls += [row(identity, item) for item in diagnostic.nulls(comparison)]
        vectors |= _vectors(comparison, FINAL if step is None else str(step), diagnostics)
    method = origin.decomposition.method if "decomposition" in origin.__dict__ else "entrywise"
    seconds = time.perf_counter() - started
    return Part(run.key, measurements, nulls, vectors, _record(task, run, seconds, method, failure))


def _vectors(comparison: Comparison, step: str, diagnostics: tuple[Diagnostic, ...]) -> dict[str, np.ndarray]:
    """Singular values and angles for the figures, of what was computed anyway."""
    asked = {metric for diagnostic in diagnostics for metric in diagnostic.metrics}
    found: dict[str, np.ndarray] = {}
    if "spectral_shift" in asked:
        found["sigma_origin"] = comparison.origin.decomposition.sigma.cpu().numpy()
        found[f"{step}/sigma"] = comparison.after.sigma.cpu().numpy()
    if "rotation_left_max_deg" in asked:
        for side in SIDES:
            theta = angles(comparison, side)
            if not isinstance(theta, str):
                found[f"{step}/angles_{side}"] = theta
    return found
