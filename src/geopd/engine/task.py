"""One task: one matrix over all checkpoints of all runs that share its origin, and those runs two by two.

W0 is read and decomposed once and lent to every checkpoint. Where increments are asked for, a run is first walked
through forwards (each increment leaves its leading triples), then measured backwards from its last checkpoint. Of
checkpoints whose values an older part holds, only what depends on the run's end is measured.
"""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from geopd.checkpoints import CheckpointError, NotEnoughMemoryError
from geopd.diagnostics import (
    Comparison,
    Diagnostic,
    OriginMatrix,
    PairDiagnostic,
    Place,
    RunPair,
    Trajectory,
    UpdateSubspace,
    drawn_nulls,
)
from geopd.diagnostics.comparison import SIDES
from geopd.diagnostics.coordinates import visible_signs
from geopd.diagnostics.rotation import angles
from geopd.diagnostics.rounding import noise_verdict
from geopd.diagnostics.trajectory import Increment, increment_of
from geopd.engine.inputs import InputChangedError, opened, require_unchanged
from geopd.engine.workload import Location, RunEnds, RunSteps, Task, as_matrix_shape
from geopd.results import Measurement, Null, Part, Status, row

__all__ = ["Location", "RunEnds", "RunSteps", "Task", "failed_parts", "perform", "read_matrix"]

TO_THE_END = frozenset({"subspace_similarity"})
"""Metrics of a checkpoint that depend on the run's last one: a longer run measures them anew for every step."""
ALONG_THE_WAY = TO_THE_END | {"increment_similarity"}  # what needs the run's increments
_PASSING = (InputChangedError, NotEnoughMemoryError)  # failures that the same command, run again, may not meet
FINAL = "final"  # how vectors name the step of a checkpoint without a number


def read_matrix(location: Location) -> Tensor:
    """A finite matrix from disk.

    Raises:
        CheckpointError: if it cannot be read or holds NaN or infinite entries; the text names file, tensor and count.
        NotEnoughMemoryError: if there is no memory for it now.
        InputChangedError: if it could be read when the command began, or was another then.
    """
    require_unchanged(location.checkpoint, location.stamp)
    try:
        tensor = opened(location.checkpoint, location.base, per_head=location.per_head).read(location.tensor)
    except NotEnoughMemoryError:
        raise
    except CheckpointError as error:
        raise InputChangedError(str(error)) if location.readable else error from error
    bad = tensor.numel() - int(torch.isfinite(tensor).sum())
    if bad:
        raise CheckpointError(
            f"{location.checkpoint}: tensor {location.tensor}: {bad} of {tensor.numel()} entries are NaN or infinite; "
            "use an earlier checkpoint"
        )
    return tensor.reshape(as_matrix_shape(tuple(tensor.shape)))


class _Reader:
    """Reads matrices and keeps the last two: a walk forwards and back reads neighbours twice in a row."""

    def __init__(self, device: torch.device) -> None:
        self._kept: deque[tuple[Location, Tensor]] = deque(maxlen=2)
        self._device = device

    def __call__(self, location: Location) -> Tensor:
        for where, matrix in self._kept:
            if where == location:
                return matrix
        matrix = read_matrix(location).to(self._device)
        self._kept.append((location, matrix))
        return matrix


def failed_parts(task: Task, reason: str, *, retry: bool = False) -> list[Part]:
    """Parts that say, for every metric asked of this matrix, that it failed and why."""
    return [_failed_run(task, run, reason, retry) for run in task.runs] + [
        _failed_pair(task, pair, reason, retry) for pair in task.pairs
    ]


def _failed_run(task: Task, run: RunSteps, reason: str, retry: bool) -> Part:
    rows = [
        row(task.identity(run.run, step), item)
        for step, _ in run.steps
        for item in _failures(task, task.diagnostics, reason)
    ]
    return Part(run.key, rows, [], {}, _record(task, {"run": run.run}, 0.0, "none", reason, retry=retry))


