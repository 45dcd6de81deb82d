from __future__ import annotations

from dataclasses import replace
from math import log
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from geopd.results import Results, read_results
from geopd.results.summary import (
    aggregate,
    complete,
    matched,
    movers,
    rotation,
    rows_of,
    summarise,
)
from geopd.results.thresholds import Threshold, check_thresholds, parse_threshold
from synthetic_results import STUDY, Folder, Run, every_matrix


@pytest.fixture(scope="module")
def results(study_folder: Path) -> Results:
    return read_results(study_folder)


def by_hand(results: Results, run: str, metric: str) -> pl.DataFrame:
    return results.measurements.filter(
        (pl.col("run") == run)
        & (pl.col("step") == 120)
        & (pl.col("metric") == metric)
        & pl.col("is_default")
        & pl.col("layer").is_not_null()
        & (pl.col("status") == "ok")
    )


def test_sparsity_is_weighted_by_parameters_and_the_rest_is_not(results: Results) -> None:
    line = summarise(results).row(by_predicate=pl.col("run") == "opd", named=True)
    rows = by_hand(results, "opd", "update_sparsity")
    weights = (rows["rows"] * rows["cols"]).to_numpy()
    assert line["update_sparsity"] == pytest.approx(np.average(rows["value"].to_numpy(), weights=weights))
    assert line["update_sparsity"] != pytest.approx(rows["value"].mean(), rel=1e-6)
    assert line["stable_rank"] == pytest.approx(by_hand(results, "opd", "stable_rank")["value"].mean())
    assert line["matrices"] == 27  # one of the 28 failed
    assert line["parameters"] == weights.sum()


def test_all_parameters_count_embeddings_head_and_norms(results: Results) -> None:
    line = summarise(results).row(by_predicate=pl.col("run") == "sft", named=True)
    rows = results.measurements.filter(
        (pl.col("run") == "sft") & (pl.col("step") == 120) & (pl.col("metric") == "update_sparsity")
    )
    assert set(rows["module"]) >= {"embedding", "head", "norm"}
    expected = np.average(rows["value"].to_numpy(), weights=(rows["rows"] * rows["cols"]).to_numpy())
    assert line["update_sparsity_all_parameters"] == pytest.approx(expected)
    assert line["update_sparsity_all_parameters"] != line["update_sparsity"]


def test_nulls_are_averaged_over_the_same_matrices_in_the_same_way(results: Results) -> None:
    line = summarise(results).row(by_predicate=pl.col("run") == "rlvr", named=True)
    rows = rows_of(results, "low_magnitude_overlap").filter(pl.col("run") == "rlvr")
    assert (rows["status"] == "undefined").any()
    pairs = matched(rows, rows_of(results, table="nulls")).filter(pl.col("null") == "gaussian")
    assert pairs.height == (rows["status"] == "ok").sum()
    assert line["low_magnitude_overlap_null_gaussian"] == pytest.approx(pairs["null_mean"].mean())
    assert line["low_magnitude_overlap_null_random_mask"] == pytest.approx(0.5)
    expected = log(line["low_magnitude_overlap"] / line["low_magnitude_overlap_null_gaussian"])
    assert line["low_magnitude_overlap_log_ratio_gaussian"] == pytest.approx(expected)


def test_unresolved_values_are_counted_and_left_out(results: Results) -> None:
    first = summarise(results, every_step=True).filter((pl.col("run") == "rlvr") & (pl.col("step") == 20))
    assert first["unresolved"].item() == 4
    rows = rows_of(results, "stable_rank", every_step=True).filter((pl.col("run") == "rlvr") & (pl.col("step") == 20))
    line = aggregate(rows).row(0, named=True)
    assert (line["matrices"], line["unresolved"]) == (24, 4)
    good = rows.filter(pl.col("status") == "ok")
    assert line["value"] == pytest.approx(good["value"].mean())
    assert line["p05"] <= line["median"] <= line["p95"]


def test_a_matrix_missing_at_one_checkpoint_is_missing_along_the_whole_path(results: Results) -> None:
    rows = rows_of(results, "stable_rank", every_step=True).filter(pl.col("run") == "rlvr")
    kept = complete(rows)
    assert kept.height == 24 * 6
    assert not kept["matrix"].str.contains("k_proj").any()


