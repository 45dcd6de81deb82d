"""Running tasks: in this process, or in worker processes that each hold one matrix at a time."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

import torch
from numpy.linalg import LinAlgError
from threadpoolctl import threadpool_limits

from geopd.engine.task import Task, failed_parts, perform
from geopd.results import Part

THREADS = 1  # per task, whatever the machine: thread counts change bits, and matrices are spread over processes instead
_OF_ONE_MATRIX = (MemoryError, OSError, RuntimeError, ValueError, AssertionError, ArithmeticError, LinAlgError)
"""What may go wrong with one matrix and says nothing of the others; torch's LinAlgError is a RuntimeError."""


@contextmanager
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        with threadpool_limits(THREADS):
            yield
    finally:
        torch.set_num_threads(before)


def _perform(task: Task) -> list[Part]:
    with _threads():
        try:
            return perform(task)
        except _OF_ONE_MATRIX as error:
            # one matrix that cannot be finished must not take the others with it; it is tried again next time
            reason = f"{type(error).__name__}: {error}"
            return failed_parts(task, reason, retry=True)


def run_tasks(tasks: list[Task], workers: int) -> Iterator[tuple[Task, list[Part]]]:
    """Finished tasks with their parts, as they finish; results do not depend on the number of workers.

    Raises:
        RuntimeError: if a worker process died; what had finished has been given out.
    """
    if workers == 1:
        for task in tasks:
            yield task, _perform(task)
        return
    context = multiprocessing.get_context("spawn")  # forking a process with running BLAS threads can hang it
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        futures = {pool.submit(_perform, task): task for task in tasks}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool as error:
            raise RuntimeError(
                "a worker process died (out of memory?): what had finished is kept; run the same command again, "
                "with fewer --workers if it recurs"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
