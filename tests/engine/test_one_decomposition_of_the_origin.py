"""The engine's economy: W0 is decomposed once for everything that needs it, and not at all where nothing does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
import torch

from checkpoints_on_disk import save_run, save_tensors, small_weights
from geopd.checkpoints import open_checkpoint
from geopd.diagnostics import comparison, trajectory
from geopd.engine import MeasureOptions, estimate, make_plan, measure, task_cost
from geopd.spectral import Decomposition, decompose, leading_triples

OPTIONS = MeasureOptions(rotation_k="p/4", principal_rank="p/4", similarity_k=(2,), hill_k=(4,))


@pytest.fixture
def world(tmp_path: Path) -> Path:
    save_tensors(tmp_path / "base", small_weights())
    save_run(tmp_path / "opd", small_weights(), [1, 2, 3])
    save_run(tmp_path / "rlvr", small_weights(), [1, 2], seed=9)
    return tmp_path


@pytest.fixture
def decomposed(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Weights given to ``decompose``, updates and increments given to ``leading_triples``, in the order they were."""
    seen: list[torch.Tensor] = []

    def watch(kernel: Callable[[torch.Tensor, int], Decomposition]) -> Callable[[torch.Tensor, int], Decomposition]:
        def watched(W: torch.Tensor, k: int) -> Decomposition:
            seen.append(W[:])
            return kernel(W, k)

        return watched

    monkeypatch.setattr(comparison, "decompose", watch(decompose))
    for module in (comparison, trajectory):
        monkeypatch.setattr(module, "leading_triples", watch(leading_triples))
    return seen


def test_the_origin_is_decomposed_once(world: Path, decomposed: list[torch.Tensor]) -> None:
    measure(world / "base", [world / "opd", world / "rlvr"], world / "out", options=OPTIONS)
    origins = [w.double() for name, w in small_weights().items() if w.ndim == 2 and "embed" not in name]
    for origin in origins:
        assert sum(W.shape == origin.shape and torch.equal(W.double(), origin) for W in decomposed) == 1
    # beside it, each of five checkpoints, their updates and their increments once; each run's first are the same
    assert len(decomposed) == len(origins) * (1 + 5 + 5 + 5 - 2)


@pytest.mark.parametrize(
    ("metrics", "ends"),
    [
        (("spectral_shift",), []),
        (("spectral_shift", "principal_overlap"), ["origin"]),
        (("rotation_left_mean_deg",), ["origin", "checkpoint"]),
    ],
    ids=str,
)
def test_vectors_are_computed_only_of_the_ends_that_need_them(
    world: Path, monkeypatch: pytest.MonkeyPatch, metrics: tuple[str, ...], ends: list[str]
) -> None:
    kinds: dict[bool, set[bool]] = {True: set(), False: set()}
    originals = [w for w in small_weights().values() if w.ndim == 2]

    def watched(W: torch.Tensor, k: int) -> Decomposition:
        is_origin = any(W.shape == w.shape and torch.equal(W, w.to(W.dtype)) for w in originals)
        kinds[is_origin].add(k > 0)
        return decompose(W, k)

    monkeypatch.setattr(comparison, "decompose", watched)
    options = MeasureOptions(metrics=metrics, rotation_k=4, principal_rank=4)
    measure(world / "base", [world / "opd"], world / "out", options=options, workers=1)
    assert kinds[True] == {"origin" in ends}
    assert kinds[False] == {"checkpoint" in ends}


@pytest.mark.parametrize("metrics", [("entrywise",), ("update_sparsity", "low_magnitude_overlap")])
def test_entrywise_metrics_need_no_decomposition(
    world: Path, monkeypatch: pytest.MonkeyPatch, metrics: tuple[str, ...]
) -> None:
    def refuse(*_: object) -> Decomposition:
        raise AssertionError("an SVD was computed")

    monkeypatch.setattr(comparison, "decompose", refuse)
    for module in (comparison, trajectory):
        monkeypatch.setattr(module, "leading_triples", refuse)
    measure(world / "base", [world / "opd"], world / "out", options=MeasureOptions(metrics=metrics), workers=1)
    assert not set(pl.read_parquet(world / "out" / "measurements.parquet")["status"]) & {"failed"}


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [(("update",), 3 + 2), (("stable_rank", "subspace_gap"), 3), (("increment_similarity",), 3)],
    ids=str,
)
def test_update_metrics_decompose_updates_alone(
    world: Path, decomposed: list[torch.Tensor], metrics: tuple[str, ...], expected: int
) -> None:
    """Of three checkpoints, and the two increments that are no update: for those who ask."""
    options = MeasureOptions(metrics=metrics, similarity_k=(2,))
    measure(world / "base", [world / "opd"], world / "out", options=options)
    assert len(decomposed) == 4 * expected


