"""What tasks will cost: seconds from a short probe of this machine, memory from their shapes."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from geopd.engine.memory import budget
from geopd.engine.workload import Task, as_matrix_shape

BASE_BYTES = 250 << 20
"""Of a worker's own: an interpreter with torch and its libraries loaded, and what it takes whatever the task."""

# Fitted to 64 x 1024 to 25600 x 5120, one to five checkpoints, one thread (docs/measuring.md has how well it holds).
# Memory: in bytes an entry, entries of the smaller Gram matrix, and sets of leading vectors of both sides.
_ENTRY_BYTES = 9  # masks and one selection copy; as much again where a run has several checkpoints
_GRAM_BYTES = 8
_VECTOR_SETS = 5  # the origin's, the checkpoint's, and what their angles take

# Work: in passes over the entries (one makes a difference of two bf16 matrices in float64 and its norm), with what a
# piece takes whatever the size counted as so many entries more; and in flop of a float64 product.
_ENTRYWISE, _ENTRYWISE_MORE = 60.0, 700_000
_TRIPLES, _TRIPLES_MORE = 235.0, 450_000
_PAIR = 30.0
_PRODUCT_FLOP = 1.35  # for each entry and row or vector of the smaller side: the Gram matrix and the images
_TRIDIAGONAL_FLOP = 2.0  # for each p^3, p = min(m, n)
_VECTOR_FLOP = 10.0  # for each p^2 k
_ANGLE_FLOP = 38.0  # for each (m + n) k^2

_GEMM = 512  # rows and columns of the probed product: 2 MiB a matrix
_PASS = 1 << 20  # entries of the probed pass
_PIECE = 1 << 18  # of them at a time, as the kernels do
_READ = 64 << 20  # bytes that the probe reads at most of each file
SHORT = 0.05
"""Seconds of a probe that only tells short work from long."""
LONG = 3.0
"""Seconds of a probe to be relied on: long enough to feel what else the machine does."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What one core does here: float64 product (flop/s), pass over bf16 entries (entries/s), reading (bytes/s).

    ``read``: of files probed, digested as the inputs are; None where none was.
    """

    flop: float
    entries: float
    read: float | None = None


USUAL = Machine(53e9, 1.9e9)
"""A core of a server's processor with AVX2, nothing else running."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Expected seconds of one worker over all tasks, the longest task's seconds, and peak bytes per worker."""

    seconds: float
    longest: float
    worker_bytes: int


def estimate(tasks: list[Task], machine: Machine | None = None) -> Estimate:
    """Time and memory of the tasks on a machine; None probes this one."""
    if not tasks:
        return Estimate(0.0, 0.0, BASE_BYTES)
    machine = machine or probed(tasks)
    costs = [task_seconds(task, machine) for task in tasks]
    return Estimate(sum(costs), max(costs), BASE_BYTES + max(map(task_bytes, tasks)))


def task_bytes(task: Task) -> int:
    """Peak bytes of a task's own beyond what its worker takes anyway; its inputs are mapped, and the system's.

    One checkpoint's masks are gone before the next decomposition begins; along a trajectory its walk stays beside it.
    """
    rows, cols = as_matrix_shape(task.shape)
    entrywise = rows * cols * _ENTRY_BYTES
    spectra = 0
    if _decomposes(task):
        spectra = 8 * _VECTOR_SETS * (rows + cols) * _rank(task) + _GRAM_BYTES * min(rows, cols) ** 2
    along = max((len(run.steps) for run in task.runs), default=1) > 1
    return (entrywise + spectra if along else max(entrywise, spectra)) + rows * cols * len(task.pairs)