def _failed_pair(task: Task, pair: RunEnds, reason: str, retry: bool) -> Part:
    identity = task.identity(pair.run, pair.step, pair.other)
    rows = [row(identity, item) for item in _failures(task, task.pair_diagnostics, reason)]
    labels = {"run": pair.run, "other_run": pair.other}
    return Part(pair.key, rows, [], {}, _record(task, labels, 0.0, "none", reason, retry=retry))


def _failures(task: Task, diagnostics: Sequence[Diagnostic | PairDiagnostic], reason: str) -> list[Measurement]:
    parameters = task.options.parameters
    return [
        Measurement(metric, diagnostic.setting(parameters), None, None, Status.FAILED, "none", reason)
        for diagnostic in diagnostics
        for metric in diagnostic.metrics
    ]


def _record(
    task: Task,
    labels: dict[str, str],
    seconds: float,
    method: str,
    failure: str | None,
    *,
    retry: bool = False,
    kept_steps: int = 0,
) -> dict[str, Any]:
    return labels | {
        "matrix": task.weight.name,
        "seconds": seconds,
        "method": method,
        "failure": failure,
        "retry": retry,
        "threads": torch.get_num_threads(),
        "kept_steps": kept_steps,
    }


def perform(task: Task, device: str = "cpu") -> list[Part]:
    """Measure one matrix over all its checkpoints: one part a run, and one for every pair of runs asked.

    What the inputs make impossible (damaged or non-finite tensors) becomes ``failed`` rows with the reason.
    """
    started = time.perf_counter()
    try:
        vectors = frozenset[str]().union(*(d.vectors for d in task.diagnostics))
        origin = OriginMatrix(read_matrix(task.origin).to(device), task.options.parameters, vectors)
    except CheckpointError as error:
        return failed_parts(task, str(error), retry=isinstance(error, _PASSING))
    decomposes = any(diagnostic.group == "full" for diagnostic in task.diagnostics)
    with task.cache.lent(origin) if task.cache and decomposes else nullcontext():
        return _measure_all(task, origin, started)


def _measure_all(task: Task, origin: OriginMatrix, started: float) -> list[Part]:
    # one byte an entry for each run that is compared with another, so that its last checkpoint is read once
    signs: dict[Location, Tensor | None] = {end: None for pair in task.pairs for end in (pair.last, pair.other_last)}
    parts = []
    for run in task.runs:
        parts.append(_measure_run(task, run, origin, signs, started))
        started = time.perf_counter()
    return parts + [_measure_pair(task, pair, origin, signs) for pair in task.pairs]


@dataclass
class _Found:
    """What a run's steps have given so far."""

    measurements: list[dict[str, Any]] = field(default_factory=list)
    nulls: list[dict[str, Any]] = field(default_factory=list)
    vectors: dict[str, np.ndarray] = field(default_factory=dict)
    failure: str | None = None
    retry: bool = False


def _measure_run(
    task: Task, run: RunSteps, origin: OriginMatrix, signs: dict[Location, Tensor | None], started: float
) -> Part:
    asked = {metric for diagnostic in task.diagnostics for metric in diagnostic.metrics}
    found = _Found()
    final: UpdateSubspace | None = None
    many = len(run.steps) > 1
    kept = run.kept.steps if run.kept else 0
    read = _Reader(origin.stored.device)
    path = _trajectory(task, run, origin, read) if many and asked & ALONG_THE_WAY else None
    # the last checkpoint first: the others are compared with its subspace
    for position, (step, location) in reversed(list(enumerate(run.steps))):
        diagnostics = tuple(d for d in task.diagnostics if position >= kept or TO_THE_END & set(d.metrics))
        if not diagnostics:
            continue
        last = position == len(run.steps) - 1
        try:
            place = None if path is None else Place(path, position)
            comparison = Comparison(origin, read(location), final, place)
        except CheckpointError as error:
            # where it was the last, there is nothing for the others to be similar to
            found.failure, found.retry = str(error), found.retry or isinstance(error, _PASSING)
            identity = task.identity(run.run, step)
            found.measurements += [row(identity, item) for item in _failures(task, diagnostics, found.failure)]
            continue
        if last and many and "subspace_similarity" in asked:
            final = UpdateSubspace(comparison.update_decomposition, doubt=noise_verdict(comparison))
            comparison.final = replace(final, is_this=True)
        _measure_step(task, run, step, comparison, diagnostics, found)
        if position >= kept:
            found.vectors |= _vectors(comparison, FINAL if step is None else str(step), diagnostics)
        if location in signs:
            signs[location] = visible_signs(comparison)
    return _part(task, run, origin, found, time.perf_counter() - started)


