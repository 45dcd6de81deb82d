from __future__ import annotations

from dataclasses import replace
from math import degrees, sqrt
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from geopd.report.control_figures import baseline_of, controls, mixture_ends, mixture_paths, mixtures
from geopd.report.curves import draw_path, keep_to
from geopd.report.drawing import Drawing, Subject
from geopd.report.gallery import FIGURES, STUDY_FIGURES
from geopd.report.gate_figures import divergence_points, gates, visible_points, wedin_points
from geopd.report.gradient_figures import gradient_ranks, ratio
from geopd.report.groups import Group
from geopd.report.projection_figures import arms, end_scores, projection_benchmarks, projection_curves
from geopd.report.size_figures import KINDS, kind_of, size_points, update_size
from geopd.report.style import new_figure
from geopd.report.variant_figures import variants
from geopd.results import Results, read_results
from geopd.results.summary import aggregate, rows_of
from synthetic_full_study import FullStudy, baseline
from synthetic_full_study import arms as made_up_arms


@pytest.fixture(scope="module")
def subject(full_folder: Path) -> Subject:
    return Subject.of(read_results(full_folder))


@pytest.fixture(scope="module")
def drawings(subject: Subject) -> dict[str, Drawing | None]:
    return {draw.__name__: draw(subject.baselines) for draw in FIGURES} | {
        draw.__name__: draw(subject) for draw in STUDY_FIGURES
    }


@pytest.mark.parametrize("name", [draw.__name__ for draw in (*FIGURES, *STUDY_FIGURES)])
def test_every_figure_is_drawn_with_its_three_texts(drawings: dict[str, Drawing | None], name: str) -> None:
    drawing = drawings[name]
    assert drawing is not None
    assert drawing.figure is not None
    assert min(map(len, (drawing.shows, drawing.reading, drawing.chance))) > 40


def test_the_papers_figures_have_their_counterparts(drawings: dict[str, Drawing | None]) -> None:
    found = {drawing.counterpart for drawing in drawings.values() if drawing is not None}
    assert {"Table 1", "Tables 1 and 6", *(f"Figure {n}" for n in range(2, 10))} <= found


@pytest.mark.parametrize("draw", STUDY_FIGURES, ids=lambda draw: draw.__name__)
def test_a_folder_without_tags_has_no_study_figures(study_folder: Path, draw: object) -> None:
    assert draw(Subject.of(read_results(study_folder))) is None  # type: ignore[operator]


def test_arms_are_named_after_their_basis_rank_and_mode_free_first(subject: Subject) -> None:
    assert [arm.label for arm, _ in arms(subject, "opd")] == [
        "free",
        "update's top-16",
        "update's top-16, adapter",
        "update's top-16, adapter, lr × √(n/K)",
        "random 4",
    ]


def test_learning_curves_start_at_the_step_of_the_baseline_where_the_projection_began(subject: Subject) -> None:
    drawing = projection_curves(subject)
    assert drawing is not None
    assert drawing.figure is not None
    axes = drawing.figure.axes[0]
    scores = subject.accuracies.filter((pl.col("benchmark") == "selection") & (pl.col("decoding") == "greedy"))
    seeds = scores.filter(pl.col("run").is_in([f"opd-s{s}" for s in range(3)]) & (pl.col("step") == 32))["value"]
    marked = [line for line in axes.get_lines() if line.get_markerfacecolor() == "white"]
    assert [tuple(map(float, line.get_xydata()[0])) for line in marked] == [(0.0, pytest.approx(float(seeds.mean())))]
    assert "3 seeds an arm" in drawing.shows


def test_the_benchmarks_at_the_end_are_means_over_seeds(subject: Subject) -> None:
    scores = end_scores(subject)
    assert set(scores["benchmark"]) == {"held_out", "carries", "subtraction", "no_working", "three_digits", "strings"}
    free = next(group for arm, group in arms(subject, "sft") if arm.label == "free")
    raw = subject.results.evaluations.filter(
        pl.col("run").is_in(free.runs) & (pl.col("benchmark") == "carries") & (pl.col("decoding") == "avg@4")
    )
    (line,) = scores.filter((pl.col("run") == free.name) & (pl.col("benchmark") == "carries")).iter_rows(named=True)
    assert line["value"] == pytest.approx(float(raw["value"].mean()))  # type: ignore[arg-type]
    assert line["half"] == pytest.approx(4.302652729911275 * float(raw["value"].std()) / sqrt(3))  # type: ignore[arg-type]


