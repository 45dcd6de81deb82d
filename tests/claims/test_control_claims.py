from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import t as student

from geopd.claims.comparisons import described
from geopd.claims.controls import mixture, teacher_rollouts, token_selection
from geopd.claims.readouts import Readouts
from geopd.results import Results
from synthetic_controls import Made, made_results

BAND = np.log(1.15)
STEPS = (40, 80, 120, 160)
TOKENS = {
    (selection, rho): {"token_selection": selection, "rho": rho}
    for selection in ("top-gap", "random")
    for rho in ("0.25", "0.5")
}
TEACHER = {"rollouts": "teacher"}


def baselines(spread: float, seeds: int = 3) -> list[Made]:
    """OPD of several seeds at a stable rank of 4 in seed 0, whose logs have this standard deviation at the end."""
    shifts = {1: [0.0], 2: [0.0, np.sqrt(2)], 3: [0.0, 1.0, -1.0]}[seeds]
    return [
        Made(f"opd-s{s}", "opd", s, ranks={step: 4.0 * np.exp(spread * shift * step / 160) for step in STEPS})
        for s, shift in enumerate(shifts)
    ]


def control(ratio: float, tags: dict[str, str], seed: int = 0, **options: Any) -> Made:
    name = "_".join(["opd", *tags.values(), f"s{seed}"])
    return Made(name, "opd", seed, tags, ranks=options.pop("ranks", 4.0 * ratio), **options)


def by_id(comparisons: list[Any]) -> dict[str, dict[str, Any]]:
    return {c.id: described(c) for c in comparisons}


def rollouts(root: Path, *runs: Made, metric: str = "stable_rank_denoised") -> dict[str, Any]:
    return by_id(teacher_rollouts(made_results(root, runs, metric)))["teacher_rollouts"]


@pytest.mark.parametrize(
    ("ratio", "spread", "verdict"),
    [(1.02, 0.01, "held"), (1.6, 0.01, "did not hold"), (0.6, 0.01, "did not hold"), (1.02, 0.1, "unresolved")],
)
def test_a_control_of_one_seed_is_judged_by_the_spread_of_the_baselines(
    tmp_path: Path, ratio: float, spread: float, verdict: str
) -> None:
    entry = rollouts(tmp_path, *baselines(spread), control(ratio, TEACHER))
    assert entry["verdict"] == verdict
    assert "one seed" in f"{entry['sentence']} {entry['reason']}"


def test_the_interval_of_one_seed_is_root_two_baseline_deviations_at_their_degrees_of_freedom(tmp_path: Path) -> None:
    end, path = rollouts(tmp_path, *baselines(0.03), control(1.05, TEACHER))["statements"]
    half = student.ppf(0.95, 2) * np.sqrt(2) * 0.03
    assert end["interval"] == pytest.approx([np.log(1.05) - half, np.log(1.05) + half])
    assert path["interval"] == pytest.approx(end["interval"])
    assert end["margin"] == pytest.approx(BAND)


def test_a_path_that_leaves_the_band_and_comes_back_is_seen(tmp_path: Path) -> None:
    ranks = {40: 4.0, 80: 6.0, 120: 5.0, 160: 4.1}
    end, path = rollouts(tmp_path, *baselines(0.01), control(1, TEACHER, ranks=ranks))["statements"]
    assert end["verdict"] == "held"
    assert path["verdict"] == "did not hold"
    assert path["estimate"] == pytest.approx(np.log(1.5))


def test_the_path_uses_the_largest_spread_on_the_way(tmp_path: Path) -> None:
    wide = [
        replace(r, ranks={**r.ranks, 80: 4.0 * np.exp(0.2 * shift)})  # type: ignore[dict-item]
        for r, shift in zip(baselines(0.01), (0, 1, -1), strict=True)
    ]
    end, path = rollouts(tmp_path, *wide, control(1.0, TEACHER))["statements"]
    assert end["verdict"] == "held"
    assert path["verdict"] == "unresolved"
    assert path["interval"][1] == pytest.approx(student.ppf(0.95, 2) * np.sqrt(2) * 0.2)


