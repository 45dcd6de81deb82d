"""Stable-rank paths, Hill slopes and early alignment, with planted paths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import exp, log
from typing import Any

import numpy as np
import polars as pl
import pytest

from geopd.results import Results
from judged_claims import judged
from planted_results import Planted, results_of

STEPS = (25, 50, 75, 100)
PROGRESS = np.array(STEPS) / 100


def growing(start: float, slope: float) -> list[float]:
    """``start * exp(slope * progress)``."""
    return list(start * np.exp(slope * PROGRESS))


def study(paths: dict[str, Callable[[int], Sequence[float]]], metric: str, **more: Any) -> Results:
    """Three seeds of SFT from the base, OPD and RLVR, with the path of each seed."""
    return results_of(
        *(
            Planted(
                f"{paradigm}-s{seed}",
                paradigm,
                {metric: path(seed)},
                seed,
                "base" if paradigm == "sft" else "anchor",
                STEPS,
                **more,
            )
            for paradigm, path in paths.items()
            for seed in range(3)
        )
    )


RANKS: dict[str, Callable[[int], Sequence[float]]] = {
    "sft": lambda s: growing(5, 0.9 + 0.05 * s),
    "opd": lambda s: growing(4, 0.02 * (s - 1)),
    "rlvr": lambda s: growing(4.1 * exp(0.5), -0.5 - 0.02 * s),
}


def test_the_papers_three_paths_are_held() -> None:
    found = judged(study(RANKS, "stable_rank_denoised"), "stable_rank_path")["paper"]
    assert [s["verdict"] for s in found["statements"]] == ["held"] * 5
    assert found["verdict"] == "held"
    slopes = [s["estimate"] for s in found["statements"][:3]]
    assert slopes == pytest.approx([0.95, 0.0, 0.52])


def test_a_band_that_opd_leaves_in_every_seed_did_not_hold() -> None:
    found = judged(
        study(RANKS | {"opd": lambda s: growing(4, 0.4 + 0.02 * s)}, "stable_rank_denoised"), "stable_rank_path"
    )
    assert found["paper"]["verdict"] == "did not hold"
    assert found["paper"]["deciding"] == "OPD's trend over the run is within 15%"


def test_a_band_that_the_interval_leaves_is_unresolved() -> None:
    loose = RANKS | {"opd": lambda s: growing(4, 0.12 * (s - 1))}
    statement = judged(study(loose, "stable_rank_denoised"), "stable_rank_path")["paper"]["statements"][1]
    assert statement["verdict"] == "unresolved"
    assert statement["interval"][0] < -log(1.15) < log(1.15) < statement["interval"][1]
    assert statement["seeds_needed"] > 3


def test_one_unresolved_checkpoint_of_the_cast_leaves_the_whole_path_unresolved() -> None:
    results = study(RANKS, "stable_rank_denoised")
    early = (pl.col("run") == "opd-s1") & (pl.col("step") == 25) & (pl.col("matrix") == "layers.0.q_proj")
    status = pl.when(early).then(pl.lit("unresolved")).otherwise("status")
    shaky = replace(results, measurements=results.measurements.with_columns(status=status))
    found = judged(shaky, "stable_rank_path")["paper"]
    assert found["verdict"] == "unresolved"
    assert found["reason"] == "the stable rank without rounding noise is not resolved at every checkpoint"
    assert found["seeds_needed"] is None


def test_arms_and_controls_have_no_say_in_the_paths_of_the_baselines() -> None:
    arm = Planted("arm", "opd", {"stable_rank": growing(4, 0.1)}, steps=STEPS, tags={"k": "4"})
    results = study(RANKS, "stable_rank_denoised")
    beside = replace(
        results,
        measurements=pl.concat([results.measurements, results_of(arm).measurements]),
        runs=pl.concat([results.runs, results_of(arm).runs]),
    )
    assert judged(beside, "stable_rank_path")["paper"]["verdict"] == "held"


def test_a_cast_without_the_denoised_estimate_is_described_by_the_raw_one_and_not_judged() -> None:
    found = judged(study(RANKS, "stable_rank"), "stable_rank_path")["paper"]
    assert (found["quantity"], found["shows_here"]) == ("stable rank over training", "yes")
    assert (found["verdict"], found["statements"][0]["interval"] is None) == ("unresolved", False)


def test_the_sign_of_a_hill_slope_must_not_hang_on_its_k() -> None:
    tails: dict[str, Callable[[int], Sequence[float]]] = {
        "sft": lambda s: growing(2, 0.9 + 0.05 * s),
        "opd": lambda s: growing(2.3, 0.2 + 0.02 * s),
        "rlvr": lambda s: growing(3.2, -0.3 - 0.02 * s),
    }
    results = study(tails, "hill_tail")
    assert judged(results, "hill_trend")["paper"]["verdict"] == "held"
    other = results.measurements.with_columns(
        setting=pl.lit("k=8;view=native"), is_default=pl.lit(False), value=1 / pl.col("value")
    )
    turned = replace(results, measurements=pl.concat([results.measurements, other]))
    found = judged(turned, "hill_trend")["paper"]
    assert found["verdict"] == "unresolved"
    assert found["reason"] == "the sign of SFT's slope depends on the k of the Hill index"
    one = replace(turned, measurements=turned.measurements.filter((pl.col("run") == "rlvr-s2") | pl.col("is_default")))
    verdicts = [s["verdict"] for s in judged(one, "hill_trend")["paper"]["statements"]]
    assert verdicts == ["held", "held", "unresolved"]
    falling = study(tails | {"sft": lambda s: growing(4, -0.9 - 0.05 * s)}, "hill_tail")
    assert judged(falling, "hill_trend")["paper"]["verdict"] == "did not hold"


def locked(lock: dict[str, float], walk: dict[str, float], norms: dict[str, Sequence[float]] | None = None) -> Results:
    """Similarities that rise from ``lock`` at the first checkpoint to 1, and walks that rise from ``walk``."""
    runs = []
    for seed in range(3):
        for paradigm in lock:
            line, null = (
                list(np.interp(STEPS, (25, 100), (start + 0.01 * (seed - 1), 1.0)))
                for start in (lock[paradigm], walk[paradigm])
            )
            runs.append(
                Planted(
                    f"{paradigm}-s{seed}",
                    paradigm,
                    {
                        "subspace_similarity": line,
                        "update_norm": (norms or {}).get(paradigm, (0.2, 0.4, 0.7, 1.0)),
                        "increment_similarity": (None, lock[paradigm] - 0.02 * seed, 0.3, 0.3),
                    },
                    seed,
                    "base" if paradigm == "sft" else "anchor",
                    STEPS,
                    {"subspace_similarity": null, "increment_similarity": (0.05,) * 4},
                    "random_walk",
                )
            )
    return results_of(*runs)


EARLY = {"sft": 0.3, "opd": 0.8, "rlvr": 0.4}


def test_early_alignment_is_held_and_beyond_walks_that_start_alike() -> None:
    found = judged(locked(EARLY, dict.fromkeys(EARLY, 0.2)), "early_lock")
    assert (found["paper"]["verdict"], found["paper"]["beyond_null"]) == ("held", "yes")
    assert [s["estimate"] for s in found["paper"]["statements"]] == pytest.approx([0.3, 0.5, 0.4, 0.5, 0.4])
    assert "beyond its null" in found["paper"]["sentence"]


def test_early_alignment_is_judged_at_every_k_and_the_headline_one_speaks() -> None:
    results = locked(EARLY, dict.fromkeys(EARLY, 0.2))
    other = results.measurements.filter(pl.col("metric").str.ends_with("similarity")).with_columns(
        setting=pl.lit("k=16;view=native"), is_default=pl.lit(False), value=0.9 * pl.col("value")
    )
    found = judged(replace(results, measurements=pl.concat([results.measurements, other])), "early_lock")
    assert {"paper", "same_origin", "paper_k16", "paper_increments_k16"} <= set(found)
    first, *orders = (s["estimate"] for s in found["paper_k16"]["statements"])
    assert (first, orders) == (pytest.approx(0.22), pytest.approx([0.45, 0.36, 0.45, 0.36]))
    assert found["paper"]["statements"][0]["estimate"] == pytest.approx(0.3)
    assert found["paper_k16"]["label"].endswith(", K = 16")


def test_early_alignment_that_the_walks_have_as_well_is_explained_by_them() -> None:
    found = judged(locked(EARLY, {name: value - 0.1 for name, value in EARLY.items()}), "early_lock")["paper"]
    orders = found["statements"][1:]
    assert all(s["explained_share"] == pytest.approx(1, abs=0.05) and s["explained"] == "yes" for s in orders)
    assert found["sentence"].endswith("Over seeds: held, explained by a random walk of the same length.")


def test_at_equal_norm_a_run_is_read_where_it_has_gone_as_far() -> None:
    norms = {"sft": (0.05, 0.3, 0.6, 1.0), "opd": (0.2, 0.4, 0.7, 1.0), "rlvr": (0.1, 0.5, 0.8, 1.0)}
    found = judged(locked(EARLY, dict.fromkeys(EARLY, 0.2), norms), "early_lock")["paper"]["statements"]
    assert [s["text"] for s in found[3:]] == ["OPD above SFT at equal norm", "OPD above RLVR at equal norm"]
    for statement, role in zip(found[3:], ("sft", "rlvr"), strict=True):
        line = np.interp(STEPS, (25, 100), (EARLY[role], 1.0))
        assert statement["values"]["1"] == pytest.approx(0.8 - np.interp(0.2, norms[role], line))


def test_successive_increments_are_compared_from_the_checkpoint_that_has_them() -> None:
    found = judged(locked(EARLY, dict.fromkeys(EARLY, 0.2)), "early_lock")["paper_increments"]
    assert [s["estimate"] for s in found["statements"]] == pytest.approx([0.5, 0.4])
    assert found["quantity"] == "similarity of successive increments"
    assert found["measured"]["opd-s0"]["checkpoints"] == 3
    assert (found["verdict"], found["null_shows"]) == ("held", "no")


def test_alignment_later_than_the_others_did_not_hold() -> None:
    found = judged(locked({"sft": 0.6, "opd": 0.3, "rlvr": 0.5}, dict.fromkeys(EARLY, 0.2)), "early_lock")["paper"]
    assert (found["shows_here"], found["verdict"]) == ("no", "did not hold")