def test_settings_select_by_parameter_and_default_rows_otherwise(results: Results) -> None:
    narrow = rows_of(results, "principal_overlap", alpha=0.3, view="bf16")
    assert set(narrow["setting"]) == {"alpha=0.3;eta=0.001;rank=2;view=bf16"}
    assert set(rows_of(results, "principal_overlap")["setting"]) == {"alpha=0.5;eta=0.001;rank=2;view=bf16"}
    assert rows_of(results, "principal_overlap", alpha=0.33).is_empty()
    with pytest.raises(ValueError, match="scope 'matrices' is unknown"):
        rows_of(results, scope="matrices")


def test_every_step_has_a_line_and_the_last_step_equals_the_plain_summary(results: Results) -> None:
    every = summarise(results, every_step=True)
    assert every.height == 4 * 6
    last = every.filter(pl.col("step") == 120)
    assert last.select(sorted(last.columns)).equals(summarise(results).select(sorted(last.columns)))


def test_the_ten_movers_are_the_largest_relative_updates(results: Results) -> None:
    top = movers(results, "sft")
    everything = by_hand(results, "sft", "relative_update_norm")["value"].sort(descending=True)
    assert top["value"].to_list() == everything[:10].to_list()
    assert top["stable_rank"].null_count() == 0
    with pytest.raises(ValueError, match="no run 'missing'; it has opd"):
        movers(results, "missing")


def test_entrywise_folders_rank_by_visible_change(tmp_path: Path) -> None:
    run = Run("tuned", "other", 0.02, steps=(None,))
    results = read_results(Folder(tmp_path / "r", runs=(run,), entrywise_only=True).write())
    top = movers(results, "tuned", 3)
    assert set(top["ranked_by"]) == {"update_sparsity"}
    assert top["value"].is_sorted()
    line = summarise(results).row(0, named=True)
    assert line["step"] is None
    assert "stable_rank" not in line
    assert rotation(line) is None


def test_a_run_of_which_nothing_was_measured_still_has_a_line(tmp_path: Path) -> None:
    lost = replace(STUDY[0], failed=every_matrix(4))
    line = summarise(read_results(Folder(tmp_path / "r", runs=(lost,)).write())).row(0, named=True)
    assert (line["run"], line["matrices"], line["parameters"]) == ("sft", 0, 0)


def test_rotation_uses_the_side_that_is_defined() -> None:
    assert rotation({"rotation_left_mean_deg": 1.0, "rotation_right_mean_deg": 3.0}) == 2.0
    assert rotation({"rotation_left_mean_deg": None, "rotation_right_mean_deg": 3.0}) == 3.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("update_sparsity>0.999", Threshold("update_sparsity", ">", 0.999)),
        (" hill_tail <= 1e-2 ", Threshold("hill_tail", "<=", 0.01)),
    ],
)
def test_thresholds_read_as_written(text: str, expected: Threshold) -> None:
    assert parse_threshold(text) == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("update_sparcity>0.9", "did you mean 'update_sparsity'"),
        ("update_sparsity=0.9", "not of the form"),
        ("update_sparsity>much", "not a finite number"),
        ("update_sparsity>nan", "not a finite number"),
    ],
)
def test_thresholds_that_cannot_be_read_say_what_would_do(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_threshold(text)


def test_the_worst_matrix_comes_first_and_the_mean_can_pass_where_one_matrix_fails(results: Results) -> None:
    rows = by_hand(results, "rlvr", "update_sparsity").sort("value")
    bound = float(rows["value"][-2])
    threshold = Threshold("update_sparsity", ">=", bound)
    (found,) = check_thresholds(results, [threshold], runs=["rlvr"])
    assert [name for name, _ in found.crossed] == rows["matrix"].to_list()[:-3:-1]
    assert (found.decided, found.passed) == (28, False)
    (mean,) = check_thresholds(results, [threshold], runs=["rlvr"], over="mean")
    assert mean.passed


def test_a_metric_without_values_is_no_pass(results: Results) -> None:
    (found,) = check_thresholds(results, [Threshold("stable_rank_denoised", ">", 1)], runs=["opd"])
    assert (found.decided, found.crossed, found.passed) == (0, [], False)