def test_what_changing_the_paradigm_varies_by_is_taken_where_it_is_known(tmp_path: Path) -> None:
    """RLVR of the same seeds at a log ratio to OPD of 0.2, 0.2 + 0.15, 0.2 - 0.15, though OPD itself hardly varies."""
    opd = baselines(0.01)
    rlvr = [
        Made(f"rlvr-s{s}", "rlvr", s, ranks={k: v * np.exp(0.2 + 0.15 * d) for k, v in run.ranks.items()})  # type: ignore[union-attr]
        for s, (run, d) in enumerate(zip(opd, (0, 1, -1), strict=True))
    ]
    end = rollouts(tmp_path, *opd, *rlvr, control(1.6, TEACHER))["statements"][0]
    assert end["yardstick"] == [pytest.approx(0.15), 2]
    assert end["verdict"] == "unresolved"
    assert end["seeds_needed"] == 3


def test_without_other_baselines_one_seed_settles_nothing(tmp_path: Path) -> None:
    entry = rollouts(tmp_path, *baselines(0.01, seeds=1), control(1.0, TEACHER))
    assert entry["shows_here"] == "yes"
    assert entry["verdict"] == "unresolved"
    assert entry["statements"][0]["interval"] is None


def test_baselines_of_one_anchor_are_no_yardstick(tmp_path: Path) -> None:
    runs = [replace(run, origin="anchor") for run in [*baselines(0.01), control(1.0, TEACHER)]]
    assert rollouts(tmp_path, *runs)["statements"][0]["interval"] is None


def test_controls_of_several_seeds_are_judged_by_their_own_spread(tmp_path: Path) -> None:
    # Far apart between seeds, but each control is at its own baseline's: pairs, not baselines, decide.
    pairs = [
        control(1.0, TEACHER, s, ranks={k: 1.01**s * v for k, v in run.ranks.items()})  # type: ignore[union-attr]
        for s, run in enumerate(baselines(0.3))
    ]
    entry = rollouts(tmp_path, *baselines(0.3), *pairs)
    assert entry["verdict"] == "held"
    assert entry["seeds"] == 3
    assert entry["reason"] is None


def test_the_path_of_several_seeds_is_read_at_one_step(tmp_path: Path) -> None:
    # Seed 0 strays upwards at 80 and seed 1 downwards at 120: the mean strays furthest at 80.
    strays = ({80: 1.5, 120: 1.1}, {120: 0.75}, {})
    runs = baselines(0.0)
    pairs = [
        control(1.0, TEACHER, s, ranks={k: v * strays[s].get(k, 1.0) for k, v in run.ranks.items()})  # type: ignore[union-attr]
        for s, run in enumerate(runs)
    ]
    path = rollouts(tmp_path, *runs, *pairs)["statements"][1]
    assert path["values"] == pytest.approx({"0": np.log(1.5), "1": 0.0, "2": 0.0})
    assert path["verdict"] == "unresolved"


def test_a_control_whose_baseline_is_absent_is_left_out_and_named(tmp_path: Path) -> None:
    entry = rollouts(tmp_path, *baselines(0.01, seeds=2), control(1.0, TEACHER), control(1.0, TEACHER, 2))
    assert entry["left_out"] == ["opd_teacher_s2"]
    assert list(entry["statements"][0]["values"]) == ["0"]


def test_stable_ranks_held_back_by_rounding_settle_nothing(tmp_path: Path) -> None:
    shaky = rollouts(tmp_path, *baselines(0.01), control(1.0, TEACHER, unresolved=True))
    plain = rollouts(tmp_path, *baselines(0.01), control(1.0, TEACHER), metric="stable_rank")
    for entry in (shaky, plain):
        assert entry["verdict"] == "unresolved"
        assert "rounding noise" in entry["reason"]
    assert plain["quantity"].startswith("stable rank at")


def test_the_mean_is_over_matrices_that_both_runs_have(tmp_path: Path) -> None:
    # The control's first matrix (0.8 of the planted mean) is unresolved, so both are read on the second (1.2 of it).
    entry = rollouts(tmp_path, *baselines(0.01), control(1.1, TEACHER, unresolved=True))
    assert entry["statements"][0]["estimate"] == pytest.approx(np.log(1.1))