def test_tables_agree_with_measuring_by_hand(world: Path) -> None:
    measure(world / "base", [world / "rlvr"], world / "out", options=OPTIONS)
    frame = pl.read_parquet(world / "out" / "measurements.parquet")
    before = small_weights()["model.layers.0.self_attn.q_proj.weight"]
    after = open_checkpoint(world / "rlvr" / "checkpoint-2").read("model.layers.0.self_attn.q_proj.weight")
    rows = frame.filter((pl.col("matrix") == "layers.0.self_attn.q_proj") & (pl.col("step") == 2))
    by_metric = {row["metric"]: row for row in rows.iter_rows(named=True) if row["is_default"]}
    assert by_metric["update_sparsity"]["value"] == pytest.approx(float((before == after).double().mean()))
    sigma = torch.linalg.svdvals(after.double() - before.double())
    assert by_metric["stable_rank"]["value"] == pytest.approx(float(sigma.square().sum() / sigma[0] ** 2), rel=1e-12)
    assert by_metric["hill_tail"]["value"] == pytest.approx(3 / float(torch.log(sigma[:3] / sigma[3]).sum()), rel=1e-9)
    assert (by_metric["stable_rank"]["rows"], by_metric["stable_rank"]["cols"]) == (24, 16)
    assert (by_metric["stable_rank"]["layer"], by_metric["stable_rank"]["module"]) == (0, "q_proj")


def test_a_plan_reads_no_weights(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("geopd.checkpoints.safetensors_format.safe_open", None)
    plan = make_plan(world / "base", [world / "opd"], OPTIONS)
    tasks = plan.tasks({("opd", name): "" for name in plan.runs[0].pairs})
    assert len(tasks) == 6
    costs = [task_cost(task) for task in tasks]
    assert costs == sorted(costs, reverse=True), "the longest first"
    assert {d.group for task in tasks if task.weight.module == "embedding" for d in task.diagnostics} == {"entrywise"}
    expected = estimate(tasks)
    assert 0 < expected.longest <= expected.seconds
    assert expected.worker_bytes > 1 << 20


def test_selected_matrices_only(world: Path) -> None:
    options = MeasureOptions(matrices=("*.0.*q_proj",), metrics=("update_norm",))
    measure(world / "base", [world / "opd"], world / "out", options=options)
    frame = pl.read_parquet(world / "out" / "measurements.parquet")
    assert set(frame["matrix"]) == {"layers.0.self_attn.q_proj"}
    assert set(frame["metric"]) == {"update_norm"}


def test_another_thread_count_outside_changes_no_bits(world: Path) -> None:
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            measure(world / "base", [world / "opd"], world / f"out{threads}", options=OPTIONS)
            assert torch.get_num_threads() == threads, "left as it was found"
    finally:
        torch.set_num_threads(before)
    one, two = ((world / f"out{threads}" / "measurements.parquet").read_bytes() for threads in (1, 2))
    assert one == two


def test_a_tensor_missing_at_one_step_is_measured_at_the_others(world: Path) -> None:
    fewer = small_weights(seed=3)
    name = "model.layers.0.self_attn.q_proj.weight"
    del fewer[name]
    save_tensors(world / "opd" / "checkpoint-2", fewer)
    outcome = measure(world / "base", [world / "opd"], world / "out", options=OPTIONS)
    assert outcome.exit_code == 0, "what a checkpoint does not hold is left out, not failed"
    frame = pl.read_parquet(world / "out" / "measurements.parquet")
    steps = frame.filter(pl.col("matrix") == "layers.0.self_attn.q_proj")["step"].unique().sort().to_list()
    assert steps == [1, 3]
    manifest = json.loads((world / "out" / "manifest.json").read_text())
    (skip,) = manifest["coverage"]["opd"]["skipped"]
    assert skip["name"] == "layers.0.self_attn.q_proj"
    assert skip["reason"].startswith("missing in ")
    assert skip["reason"].endswith("(at step 2)")


def test_a_failure_is_measured_anew_once_its_input_is_repaired(world: Path) -> None:
    """The same label with another content is a replacement, and replaces the failed rows."""
    broken = small_weights(seed=3)
    broken["model.layers.0.self_attn.q_proj.weight"][0, 0] = float("nan")
    save_tensors(world / "tuned", broken)
    assert measure(world / "base", [world / "tuned"], world / "out", options=OPTIONS).exit_code == 1
    save_tensors(world / "tuned", small_weights(seed=3))
    repaired = measure(world / "base", [world / "tuned"], world / "out", options=OPTIONS, replace=True)
    assert (repaired.exit_code, repaired.measured, repaired.resumed) == (0, 1, 5)
    assert "failed" not in set(pl.read_parquet(world / "out" / "measurements.parquet")["status"])


def test_a_renamed_step_is_another_input(world: Path) -> None:
    run = save_run(world / "renamed", small_weights(), [1, 2])
    measure(world / "base", [run], world / "out", options=OPTIONS)
    (run / "checkpoint-2").rename(run / "checkpoint-20")
    with pytest.raises(ValueError, match="already holds a run labelled renamed with other inputs"):
        measure(world / "base", [run], world / "out", options=OPTIONS)
    measure(world / "base", [run], world / "out", options=OPTIONS, replace=True)
    assert sorted(pl.read_parquet(world / "out" / "measurements.parquet")["step"].unique()) == [1, 20]