def test_arms_that_were_not_evaluated_are_said_to_be(subject: Subject) -> None:
    bare = Subject.of(replace(subject.results, evaluations=subject.results.evaluations.clear()))
    for draw in (projection_curves, projection_benchmarks):
        drawing = draw(bare)
        assert drawing is not None
        assert drawing.missing is not None
        assert "no arm" in drawing.missing


def test_raw_mixtures_end_in_the_baselines_and_normalised_ones_do_not(subject: Subject) -> None:
    raw = {alpha: group.name for alpha, group in mixtures(subject, normalised=False)}
    assert raw == {1.0: "opd", 0.5: "mix-0.5-s0", 0.0: "rlvr"}
    assert [alpha for alpha, _ in mixtures(subject, normalised=True)] == [1.0, 0.5]


def test_controls_are_told_relative_to_the_baseline(subject: Subject) -> None:
    drawing = controls(subject)
    assert drawing is not None
    ends = aggregate(rows_of(subject.results, "stable_rank"))
    values = dict(ends.select("run", "value").iter_rows())
    base = np.mean([values[f"opd-s{s}"] for s in range(3)])
    assert f"teacher rollouts {100 * (values['opd-teacher-s0'] / base - 1):+.0f}%" in drawing.shows


def test_the_yardstick_of_a_control_is_the_baseline_with_the_shared_origin(subject: Subject) -> None:
    found = baseline_of(subject, "sft")
    assert found is not None
    assert found.name == "sft_continued"


def test_every_run_and_checkpoint_is_a_point_of_the_size_figure(subject: Subject) -> None:
    points = size_points(subject)
    sparsity = points.filter(pl.col("metric") == "update_sparsity")
    steps = {(run, step) for run, step in subject.results.measurements.select("run", "step").unique().iter_rows()}
    assert set(sparsity.select("run", "step").iter_rows()) == steps
    assert sparsity.filter("last").height == sparsity["run"].n_unique()
    one = {"run": "opd-s1", "step": 160}
    at = (pl.col("run") == one["run"]) & (pl.col("step") == one["step"])
    sides = rows_of(subject.results, "rotation_left_mean_deg", "rotation_right_mean_deg").filter(at)
    (rotation,) = points.filter(at & (pl.col("metric") == "rotation"))["value"]
    assert rotation == pytest.approx(float(sides["value"].mean()))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("tags", "kind"),
    [
        ({}, "baseline"),
        ({"learning_rate": "1e-05"}, "learning_rate"),
        ({"projection": "none"}, "projection"),
        ({"variant": "strings"}, "variant"),
        ({"rollouts": "teacher"}, "control"),
        ({"alpha": "0.5"}, "control"),
    ],
)
def test_the_kind_of_a_run_follows_from_its_tags(tags: dict[str, str], kind: str) -> None:
    assert kind_of(Group("a", "opd", ("a",), tags)) == kind
    assert kind in KINDS


def test_the_bound_on_rotation_is_wedins(tmp_path: Path) -> None:
    # W0 = diag(4, 2, 1): k = 1 has the gap 4 - sigma_2(W+)
    results = read_results(FullStudy(tmp_path / "r", runs=(baseline("opd", 0), *made_up_arms(0)[:1])).write())
    vectors = {
        "sigma_origin": np.array([4.0, 2.0, 1.0]),
        "160/sigma": np.array([4.1, 2.5, 1.0]),
        "160/angles_left": np.array([3.0]),
        "160/angles_right": np.array([5.0]),
    }

    class Planted(Results):
        def vectors(self, *place: str) -> dict[str, np.ndarray]:
            return vectors if place[1].endswith("q_proj") else {}

    planted = Planted(**{name: getattr(results, name) for name in Results.__dataclass_fields__})
    (line,) = wedin_points(Subject.of(planted).baselines).iter_rows(named=True)
    norm = rows_of(results, "update_operator_norm").filter(
        (pl.col("run") == "opd-s0") & (pl.col("matrix") == line["matrix"])
    )["value"][0]
    assert line["bound"] == pytest.approx(norm / (4.0 - 2.5))
    assert degrees(np.arcsin(line["sine"])) == pytest.approx(5.0)


def test_matrices_without_a_spectral_gap_have_no_bound(subject: Subject) -> None:
    class Flat(Results):
        def vectors(self, *_: str) -> dict[str, np.ndarray]:
            flat = np.ones(4)
            return {"sigma_origin": flat, "160/sigma": flat, "160/angles_left": np.ones(2)}

    flat = Flat(**{name: getattr(subject.results, name) for name in Results.__dataclass_fields__})
    assert wedin_points(Subject.of(flat).baselines).is_empty()
    drawing = gates(Subject.of(flat))
    assert drawing is not None
    assert drawing.figure is not None