def test_fewer_than_three_common_checkpoints_are_an_end_but_no_path(tmp_path: Path) -> None:
    end, path = rollouts(tmp_path, *baselines(0.01), control(1.0, TEACHER, steps=(80, 160)))["statements"]
    assert end["verdict"] == "held"
    assert path["verdict"] == "not measured"
    assert "fewer than 3 checkpoints in common" in path["reason"]


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    assert rollouts(tmp_path, *baselines(0.01))["reason"] == (
        "no run for OPD on the teacher's responses (paradigm opd, tags rollouts=teacher)"
    )
    alone = rollouts(tmp_path, control(1.0, TEACHER))
    assert alone["reason"] == "no run for OPD (paradigm opd, without tags) with the seed and origin of opd_teacher_s0"
    apart = rollouts(tmp_path, *baselines(0.01), control(1.0, TEACHER, steps=(50, 150)))
    assert apart["reason"] == "no stable rank at a checkpoint that opd_teacher_s0, opd-s0 share"


def test_update_norm_and_hill_are_described(tmp_path: Path) -> None:
    measured = rollouts(tmp_path, *baselines(0.01), control(1.1, TEACHER))["measured"]
    assert measured["opd_teacher_s0"] == pytest.approx(
        {
            "stable_rank_denoised": 4.4,
            "update_norm": 0.15,
            "hill_tail": 2.5,
            "log_ratio": np.log(1.1),
            "largest_log_ratio": np.log(1.1),
            "largest_at_step": 40,
        }
    )
    assert set(measured["opd-s0"]) == {"stable_rank_denoised", "update_norm", "hill_tail"}


def test_token_selections_are_judged_together_and_alone(tmp_path: Path) -> None:
    runs = [*baselines(0.01), *(control(1.02, tags) for tags in TOKENS.values())]
    entries = by_id(token_selection(made_results(tmp_path, runs)))
    assert list(entries) == ["summary", "top_gap_25", "top_gap_50", "random_25", "random_50"]
    assert {e["verdict"] for e in entries.values()} == {"held"}
    assert "one seed" in entries["summary"]["sentence"]
    assert len(entries["summary"]["statements"]) == 8


def test_one_token_selection_that_departs_fails_the_whole_and_itself_only(tmp_path: Path) -> None:
    runs = [*baselines(0.01), *(control(1.5 if key == ("random", "0.25") else 1.0, t) for key, t in TOKENS.items())]
    entries = by_id(token_selection(made_results(tmp_path, runs)))
    failed = {id_ for id_, e in entries.items() if e["verdict"] == "did not hold"}
    assert failed == {"summary", "random_25"}


def test_selections_with_one_and_with_three_seeds_are_judged_side_by_side(tmp_path: Path) -> None:
    first, second = TOKENS["top-gap", "0.25"], TOKENS["top-gap", "0.5"]
    several = [
        control(1.0 + 0.01 * s, second, s, ranks={k: v * (1 + 0.01 * s) for k, v in run.ranks.items()})  # type: ignore[union-attr]
        for s, run in enumerate(baselines(0.01))
    ]
    results = made_results(tmp_path, [*baselines(0.01), control(1.0, first), *several])
    words = [s["verdict"] for s in by_id(token_selection(results))["summary"]["statements"]]
    assert words == ["held"] * 4 + ["not measured"] * 4


def test_a_token_selection_without_runs_keeps_the_whole_open(tmp_path: Path) -> None:
    runs = [*baselines(0.01), control(1.0, TOKENS["top-gap", "0.25"])]
    entries = by_id(token_selection(made_results(tmp_path, runs)))
    assert entries["summary"]["shows_here"] == "partly"
    assert entries["summary"]["verdict"] == "unresolved"
    assert entries["random_50"]["reason"].startswith("no run for OPD on a random 50% of tokens")


def mixed(alpha: str, rank: float, **tags: str) -> Made:
    paradigm = {"1": "opd", "0": "rlvr"}.get(alpha, "mix")
    return Made("_".join(["mix", alpha, *tags]), paradigm, tags={"alpha": alpha, **tags}, ranks=rank)


def mixtures(root: Path, weak: float, *, strong: float = 4.1, rlvr: float = 7.0, **tags: str) -> Results:
    runs = [*baselines(0.01), Made("rlvr-s0", "rlvr", ranks=rlvr, steps=(*STEPS, 240))]
    runs += [mixed(alpha, strong, **tags) for alpha in ("0.75", "0.5", "0.25")]
    runs += [mixed(alpha, weak, **tags) for alpha in ("0.05", "0.01")]
    if tags:
        runs += [mixed("1", 4.0, **tags), mixed("0", rlvr, **tags)]
    return made_results(root, runs)


