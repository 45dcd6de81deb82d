"""Killed, out of disk, out of memory, without rights or beside another: the same command then ends in the same bits."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import polars as pl
import pytest

from checkpoints_on_disk import moved, q_name, save_run, save_shards, save_tensors, small_weights
from command_line import geopd, start_geopd
from forked_measurements import LARGE, ForkedMeasurements, perform_with_little_memory
from geopd.engine import local_execution, measure
from geopd.results.task_log import read_log

pytestmark = pytest.mark.faults
ROUNDS = int(os.environ.get("GEOPD_FAULTS_ROUNDS", "10"))
METRICS = ("update_norm", "stable_rank", "subspace_similarity", "increment_similarity", "rotation_left_mean_deg")
SMALL = ("--rotation-k", "p/4", "--principal-rank", "p/4", "--similarity-k", "2", "--hill-k", "4", "--quiet")
SMALL += ("--cache-dir", "none")
SMALL += tuple(word for metric in (*METRICS, "support_jaccard") for word in ("--metrics", metric))
TABLES = ("measurements", "nulls", "runs", "evaluations")
KILLED = -9


def tables(out: Path) -> dict[str, bytes]:
    return {name: (out / f"{name}.parquet").read_bytes() for name in TABLES}


class World:
    """A base, a run of three steps and its first two alone, and what undisturbed commands made of them."""

    def __init__(self, root: Path, forked: ForkedMeasurements) -> None:
        self.root, self.forked = root, forked
        weights = small_weights(layers=1)
        self.base = save_tensors(root / "base", weights)
        self.run, self.first = save_run(root / "opd", weights, [1, 2, 3]), root / "first" / "opd"
        for step in (1, 2):
            shutil.copytree(self.run / f"checkpoint-{step}", self.first / f"checkpoint-{step}")
        self.other = save_run(root / "rlvr", weights, [1], seed=4)
        self.seconds = self.measure(root / "whole")["seconds"]
        self.whole = tables(root / "whole")
        assert self.forked.geopd("measure", self.base, self.first, "--out", root / "begun", *SMALL)["code"] == 0

    def command(self, out: Path) -> tuple[object, ...]:
        return ("measure", self.base, self.run, self.other, "--out", out, "--workers", "1", *SMALL)

    def measure(self, out: Path, **request: object) -> dict[str, object]:
        return self.forked.geopd(*self.command(out), **request)


@pytest.fixture(scope="module")
def world(forked: ForkedMeasurements, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"), forked)


@pytest.mark.parametrize("round_", range(ROUNDS))
def test_killed_at_a_random_moment_twice_and_taken_up_again(world: World, round_: int) -> None:
    draw, out = random.Random(round_), world.root / f"killed-{round_}"
    if round_ % 2:  # every other time a run of two steps is there and gains a third
        shutil.copytree(world.root / "begun", out)
    for _ in range(2):
        killed = world.measure(out, kill_after=draw.uniform(0, world.seconds))
        assert killed["code"] in (KILLED, 0), killed
    ended = world.measure(out)
    assert ended["code"] == 0, ended
    assert tables(out) == world.whole
    assert not list(out.rglob("*.tmp")), "nothing half-written is left"
    assert all(line["status"] == "ok" for line in read_log(out))
    shutil.rmtree(out)


@pytest.mark.parametrize("at", ["a part", "the tables"])
def test_a_disk_that_is_full(world: World, at: str) -> None:
    out = world.root / f"full at {at}"
    if at == "the tables":  # the parts are all there
        shutil.copytree(world.root / "whole", out)
        for name in (*TABLES, "manifest"):
            next(out.glob(f"{name}.*")).unlink()
    full = world.measure(out, limits={"FSIZE": 1000})
    assert full["code"] == 1, full
    assert full["err"].startswith(f"geopd: {out}: cannot be written")
    assert "make room and run the same command again" in full["err"]
    assert "Traceback" not in full["err"]
    assert not (out / "manifest.json").exists()
    assert world.measure(out)["code"] == 0
    assert tables(out) == world.whole


def test_an_output_folder_without_the_right_to_write(world: World) -> None:
    out = world.root / "read only"
    out.mkdir(mode=0o555)
    refused = world.measure(out, without_privileges=True)
    assert refused["code"] == 2, refused
    assert refused["err"] == f"geopd: --out {out}: cannot be written (Permission denied); name another folder\n"


def test_a_file_without_the_right_to_read(world: World) -> None:
    weights = moved(small_weights(layers=1), 1e-3)
    alone = {q_name(): weights.pop(q_name())}
    run = save_shards(world.root / "unreadable", [alone, weights])
    (run / "model-00001-of-00002.safetensors").chmod(0)
    out = world.root / "out of unreadable"
    command = ("measure", world.base, run, "--out", out, "--workers", "1", *SMALL)
    result = world.forked.geopd(*command, without_privileges=True)
    assert result["code"] == 1, result
    assert "model-00001-of-00002.safetensors: Permission denied" in result["err"]
    frame = pl.read_parquet(out / "measurements.parquet")
    assert set(frame.filter(pl.col("status") == "failed")["matrix"]) == {"layers.0.self_attn.q_proj"}
    (run / "model-00001-of-00002.safetensors").chmod(0o644)
    assert world.forked.geopd(*command)["code"] == 0
    assert world.forked.geopd(*command[:4], world.root / "readable", *command[5:])["code"] == 0
    assert tables(out) == tables(world.root / "readable")


def test_a_second_writer_is_refused_and_a_dead_one_holds_nothing(world: World) -> None:
    out = world.root / "two writers"
    first = world.measure(out, meanwhile=world.command(out))
    second = first["other"]
    assert second["code"] == 2, second
    assert "is measuring into it; wait until it is done, or name another --out" in second["err"]
    assert first["code"] == 0
    assert tables(out) == world.whole
    stopped = world.measure(world.root / "dead", kill_after=world.seconds / 2)
    assert stopped["code"] == KILLED
    assert world.measure(world.root / "dead")["code"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("beyond", [0, 1 << 20, 4 << 20], ids=["to open it", "to map its file", "to work with it"])
def test_a_matrix_too_large_for_the_memory_fails_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beyond: int
) -> None:
    """The worker's address space ends so many bytes beyond what is in use while it has the large matrix."""
    weights = small_weights(layers=1) | {LARGE: small_weights(rows=700, cols=700)[q_name()]}
    base, run = save_tensors(tmp_path / "base", weights), save_tensors(tmp_path / "run", moved(weights, 1e-3))
    with monkeypatch.context() as patched:
        patched.setattr(local_execution, "perform_task", partial(perform_with_little_memory, beyond))
        workers = local_execution.LocalExecution(1, memory=1 << 40)
        limited = measure(base, [run], tmp_path / "out", execution=workers)
    assert limited.exit_code == 1
    assert set(limited.failed["run"]) == {"layers.9.mlp.up_proj"}
    said = limited.failed["run"]["layers.9.mlp.up_proj"]
    assert re.search("(cannot|can't) allocate memory|MemoryError", said, re.IGNORECASE)
    assert "copy it again" not in said, "the file is sound"
    frame = pl.read_parquet(tmp_path / "out" / "measurements.parquet")
    assert set(frame.filter(pl.col("status") == "failed")["matrix"]) == {"layers.9.mlp.up_proj"}
    assert measure(base, [run], tmp_path / "out").measured == 1
    measure(base, [run], tmp_path / "roomy")
    assert tables(tmp_path / "out") == tables(tmp_path / "roomy")


