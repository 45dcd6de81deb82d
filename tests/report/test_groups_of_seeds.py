from __future__ import annotations

import json
from math import sqrt
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from geopd.report.drawing import Subject
from geopd.report.groups import Group, fold, groups_of, half_width
from geopd.results import EVALUATIONS, MEASUREMENTS, NULLS, RUNS, Results, read_results

T_2 = 4.302652729911275
"""97.5% quantile of Student's t with two degrees of freedom."""


def results(*rows: dict[str, Any]) -> Results:
    """A folder of runs without measurements."""
    plain = dict.fromkeys(RUNS, None)
    table = pl.DataFrame([plain | {"steps": [10, 20]} | row for row in rows], schema=RUNS)
    empty = [pl.DataFrame(schema=schema) for schema in (MEASUREMENTS, NULLS)]
    return Results(Path("made-up"), *empty, table, pl.DataFrame(schema=EVALUATIONS), {"parts": {}})


def run(name: str, paradigm: str, seed: int | None, origin: str, **others: Any) -> dict[str, Any]:
    return {"run": name, "paradigm": paradigm, "seed": seed, "origin_digest": origin} | others


def names(found: list[Group]) -> dict[str, tuple[str, ...]]:
    return {group.name: group.runs for group in found}


def test_runs_that_differ_in_their_seed_only_form_one_group() -> None:
    found = groups_of(results(*(run(f"opd-s{seed}", "opd", seed, f"anchor{seed}") for seed in (2, 0, 1))))
    assert names(found) == {"opd": ("opd-s0", "opd-s1", "opd-s2")}
    assert found[0].label == "opd (3 seeds)"


def test_fine_tuning_from_the_base_and_from_the_anchor_are_two_groups() -> None:
    rows = [
        run(f"{name}-s{seed}", paradigm, seed, f"{origin}{seed}")
        for seed in (0, 1)
        for name, paradigm, origin in (
            ("sft", "sft", "base"),
            ("sft_continued", "sft", "anchor"),
            ("rlvr", "rlvr", "anchor"),
        )
    ]
    found = {group.name: group for group in groups_of(results(*rows))}
    assert list(found) == ["sft", "sft_continued", "rlvr"]
    assert not found["sft"].shared_origin
    assert found["sft_continued"].shared_origin
    assert all(len(group.runs) == 2 for group in found.values())


def test_tags_part_runs_and_baselines_come_first() -> None:
    tags = json.dumps({"projection": "none", "start": "32"})
    rows = [run(f"opd-s{s}", "opd", s, f"a{s}") for s in (0, 1)]
    rows += [run(f"free-s{s}", "opd", s, f"a{s}", tags=tags) for s in (0, 1)]
    found = groups_of(results(*rows))
    assert names(found) == {"opd": ("opd-s0", "opd-s1"), "free": ("free-s0", "free-s1")}
    assert found[1].tags == {"projection": "none", "start": "32"}


@pytest.mark.parametrize(
    "rows",
    [
        (run("mine", "opd", None, "a"), run("other", "opd", None, "a")),
        (run("mine", "opd", 0, "a"), run("other", "opd", 0, "a")),
        (run("mine", "opd", 0, "a"), run("other", "opd", 1, "a", steps=[10, 30])),
    ],
    ids=["no seed", "same seed", "another last step"],
)
def test_runs_that_are_no_replicates_stay_alone(rows: tuple[dict[str, Any], ...]) -> None:
    assert names(groups_of(results(*rows))) == {"mine": ("mine",), "other": ("other",)}


def test_runs_of_one_name_are_told_from_runs_of_another_with_the_same_seeds() -> None:
    rows = [run(f"{name}-s{seed}", "opd", seed, f"a{seed}") for name in ("short", "long") for seed in (0, 1)]
    assert names(groups_of(results(*rows))) == {"long": ("long-s0", "long-s1"), "short": ("short-s0", "short-s1")}


def test_seeds_without_a_common_name_are_named_after_their_paradigm_and_no_name_is_given_twice() -> None:
    rows = [run("one", "opd", 0, "a0"), run("two", "opd", 1, "a1"), run("opd", "rlvr", 0, "a0")]
    assert sorted(names(groups_of(results(*rows)))) == ["opd", "opd from the shared origin"]


def test_a_fold_is_the_mean_and_the_t_interval_over_seeds() -> None:
    group = Group("opd", "opd", ("opd-s0", "opd-s1", "opd-s2"))
    values = (4.0, 5.0, 9.0)
    lines = pl.DataFrame({"run": group.runs, "step": [20] * 3, "value": values, "n": [10, 20, 30], "u": ["x"] * 3})
    (line,) = fold([group], lines).iter_rows(named=True)
    assert (line["run"], line["step"], line["value"], line["n"], line["u"]) == ("opd", 20, 6.0, 20.0, "x")
    assert line["each"] == list(values)
    assert line["half"] == pytest.approx(T_2 * sqrt(7.0) / sqrt(3), rel=1e-9)  # variance (4 + 1 + 9) / 2
    assert half_width([3.0]) is None


def test_a_step_that_not_every_seed_has_is_left_out_and_absent_seeds_are_not_waited_for() -> None:
    group = Group("opd", "opd", ("a", "b", "never"))
    lines = pl.DataFrame({"run": ["a", "b", "a"], "step": [10, 10, 20], "value": [1.0, 3.0, 5.0]})
    assert fold([group], lines).select("step", "value", "seeds").rows() == [(10, 2.0, 2)]


def test_groups_are_folded_per_further_column() -> None:
    group = Group("opd", "opd", ("a", "b"))
    lines = pl.DataFrame(
        {"run": ["a", "b", "a"], "step": [10] * 3, "metric": ["x", "x", "y"], "value": [1.0, 3.0, 5.0]}
    )
    folded = fold([group], lines, ["metric"]).select("metric", "value", "seeds").rows()
    assert folded == [("x", 2.0, 2), ("y", 5.0, 1)]


def test_a_full_study_falls_into_its_baselines_arms_and_controls(full_folder: Path) -> None:
    subject = Subject.of(read_results(full_folder))
    assert list(subject.baselines.groups) == ["sft", "sft_continued", "opd", "rlvr"]
    assert {len(group.runs) for group in subject.groups.values() if "projection" in group.tags} == {3}
    assert {len(group.runs) for group in subject.groups.values() if "alpha" in group.tags} == {1}
    assert set(subject.baselines.results.measurements["run"]) == {
        run for group in subject.baselines.groups.values() for run in group.runs
    }


def test_where_every_run_has_tags_all_are_drawn() -> None:
    subject = Subject.of(results(run("a", "opd", 0, "x", tags='{"rho": "0.5"}')))
    assert list(subject.baselines.groups) == ["a"]
