"""Tasks on a Ray cluster: each node reads the checkpoints itself and sends back finished parts.

The process that was called keeps the results folder; nodes need the same geopd and the checkpoints under the same paths
(a shared file system), nothing else. Ray places a task where its threads and its memory are free, on a GPU of its own
where GPUs measure. A task whose worker or node is lost is begun again elsewhere. Ray is optional and imported on use.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from geopd.engine.cost import BASE_BYTES, task_bytes
from geopd.engine.execution import ATTEMPTS, Outcome, lost, raised
from geopd.engine.executor import perform_task, threads_of
from geopd.engine.task import Task

_OBJECT_STORE = 128 << 20  # bytes, of a Ray started here: finished parts pass through it, weights never do
_PATIENCE = 10.0  # seconds without news after which it is asked whether any node is left
_GRACE = 180.0  # seconds that a cluster without nodes is given to start one


@dataclass
class _Flight:
    task: Task
    attempts: int = 1


class RayExecution:
    """Workers of a Ray cluster: the one at ``address``, else at ``RAY_ADDRESS``, else one started on this machine.

    ``workers`` caps how many tasks are in flight, None for what the nodes alive take. ``device``: cuda, cpu, or auto
    for GPUs where nodes offer any. A Ray that this process is connected to already is used and left as it is.

    Raises:
        ValueError: if Ray is not installed, there is no cluster at the address, or no GPU in it where one is asked for.
    """

    def __init__(self, address: str | None = None, workers: int | None = None, device: str = "cpu") -> None:
        try:
            import ray
        except ImportError as error:
            raise ValueError("--engine ray: Ray is not installed; `pip install 'geopd[ray]'`") from error
        self._ray: Any = ray
        self._cap = workers
        self._processors = 1
        self._flights: dict[Any, _Flight] = {}
        self._cancelled = False
        self._owner = not ray.is_initialized()
        if self._owner:
            _connect(ray, address, workers)
        self.device = device if device != "auto" else "cuda" if self._offered("GPU") else "cpu"
        if device == "cuda" and not self._offered("GPU"):
            self._leave()
            raise ValueError("--device cuda: no node of the Ray cluster offers a GPU; use --device cpu")

    @property
    def workers(self) -> int:
        """Processors of the nodes alive (when Ray was last asked), or their GPUs where these measure, or the cap."""
        if self._ray.is_initialized():
            self._processors = max(1, self._offered("GPU" if self.device == "cuda" else "CPU"))
        return self._processors if self._cap is None else min(self._processors, self._cap)

    def _offered(self, resource: str) -> int:
        return int(sum(node["Resources"].get(resource, 0) for node in self._nodes()))

    def _leave(self) -> None:
        if self._owner:
            self._ray.shutdown()

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Outcome]]:
        """Every task once, with its outcome, as they finish; the contract is ``execution.Execution.run``'s.

        Raises:
            RuntimeError: if no node of the cluster is left.
        """
        waiting, alive = list(reversed(tasks)), time.monotonic()
        try:
            while (waiting or self._flights) and not self._cancelled:
                # twice as many as are worked on: a worker that finishes finds the next one on its node
                while waiting and len(self._flights) < (self._cap or 2 * self.workers):
                    self._submit(_Flight(waiting.pop()))
                if not (in_flight := list(self._flights)):
                    continue
                ready, _ = self._ray.wait(in_flight, timeout=_PATIENCE)
                if ready or self._nodes():
                    alive = time.monotonic()
                elif time.monotonic() - alive > _GRACE:
                    raise RuntimeError(
                        "no node of the Ray cluster is left; what had finished is kept: run the same command again"
                    )
                for reference in ready:
                    flight = self._flights.pop(reference, None)  # None: cancelled meanwhile
                    outcome = flight and self._outcome(reference, flight)
                    if flight and outcome and not self._cancelled:
                        yield flight.task, outcome
        finally:
            self.cancel()
            self._leave()

    def current(self) -> tuple[Task, ...]:
        """The oldest tasks in flight, as many as there are processors: Ray begins them in this order."""
        return tuple(flight.task for flight in list(self._flights.values())[: self.workers])

    def cancel(self) -> None:
        """Begin no more, and kill what is under way."""
        self._cancelled = True
        for reference in list(self._flights):
            with suppress(self._ray.exceptions.RayError):  # the cluster may be gone
                self._ray.cancel(reference, force=True)
        self._flights.clear()

    def _nodes(self) -> list[dict[str, Any]]:
        """Nodes alive that offer processors."""
        return [node for node in self._ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) > 0]

    def _submit(self, flight: _Flight) -> None:
        largest = max((int(node["Resources"].get("memory", 0)) for node in self._nodes()), default=0)
        # what no node can promise is done by the largest one alone
        memory = min(BASE_BYTES + task_bytes(flight.task), largest) or None
        placed = self._ray.remote(_on_a_node).options(
            num_cpus=threads_of(flight.task.shape),
            num_gpus=int(self.device == "cuda"),
            memory=memory,
            max_retries=0,
            name=flight.task.weight.name,
        )
        self._flights[placed.remote(flight.task, self.device)] = flight

    def _outcome(self, reference: Any, flight: _Flight) -> Outcome | None:
        """None where the task has been begun again."""
        errors = self._ray.exceptions
        try:
            found: Outcome = self._ray.get(reference)
            return replace(found, attempts=flight.attempts)
        except errors.RayTaskError as error:  # raised in the worker: it would be again
            return raised(flight.task, error.cause or error, "ray", flight.attempts)
        except errors.RayError as error:  # its worker, its node or its finished parts were lost
            if self._cancelled:
                return None
            if flight.attempts >= ATTEMPTS:
                return lost(flight.task, _first_line(error), "ray", flight.attempts)
            self._submit(_Flight(flight.task, flight.attempts + 1))
            return None


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def _connect(ray: Any, address: str | None, workers: int | None) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # measuring weights calls nobody
    local: dict[str, Any] = {}
    if address is None and not os.environ.get("RAY_ADDRESS"):
        local = {"address": "local", "num_cpus": workers, "include_dashboard": False}
        local["object_store_memory"] = _OBJECT_STORE
    elif address is not None:
        local = {"address": address}
    where = address or os.environ.get("RAY_ADDRESS") or "on this machine"
    host, _, port = where.rpartition(":")
    try:
        if port.isdigit() and "/" not in host:
            socket.create_connection((host, int(port)), _PATIENCE).close()  # Ray itself would try for five minutes
        ray.init(logging_level="ERROR", log_to_driver=False, **local)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"--engine ray: no Ray cluster {where}: {_first_line(error)}; see `ray status`") from error


def _on_a_node(task: Task, device: str) -> Outcome:
    """What a Ray worker does: the same as any worker. Of a node's GPUs it sees the one that Ray gives it."""
    import ray

    return perform_task(task, f"{socket.gethostname()}/{ray.get_runtime_context().get_node_id()[:8]}", device)
