"""Worker processes: what memory admits, a worker that is lost, what is said while they work, and who starts none."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest

from checkpoints_on_disk import save_run, save_tensors, small_weights
from command_line import geopd
from geopd.engine import MeasureOptions, Outcome, make_plan
from geopd.engine.cost import BASE_BYTES, Estimate, Machine, choose_workers, estimate, probe, task_bytes, task_seconds
from geopd.engine.execution import ATTEMPTS
from geopd.engine.local_execution import LocalExecution, devices_of
from geopd.engine.memory import UNKNOWN, available_bytes
from geopd.engine.progress import Clock, reporter
from geopd.engine.workload import Task
from geopd.results.task_log import append_line, read_log, timing

SMALL = ("--rotation-k", "p/4", "--principal-rank", "p/4", "--similarity-k", "2", "--hill-k", "4")


@pytest.fixture
def tasks(tmp_path: Path) -> list[Task]:
    """Six tasks, longest first: four matrices, an embedding and a norm."""
    save_tensors(tmp_path / "base", small_weights())
    save_run(tmp_path / "opd", small_weights(), [1, 2])
    return make_plan(tmp_path / "base", [tmp_path / "opd"], MeasureOptions()).all_tasks()


class Recorded(LocalExecution):
    """Begins tasks without processes."""

    def _submit(self, flight):  # type: ignore[no-untyped-def]
        self._pools[flight.slot] = _NoPool()  # type: ignore[assignment]
        self._flights[Future()] = flight


class _NoPool:
    _processes = None

    def shutdown(self, **_: bool) -> None:
        """Nothing to stop."""


def test_no_more_matrices_are_in_flight_than_fit(tasks: list[Task]) -> None:
    room = 2 * (BASE_BYTES + max(map(task_bytes, tasks)))
    execution = Recorded(4, memory=room)
    execution._begin(list(tasks), [])
    assert len(execution.current()) == 2
    alone = Recorded(4, memory=1)
    alone._begin(list(tasks), [])
    assert [task.weight.name for task in alone.current()] == [tasks[0].weight.name], "one is begun whatever it takes"


def test_what_fits_beside_a_large_matrix_goes_first(tasks: list[Task]) -> None:
    small = min(tasks, key=task_bytes)
    large = max(tasks, key=task_bytes)
    execution = Recorded(2, memory=2 * BASE_BYTES + task_bytes(large) + task_bytes(small))
    queue = [large, large, small]
    execution._begin(queue, [])
    assert execution.current() == (large, small)
    assert queue == [large]


def test_a_lost_task_is_begun_again_alone(tasks: list[Task]) -> None:
    execution = Recorded(2, memory=UNKNOWN)
    execution._begin(list(tasks[:2]), [])
    future, flight = next(iter(execution._flights.items()))
    del execution._flights[future]
    again = [flight]
    execution._begin([], again)
    assert execution.current() == (tasks[1],), "not beside another"
    execution._flights.clear()
    execution._begin([], again)
    assert execution.current() == (tasks[0],)
    assert next(iter(execution._flights.values())).attempts == ATTEMPTS


def test_workers_that_cannot_live_are_told(tasks: list[Task]) -> None:
    class Dying(Recorded):
        def _submit(self, flight):  # type: ignore[no-untyped-def]
            super()._submit(flight)
            next(future for future in self._flights if not future.done()).set_exception(BrokenProcessPool("killed"))

    with pytest.raises(RuntimeError, match="die before they finish anything"):
        list(Dying(2, memory=UNKNOWN).run(tasks))


class OneFails(Recorded):
    """Every task is done at once, but one, whose future fails."""

    def __init__(self, failing: Task, error: Exception) -> None:
        super().__init__(2, memory=UNKNOWN)
        self.failing, self.error = failing, error

    def _submit(self, flight):  # type: ignore[no-untyped-def]
        super()._submit(flight)
        future = next(future for future in self._flights if not future.done())
        if flight.task is self.failing:
            future.set_exception(self.error)
        else:
            future.set_result(Outcome((), 1.0, "recorded"))


def test_one_lost_twice_is_a_failed_outcome(tasks: list[Task]) -> None:
    execution = OneFails(tasks[0], BrokenProcessPool("killed"))
    outcomes = {task.weight.name: outcome for task, outcome in execution.run(tasks)}
    assert len(outcomes) == len(tasks)
    given_up = outcomes[tasks[0].weight.name]
    assert given_up.attempts == ATTEMPTS
    (part,) = given_up.parts
    assert {row["status"] for row in part.measurements} == {"failed"}
    assert part.record["retry"]
    assert "its worker was lost 2 times (the process died, killed for memory?)" in part.record["failure"]


def test_what_a_worker_raises_fails_its_task_alone(tasks: list[Task]) -> None:
    outcomes = {task.weight.name: outcome for task, outcome in OneFails(tasks[0], MemoryError()).run(tasks)}
    assert len(outcomes) == len(tasks)
    (part,) = outcomes[tasks[0].weight.name].parts
    assert part.record["failure"] == "worker-0: MemoryError"
    assert part.record["retry"]


@pytest.mark.slow
def test_ctrl_c_is_not_heard_by_workers_not_even_while_they_start(tasks: list[Task]) -> None:
    """In a terminal it reaches every process; who asked for the workers is to stop them, in silence."""
    execution = LocalExecution(1, memory=UNKNOWN)

    def interrupt() -> None:
        while not execution._cancelled:
            for pool in list(execution._pools.values()):
                for pid in list(pool._processes or {}):
                    os.kill(pid, signal.SIGINT)
            time.sleep(0.01)

    interrupting = threading.Thread(target=interrupt)
    interrupting.start()
    outcomes = [outcome for _, outcome in execution.run(tasks[:2])]
    interrupting.join()
    assert [outcome.attempts for outcome in outcomes] == [1, 1]
    assert all(part.record["failure"] is None for outcome in outcomes for part in outcome.parts)


def test_available_memory_is_the_least_that_any_limit_leaves(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 2000 kB\nMemAvailable:    1000 kB\n")
    group = tmp_path / "cgroup"
    assert available_bytes(meminfo, group) == 1000 << 10
    group.mkdir()
    (group / "memory.max").write_text("max\n")
    assert available_bytes(meminfo, group) == 1000 << 10, "no limit"
    (group / "memory.max").write_text("600000\n")
    (group / "memory.current").write_text("400000\n")
    (group / "memory.stat").write_text("anon 100000\ninactive_file 250000\n")
    assert available_bytes(meminfo, group) == 450_000, "what the page cache holds can be given up"
    old = group / "memory"
    old.mkdir()
    (old / "memory.limit_in_bytes").write_text("300000\n")
    (old / "memory.usage_in_bytes").write_text("290000\n")
    (old / "memory.stat").write_text("total_inactive_file 0\n")
    assert available_bytes(meminfo, group) == 10_000
    assert available_bytes(tmp_path / "absent", tmp_path / "absent") == UNKNOWN


def test_workers_are_started_for_long_work_only() -> None:
    short, long = Estimate(3.0, 1.0, 1 << 20), Estimate(1e6, 1.0, 1 << 20)
    cores = len(os.sched_getaffinity(0))
    assert choose_workers(None, short, 9) == 0, "this process does it"
    assert choose_workers(None, long, 99) == cores
    assert choose_workers(None, long, 1) == 1
    assert choose_workers(1, long, 9) == 0
    assert choose_workers(3, short, 9) == 3
    assert choose_workers(3, short, 2) == 2


def test_the_estimate_grows_with_the_work_and_falls_with_the_machine(tasks: list[Task]) -> None:
    slow, fast = Machine(1e9, 1e8), Machine(1e10, 1e9)
    for task in tasks:
        assert task_seconds(task, slow) == pytest.approx(10 * task_seconds(task, fast))
    assert estimate(tasks, fast).seconds == pytest.approx(sum(task_seconds(task, fast) for task in tasks))
    machine = probe(0.01)
    assert machine.flop > 1e6
    assert machine.entries > 1e4
    assert machine.read is None


def test_devices_are_named_or_refused() -> None:
    assert devices_of("cpu") == ("cpu",)
    with pytest.raises(ValueError, match="--device tpu: one of auto, cpu, cuda"):
        devices_of("tpu")


def test_cuda_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert devices_of("auto") == ("cpu",)
    with pytest.raises(ValueError, match="--device cuda: torch sees no GPU here"):
        devices_of("cuda")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert devices_of("auto") == devices_of("cuda") == ("cuda:0", "cuda:1"), "one worker for each"


def test_the_time_left_follows_the_cost_of_what_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    clock = Clock([8.0, 1.0, 1.0])
    assert clock.left() is None
    now[0] += 16
    clock.done(8.0)
    assert clock.left() == pytest.approx(4.0)
    assert clock.line(["a", "b", "c", "d"]) == "1/3 matrices, 3.75/min, 4 s left: a, b, c and 1 more"


def test_progress_of_no_such_kind() -> None:
    with pytest.raises(ValueError, match="--progress loud: one of bar, json, none"):
        reporter("loud")


def test_json_lines_tell_every_task(tasks: list[Task], tmp_path: Path) -> None:
    command = ("measure", tmp_path / "base", tmp_path / "opd", "--out", tmp_path / "out", "--workers", "1", *SMALL)
    result = geopd(*command, "--progress", "json")
    assert result.code == 0
    events = [json.loads(line) for line in result.err.splitlines()]
    assert [event["event"] for event in events if event["event"] != "note"] == [
        *("reading", "measuring"),
        *["task"] * len(tasks),
        "measured",
    ]
    told = [event for event in events if event["event"] == "task"]
    assert [event["done"] for event in told] == [1, 2, 3, 4, 5, 6]
    assert {event["of"] for event in told} == {6}
    assert told[-1]["left_seconds"] == pytest.approx(0.0, abs=1e-9)
    assert all(event["seconds"] > 0 and event["expected_seconds"] > 0 for event in told)


def test_the_log_has_a_line_for_every_task_and_show_adds_them_up(tasks: list[Task], tmp_path: Path) -> None:
    out = tmp_path / "out"
    geopd("measure", tmp_path / "base", tmp_path / "opd", "--out", out, "--workers", "1", "--quiet", *SMALL)
    lines = read_log(out)
    assert [line["matrix"] for line in lines] == [task.weight.name for task in tasks]
    sizes = {task.weight.name: 3 * 2 * task.shape[0] * (task.shape[1] if len(task.shape) == 2 else 1) for task in tasks}
    assert {line["matrix"]: line["bytes"] for line in lines} == sizes
    assert {(line["status"], line["attempts"], line["steps"], line["threads"]) for line in lines} == {("ok", 1, 2, 1)}
    estimated = json.loads((out / "manifest.json").read_text())["estimate"]
    assert estimated["tasks"] == 6
    assert estimated["seconds"] == pytest.approx(sum(line["expected_seconds"] for line in lines))
    shown = json.loads(geopd("show", out, "--timing", "--json").out)
    assert shown == timing(lines)
    assert shown["cpu_seconds"] == pytest.approx(sum(line["cpu_seconds"] for line in lines))
    assert all(0 < line["cpu_seconds"] < line["seconds"] + 0.1 for line in lines), "one thread each"
    assert shown["factor"] == pytest.approx(sum(line["seconds"] for line in lines) / estimated["seconds"])
    assert {item["module"]: item["tasks"] for item in shown["modules"]} == {
        "q_proj": 2,
        "down_proj": 2,
        "embedding": 1,
        "norm": 1,
    }
    text = geopd("show", out, "--timing", "--top", "2").out
    assert "6 tasks" in text
    assert "times as long" in text
    assert text.count("24") >= 1


def test_a_line_cut_short_spoils_no_other(tmp_path: Path) -> None:
    append_line(tmp_path, {"matrix": "a"})
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"matr')
    append_line(tmp_path, {"matrix": "b"})
    assert read_log(tmp_path) == [{"matrix": "a"}, {"matrix": "b"}]


def test_timing_of_a_folder_without_a_log(tmp_path: Path) -> None:
    assert "no log.jsonl here" in geopd("show", tmp_path, "--timing").complaint()


def test_a_folder_that_is_not_measured_to_its_end_says_how_to_go_on(tmp_path: Path) -> None:
    append_line(tmp_path, {"matrix": "a"})
    assert "not measured to its end yet; the same `geopd measure` command" in geopd("show", tmp_path).complaint()
