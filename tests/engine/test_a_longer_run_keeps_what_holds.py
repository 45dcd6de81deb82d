"""A run that gained checkpoints: only what depends on its new end is computed, and the tables are a fresh folder's."""

from __future__ import annotations

import shutil
from pathlib import Path

import polars as pl
import pytest
import torch

from checkpoints_on_disk import q_name, save_run, save_tensors, small_weights
from geopd.diagnostics import comparison
from geopd.engine import MeasureOptions, measure
from geopd.engine import task as task_module
from geopd.results.task_log import read_log
from geopd.spectral import Decomposition, decompose

OPTIONS = MeasureOptions(rotation_k="p/4", principal_rank="p/4", similarity_k=(2,), hill_k=(4,))
MATRICES = 6


@pytest.fixture
def world(tmp_path: Path) -> Path:
    save_tensors(tmp_path / "base", small_weights())
    save_run(tmp_path / "opd", small_weights(), [1, 2])
    save_run(tmp_path / "rlvr", small_weights(), [1], seed=9)
    return tmp_path


def same(here: Path, there: Path) -> None:
    for name in ("measurements", "nulls", "runs"):
        assert (here / f"{name}.parquet").read_bytes() == (there / f"{name}.parquet").read_bytes(), name
    for folder in ("parts", "vectors"):
        assert {path.name for path in (here / folder).iterdir()} == {path.name for path in (there / folder).iterdir()}
    for path in (here / "vectors").iterdir():
        assert path.read_bytes() == (there / "vectors" / path.name).read_bytes()


DRAWN = MeasureOptions(rotation_k="p/4", principal_rank="p/4", similarity_k=(2, 3), hill_k=(4,), nulls=1)
ALONG = MeasureOptions(metrics=("entrywise", "increment_similarity"), similarity_k=(2,))


@pytest.mark.parametrize(
    ("dtype", "options", "first", "then"),
    [
        (torch.bfloat16, OPTIONS, [1], [1, 2]),
        (torch.float32, OPTIONS, [1, 2], [1, 2, 3, 4]),
        (torch.bfloat16, DRAWN, [1, 2], [1, 2, 3]),
        (torch.bfloat16, ALONG, [1, 2], [1, 2, 3]),
    ],
    ids=["a second checkpoint", "two more, with walks", "drawn nulls", "nothing that depends on the end"],
)
def test_the_tables_are_those_of_a_fresh_folder(
    tmp_path: Path, dtype: torch.dtype, options: MeasureOptions, first: list[int], then: list[int]
) -> None:
    weights = {name: W.to(dtype) for name, W in small_weights(layers=1).items()}
    save_tensors(tmp_path / "base", weights)
    save_run(tmp_path / "rlvr", weights, [1], seed=9)
    for now in (first, then):
        save_run(tmp_path / "opd", weights, now)
        measure(tmp_path / "base", [tmp_path / "opd", tmp_path / "rlvr"], tmp_path / "out", options=options)
    measure(tmp_path / "base", [tmp_path / "opd", tmp_path / "rlvr"], tmp_path / "fresh", options=options)
    same(tmp_path / "out", tmp_path / "fresh")


def test_only_the_new_checkpoint_is_decomposed(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure(world / "base", [world / "opd"], world / "out", options=OPTIONS)
    save_run(world / "opd", small_weights(), [1, 2, 3])
    seen: list[torch.Tensor] = []

    def watched(W: torch.Tensor, k: int) -> Decomposition:
        seen.append(W[:])
        return decompose(W, k)

    monkeypatch.setattr(comparison, "decompose", watched)
    outcome = measure(world / "base", [world / "opd"], world / "out", options=OPTIONS)
    assert (outcome.measured, outcome.resumed) == (MATRICES, 0)
    assert len(seen) == 4 * 2, "four matrices in full: the origin and the new checkpoint"
    lines = read_log(world / "out")[MATRICES:]
    assert {(line["steps"], line["kept_steps"]) for line in lines} == {(1, 2)}


def test_old_checkpoints_are_not_read_where_nothing_depends_on_the_end(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = MeasureOptions(metrics=("entrywise",))
    measure(world / "base", [world / "opd"], world / "out", options=options)
    save_run(world / "opd", small_weights(), [1, 2, 3])
    read, seen = task_module.read_matrix, set()

    def watched(location: task_module.Location) -> torch.Tensor:
        seen.add(location.checkpoint.name)
        return read(location)

    monkeypatch.setattr(task_module, "read_matrix", watched)
    measure(world / "base", [world / "opd"], world / "out", options=options)
    assert seen == {"base", "checkpoint-3"}


def test_another_run_of_the_call_is_left_alone(world: Path) -> None:
    runs = [world / "opd", world / "rlvr"]
    measure(world / "base", runs, world / "out", options=OPTIONS)
    before = {path.name for path in (world / "out" / "parts").iterdir()}
    save_run(world / "opd", small_weights(), [1, 2, 3])
    outcome = measure(world / "base", runs, world / "out", options=OPTIONS)
    assert (outcome.measured, outcome.resumed) == (MATRICES, MATRICES)
    kept = before & {path.name for path in (world / "out" / "parts").iterdir()}
    assert len(kept) == MATRICES, "rlvr's parts; those of the two runs together are of another end"


def test_a_part_that_failed_is_no_foundation(world: Path) -> None:
    weights = small_weights()
    weights[q_name()][0, 0] = float("nan")
    save_tensors(world / "opd" / "checkpoint-2", weights)
    assert measure(world / "base", [world / "opd"], world / "out", options=OPTIONS).exit_code == 1
    save_run(world / "late", small_weights(), [1, 2, 3])
    shutil.copytree(world / "late" / "checkpoint-3", world / "opd" / "checkpoint-3")
    assert measure(world / "base", [world / "opd"], world / "out", options=OPTIONS).exit_code == 1
    measure(world / "base", [world / "opd"], world / "fresh", options=OPTIONS)
    same(world / "out", world / "fresh")
    kept = {line["matrix"]: line["kept_steps"] for line in read_log(world / "out")[MATRICES:]}
    assert {name for name, steps in kept.items() if steps == 0} == {"layers.0.self_attn.q_proj"}


def test_a_run_that_failed_at_its_end_is_measured_anew(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The origin is unreadable the second time: whole parts say so, and none is mixed with an older one's rows."""
    measure(world / "base", [world / "opd"], world / "out", options=OPTIONS)
    save_run(world / "opd", small_weights(), [1, 2, 3])

    def refuse(*_: object) -> None:
        raise MemoryError("none left")

    with monkeypatch.context() as patched:
        patched.setattr(task_module, "OriginMatrix", refuse)
        assert measure(world / "base", [world / "opd"], world / "out", options=OPTIONS).exit_code == 1
    frame = pl.read_parquet(world / "out" / "measurements.parquet")
    assert set(frame["status"]) == {"failed"}
    assert not frame.select("run", "step", "matrix", "metric", "setting").is_duplicated().any()
    measure(world / "base", [world / "opd"], world / "out", options=OPTIONS)
    measure(world / "base", [world / "opd"], world / "fresh", options=OPTIONS)
    same(world / "out", world / "fresh")
