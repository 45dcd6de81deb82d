"""Calls side by side keep each other's runs, and what goes wrong with one matrix is told and stops no other."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from numpy.linalg import LinAlgError

from checkpoints_on_disk import save_run, save_tensors, small_weights
from geopd.diagnostics import perturbation
from geopd.engine import MeasureOptions, executor, measure
from geopd.engine.task import Task
from geopd.results import Part, read_results

OPTIONS = MeasureOptions(rotation_k="p/4", principal_rank="p/4", similarity_k=(2,), hill_k=(4,))


@pytest.fixture
def world(tmp_path: Path) -> Path:
    save_tensors(tmp_path / "base", small_weights())
    save_run(tmp_path / "one", small_weights(), [1])
    save_run(tmp_path / "other", small_weights(), [1], seed=9)
    return tmp_path


def test_a_second_call_is_refused_while_the_first_measures(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    perform = executor.perform
    complaints = []

    def interrupted(*args: Any) -> list[Part]:
        monkeypatch.setattr(executor, "perform", perform)
        with pytest.raises(ValueError, match="is measuring into it; wait until it is done") as refused:
            measure(world / "base", [world / "other"], world / "out", options=OPTIONS)
        complaints.append(str(refused.value))
        return perform(*args)

    monkeypatch.setattr(executor, "perform", interrupted)
    measure(world / "base", [world / "one"], world / "out", options=OPTIONS)
    assert f"process {os.getpid()} on" in complaints[0]
    assert set(read_results(world / "out").measurements["run"]) == {"one"}
    measure(world / "base", [world / "other"], world / "out", options=OPTIONS)
    assert set(read_results(world / "out").measurements["run"]) == {"one", "other"}


def test_a_number_that_breaks_its_bound_fails_the_call(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perturbation, "violation", lambda _: "Weyl: broken on purpose")
    outcome = measure(world / "base", [world / "one"], world / "out", options=OPTIONS)
    assert outcome.exit_code == 1
    assert set(outcome.failed["one"].values()) == {"Weyl: broken on purpose"}


def test_lapack_giving_up_on_a_matrix_is_told_and_tried_again(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gives_up(*_: object) -> None:
        raise LinAlgError("dsterf returned 1")

    with monkeypatch.context() as patched:
        patched.setattr(executor, "perform", gives_up)
        assert measure(world / "base", [world / "one"], world / "out", options=OPTIONS).exit_code == 1
    assert measure(world / "base", [world / "one"], world / "out", options=OPTIONS).exit_code == 0


@pytest.mark.parametrize("kind", [ValueError, AssertionError, ZeroDivisionError, OverflowError, RuntimeError])
def test_an_unexpected_error_in_one_matrix_fails_that_matrix_alone(
    world: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    perform, struck = executor.perform, "layers.0.self_attn.q_proj"

    def breaks(task: Task, device: str) -> list[Part]:
        if task.weight.name == struck:
            raise kind("f(a) and f(b) must have different signs")
        return perform(task, device)

    with monkeypatch.context() as patched:
        patched.setattr(executor, "perform", breaks)
        outcome = measure(world / "base", [world / "one"], world / "out", options=OPTIONS)
    reason = f"{kind.__name__}: f(a) and f(b) must have different signs"
    assert outcome.exit_code == 1
    assert outcome.failed == {"one": {struck: reason}}
    table = read_results(world / "out").measurements
    of_struck = table.filter(pl.col("matrix") == struck)
    assert set(of_struck["status"]) == {"failed"}
    assert set(of_struck["note"]) == {reason}
    assert "failed" not in set(table.filter(pl.col("matrix") != struck)["status"])
    assert measure(world / "base", [world / "one"], world / "out", options=OPTIONS).exit_code == 0, "tried again"
