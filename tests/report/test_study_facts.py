"""The numbers in the captions and in the arms' table, against planted ones."""

from __future__ import annotations

from dataclasses import replace
from math import sqrt
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from geopd.report.drawing import Subject
from geopd.report.gate_figures import gates, slopes, visible_points
from geopd.report.projection_figures import projection_benchmarks
from geopd.report.size_figures import update_size
from geopd.report.study_tables import Table, study_tables
from geopd.results import NULLS, read_results
from geopd.results.summary import aggregate, rows_of

T_2 = 4.302652729911275
"""97.5% quantile of Student's t with two degrees of freedom."""
LEAKS = {
    "opd-update-16-gradient-s": ((0.10, 0.12, 0.14), 0.3),
    "opd-random-4-gradient-s": ((0.2, 0.22, None), 0.25),
    "opd-update-16-adapter-s": ((1e-16, 2e-16, 3e-16), 4e-16),
    "sft-update-16-gradient-s": ((0.04, 0.05, 0.06), None),
}


@pytest.fixture(scope="module")
def subject(full_folder: Path) -> Subject:
    return Subject.of(read_results(full_folder))


@pytest.fixture(scope="module")
def leaking(subject: Subject) -> Subject:
    """The made-up study with leaks in its runs' records, as training leaves them; the last seed of one has none."""
    inputs = dict(subject.results.manifest["inputs"])
    for stem, (leaks, worst) in LEAKS.items():
        for seed, leak in enumerate(leaks):
            named = None if worst is None else {"matrix": "layers.0.mlp.up_proj", "leak": worst - 0.01 * seed * worst}
            record = {"mode": "gradient", "leak": leak, "leak_worst": named}
            inputs[f"{stem}{seed}"] = inputs[f"{stem}{seed}"] | {"run_settings": {"projection_record": record}}
    manifest = subject.results.manifest | {"inputs": inputs}
    return replace(subject, results=replace(subject.results, manifest=manifest))


def arms_table(subject: Subject) -> dict[str, dict[str, tuple[str, str]]]:
    (table,) = [t for t in study_tables(subject) if t.name == "table_projections"]
    assert isinstance(table, Table)
    return {row[0][0]: dict(zip(table.head, row, strict=True)) for row in table.rows}


def test_every_arm_has_its_leak_beside_its_scores_and_a_dash_where_a_seed_has_none(leaking: Subject) -> None:
    rows = arms_table(leaking)
    assert rows["OPD update's top-16"]["leak"] == ("12.0 %", f"± {T_2 * 2 / sqrt(3):.1f}, worst matrix 30.0 %")
    assert rows["SFT update's top-16"]["leak"] == ("5.0 %", f"± {T_2 * 1 / sqrt(3):.1f}")
    assert rows["OPD update's top-16, adapter"]["leak"] == ("2e-16", "worst matrix 4e-16")
    assert rows["OPD free"]["leak"] == rows["OPD random 4"]["leak"] == ("–", "")


def test_every_arm_has_the_length_of_its_update_beside_its_scores(subject: Subject) -> None:
    norms = aggregate(rows_of(subject.results, "relative_update_norm")).filter(
        pl.col("run").str.starts_with("opd-none")
    )
    assert arms_table(subject)["OPD free"]["relative update norm"][0] == f"{norms['value'].mean():.3g}"


def test_the_caption_of_the_arms_has_the_range_of_leaks_in_gradient_mode(leaking: Subject, subject: Subject) -> None:
    drawing, without = projection_benchmarks(leaking), projection_benchmarks(subject)
    assert drawing is not None
    assert without is not None
    assert "energy outside the subspace: OPD 12.0 %, SFT 5.0 %." in drawing.shows  # no adapter
    assert "Leak" not in without.shows
    norms = dict(aggregate(rows_of(subject.results, "relative_update_norm")).select("run", "value").iter_rows())
    free, bound, random = (
        np.mean([norms[f"opd-{arm}-s{seed}"] for seed in range(3)])
        for arm in ("none", "update-16-gradient", "random-4-gradient")
    )
    low, high = sorted((bound / free, random / free))
    longest = "random 4" if random > bound else "update's top-16"
    assert f"OPD {low:.2f} to {high:.2f} ({longest})" in drawing.shows
    assert "not in the length of their steps" in drawing.reading