@pytest.mark.slow
def test_a_worker_killed_in_the_middle_costs_its_task_a_second_try(tmp_path: Path) -> None:
    weights = small_weights(layers=4, rows=320, cols=256)
    base, run = save_tensors(tmp_path / "base", weights), save_run(tmp_path / "opd", weights, [1])
    command = ("measure", base, run, *SMALL)
    process = start_geopd(*command, "--workers", "2", "--out", tmp_path / "out", "--progress", "json")
    deadline = time.monotonic() + 300
    victim = None
    while victim is None and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
        if (tmp_path / "out" / "log.jsonl").exists():
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            workers = [pid for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
            victim = int(workers[0]) if workers else None
    assert victim is not None
    os.kill(victim, signal.SIGKILL)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert geopd(*command, "--workers", "1", "--quiet", "--out", tmp_path / "alone").code == 0
    assert tables(tmp_path / "out") == tables(tmp_path / "alone")


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_ctrl_c_leaves_a_folder_to_go_on_from_and_says_so(tmp_path: Path, workers: str) -> None:
    weights = small_weights(layers=6, rows=320, cols=256)
    base, run = save_tensors(tmp_path / "base", weights), save_run(tmp_path / "opd", weights, [1])
    command = ("measure", base, run, "--workers", workers, *SMALL)
    process = start_geopd(*command, "--out", tmp_path / "out")
    deadline = time.monotonic() + 120
    while not (tmp_path / "out" / "log.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1, err
    assert err == "geopd: stopped; what had finished is kept, the same command goes on from there\n"
    done = len(read_log(tmp_path / "out"))
    assert 1 <= done < 14
    assert geopd(*command, "--out", tmp_path / "out", "--workers", "1").code == 0
    assert len(read_log(tmp_path / "out")) == 14, "what had finished was left as it was"
    assert geopd(*command, "--out", tmp_path / "whole", "--workers", "1").code == 0
    assert tables(tmp_path / "out") == tables(tmp_path / "whole")