def test_the_norm_of_the_whole_update_beside_its_divergence(subject: Subject) -> None:
    points = divergence_points(subject)
    (line,) = points.filter((pl.col("run") == "opd-s1") & (pl.col("step") == 160)).iter_rows(named=True)
    norms = rows_of(subject.results, "update_norm").filter(pl.col("run") == "opd-s1")["value"]
    assert line["norm"] == pytest.approx(float((norms**2).sum()) ** 0.5)
    assert line["last"]
    kl = subject.results.evaluations.filter(pl.col("benchmark") == "kl_to_origin")
    assert points.height == kl.height


def test_predicted_and_seen_entries_are_the_jaccard_index_beside_its_null(subject: Subject) -> None:
    sparsity = (pl.col("metric") == "update_sparsity") & ~pl.col("module").is_in(["embedding", "head", "norm"])
    found = subject.results.measurements.filter(sparsity).with_columns(
        metric=pl.lit("visible_mask_jaccard"), value=pl.when(pl.col("run") == "opd-s0").then(0.75).otherwise(0.5)
    )
    nulls = subject.results.nulls.filter(sparsity & (pl.col("null") == "gaussian")).with_columns(
        metric=pl.lit("visible_mask_jaccard"), mean=pl.lit(0.25)
    )
    both = replace(
        subject.results,
        measurements=pl.concat([subject.results.measurements, found]),
        nulls=pl.concat([subject.results.nulls, nulls]),
    )
    points = visible_points(Subject.of(both).baselines)
    assert set(points["predicted"]) == {0.25}
    assert set(points.filter(pl.col("run") == "opd-s0")["realised"]) == {0.75}
    assert set(points.filter(pl.col("run") == "rlvr-s0")["realised"]) == {0.5}


def test_the_log_ratio_of_gradient_ranks_is_taken_over_seeds_and_over_prompts_with_one() -> None:
    rows = [{"seed": s, "log_ratio": v, "se": 0.1} for s, v in ((0, 0.2), (0, 0.4), (1, 0.5), (2, 0.7))]
    line = ratio(rows)
    assert line is not None
    assert line["each"] == pytest.approx([0.3, 0.5, 0.7])
    assert line["half"] == pytest.approx(4.302652729911275 * 0.2 / sqrt(3))
    alone = ratio(rows[:2])
    assert alone is not None
    assert alone["half"] == pytest.approx(1.96 * sqrt(0.02) / 2)
    assert ratio([{"seed": 0, "log_ratio": None}]) is None


def test_matrices_without_gradient_ranks_are_counted(subject: Subject) -> None:
    drawing = gradient_ranks(subject)
    assert drawing is not None
    assert "Left out: 1 of 9 rows" in drawing.shows


def test_two_seeds_are_drawn_as_two_thin_lines_and_three_as_a_band() -> None:
    axes = new_figure(3, 3).subplots()
    two = pl.DataFrame({"value": [2.0, 3.0], "half": [1.0, 1.0], "seeds": [2, 2], "each": [[1.0, 3.0], [2.0, 4.0]]})
    draw_path(axes, [1.0, 2.0], two)
    assert [line.get_ydata().tolist() for line in axes.get_lines()] == [[2.0, 3.0], [1.0, 2.0], [3.0, 4.0]]
    assert not axes.collections
    three = two.with_columns(seeds=pl.lit(3))
    draw_path(axes, [1.0, 2.0], three)
    (band,) = axes.collections
    assert band.get_paths()[0].get_extents().bounds == pytest.approx((1.0, 1.0, 1.0, 3.0))


def test_an_interval_far_wider_than_the_values_does_not_flatten_them() -> None:
    axes = new_figure(3, 3).subplots()
    keep_to(axes, pl.DataFrame({"value": [2.0, 3.0], "half": [50.0, 50.0], "seeds": [3, 3]}))
    low, high = axes.get_ylim()
    assert 0 < low < 2
    assert 3 < high < 5


@pytest.mark.parametrize("draw", [update_size, controls, mixture_paths, mixture_ends, variants])
def test_one_seed_is_drawn_without_bands(
    tmp_path_factory: pytest.TempPathFactory, draw: object, one_seed: Path
) -> None:
    drawing = draw(Subject.of(read_results(one_seed)))  # type: ignore[operator]
    assert drawing.figure is not None


@pytest.fixture(scope="module")
def one_seed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from synthetic_full_study import some_runs

    runs = tuple(run for run in some_runs() if run.seed == 0)
    return FullStudy(tmp_path_factory.mktemp("one_seed") / "results", runs=runs).write()