def test_the_divergence_has_the_slope_within_a_run_whatever_its_level() -> None:
    norms = np.array([0.1, 0.2, 0.4, 0.8])
    points = pl.concat(
        pl.DataFrame({"run": run, "norm": scale * norms, "kl": level * norms**power})
        for run, scale, level, power in (("a", 1.0, 1.0, 2.0), ("b", 30.0, 0.01, 1.5), ("c", 0.1, 5.0, 0.5))
    )
    alone = pl.DataFrame({"run": "d", "norm": [1.0, 2.0], "kl": [1.0, 2.0]})
    found = slopes(pl.concat([points, alone]))
    assert found == {"a": pytest.approx(2.0), "b": pytest.approx(1.5), "c": pytest.approx(0.5)}


def test_the_caption_has_the_mean_slope_of_each_baseline_with_its_interval_over_seeds(subject: Subject) -> None:
    rows = rows_of(subject.results, "update_norm", every_step=True)
    norm = {key: sqrt(part["value"].pow(2).sum()) for key, part in rows.group_by("run", "step")}
    powers = {"opd-s0": 1.2, "opd-s1": 1.4, "opd-s2": 1.6, "rlvr-s0": 2.0}
    kept = subject.results.evaluations.filter((pl.col("benchmark") == "kl_to_origin") & pl.col("run").is_in([*powers]))
    planted = [
        line | {"value": 7.0 * norm[line["run"], line["step"]] ** powers[line["run"]]}
        for line in kept.iter_rows(named=True)
    ]
    evaluations = pl.DataFrame(planted, schema=kept.schema)
    drawing = gates(replace(subject, results=replace(subject.results, evaluations=evaluations)))
    assert drawing is not None
    said = "I: within a run the divergence from its origin grows with the norm to the power "
    assert said + f"opd 1.40 ± {T_2 * 0.2 / sqrt(3):.2f}, rlvr 2.00" in drawing.shows
    assert "the base" in drawing.reading


def masks(subject: Subject) -> Subject:
    """With agreements of predicted and seen entries, 0.5 everywhere and 0.25 by the null."""
    sparsity = (pl.col("metric") == "update_sparsity") & ~pl.col("module").is_in(["embedding", "head", "norm"])
    jaccard = pl.lit("visible_mask_jaccard")
    found = subject.results.measurements.filter(sparsity).with_columns(metric=jaccard, value=pl.lit(0.5))
    nulls = subject.results.nulls.filter(sparsity & (pl.col("null") == "gaussian"))
    nulls = nulls.with_columns(metric=jaccard, mean=pl.lit(0.25))
    tables = {
        "measurements": pl.concat([subject.results.measurements, found]),
        "nulls": pl.concat([subject.results.nulls, nulls]),
    }
    return replace(subject, results=replace(subject.results, **tables))


def test_the_agreement_of_masks_stands_beside_the_density_of_what_is_seen(subject: Subject) -> None:
    planted = masks(subject)
    points = visible_points(planted.baselines)
    lines = rows_of(subject.baselines.results, "update_sparsity").select("run", "matrix", "value").iter_rows()
    seen = {(run, matrix): 1 - value for run, matrix, value in lines}
    density = {(run, matrix): d for run, matrix, d in points.select("run", "matrix", "density").iter_rows()}
    assert density == {key: pytest.approx(seen[key]) for key in density}
    drawing = gates(planted)
    assert drawing is not None
    values = np.array(list(density.values()))
    # Two unrelated masks of density p share p^2 and cover 2p - p^2.
    unrelated = np.mean(values**2 / (2 * values - values**2))
    assert f"III: {100 * values.mean():.1f}% of the entries are seen" in drawing.shows
    assert "agree by 0.500, those of a Gaussian update by 0.250" in drawing.shows
    assert f"unrelated masks of that density would by {unrelated:.3f}" in drawing.shows


def test_the_caption_says_on_which_side_of_its_null_a_metric_lies(subject: Subject) -> None:
    rows = rows_of(subject.results, "spectral_shift", every_step=True)
    runs = sorted(rows["run"].unique())
    ratios = dict.fromkeys(runs, 2.0) | {runs[0]: 0.25, runs[1]: 1.1, runs[2]: 4.0}
    means = pl.col("value") / pl.col("run").replace_strict(ratios, return_dtype=pl.Float64)
    nulls = rows.with_columns(mean=means, null=pl.lit("gaussian"), sd=None, draws=0)
    everything = pl.concat([subject.results.nulls, nulls.select(subject.results.nulls.columns).cast(dict(NULLS))])
    drawing = update_size(replace(subject, results=replace(subject.results, nulls=everything)))
    assert drawing is not None
    (part,) = [p for p in drawing.shows.split("; n") if p.startswith("ormalised spectral shift")]
    assert f"at the median 100% above its null (75% below to 300% above; above it in {len(runs) - 1} runs)" in part
