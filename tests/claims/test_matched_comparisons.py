"""Runs read at equal steps, accuracy and update norm: planted lines, and numpy's interpolation as the other way."""

from __future__ import annotations

from dataclasses import replace
from math import exp, log

import numpy as np
import polars as pl
import pytest

from geopd.results import Results
from judged_claims import judged
from planted_results import STEPS, Planted, results_of

SFT = Planted("sft_continued", "sft", {"update_sparsity": (0.9, 0.8, 0.7, 0.6)}, accuracy=(0.5, 0.6, 0.7, 0.8))
OPD = Planted("opd", "opd", {"update_sparsity": (0.95, 0.9, 0.88, 0.8)}, accuracy=(0.45, 0.5, 0.6, 0.7))
RLVR = Planted("rlvr", "rlvr", {"update_sparsity": (0.99, 0.97, 0.94, 0.9)}, accuracy=(0.4, 0.55, 0.5, 0.75))


def sparsity(*runs: Planted, at: str) -> dict:  # type: ignore[type-arg]
    return judged(results_of(*runs), "sparsity_order")[at]


def line(run: Planted, step: float) -> float:
    return float(np.interp(step, run.steps, run.metrics["update_sparsity"]))  # type: ignore[arg-type]


def test_equal_steps_are_the_largest_that_every_run_reached() -> None:
    longer = replace(RLVR, steps=(30, 50, 90, 130))
    found = sparsity(SFT, OPD, longer, at="same_origin@steps")
    assert found["matched"] == "steps"
    assert found["matched_at"] == {"step": {"sft_continued": 80, "opd": 80, "rlvr": 80}, "level": {"0": 80}}
    assert found["measured"] == pytest.approx({r.name: line(r, 80) for r in (SFT, OPD, longer)})


def test_a_run_first_saved_after_the_common_step_is_left_out_with_the_reason() -> None:
    late = replace(RLVR, steps=(90, 100, 110, 120))
    found = sparsity(SFT, OPD, late, at="same_origin@steps")
    assert [s["shows_here"] for s in found["statements"]] == ["yes", "not measured"]
    assert found["reason"] == "RLVR was first saved after the common step"


def test_equal_accuracy_is_where_each_isotonic_fit_first_reaches_the_smallest_final_one() -> None:
    found = sparsity(SFT, OPD, RLVR, at="same_origin@accuracy")
    # RLVR's dip is pooled to .525 twice; the level is OPD's final .7
    steps = {
        "sft_continued": 60.0,
        "opd": 80.0,
        "rlvr": float(np.interp(0.7, (0.4, 0.525, 0.525 + 1e-12, 0.75), STEPS)),
    }
    assert found["matched_at"]["level"] == {"0": pytest.approx(0.7)}
    assert found["matched_at"]["step"] == pytest.approx(steps)
    assert found["measured"] == pytest.approx({r.name: line(r, steps[r.name]) for r in (SFT, OPD, RLVR)})


def test_an_accuracy_crossed_before_the_first_checkpoint_is_undefined() -> None:
    quick = replace(SFT, accuracy=(0.72, 0.75, 0.78, 0.8))
    found = sparsity(quick, OPD, RLVR, at="same_origin@accuracy")
    assert [s["shows_here"] for s in found["statements"]] == ["not measured", "yes"]
    assert found["reason"] == "SFT reaches the common avg@8 on selection before its first checkpoint"
    assert set(found["matched_at"]["step"]) == {"opd", "rlvr"}


def test_a_run_that_never_gains_sets_a_level_that_it_never_crosses() -> None:
    found = sparsity(SFT, OPD, replace(RLVR, accuracy=(0.5, 0.5, 0.5, 0.5)), at="same_origin@accuracy")
    assert found["matched_at"]["level"] == {"0": 0.5}
    assert "RLVR reaches the common avg@8 on selection before its first checkpoint" in found["reason"]
    assert "rlvr" not in found["measured"]


def test_without_evaluations_there_is_no_equal_accuracy() -> None:
    bare = [replace(run, accuracy=()) for run in (SFT, OPD, RLVR)]
    found = sparsity(*bare, at="same_origin@accuracy")
    assert (found["shows_here"], found["verdict"]) == ("not measured", "not measured")
    assert "OPD has no avg@8 on selection" in found["reason"]


