"""OPD's variants beside the baseline, and which run plays which part."""

from __future__ import annotations

import json
from dataclasses import replace
from math import exp, log

import numpy as np
import polars as pl
import pytest
from scipy import stats

from geopd.claims import decide
from geopd.claims.roles import casts
from geopd.claims.variants import VARIANT_BAND
from geopd.results import Results
from judged_claims import judged
from planted_results import Planted, results_of

METRICS = {
    "update_sparsity": 0.516,
    "spectral_shift": 1e-4,
    "stable_rank_denoised": 4.0,
    "principal_overlap": 0.2,
    "low_magnitude_overlap": 0.5,
}


def run(name: str, seed: int, factor: float = 1.0, variant: str = "") -> Planted:
    metrics = {metric: (value, value * factor * exp(0.01 * (seed - 1))) for metric, value in METRICS.items()}
    return Planted(name, "opd", metrics, seed, steps=(10, 20), tags={"variant": variant} if variant else {})


def with_variants(*factors: float, variant: str = "moe_teacher") -> Results:
    baselines = [run(f"opd-s{seed}", seed) for seed in range(3)]
    return results_of(*baselines, *(run(f"v-s{seed}", seed, f, variant) for seed, f in enumerate(factors)))


def test_one_seed_of_a_variant_is_held_against_the_spread_of_three_baselines() -> None:
    found = judged(with_variants(1.05), "variants")["variant_moe_teacher"]
    assert (found["shows_here"], found["verdict"], found["seeds"]) == ("yes", "held", 1)
    assert found["runs"] == {"opd": ["opd-s0", "opd-s1", "opd-s2"], "variant": ["v-s0"]}
    assert [s["estimate"] for s in found["statements"]] == pytest.approx([log(1.05)] * 5)
    half = stats.t.ppf(0.95, 2) * np.sqrt(2) * 0.01
    assert found["statements"][0]["interval"] == pytest.approx([log(1.05) - half, log(1.05) + half])
    far = judged(with_variants(1.5), "variants")["variant_moe_teacher"]
    assert (far["shows_here"], far["verdict"]) == ("no", "did not hold")


@pytest.mark.parametrize(
    ("factors", "verdict"),
    [((1.04, 1.05, 1.06), "held"), ((1.4, 1.5, 1.45), "did not hold"), ((0.9, 1.0, 1.15), "unresolved")],
)
def test_several_seeds_of_a_variant_are_paired_with_the_baselines(factors: tuple[float, ...], verdict: str) -> None:
    found = judged(with_variants(*factors), "variants")["variant_moe_teacher"]
    assert found["verdict"] == verdict
    assert list(found["statements"][0]["values"].values()) == pytest.approx([log(f) for f in factors])
    assert (found["seeds_needed"] is not None) == (verdict == "unresolved")


def test_the_claim_is_about_every_variant() -> None:
    runs = [run(f"opd-s{s}", s) for s in range(3)]
    runs += [
        run(f"{name}-s{s}", s, f, name) for name, f in (("strings", 1.01), ("student_small", 1.5)) for s in range(3)
    ]
    found = judged(results_of(*runs), "variants")
    assert list(found) == ["summary", "variant_strings", "variant_student_small"]
    assert [c["verdict"] for c in found.values()] == ["did not hold", "held", "did not hold"]
    assert found["summary"]["deciding"].startswith("student small: ")
    assert set(found["summary"]["runs"]) == {"opd", "strings", "student_small"}
    entry = next(e for e in decide(results_of(*runs)) if e["number"] == "C14")
    assert entry["summary"] == "summary"


def test_the_margin_holds_the_table_that_the_paper_calls_stable() -> None:
    assert max(abs(log(x / 51.6)) for x in (50.3, 51.1, 51.7, 56.6, 57.1, 48.6)) < VARIANT_BAND < log(1.15)