def task_seconds(task: Task, machine: Machine) -> float:
    """Expected seconds of a task in one worker.

    Entrywise work and the update's leading triples for every checkpoint; a decomposition of the origin and of every
    checkpoint, and the angles between them. Of checkpoints that an older part covers only the triples.
    """
    rows, cols = as_matrix_shape(task.shape)
    entries, p, k = rows * cols, min(rows, cols), _rank(task)
    steps = sum(len(run.steps) for run in task.runs)
    new = steps - sum(run.kept.steps for run in task.runs if run.kept)
    passes = _PAIR * entries * len(task.pairs) + new * _ENTRYWISE * (entries + _ENTRYWISE_MORE)
    if any(diagnostic.group != "entrywise" for diagnostic in task.diagnostics):
        passes += steps * _TRIPLES * (entries + _TRIPLES_MORE)
    flop = 0.0
    if _decomposes(task):
        each = _PRODUCT_FLOP * entries * (p + 2 * k) + _TRIDIAGONAL_FLOP * p**3 + _VECTOR_FLOP * p**2 * k
        flop = (1 + new) * each + new * _ANGLE_FLOP * (rows + cols) * k**2
    return (passes / machine.entries + flop / machine.flop) * (1 + 2 * task.options.nulls)


def _decomposes(task: Task) -> bool:
    return any(diagnostic.group == "full" for diagnostic in task.diagnostics)


def _rank(task: Task) -> int:
    """Leading vectors that are kept of a decomposition."""
    shape, asked = as_matrix_shape(task.shape), task.options.parameters
    return min(*shape, max(asked.rotation_k.of(*shape), asked.principal_rank.of(*shape)))


def task_cost(task: Task) -> float:
    """Expected work on a usual core, for the order of tasks: a function of the task alone, in seconds."""
    return task_seconds(task, USUAL)


def probed(tasks: Iterable[Task]) -> Machine:
    """This machine as it is now: probed briefly, and for longer where the tasks take longer."""
    short = probe(SHORT)
    return probe(LONG) if sum(task_seconds(task, short) for task in tasks) > 10 * LONG else short


def probe(seconds: float, files: Iterable[Path] = (), clock: Callable[[], float] = time.perf_counter) -> Machine:
    """Rates of one core, averaged over as many seconds so that a loaded machine shows; a third to read ``files``.

    ``clock``: ``time.process_time`` for the rates that the processor has when nothing else takes it.
    """
    files = list(files)
    span = seconds / (3 if files else 2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        flop, entries = 2.0 * _GEMM**3 / _mean(_product(), span, clock), _PASS / _mean(_pass(), span, clock)
    finally:
        torch.set_num_threads(threads)
    return Machine(flop, entries, _read_rate(files, span))


def _mean(work: Callable[[], object], span: float, clock: Callable[[], float]) -> float:
    """Mean seconds of a call over a span, at least two calls behind one that only warms up."""
    work()
    started, calls = clock(), 0
    while (spent := clock() - started) < span or calls < 2:
        work()
        calls += 1
    return spent / calls if calls else span


def _product() -> Callable[[], object]:
    A = torch.ones(_GEMM, _GEMM, dtype=torch.float64)
    return lambda: A @ A


def _pass() -> Callable[[], object]:
    before, after = torch.ones(_PASS, dtype=torch.bfloat16), torch.full((_PASS,), 1.5, dtype=torch.bfloat16)
    pieces = [slice(start, start + _PIECE) for start in range(0, _PASS, _PIECE)]
    # a buffer of its own: whether the allocator gives pages back and takes them again is a matter of luck, and of ten
    moved = torch.empty(_PIECE, dtype=torch.float64)
    return lambda: [float(torch.linalg.vector_norm(moved.copy_(after[i]).sub_(before[i]))) for i in pieces]


def _read_rate(files: list[Path], span: float) -> float | None:
    state, done, started = hashlib.blake2b(digest_size=16), 0, time.perf_counter()
    for path in files:
        left = _READ
        with path.open("rb") as file:
            while left > 0 and time.perf_counter() - started < span and (block := file.read(1 << 22)):
                state.update(block)
                done, left = done + len(block), left - len(block)
    return done / (time.perf_counter() - started) if done else None


def choose_workers(asked: int | None, estimated: Estimate, tasks: int) -> int:
    """Worker processes: as asked, or as many as cores, tasks and free memory allow; 0 for this process itself.

    A worker takes seconds to start, so less than that of work is done here, and what one alone is asked to do.
    """
    if asked is not None:
        return 0 if asked == 1 else min(asked, tasks)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    worth = int(estimated.seconds // 5)
    return max(min(1, worth), min(cores, tasks, worth, budget() // BASE_BYTES))