def test_equal_norm_interpolates_in_log_norm() -> None:
    def grown(run: Planted, *norms: float) -> Planted:
        return replace(run, metrics={"relative_update_norm": norms, "update_sparsity": [2 + log(n) / 9 for n in norms]})

    runs = grown(SFT, 0.02, 0.06, 0.1, 0.3), grown(OPD, 0.01, 0.02, 0.04, 0.07), grown(RLVR, 0.005, 0.01, 0.05, 0.03)
    found = sparsity(*runs, at="same_origin@norm")
    assert found["matched_at"]["level"] == {"0": pytest.approx(0.05)}  # the largest RLVR had, though not at its end
    # a metric that is a function of log norm is the same for all once the norm is
    assert found["measured"] == pytest.approx(dict.fromkeys(found["measured"], 2 + log(0.05) / 9))
    assert len(found["measured"]) == 3
    base = replace(runs[0], name="sft", origin="base", metrics={n: v[::-1] for n, v in runs[0].metrics.items()})
    beside = sparsity(*runs, base, at="paper@norm")
    assert beside["reason"] == "SFT reaches the common update norm before its first checkpoint"
    assert beside["sentence"].startswith("Does not show here (not: OPD < RLVR. Not measured: SFT < OPD); no null")


def test_nulls_are_read_at_the_same_place_in_the_same_way() -> None:
    runs = [
        replace(run, nulls={"update_sparsity": [v / 2 for v in run.metrics["update_sparsity"] if v is not None]})
        for run in (SFT, OPD, RLVR)
    ]
    for at in ("same_origin@steps", "same_origin@accuracy"):
        found = sparsity(*runs, at=at)
        assert found["null"] == "gaussian"
        assert found["null_measured"] == pytest.approx({run: v / 2 for run, v in found["measured"].items()})
        assert all(s["explained_share"] == pytest.approx(1) for s in found["statements"])


def test_a_stretch_is_read_over_the_matrices_that_have_a_value_at_both_of_its_ends() -> None:
    results = results_of(SFT, OPD, replace(RLVR, accuracy=(0.4, 0.5, 0.6, 0.8)))
    gone = (pl.col("run") == "rlvr") & (pl.col("step") == 80) & (pl.col("matrix") == "layers.0.o_proj")
    status = pl.when(gone).then(pl.lit("undefined")).otherwise("status")
    holed = replace_measurements(results, results.measurements.with_columns(status=status))
    found = judged(holed, "sparsity_order")["same_origin@accuracy"]
    assert found["matched_at"]["step"]["rlvr"] == pytest.approx(70)
    assert found["measured"]["rlvr"] == pytest.approx(0.9 * (0.94 + 0.9) / 2)
    assert found["measured"]["opd"] == pytest.approx(0.8)


def replace_measurements(results: Results, measurements: pl.DataFrame) -> Results:
    return replace(results, measurements=measurements)


def test_one_seed_shows_what_resampling_the_problems_does_to_the_estimate() -> None:
    slow = replace(RLVR, accuracy=(0.3, 0.45, 0.6, 0.9), se=0.02)
    opd = replace(OPD, accuracy=(0.3, 0.45, 0.55, 0.7), se=0.02)
    sft = replace(SFT, accuracy=(0.2, 0.4, 0.6, 0.8), se=0.02)
    found = sparsity(sft, opd, slow, at="same_origin@accuracy")
    assert found == sparsity(sft, opd, slow, at="same_origin@accuracy")
    # OPD's end is the level unless a draw lifts it over the others, which .02 hardly does: a plain loop with numpy
    rng = np.random.default_rng(9)
    drawn = []
    for _ in range(4000):
        fits = [np.maximum.accumulate(rng.normal(run.accuracy, 0.02)) for run in (opd, slow)]
        level = min(fit[-1] for fit in fits)
        low, high = (line(run, np.interp(level, fit, STEPS)) for run, fit in zip((opd, slow), fits, strict=True))
        drawn.append(log(high / low))
    ours, theirs = found["statements"][1]["evaluation_interval"], np.quantile(drawn, (0.025, 0.975))
    assert ours[0] < found["statements"][1]["estimate"] < ours[1]
    assert ours == pytest.approx(theirs, rel=0.1)
    assert found["matched_at"]["undefined_draws"] == 0
    assert found["statements"][1]["verdict"] == "unresolved"


