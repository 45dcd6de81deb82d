"""Tasks in worker processes of this machine, each with one matrix at a time, as many as memory allows.

Every worker is a pool of one process, so that a worker that dies takes its own task alone.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from geopd.engine.cost import BASE_BYTES, task_bytes
from geopd.engine.execution import ATTEMPTS, Outcome, lost, raised
from geopd.engine.executor import perform_task
from geopd.engine.memory import budget
from geopd.engine.workload import Task

DEVICES = ("auto", "cpu", "cuda")
_HOPELESS = 4  # losses on end with nothing finished before or between: no worker can live here
_DIED = "the process died, killed for memory?"
_POLL = 0.5  # seconds between looks, so that Ctrl-C is heard while every worker is busy


@dataclass
class _Flight:
    task: Task
    slot: int
    attempts: int


class LocalExecution:
    """Worker processes, or one for every device named.

    ``workers``: processes at most. ``devices``: where worker i puts its matrices, ``devices[i % len(devices)]``.
    ``memory``: bytes that all of them may take together; None for what the machine has left. A task that would not fit
    beside those under way waits, and shorter ones that fit go first; one alone is always begun.
    """

    def __init__(self, workers: int, devices: Sequence[str] = ("cpu",), memory: int | None = None) -> None:
        self._workers = workers
        self._devices = tuple(devices)
        self.device = self._devices[0].partition(":")[0]
        self._memory = budget() if memory is None else memory
        self._pools: dict[int, ProcessPoolExecutor] = {}
        self._flights: dict[Future[Outcome], _Flight] = {}
        self._cancelled = False

    @property
    def workers(self) -> int:
        """Processes at most."""
        return self._workers

    def current(self) -> tuple[Task, ...]:
        """The tasks that workers have now, oldest first."""
        return tuple(flight.task for flight in tuple(self._flights.values()))

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Outcome]]:
        """Every task with its outcome, as they finish.

        Raises:
            RuntimeError: if workers die one after the other and nothing is finished.
        """
        queue, again = list(tasks), list[_Flight]()
        deaths, finished = 0, 0
        try:
            while (queue or again or self._flights) and not self._cancelled:
                self._begin(queue, again)
                done, _ = wait(self._flights, timeout=_POLL, return_when=FIRST_COMPLETED)
                results = []
                for future in done:
                    flight = self._flights.pop(future)
                    error = future.exception()
                    if not isinstance(error, BrokenProcessPool):
                        if isinstance(error, Exception):  # no memory left to say what went wrong, for one
                            outcome = raised(flight.task, error, _name(flight), flight.attempts)
                        else:
                            outcome = replace(future.result(), attempts=flight.attempts)
                        results.append((flight.task, outcome))
                        finished += 1
                        continue
                    deaths += 1
                    self._pools.pop(flight.slot).shutdown(wait=False)
                    if flight.attempts < ATTEMPTS:
                        again.append(flight)
                    else:
                        results.append((flight.task, lost(flight.task, _DIED, _name(flight), flight.attempts)))
                if deaths >= _HOPELESS and not finished:
                    raise RuntimeError(
                        "worker processes die before they finish anything (too little memory for one matrix?): see "
                        "`geopd plan` for what a worker needs"
                    )
                self._begin(queue, again)  # a worker that became free has its next task before this one is told of
                yield from results
        finally:
            self.cancel()

    def _begin(self, queue: list[Task], again: list[_Flight]) -> None:
        free = [slot for slot in range(self._workers) if slot not in {f.slot for f in self._flights.values()}]
        for slot in free:
            if queue:
                fitting = next((task for task in queue if self._fits(task)), None)
                if fitting is None:
                    return
                queue.remove(fitting)
                self._submit(_Flight(fitting, slot, 1))
            elif again and not self._flights:
                # a task whose worker died is begun again alone, in case the others' memory was what killed it
                flight = again.pop(0)
                self._submit(_Flight(flight.task, slot, flight.attempts + 1))

    def _fits(self, task: Task) -> bool:
        held = sum(BASE_BYTES + task_bytes(flight.task) for flight in self._flights.values())
        return not self._flights or held + BASE_BYTES + task_bytes(task) <= self._memory

    def _submit(self, flight: _Flight) -> None:
        slot = flight.slot
        if slot not in self._pools:
            # forking a process with running BLAS threads can hang it
            context = multiprocessing.get_context("spawn")
            self._pools[slot] = ProcessPoolExecutor(1, mp_context=context, initializer=_die_with_parent)
        device = self._devices[slot % len(self._devices)]
        try:
            with _without_interrupts():
                future = self._pools[slot].submit(perform_task, flight.task, _name(flight), device)
        except BrokenProcessPool as error:  # it died between two tasks
            future = Future()
            future.set_exception(error)
        self._flights[future] = flight

    def cancel(self) -> None:
        """Stop the workers, whatever they are doing."""
        self._cancelled = True
        pools, self._pools = list(self._pools.values()), {}
        for pool in pools:
            for process in list((pool._processes or {}).values()):  # Python 3.14 has kill_workers() for it
                process.kill()
            pool.shutdown(wait=True, cancel_futures=True)
        self._flights.clear()


def devices_of(device: str) -> tuple[str, ...]:
    """The devices that ``auto``, ``cpu`` or ``cuda`` stands for: every GPU there is, or the processor.

    Raises:
        ValueError: if it is none of these words, or there is no GPU where one is asked for.
    """
    if device not in DEVICES:
        raise ValueError(f"--device {device}: one of {', '.join(DEVICES)}")
    found = () if device == "cpu" or not torch.cuda.is_available() else range(torch.cuda.device_count())
    if device == "cuda" and not found:
        raise ValueError("--device cuda: torch sees no GPU here; use --device cpu, or install a torch build for CUDA")
    return tuple(f"cuda:{i}" for i in found) or ("cpu",)


def _name(flight: _Flight) -> str:
    return f"worker-{flight.slot}"


@contextmanager
def _without_interrupts() -> Iterator[None]:
    # Ctrl-C reaches the whole process group, and the parent decides what becomes of a worker: one that is started in
    # here never hears it, not even while it imports; the parent hears it behind
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)  # a parent killed outright cannot stop its workers, and they would wait for tasks for ever

    threading.Thread(target=watch, daemon=True).start()
