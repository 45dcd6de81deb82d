"""What a plan will cost: seconds from a short probe of this machine, memory from the largest matrices."""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from geopd.engine.plan import task_cost
from geopd.engine.task import Task

_PROBE = 384  # rows and columns of the probed SVD: about 50 ms
_BASE_BYTES = 450 << 20  # an interpreter with torch loaded
_FULL_BYTES = 28  # per entry at the peak of the full suite, as measured (docs/log.md)
_GRAM_BYTES = 24  # per entry of the smaller Gram matrix: it, its reflectors and vectors
_ENTRYWISE_BYTES = 16  # per entry: masks, magnitude bins and one selection copy


@dataclass(frozen=True, slots=True)
class Estimate:
    """Expected seconds of one worker over all tasks, the longest task's seconds, and peak bytes per worker."""

    seconds: float
    longest: float
    worker_bytes: int


def estimate(tasks: list[Task]) -> Estimate:
    """Time and memory of the tasks; times one float64 SVD of this machine to set the scale."""
    if not tasks:
        return Estimate(0.0, 0.0, _BASE_BYTES)
    rate = _seconds_per_unit()
    costs = [task_cost(task) * rate for task in tasks]
    return Estimate(sum(costs), max(costs), _BASE_BYTES + max(_peak_bytes(task) for task in tasks))


def _peak_bytes(task: Task) -> int:
    if all(diagnostic.group == "entrywise" for diagnostic in task.diagnostics):
        return math.prod(task.shape) * _ENTRYWISE_BYTES
    return math.prod(task.shape) * _FULL_BYTES + min(task.shape) ** 2 * _GRAM_BYTES


def _seconds_per_unit() -> float:
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(_PROBE, _PROBE, dtype=torch.float64, generator=generator)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        torch.linalg.svd(probe, full_matrices=False)
        started = time.perf_counter()
        torch.linalg.svd(probe, full_matrices=False)
        return (time.perf_counter() - started) / _PROBE**3
    finally:
        torch.set_num_threads(threads)


def choose_workers(asked: int | None, estimated: Estimate, tasks: int) -> int:
    """Worker processes: as asked, or as many as cores, tasks and free memory allow; short work is done in process."""
    if asked is not None:
        return max(1, min(asked, tasks))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # starting a worker takes seconds, so less than that of work is not spread
    worth = int(estimated.seconds // 5) + 1
    return max(1, min(cores, tasks, worth, int(_available_bytes() * 0.8) // estimated.worker_bytes))


def _available_bytes() -> int:
    try:
        with Path("/proc/meminfo").open(encoding="ascii") as lines:
            return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not every system tells; then cores alone decide
        return 1 << 62