@pytest.mark.parametrize(
    ("weak", "options", "verdict"),
    [
        (6.5, {}, "held"),
        (3.0, {"rlvr": 2.5}, "held"),
        (4.0, {}, "did not hold"),  # departs nowhere
        (3.0, {}, "did not hold"),  # departs away from RLVR
        (6.5, {"strong": 6.0}, "did not hold"),  # departs already when distillation is strong
        (4.7, {}, "unresolved"),
    ],
)
def test_the_mixture_reaches_every_verdict(tmp_path: Path, weak: float, options: Any, verdict: str) -> None:
    entry = by_id(mixture(mixtures(tmp_path, weak, **options)))["raw"]
    assert entry["verdict"] == verdict


def test_departure_is_counted_beyond_the_band_in_rlvrs_direction(tmp_path: Path) -> None:
    for weak, rlvr, expected in ((6.5, 7.0, np.log(6.5 / 4) - BAND), (6.5, 2.0, -np.log(6.5 / 4) - BAND)):
        statement = by_id(mixture(mixtures(tmp_path, weak, rlvr=rlvr)))["raw"]["statements"][-1]
        half = student.ppf(0.975, 2) * np.sqrt(2) * 0.01
        assert statement["estimate"] == pytest.approx(expected)
        assert statement["interval"] == pytest.approx([expected - half, expected + half])


def test_where_rlvr_ends_like_opd_there_is_nowhere_to_depart_to(tmp_path: Path) -> None:
    entry = by_id(mixture(mixtures(tmp_path, 6.5, rlvr=4.2)))["raw"]
    assert entry["verdict"] == "unresolved"
    assert "RLVR itself ends within 15% of OPD: there is nowhere to depart to" in entry["statements"][-1]["reason"]


def test_the_normalised_mixture_has_ends_of_its_own(tmp_path: Path) -> None:
    entries = by_id(mixture(mixtures(tmp_path, 6.5, normalise="true")))
    assert entries["normalised"]["verdict"] == "held"
    assert entries["normalised"]["runs"]["OPD of signals at unit RMS"] == ["mix_1_normalise"]
    assert entries["raw"]["verdict"] == "not measured"


def test_a_mixture_without_rlvr_says_so(tmp_path: Path) -> None:
    results = made_results(tmp_path, [*baselines(0.01), mixed("0.75", 4.0), mixed("0.05", 6.0)])
    entry = by_id(mixture(results))["raw"]
    assert entry["statements"][-2]["reason"] == (
        "no run for RLVR (paradigm rlvr, without tags) with the seed and origin of mix_0.05"
    )
    assert entry["statements"][-1]["reason"] == "no run for alpha 0.01 (paradigm mix, tags alpha=0.01)"


def test_the_share_of_distillation_is_told_where_training_logged_it(tmp_path: Path) -> None:
    (tmp_path / "costs.json").write_text(json.dumps([{"stage": "mix_0.05", "signal_share": 0.29}, {"stage": "other"}]))
    measured = by_id(mixture(mixtures(tmp_path, 6.5)))["raw"]["measured"]
    assert measured["mix_0.05"]["signal_share"] == 0.29
    assert measured["mix_0.01"]["signal_share"] is None
    assert "signal_share" not in measured["opd-s0"]


def test_a_folder_without_controls_measures_nothing(tmp_path: Path) -> None:
    results = made_results(tmp_path, [Made("sft", "sft")])
    for claim in (token_selection, teacher_rollouts, mixture):
        for entry in map(described, claim(results)):
            assert entry["verdict"] == "not measured"
            assert entry["reason"].startswith("no run for")


def test_the_spread_is_none_where_a_baseline_lacks_the_step(tmp_path: Path) -> None:
    runs = baselines(0.01)
    readouts = Readouts(made_results(tmp_path, [*runs[:2], replace(runs[2], steps=(40, 80))]))
    cast = {run.seed: run for run in readouts.runs}
    assert readouts.spread([160], cast) is None
    assert readouts.spread([], cast) is None
    found = readouts.spread([40], cast)
    assert found is not None
    assert found == (pytest.approx(np.sqrt(2) * 0.01 / 4), 2)
