"""Ray: the same tasks on a cluster's nodes, the same bits, and a node that dies takes nothing with it."""

from __future__ import annotations

import builtins
import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints_on_disk import save_run, save_tensors, small_weights
from geopd.engine import MeasureOptions, make_plan
from geopd.engine.execution import ATTEMPTS, Outcome
from geopd.engine.executor import perform_task
from geopd.engine.ray_execution import RayExecution
from geopd.engine.task import Task

OPTIONS = MeasureOptions(rotation_k="p/4", principal_rank="p/4", similarity_k=(2,), hill_k=(4,))
SOON = {  # a dead node is noticed within seconds, not half a minute
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 10_000,  # a dead node refuses at once; one that is only starved may take its time
    "health_check_failure_threshold": 3,
}
NODE = {"num_cpus": 1, "object_store_memory": 80 << 20, "include_dashboard": False}


def tasks_of(root: Path, *, layers: int, rows: int, cols: int) -> list[Task]:
    weights = small_weights(layers=layers, rows=rows, cols=cols)
    base = save_tensors(root / "base", weights)
    runs = [save_run(root / "opd", weights, [1, 2]), save_run(root / "rlvr", weights, [1], seed=9)]
    plan = make_plan(base, runs, OPTIONS)
    keys = {(run.run.label, name): f"{run.run.label} {name}" for run in plan.runs for name in run.pairs}
    return plan.tasks(keys)


def rows(found: Sequence[tuple[Task, Outcome]]) -> dict[str, tuple[Any, ...]]:
    """All that a part says but how long it took, by its name."""
    parts = [part for _, outcome in found for part in outcome.parts]
    assert len({part.key for part in parts}) == len(parts), "no task is done twice"
    return {
        part.key: (
            repr(part.measurements),
            repr(part.nulls),
            {name: array.tobytes() for name, array in part.vectors.items()},
            part.record["failure"],
        )
        for part in parts
    }


def by_hand(tasks: Sequence[Task]) -> dict[str, tuple[Any, ...]]:
    return rows([(task, perform_task(task)) for task in tasks])


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head node of one processor; a second is added by the test."""
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_DISABLE_MEMORY_MONITOR", "1")
    import ray
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args=NODE | {"_system_config": SOON})
    yield made
    ray.shutdown()
    made.shutdown()


def test_without_ray_the_remedy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    found = builtins.__import__

    def without_ray(name: str, *arguments: Any) -> Any:
        if name == "ray":
            raise ImportError("No module named 'ray'")
        return found(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without_ray)
    with pytest.raises(ValueError, match=r"--engine ray: Ray is not installed; `pip install 'geopd\[ray\]'`"):
        RayExecution()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_a_node_killed_in_the_middle_costs_no_task_and_no_bit(
    tmp_path: Path, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first task waits there until the node is killed, the others go on; then the node that is left does it too."""
    from geopd.engine import ray_execution

    second = cluster.add_node(**{key: value for key, value in NODE.items() if key != "include_dashboard"})
    cluster.wait_for_nodes()
    tasks = tasks_of(tmp_path, layers=4, rows=160, cols=128)
    doomed, struck = second.node_id, tmp_path / "struck"

    def waits_on_the_second(task: Task, device: str) -> Outcome:
        import ray

        node = ray.get_runtime_context().get_node_id()
        if node == doomed:
            struck.write_text(task.weight.name)
            time.sleep(3600)
        return perform_task(task, node)

    def kill() -> None:
        while not struck.exists():
            time.sleep(0.05)
        cluster.remove_node(second, allow_graceful=False)

    waits_on_the_second.__module__ = "__main__"  # so that it travels by value: workers do not know this file
    monkeypatch.setattr(ray_execution, "_on_a_node", waits_on_the_second)
    execution = RayExecution(cluster.address)
    assert execution.workers == 2
    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    found = list(execution.run(tasks))
    killer.join(60)
    again = {task.weight.name for task, outcome in found if outcome.attempts == ATTEMPTS}
    assert struck.read_text() in again, "what the dead node was at was begun again"
    assert {outcome.worker for _, outcome in found} == {cluster.head_node.node_id}
    assert len(found) == len(tasks)
    assert rows(found) == by_hand(tasks)
    assert all(failure is None for *_, failure in rows(found).values())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_a_task_that_takes_every_worker_down_fails_alone_and_so_does_one_that_raises(
    tmp_path: Path, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from geopd.engine import ray_execution

    tasks = tasks_of(tmp_path, layers=1, rows=24, cols=16)
    struck, raising = (task.weight.name for task in tasks[:2])

    def dies(task: Task, device: str) -> Outcome:
        if task.weight.name == struck:
            os._exit(9)
        if task.weight.name == raising:
            raise MemoryError("first line\nlast line")
        return perform_task(task, "node")

    dies.__module__ = "__main__"  # so that it travels by value: workers do not know this file
    monkeypatch.setattr(ray_execution, "_on_a_node", dies)
    found = list(RayExecution(cluster.address).run(tasks))
    lost = [outcome for task, outcome in found if task.weight.name == struck]
    assert [outcome.attempts for outcome in lost] == [ATTEMPTS]
    failures = {part.record["failure"] for part in lost[0].parts}
    assert len(failures) == 1
    assert "its worker was lost 2 times (WorkerCrashedError" in failures.pop()
    assert all(part.record["retry"] for part in lost[0].parts)
    (raised,) = (outcome for task, outcome in found if task.weight.name == raising)
    assert {part.record["failure"] for part in raised.parts} == {"ray: MemoryError: last line"}
    assert all(part.record["retry"] for part in raised.parts)
    others = [(task, outcome) for task, outcome in found if task.weight.name not in (struck, raising)]
    assert rows(others) == by_hand(tasks[2:])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_a_cancelled_run_begins_no_more(tmp_path: Path, cluster: Any) -> None:
    tasks = tasks_of(tmp_path, layers=3, rows=24, cols=16)
    execution = RayExecution(cluster.address, workers=1)
    assert execution.workers == 1
    given = execution.run(tasks)
    next(given)
    execution.cancel()
    execution.cancel()
    assert list(given) == []
    assert execution.current() == ()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own
@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU that the cluster offers must be a pretended one")
def test_where_nodes_offer_gpus_each_task_has_one(tmp_path: Path, cluster: Any) -> None:
    """The node says it has a GPU and has none, so what its one task at a time meets is torch without CUDA."""
    tasks = tasks_of(tmp_path, layers=1, rows=24, cols=16)
    with pytest.raises(ValueError, match="--device cuda: no node of the Ray cluster offers a GPU; use --device cpu"):
        RayExecution(cluster.address, device="cuda")
    assert RayExecution(cluster.address, device="auto").device == "cpu"
    cluster.add_node(**{key: value for key, value in NODE.items() if key != "include_dashboard"}, num_gpus=1)
    cluster.wait_for_nodes()
    execution = RayExecution(cluster.address, device="auto")
    assert (execution.device, execution.workers) == ("cuda", 1)
    reasons = {part.record["failure"] for _, outcome in execution.run(tasks) for part in outcome.parts}
    assert all("CUDA" in reason or "NVIDIA" in reason for reason in reasons), reasons


def test_an_address_without_a_cluster_is_named() -> None:
    pytest.importorskip("ray")
    with pytest.raises(ValueError, match=r"--engine ray: no Ray cluster 127\.0\.0\.1:1: ConnectionRefusedError"):
        RayExecution("127.0.0.1:1")