def test_draws_that_are_mostly_undefined_give_no_interval() -> None:
    shaky = replace(SFT, accuracy=(0.699, 0.72, 0.75, 0.8), se=0.05)
    found = sparsity(shaky, OPD, RLVR, at="same_origin@accuracy")
    assert found["matched_at"]["undefined_draws"] > 0.05
    assert all(s["evaluation_interval"] is None for s in found["statements"])


def test_several_seeds_carry_the_noise_of_the_evaluation_in_their_own_spread() -> None:
    runs = [
        replace(run, name=f"{run.name}-s{seed}", seed=seed, accuracy=[a + seed * 0.002 for a in run.accuracy])
        for run in (SFT, OPD, RLVR)
        for seed in range(3)
    ]
    found = sparsity(*runs, at="same_origin@accuracy")
    assert all(s["evaluation_interval"] is None and s["interval"] is not None for s in found["statements"])
    assert set(found["matched_at"]["level"]) == {"0", "1", "2"}
    assert "undefined_draws" not in found["matched_at"]


def test_a_single_checkpoint_has_an_end_and_no_matching() -> None:
    runs = [
        replace(run, steps=(None,), metrics={"update_sparsity": run.metrics["update_sparsity"][-1:]}, accuracy=())
        for run in (SFT, OPD, RLVR)
    ]
    assert sparsity(*runs, at="same_origin")["shows_here"] == "yes"
    found = sparsity(*runs, at="same_origin@steps")
    assert found["reason"] == "a single checkpoint leaves nothing to interpolate"


def norm_and_rank(seed: int, norms: tuple[float, float], ranks: tuple[float, float], wobble: float) -> list[Planted]:
    return [
        Planted(
            f"{paradigm}-s{seed}",
            paradigm,
            {
                "update_norm": (0.1, norm * exp(0.05 * seed)),
                "stable_rank_denoised": (4.0, rank * exp(wobble * (seed - 1) * (paradigm == "opd"))),
            },
            seed,
            steps=(10, 20),
        )
        for paradigm, norm, rank in zip(("opd", "rlvr"), norms, ranks, strict=True)
    ]


@pytest.mark.parametrize(
    ("norms", "ranks", "wobble", "words"),
    [
        ((0.4, 0.2), (4.2, 4.0), 0.01, ("held", "held")),
        ((0.4, 0.2), (6.0, 4.0), 0.01, ("held", "did not hold")),
        ((0.4, 0.2), (4.2, 4.0), 0.10, ("held", "unresolved")),
        ((0.2, 0.4), (4.2, 4.0), 0.01, ("did not hold", "held")),
    ],
    ids=["larger at the same rank", "another rank", "ranks too spread", "smaller"],
)
def test_a_larger_norm_counts_only_at_a_comparable_stable_rank(
    norms: tuple[float, float], ranks: tuple[float, float], wobble: float, words: tuple[str, str]
) -> None:
    runs = [run for seed in range(3) for run in norm_and_rank(seed, norms, ranks, wobble)]
    found = judged(results_of(*runs), "norm_at_stable_rank")["same_origin"]
    assert tuple(s["verdict"] for s in found["statements"]) == words
    whole = "did not hold" if "did not hold" in words else "unresolved" if "unresolved" in words else "held"
    assert found["verdict"] == whole
    assert found["statements"][1]["margin"] == pytest.approx(log(1.15))
    if whole == "unresolved":
        assert found["seeds_needed"] == found["statements"][1]["seeds_needed"] > 3


def test_an_unresolved_stable_rank_leaves_the_norm_without_its_ground() -> None:
    runs = [run for seed in range(3) for run in norm_and_rank(seed, (0.4, 0.2), (4.2, 4.0), 0.01)]
    runs[0] = replace(runs[0], unresolved=frozenset({("stable_rank_denoised", 20)}))
    found = judged(results_of(*runs), "norm_at_stable_rank")["same_origin"]
    assert found["verdict"] == "unresolved"
    assert "not resolved" in found["reason"]
