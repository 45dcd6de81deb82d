"""What a measurement would compare, read and cost, before anything is measured."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from geopd.checkpoints import CheckpointError
from geopd.engine.cost import LONG, choose_workers, estimate, probe, task_bytes, task_seconds
from geopd.engine.plan import Plan
from geopd.engine.run_plan import RunPlan

_COSTLIEST = 5  # matrices told by name
_LOOK = 1.0  # seconds for finding a first difference between a run's end and its origin
_WEIGHTS = {".safetensors", ".distcp", ".bin", ".pt"}  # whose bytes are what a probe of reading should read


def preflight(plan: Plan, workers: int | None = None) -> dict[str, Any]:
    """A plan in numbers, as ``geopd plan --json`` prints it; at most five seconds of probing and reading.

    ``runs`` by label: ``steps``, ``origin``, ``origin_format``, ``formats`` (checkpoints of each), ``matched``,
    ``not_selected``, ``skipped``, ``failed``, ``warnings`` and ``dtypes`` (how many tensors of each "origin ->
    checkpoint"). ``matrices``: tasks. ``bytes``: read and digested before the first task, in ``reading_seconds``.
    ``seconds_one_worker``; ``seconds`` with the ``workers`` that would run; ``bytes_per_worker`` at the peak;
    ``costliest`` matrices with their seconds and bytes; ``machine``, what the probe found.
    """
    tasks = plan.all_tasks()
    sizes = plan.tensors()
    machine = probe(LONG, _files(plan))
    expected = estimate(tasks, machine)
    count = max(choose_workers(workers, expected, len(tasks)), 1)
    costliest = sorted(tasks, key=lambda task: -task_seconds(task, machine))[:_COSTLIEST]
    return {
        "runs": {run.run.label: _about(run, plan) for run in plan.runs},
        "matrices": len(tasks),
        "bytes": sum(sizes.values()),
        "reading_seconds": sum(sizes.values()) / machine.read if machine.read else None,
        "seconds_one_worker": expected.seconds,
        "workers": count,
        "seconds": max(expected.seconds / count, expected.longest),
        "bytes_per_worker": expected.worker_bytes,
        "costliest": [
            {
                "matrix": task.weight.name,
                "shape": list(task.shape),
                "seconds": task_seconds(task, machine),
                "bytes": task_bytes(task),
            }
            for task in costliest
        ],
        "machine": asdict(machine),
    }


def _about(run: RunPlan, plan: Plan) -> dict[str, Any]:
    readable = [path for step, path in run.run.checkpoints if step not in run.lost]
    found = Counter(plan.opened(path).format for path in readable)
    about: dict[str, Any] = {
        "steps": run.steps,
        "origin": str(run.origin),
        "origin_format": plan.opened(run.origin).format,
    }
    about |= {"formats": dict(sorted(found.items())), **run.coverage(), "dtypes": _dtypes(run)}
    resized = sum("vocabulary resized" in reason for reason in run.skipped.values())
    warnings = list(run.warnings)
    if resized:
        warnings.append(f"the vocabulary was resized: {resized} tensor(s) are not compared")
    if same := _unchanged(run, plan):
        warnings.append(same)
    return about | {"warnings": warnings}


def _dtypes(run: RunPlan) -> dict[str, int]:
    pairs = (pair for steps in run.pairs.values() for pair in list(steps.values())[-1:])
    return dict(sorted(Counter(f"{pair.origin_dtype} -> {pair.tuned_dtype}" for pair in pairs).items()))


def _unchanged(run: RunPlan, plan: Plan) -> str | None:
    """A warning where a run's last checkpoint is its origin as far as could be read, largest tensors first."""
    step, last = run.run.checkpoints[-1]
    if step in run.lost:
        return None
    before, after = plan.opened(run.origin), plan.opened(last)
    pairs = [steps[run.steps[-1]] for steps in run.pairs.values() if run.steps[-1] in steps]
    started, same = time.perf_counter(), 0
    for pair in sorted(pairs, key=lambda pair: -pair.nbytes):
        if time.perf_counter() - started > _LOOK:
            break
        try:
            if not torch.equal(before.read(pair.origin_tensor), after.read(pair.tuned_tensor)):
                return None
        except (CheckpointError, RuntimeError):  # damaged, or of two shapes: told elsewhere
            continue
        same += 1
    if not same:
        return None
    return (
        f"nothing changed: {same} of {len(pairs)} tensors were compared and {last} holds just what {run.origin} holds"
    )


def _files(plan: Plan) -> list[Path]:
    paths = {plan.origin for plan in plan.runs} | {path for run in plan.runs for _, path in run.run.checkpoints}
    folders = (sorted(path.rglob("*")) if path.is_dir() else [path] for path in sorted(paths))
    return [file for files in folders for file in files if file.suffix in _WEIGHTS]