def _measure_step(
    task: Task,
    run: RunSteps,
    step: int | None,
    comparison: Comparison,
    diagnostics: tuple[Diagnostic, ...],
    found: _Found,
) -> None:
    identity = task.identity(run.run, step)
    closed: list[Null] = []
    for diagnostic in diagnostics:
        items = diagnostic.measure(comparison)
        found.measurements += [row(identity, item) for item in items]
        # a number that broke its own bounds: the command must not end as if all were well
        found.failure = found.failure or next((item.note for item in items if item.status is Status.FAILED), None)
        closed += diagnostic.nulls(comparison)
    drawn = drawn_nulls(comparison, (d.measure for d in diagnostics), task.options.nulls, seed_of(task.weight.name))
    replaced = {(item.metric, item.setting, item.null) for item in drawn}
    remaining = [item for item in closed if (item.metric, item.setting, item.null) not in replaced]
    found.nulls += [row(identity, item) for item in remaining + drawn]


def _part(task: Task, run: RunSteps, origin: OriginMatrix, found: _Found, seconds: float) -> Part:
    try:
        for location in (task.origin, *(location for _, location in run.steps)):
            require_unchanged(location.checkpoint, location.stamp)
    except InputChangedError as error:  # what was read since may be of either content
        return _failed_run(task, run, str(error), retry=True)
    method = origin.decomposition.method if "decomposition" in origin.__dict__ else "entrywise"
    labels, kept = {"run": run.run}, run.kept.steps if run.kept else 0
    record = _record(task, labels, seconds, method, found.failure, retry=found.retry, kept_steps=kept)
    return Part(run.key, found.measurements, found.nulls, dict(sorted(found.vectors.items())), record)


def _trajectory(task: Task, run: RunSteps, origin: OriginMatrix, read: _Reader) -> Trajectory:
    """The run's increments, from one walk forwards; two checkpoints are held at a time."""
    increments: list[Increment | None] = []
    before: Tensor | None = origin.stored
    for position, (_, location) in enumerate(run.steps):
        after: Tensor | None = None
        try:
            after = read(location)
        except NotEnoughMemoryError:
            raise  # a second reading may succeed, beside increments that were left out
        except CheckpointError:
            pass  # its own rows say why
        if before is None or after is None:
            increments.append(None)
        else:
            increments.append(increment_of(origin, before if position else None, after))
        before = after
    return Trajectory(increments, seed_of(task.weight.name))


def seed_of(name: str) -> int:
    """The seed of a matrix's draws: of its name alone, so that they do not depend on order or workers."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def _measure_pair(task: Task, pair: RunEnds, origin: OriginMatrix, signs: dict[Location, Tensor | None]) -> Part:
    started = time.perf_counter()
    try:
        for end in (pair.last, pair.other_last):
            if signs[end] is None:
                signs[end] = visible_signs(Comparison(origin, read_matrix(end).to(origin.stored.device)))
    except CheckpointError as error:
        return _failed_pair(task, pair, str(error), retry=isinstance(error, _PASSING))
    one, other = signs[pair.last], signs[pair.other_last]
    assert one is not None
    assert other is not None
    runs, identity = RunPair(origin, one, other), task.identity(pair.run, pair.step, pair.other)
    measured = [row(identity, item) for d in task.pair_diagnostics for item in d.measure(runs)]
    nulls = [row(identity, item) for d in task.pair_diagnostics for item in d.nulls(runs)]
    labels = {"run": pair.run, "other_run": pair.other}
    return Part(pair.key, measured, nulls, {}, _record(task, labels, time.perf_counter() - started, "entrywise", None))


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
