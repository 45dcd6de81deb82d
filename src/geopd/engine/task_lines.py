"""A task that ended, as a line of the folder's log."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from geopd.engine.cost import BASE_BYTES, task_bytes
from geopd.engine.execution import Outcome
from geopd.engine.workload import Task, as_matrix_shape


def task_line(task: Task, outcome: Outcome, expected_seconds: float, device: str) -> dict[str, Any]:
    """The keys of ``geopd.results.task_log``; ``method`` and ``reason`` are those of the first part that has one."""
    records = [part.record for part in outcome.parts]
    reasons = [record["failure"] for record in records if record["failure"]]
    rows, cols = as_matrix_shape(task.shape)
    kept = sum(run.kept.steps for run in task.runs if run.kept)
    return {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "matrix": task.weight.name,
        "module": task.weight.module,
        "layer": task.weight.layer,
        "rows": rows,
        "cols": cols,
        "runs": [run.run for run in task.runs],
        "pairs": len(task.pairs),
        "steps": sum(len(run.steps) for run in task.runs) - kept,
        "kept_steps": kept,
        "status": "failed" if reasons else "ok",
        "reason": next(iter(reasons), None),
        "method": records[0]["method"] if records else "none",
        "seconds": outcome.seconds,
        "cpu_seconds": outcome.cpu_seconds,
        "expected_seconds": expected_seconds,
        "bytes": task.nbytes,
        "peak_bytes": outcome.peak_bytes,
        "expected_bytes": BASE_BYTES + task_bytes(task),
        "worker": outcome.worker,
        "threads": max((record["threads"] for record in records), default=1),
        "device": device.partition(":")[0],
        "attempts": outcome.attempts,
    }
