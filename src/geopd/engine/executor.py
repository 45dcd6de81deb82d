"""What a worker does with one task, and the executor that needs no worker: this process itself."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from numpy.linalg import LinAlgError
from threadpoolctl import threadpool_limits

from geopd.engine.execution import Outcome
from geopd.engine.inputs import close_mapped
from geopd.engine.memory import peak_bytes, watch_peak
from geopd.engine.task import Task, failed_parts, perform

_OF_ONE_MATRIX = (MemoryError, OSError, RuntimeError, ValueError, AssertionError, ArithmeticError, LinAlgError)
"""What may go wrong with one matrix and says nothing of the others; torch's LinAlgError is a RuntimeError."""


def threads_of(shape: tuple[int, ...]) -> int:  # noqa: ARG001 - one for every shape: docs/measuring.md says why
    """Threads that work on a matrix of this shape: a function of the shape alone, since thread counts change bits."""
    return 1


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        with threadpool_limits(count):
            yield
    finally:
        torch.set_num_threads(before)


def perform_task(task: Task, worker: str = "here", device: str = "cpu") -> Outcome:
    """What a worker does: one task, with the threads of its shape; its errors become ``failed`` rows.

    ``worker``: its name in the log. ``device``: where the matrices go (``cpu``, ``cuda:0``).
    """
    watch_peak()
    started, cpu_started = time.perf_counter(), time.process_time()
    with _threads(threads_of(task.shape)):
        try:
            parts = perform(task, device)
        except _OF_ONE_MATRIX as error:
            # one matrix that cannot be finished must not take the others with it; it is tried again next time
            parts = failed_parts(task, f"{type(error).__name__}: {error}", retry=True)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    outcome = Outcome(tuple(parts), seconds, worker, peak_bytes=peak_bytes(), cpu_seconds=cpu_seconds)
    close_mapped()
    return outcome


class InProcess:
    """One task at a time in this process, for short work: a worker process takes seconds to start."""

    workers = 1

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self._current: tuple[Task, ...] = ()
        self._cancelled = False

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Outcome]]:
        """Every task with its outcome, in order."""
        for task in tasks:
            if self._cancelled:
                return
            self._current = (task,)
            yield task, perform_task(task, device=self.device)
        self._current = ()

    def current(self) -> tuple[Task, ...]:
        """The task being worked on."""
        return self._current

    def cancel(self) -> None:
        """Begin no more."""
        self._cancelled = True
