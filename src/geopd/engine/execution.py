"""What runs tasks: the promise that every executor keeps, on this machine or on others.

The process that was called holds the results folder: it plans, commits parts and folds tables. An executor only turns
tasks into outcomes, wherever its workers are, so a worker needs the checkpoints and never the folder. What a worker
does with one task is ``executor.perform_task``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from geopd.engine.task import Task, failed_parts
from geopd.results import Part

ATTEMPTS = 2
"""How often a task is begun whose worker is lost (killed for memory, its node gone) before it counts as failed."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a task: its parts (``failed`` rows where it could not be done), and how it was run.

    ``seconds``: wall seconds in the worker. ``worker``: who did it, for the log. ``attempts``: 1, or more where workers
    were lost. ``peak_bytes``: memory of the worker's own at its highest meanwhile, None where nobody can say.
    ``cpu_seconds``: of the processor, over all its threads: what the task costs whatever else the machine does.
    """

    parts: tuple[Part, ...]
    seconds: float
    worker: str
    attempts: int = 1
    peak_bytes: int | None = None
    cpu_seconds: float = 0.0


class Execution(Protocol):
    """Workers that tasks are given to. Used once: ``run`` to its end, or until ``cancel``.

    Results never depend on which executor ran a task, in what order or beside what: threads are a function of the
    shape, draws one of the matrix's name.
    """

    @property
    def device(self) -> str:
        """Where matrices are put: cpu or cuda."""
        ...

    @property
    def workers(self) -> int:
        """How many tasks are worked on at a time, at most."""
        ...

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Outcome]]:
        """Every task once, with its outcome, as they finish; ``tasks`` come longest first and are begun in that order.

        What goes wrong with one task is in its outcome and never raised. A task whose worker is lost is begun again on
        another, ``ATTEMPTS`` times in all; then its outcome is ``lost``. Closing the iterator cancels.

        Raises:
            RuntimeError: if no worker can be had at all (none starts, the cluster is gone); what was given out holds.
        """
        ...

    def current(self) -> tuple[Task, ...]:
        """The tasks being worked on now, oldest first; may be asked from another thread."""
        ...

    def cancel(self) -> None:
        """Begin nothing more and stop what is under way without waiting for it; its work is lost. Idempotent."""
        ...


def lost(task: Task, reason: str, worker: str, attempts: int) -> Outcome:
    """The outcome of a task whose workers were lost ``attempts`` times: failed, and tried again by the next command.

    ``reason``: what is known of how the last one ended.
    """
    text = f"its worker was lost {attempts} times ({reason}); the same command tries it again"
    return Outcome(tuple(failed_parts(task, text, retry=True)), 0.0, worker, attempts)


def raised(task: Task, error: BaseException, worker: str, attempts: int) -> Outcome:
    """The outcome of a task that made its worker raise what tasks are not expected to: failed, and tried again too."""
    said = str(error).strip().splitlines()[-1:]
    text = f"{worker}: {': '.join([type(error).__name__, *said])}"
    return Outcome(tuple(failed_parts(task, text, retry=True)), 0.0, worker, attempts)
