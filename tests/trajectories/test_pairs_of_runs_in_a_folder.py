"""Runs two by two in a results folder: which are compared, resumed, replaced and dropped; and bits that stay."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from checkpoints_on_disk import moved, q_name, save_run, save_tensors, small_weights
from geopd.checkpoints import RunManifest, open_checkpoint, write_run_manifest
from geopd.claims import decide_claims
from geopd.diagnostics import Comparison, OriginMatrix, Parameters, RunPair
from geopd.diagnostics.coordinates import measure_jaccard, visible_signs
from geopd.engine import MeasureOptions, make_plan, measure
from geopd.engine.task import perform
from geopd.report import write_report
from geopd.results import read_results
from geopd.results.summary import summarise

OPTIONS = MeasureOptions(metrics=("support_jaccard", "sign_agreement", "update_norm"))
FULL = MeasureOptions(rotation_k="p/4", principal_rank="p/4", similarity_k=(2,), hill_k=(4,))
MATRICES = 6


@pytest.fixture
def world(tmp_path: Path) -> Path:
    base = small_weights()
    save_tensors(tmp_path / "base", base)
    for i, label in enumerate(("opd", "rlvr", "sft")):
        save_run(tmp_path / label, base, [1, 2, 3][: 3 - i], seed=i + 1)
    return tmp_path


def run(world: Path, *labels: str, out: str = "out", options: MeasureOptions = OPTIONS, **more: Any) -> Path:
    measure(world / "base", [world / label for label in labels], world / out, options=options, **more)
    return world / out


def pairs_in(out: Path) -> pl.DataFrame:
    return pl.read_parquet(out / "measurements.parquet").filter(pl.col("other_run").is_not_null())


def named(out: Path) -> set[tuple[str, str]]:
    return set(pairs_in(out).select("run", "other_run").iter_rows())


def part_files(out: Path) -> set[str]:
    return {path.stem for path in (out / "parts").iterdir()}


def manifest(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "manifest.json").read_text())
    return found


def all_parts(out: Path) -> set[str]:
    found = manifest(out)
    own = {key for parts in found["parts"].values() for key in parts.values()}
    return own | {k for others in found["pair_parts"].values() for parts in others.values() for k in parts.values()}


def test_all_pairs_of_one_call_at_their_last_steps(world: Path) -> None:
    out = run(world, "sft", "opd", "rlvr")
    frame = pairs_in(out)
    assert named(out) == {("opd", "rlvr"), ("opd", "sft"), ("rlvr", "sft")}
    assert frame.height == 3 * MATRICES * 2
    assert dict(frame.select("run", "step").unique().iter_rows()) == {"opd": 3, "rlvr": 2}
    assert set(manifest(out)["pair_parts"]["opd"]["sft"]) == set(manifest(out)["parts"]["opd"])
    assert set(pl.read_parquet(out / "nulls.parquet").filter(pl.col("other_run").is_not_null())["null"]) == {
        "independent"
    }
    before = small_weights()[q_name()]
    ends = [open_checkpoint(world / label / f"checkpoint-{n}").read(q_name()) for label, n in (("opd", 3), ("sft", 1))]
    origin = OriginMatrix(before, Parameters())
    (item,) = measure_jaccard(RunPair(origin, *(visible_signs(Comparison(origin, W)) for W in ends)))
    here = frame.filter(
        (pl.col("matrix") == "layers.0.self_attn.q_proj")
        & (pl.col("metric") == "support_jaccard")
        & (pl.col("run") == "opd")
        & (pl.col("other_run") == "sft")
    )
    assert here["value"].to_list() == [item.value]


@pytest.mark.parametrize("metrics", [("update_norm",), ("update_sparsity", "increment_similarity")])
def test_pairs_are_not_measured_unasked(world: Path, metrics: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("geopd.engine.task.visible_signs", None)
    out = run(world, "opd", "rlvr", options=MeasureOptions(metrics=metrics, similarity_k=(2,)))
    assert named(out) == set()
    assert manifest(out)["pair_parts"] == {}


def test_increments_are_not_measured_unasked(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("geopd.engine.task.increment_of", None)
    run(world, "opd", options=MeasureOptions(metrics=("entrywise", "stable_rank", "subspace_gap"), similarity_k=(2,)))


def test_pairs_alone(world: Path) -> None:
    out = run(world, "opd", "rlvr", options=MeasureOptions(metrics=("sign_agreement",)))
    frame = pl.read_parquet(out / "measurements.parquet")
    assert set(frame["metric"]) == {"sign_agreement"}
    assert named(out) == {("opd", "rlvr")}


def test_the_same_call_again_does_nothing(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = run(world, "opd", "rlvr")
    tables = [(out / f"{name}.parquet").read_bytes() for name in ("measurements", "nulls")]
    monkeypatch.setattr("geopd.engine.executor.perform", None)
    outcome = measure(world / "base", [world / "rlvr", world / "opd"], out, options=OPTIONS)
    assert (outcome.measured, outcome.resumed) == (0, 2 * MATRICES)
    assert tables == [(out / f"{name}.parquet").read_bytes() for name in ("measurements", "nulls")]


def test_only_the_missing_pairs_are_measured(world: Path) -> None:
    out = run(world, "opd", "rlvr")
    before = (out / "measurements.parquet").read_bytes()
    lost = manifest(out)["pair_parts"]["opd"]["rlvr"]["layers.0.self_attn.q_proj"]
    (out / "parts" / f"{lost}.parquet").unlink()
    outcome = measure(world / "base", [world / "opd", world / "rlvr"], out, options=OPTIONS)
    assert (outcome.measured, outcome.resumed) == (0, 2 * MATRICES)
    assert (out / "measurements.parquet").read_bytes() == before


def test_a_later_run_is_compared_with_the_runs_of_its_call(world: Path) -> None:
    out = run(world, "opd", "rlvr")
    run(world, "sft")
    assert named(out) == {("opd", "rlvr")}, "what was there is kept, and sft came alone"
    run(world, "sft", "rlvr")
    assert named(out) == {("opd", "rlvr"), ("rlvr", "sft")}
    run(world, "sft", "opd")
    together = run(world, "opd", "rlvr", "sft", out="together")
    assert named(out) == named(together)
    assert pairs_in(out).equals(pairs_in(together))
    assert part_files(out) == all_parts(out) == part_files(together)


def test_a_run_that_grew_is_compared_anew_or_no_more(world: Path) -> None:
    out = run(world, "opd", "rlvr")
    save_tensors(world / "opd" / "checkpoint-9", moved(small_weights(), 5e-3, 7))
    run(world, "opd")
    assert named(out) == set(), "rlvr was not named again, and the pair of before is no pair of the last checkpoints"
    assert part_files(out) == all_parts(out)
    run(world, "opd", "rlvr")
    assert pairs_in(out)["step"].unique().to_list() == [9]
    assert part_files(out) == all_parts(out)


def test_a_replaced_run_takes_its_pairs_along(world: Path) -> None:
    out = run(world, "opd", "rlvr", "sft")
    save_tensors(world / "sft" / "checkpoint-1", moved(small_weights(), 5e-3, 8))
    run(world, "sft", replace=True)
    assert named(out) == {("opd", "rlvr")}
    assert part_files(out) == all_parts(out)


def test_runs_of_two_origins_are_no_pair(world: Path) -> None:
    save_tensors(world / "anchor", small_weights(seed=5))
    out = run(world, "sft")
    measure(world / "anchor", [world / "opd", world / "rlvr"], out, options=OPTIONS)
    assert named(out) == {("opd", "rlvr")}


def test_two_controls_are_held_against_their_baseline_and_not_against_one_another(world: Path) -> None:
    for label in ("rlvr", "sft"):
        write_run_manifest(world / label, RunManifest("other", tags={"rho": label}))
    assert named(run(world, "opd", "rlvr", "sft")) == {("opd", "rlvr"), ("opd", "sft")}


def test_a_damaged_end_fails_the_pair_and_says_so(world: Path) -> None:
    weights = moved(small_weights(), 1e-3)
    weights[q_name()][0, 0] = float("nan")
    save_tensors(world / "sft" / "checkpoint-1", weights)
    outcome = measure(world / "base", [world / "opd", world / "sft"], world / "out", options=OPTIONS)
    assert set(outcome.failed["sft"]) == {"layers.0.self_attn.q_proj"}
    assert outcome.failed["opd"] == {}
    frame = pairs_in(world / "out").filter(pl.col("status") == "failed")
    assert set(frame["matrix"]) == {"layers.0.self_attn.q_proj"}
    assert frame["value"].null_count() == frame.height == 2
    assert "NaN or infinite" in frame["note"][0]


def test_a_damaged_middle_leaves_the_increments_around_it_undefined(world: Path) -> None:
    weights = moved(small_weights(), 1e-3)
    weights[q_name()][0, 0] = float("nan")
    save_tensors(world / "opd" / "checkpoint-2", weights)
    out = run(world, "opd", options=FULL)
    frame = pl.read_parquet(out / "measurements.parquet").filter(
        (pl.col("matrix") == "layers.0.self_attn.q_proj") & (pl.col("metric") == "increment_similarity")
    )
    assert dict(frame.select("step", "status").iter_rows()) == {1: "undefined", 2: "failed", 3: "undefined"}
    assert "could not be read" in frame.filter(pl.col("step") == 3)["note"][0]


def test_bits_do_not_depend_on_workers_order_or_company(world: Path) -> None:
    one = run(world, "opd", "rlvr", options=FULL)
    two = run(world, "rlvr", "opd", out="two", options=FULL, workers=2)
    for name in ("measurements", "nulls"):
        assert (one / f"{name}.parquet").read_bytes() == (two / f"{name}.parquet").read_bytes()
    alone = run(world, "opd", out="alone", options=FULL)
    mine = pl.read_parquet(one / "nulls.parquet").filter((pl.col("run") == "opd") & pl.col("other_run").is_null())
    assert mine.equals(pl.read_parquet(alone / "nulls.parquet"))


def test_walks_reach_the_tables(tmp_path: Path) -> None:
    base = {name: W.float() for name, W in small_weights().items()}
    save_tensors(tmp_path / "base", base)
    save_run(tmp_path / "run", base, [1, 2, 3])
    measure(tmp_path / "base", [tmp_path / "run"], tmp_path / "out", options=FULL)
    nulls = pl.read_parquet(tmp_path / "out" / "nulls.parquet").filter(pl.col("null") == "random_walk")
    assert set(nulls["metric"]) == {"subspace_similarity"}
    assert nulls.height == 4 * 3
    assert nulls.filter(pl.col("step") == 3)["mean"].to_list() == pytest.approx([1.0] * 4)
    means = [nulls.filter(pl.col("step") == t)["mean"].mean() for t in (1, 2, 3)]
    assert means == sorted(means)


def test_checkpoints_are_read_at_most_twice(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from geopd.engine import task as module

    plan = make_plan(world / "base", [world / "opd", world / "rlvr"], FULL)
    name = "layers.0.self_attn.q_proj"
    keys = {(label, name): label for label in ("opd", "rlvr")}
    (task,) = plan.tasks(keys, {("opd", "rlvr", name): "pair"})
    seen: list[str] = []
    read = module.read_matrix

    def watch(location: module.Location) -> torch.Tensor:
        seen.append(str(location.checkpoint.relative_to(world)))
        return read(location)

    monkeypatch.setattr(module, "read_matrix", watch)
    assert [part.key for part in perform(task)] == ["opd", "rlvr", "pair"]
    # three checkpoints: forwards, then back from the two still held; two checkpoints: once each
    assert sorted(seen) == sorted(
        ["base", *(f"opd/checkpoint-{n}" for n in (1, 2, 3, 1)), "rlvr/checkpoint-1", "rlvr/checkpoint-2"]
    )


def test_readers_of_one_run_do_not_see_pairs(world: Path) -> None:
    out = run(world, "opd", "rlvr", options=FULL)
    with_pairs = summarise(read_results(out))
    assert not [column for column in with_pairs.columns if "support_jaccard" in column or "sign_agreement" in column]
    decide_claims(out)
    write_report(out)
    frame = pl.read_parquet(out / "measurements.parquet")
    frame.filter(pl.col("other_run").is_null()).write_parquet(out / "measurements.parquet")
    assert summarise(read_results(out)).equals(with_pairs)
