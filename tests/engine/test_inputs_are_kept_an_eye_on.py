"""Inputs that change or go away while they are measured fail by name; only what is selected is read and digested."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest
import torch

from checkpoints_on_disk import moved, q_name, save_run, save_tensors, small_weights, write_run_json
from geopd.checkpoints import Checkpoint, CheckpointError, NotEnoughMemoryError, checkpoint_digest, opening
from geopd.engine import MeasureOptions, executor, make_plan, measure
from geopd.engine import task as task_module
from geopd.engine.executor import InProcess
from geopd.engine.inputs import stamp_of
from geopd.engine.task import Location, Task, read_matrix
from geopd.results import Part

OPTIONS = MeasureOptions(metrics=("update_norm", "stable_rank"))
FIRST = "layers.0.self_attn.q_proj"


@pytest.fixture
def world(tmp_path: Path) -> Path:
    save_tensors(tmp_path / "base", small_weights())
    save_run(tmp_path / "opd", small_weights(), [1, 2])
    return tmp_path


def rewritten(path: Path) -> None:
    save_tensors(path, moved(small_weights(), 5e-3, seed=8))


@pytest.mark.parametrize(
    ("happens", "where", "says"),
    [
        (rewritten, "opd/checkpoint-2", "model.safetensors changed while it was measured"),
        (shutil.rmtree, "opd/checkpoint-2", "vanished while it was measured"),
        (
            lambda path: (path / "model.safetensors").unlink(),
            "base",
            "model.safetensors vanished while it was measured",
        ),
    ],
    ids=["rewritten", "removed", "the origin's file removed"],
)
@pytest.mark.parametrize("when", ["before it is read", "after it was read"])
def test_a_checkpoint_that_goes_away_fails_its_matrix_by_name(
    world: Path, monkeypatch: pytest.MonkeyPatch, happens: Any, where: str, says: str, when: str
) -> None:
    perform, module = executor.perform, "geopd.engine.task._measure_step"
    shutil.copytree(world, world / "kept")

    def disturbed(task: Task, device: str) -> list[Part]:
        if task.weight.name != FIRST:
            return perform(task, device)
        if when == "before it is read":
            happens(world / where)
            return perform(task, device)
        left = [happens]
        with monkeypatch.context() as patched:
            patched.setattr(module, lambda *_: left.pop()(world / where) if left else None)
            return perform(task, device)

    options = MeasureOptions(matrices=(FIRST,), metrics=OPTIONS.metrics)
    with monkeypatch.context() as patched:
        patched.setattr(executor, "perform", disturbed)
        outcome = measure(world / "base", [world / "opd"], world / "out", options=options)
    assert outcome.exit_code == 1
    assert str(world / where) in outcome.failed["opd"][FIRST]
    assert says in outcome.failed["opd"][FIRST]
    shutil.rmtree(world / where, ignore_errors=True)
    shutil.copytree(world / "kept" / where, world / where)
    again = measure(world / "base", [world / "opd"], world / "out", options=options)
    assert (again.exit_code, again.measured) == (0, 1), "tried again, although nothing in its name changed"


def test_a_changed_file_is_noticed_whatever_the_clock_says(world: Path) -> None:
    measure(world / "base", [world / "opd"], world / "out", options=OPTIONS)
    path = world / "opd" / "checkpoint-2" / "model.safetensors"
    before = stamp_of(path.parent)
    rewritten(path.parent)
    os.utime(path, (0, 0))  # written, so it says, long before
    assert stamp_of(path.parent) != before
    with pytest.raises(ValueError, match="already holds a run labelled opd with other inputs"):
        measure(world / "base", [world / "opd"], world / "out", options=OPTIONS)
    measure(world / "base", [world / "opd"], world / "out", options=OPTIONS, replace=True)
    measure(world / "base", [world / "opd"], world / "fresh", options=OPTIONS)
    assert (world / "out" / "measurements.parquet").read_bytes() == (
        world / "fresh" / "measurements.parquet"
    ).read_bytes()


def test_finished_parts_hold_whatever_the_clock_says(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", iter(range(10**9, 0, -3600)).__next__)
    first = measure(world / "base", [world / "opd"], world / "out", options=OPTIONS)
    for path in (world / "out" / "parts").iterdir():
        os.utime(path, (0, 0))
    again = measure(world / "base", [world / "opd"], world / "out", options=OPTIONS)
    assert (first.measured, again.measured, again.resumed) == (6, 0, 6)


def test_a_stamp_leaves_out_what_is_no_weight_and_follows_into_folders_of_shards(world: Path) -> None:
    checkpoint = world / "opd" / "checkpoint-1"
    before = stamp_of(checkpoint)
    (checkpoint / "trainer_state.json").write_text("{}")
    (checkpoint / "checkpoint-7").mkdir()
    (checkpoint / "checkpoint-7" / "model.safetensors").touch()
    assert stamp_of(checkpoint) == before
    (checkpoint / "shards").mkdir()
    (checkpoint / "shards" / "0.pt").touch()
    assert {name for name, *_ in stamp_of(checkpoint)} == {"model.safetensors", "shards/0.pt"}


@pytest.fixture
def digested(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """(checkpoint, tensor) of every digest made."""
    seen: list[tuple[str, str]] = []
    digest = Checkpoint.tensor_digest

    def watched(self: Checkpoint, name: str, look: Any = None) -> str:
        seen.append((self.path.parent.name, name))
        return digest(self, name, look)

    monkeypatch.setattr(Checkpoint, "tensor_digest", watched)
    return seen


def test_only_selected_tensors_are_digested(world: Path, digested: list[tuple[str, str]]) -> None:
    options = MeasureOptions(matrices=(FIRST,), metrics=("update_norm",))
    measure(world / "base", [world / "opd"], world / "out", options=options)
    assert sorted(digested) == sorted((name, q_name()) for name in ("base", "checkpoint-1", "checkpoint-2"))
    plan = make_plan(world / "base", [world / "opd"], options)
    assert sum(plan.tensors().values()) == 3 * 24 * 16 * 2
    (task,) = plan.all_tasks()
    assert task.nbytes == 3 * 24 * 16 * 2


def test_an_origin_is_verified_whole_whatever_is_selected(world: Path, digested: list[tuple[str, str]]) -> None:
    run = world / "opd"
    write_run_json(run, origin={"path": "../base", "digest": checkpoint_digest(world / "base")})
    digested.clear()
    options = MeasureOptions(matrices=(FIRST,), metrics=("update_norm",))
    measure("origin", [run], world / "out", options=options)
    assert {name for where, name in digested if where == "base"} == set(small_weights())
    assert {name for where, name in digested if where != "base"} == {q_name()}
    write_run_json(run, origin={"path": "../base", "digest": "0" * 32})
    with pytest.raises(ValueError, match="not the checkpoint that opd started from"):
        measure("origin", [run], world / "other", options=options)


def test_nothing_changed_is_told(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(world / "base", world / "same")
    measure(world / "base", [world / "same"], world / "out", options=OPTIONS, quiet=False)
    assert f"nothing changed: the same content as {world / 'base'}" in capsys.readouterr().err.replace("\n", "")
    assert set(pl.read_parquet(world / "out" / "measurements.parquet")["status"]) == {"ok", "undefined"}


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Cannot allocate memory (os error 12)"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 3920000 bytes"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    ],
    ids=["MemoryError", "ENOMEM", "torch on a processor", "torch on a GPU"],
)
def test_a_file_there_was_no_memory_for_is_sound_and_is_read_by_the_next(
    world: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    opens, failures = opening.format_of, iter([error])

    def format_of(path: Path) -> object:
        form = opens(path)

        def open_it(*arguments: Any) -> Checkpoint:
            for failure in failures:
                raise CheckpointError("of one shard") from failure
            return form.open(*arguments)

        return SimpleNamespace(open=open_it)

    monkeypatch.setattr(opening, "format_of", format_of)
    where = Location(world / "base", q_name(), stamp_of(world / "base"), readable=True)
    with pytest.raises(NotEnoughMemoryError, match=r"base: not enough memory \(CheckpointError: of one shard\); free"):
        read_matrix(where)
    assert read_matrix(where).equal(small_weights()[q_name()])


def test_what_failed_for_want_of_memory_is_tried_again(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The walk along the run is the first to meet it: no increment may be left out and the rest kept."""
    read, failures = task_module.read_matrix, iter([NotEnoughMemoryError("no memory")])

    def read_matrix(location: Location) -> torch.Tensor:
        if location.checkpoint.name == "checkpoint-1":
            for failure in failures:
                raise failure
        return read(location)

    options = MeasureOptions(metrics=("subspace_similarity", "increment_similarity"))
    monkeypatch.setattr(task_module, "read_matrix", read_matrix)
    run = [world / "opd"]
    assert len(measure(world / "base", run, world / "out", options=options, execution=InProcess()).failed) == 1
    assert measure(world / "base", run, world / "out", options=options, execution=InProcess()).exit_code == 0
    measure(world / "base", run, world / "fresh", options=options)
    tables = [pl.read_parquet(world / out / "measurements.parquet") for out in ("out", "fresh")]
    assert tables[0].equals(tables[1])