def test_a_stable_rank_that_is_not_resolved_for_every_matrix_keeps_its_statement_open() -> None:
    results = with_variants(1.0, 1.0, 1.0)
    one = (pl.col("metric") == "stable_rank_denoised") & (pl.col("matrix") == "layers.0.q_proj")
    status = pl.when(one & (pl.col("run") == "v-s1")).then(pl.lit("unresolved")).otherwise("status")
    shaky = replace(results, measurements=results.measurements.with_columns(status=status))
    statement = judged(shaky, "variants")["variant_moe_teacher"]["statements"][2]
    assert statement["text"] == "stable rank within 15% of the baseline"
    assert statement["verdict"] == "unresolved"
    assert "not resolved for every matrix" in statement["reason"]


def test_without_variants_or_their_yardstick_the_reason_says_so() -> None:
    found = judged(results_of(run("opd", 0)), "variants")["variants"]
    assert (found["verdict"], found["reason"]) == ("not measured", "no OPD run is tagged `variant`")
    alone = judged(results_of(run("v", 0, 1.0, "strings")), "variants")["variant_strings"]
    assert alone["reason"] == "no OPD run without tags, the yardstick of the variants"


def sparsity(name: str, paradigm: str, seed: int | None = 0, **tags: str) -> Planted:
    return Planted(name, paradigm, {"update_sparsity": (0.1, 0.2)}, seed, steps=(10, 20), tags=tags)


def test_a_tagged_run_never_plays_the_part_of_a_baseline() -> None:
    runs = [sparsity("opd-s0", "opd"), sparsity("o", "opd", alpha="1"), sparsity("p", "opd", 1, alpha="1")]
    cast = casts(results_of(*runs, sparsity("rlvr-s0", "rlvr"), sparsity("rlvr-s1", "rlvr", 1)))[0]
    assert cast.runs("opd") == ["opd-s0"]  # not even in a seed that has no baseline
    assert (cast.left_out, cast.tagged) == ([], ())


def test_baselines_that_lose_their_part_are_listed() -> None:
    stray = replace(sparsity("opd_elsewhere", "opd"), origin="another")
    runs = [sparsity(name, "opd") for name in ("opd", "opd_again")] + [sparsity("rlvr", "rlvr"), stray]
    for cast in casts(results_of(*runs)):
        assert cast.runs("opd") == ["opd"]
        assert cast.left_out == ["opd_again", "opd_elsewhere"]


def test_runs_with_tags_alone_play_the_part_and_are_named() -> None:
    cast = casts(results_of(sparsity("opd_k4", "opd", k="4"), sparsity("rlvr", "rlvr")))[0]
    assert cast.runs("opd") == ["opd_k4"]
    assert cast.label.endswith("for want of runs without tags: opd_k4")


def test_sft_from_the_base_and_from_the_anchor_are_told_apart_by_origin() -> None:
    runs = [sparsity(f"{name}-s{s}", p, s) for s in range(2) for name, p in (("sft_continued", "sft"), ("opd", "opd"))]
    base = [replace(sparsity(f"sft-s{s}", "sft", s), origin="base") for s in range(2)]
    paper, same = casts(results_of(*runs, *base))
    assert (paper.runs("sft"), same.runs("sft")) == (["sft-s0", "sft-s1"], ["sft_continued-s0", "sft_continued-s1"])
    assert paper.redrawn


@pytest.mark.parametrize(
    "runs",
    [
        [],
        [sparsity("model", "opd", None)],
        [Planted("model", "other", {"update_sparsity": (0.5,)}, None, steps=(None,))],
        [Planted(p, p, {"update_sparsity": (0.5,)}, None, steps=(None,)) for p in ("sft", "opd", "rlvr")],
        [sparsity(p, p, None) for p in ("sft", "opd", "rlvr")],
        [
            Planted("opd", "opd", {"update_sparsity": (None, None)}, None, steps=(10, 20)),
            sparsity("rlvr", "rlvr", None),
        ],
    ],
    ids=["nothing", "one run", "another paradigm", "single checkpoints", "no seeds", "undefined"],
)
def test_folders_with_little_in_them_are_described_and_never_judged(runs: list[Planted]) -> None:
    entries = decide(results_of(*runs))
    json.dumps(entries, allow_nan=False)
    for entry in entries:
        assert entry["verdict"] in ("unresolved", "not measured")
        for comparison in entry["comparisons"]:
            assert comparison["reason"]
