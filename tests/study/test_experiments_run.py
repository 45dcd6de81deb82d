"""Every kind of experiment stage as it really runs, on models that barely learn."""

import json
from dataclasses import replace

import polars as pl
import pytest

from geopd.checkpoints import checkpoint_digest
from geopd.study import run_study, whole
from geopd.study.recipe import QUICK
from geopd.training import ModelShape

GRID = replace(
    whole.FULL,
    starts={"sft": 10, "opd": 3, "rlvr": 3},
    benchmarks=20,
    gradients=8,
    rates=(3e-5,),
    alphas=(0.5,),
    shapes=(
        ModelShape(64, 2, 2, 1, 128),
        ModelShape(64, 2, 2, 1, 64, experts=4, active=2),
        ModelShape(48, 2, 2, 1, 96),
    ),
)
KINDS = (
    *("opd_free-s0", "opd_v4-s0", "opd_v16_adapter-s0", "sft_random4-s0", "sft_origin16-s0"),
    *("opd_top25-s0", "opd_teacher_rollouts-s0", "mix_0.5-s0", "mix_0_normalised-s0", "rlvr_lr3e-05-s0"),
    *("opd_moe_teacher-s0", "opd_student_small-s0", "opd_strings-s0", "sft_continued-s*", "rlvr-s1"),
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        mini = (0, 1), lambda seeds: whole.whole_study(QUICK, GRID, seeds, "mini", "For tests.")
        patch.setitem(whole.SCALES, "mini", mini)
        folder = tmp_path_factory.mktemp("study")
        outcome = run_study("mini", folder, only=KINDS, quiet=True)
        claims = (outcome.results / "claims.json").read_bytes()
        again = run_study("mini", folder, only=KINDS, quiet=True)
    return outcome, again, claims


def test_runs_carry_what_they_differ_in(study):
    runs = {row["run"]: row for row in pl.read_parquet(study[0].results / "runs.parquet").to_dicts()}
    assert json.loads(runs["opd-s0"]["tags"]) == {}
    assert json.loads(runs["opd_v4-s0"]["tags"]) == {"projection": "update", "k": "4", "mode": "gradient", "start": "3"}
    assert json.loads(runs["mix_0_normalised-s0"]["tags"]) == {"alpha": "0", "normalise": "true"}
    assert (runs["mix_0_normalised-s0"]["paradigm"], runs["mix_0.5-s0"]["paradigm"]) == ("rlvr", "mix")
    # an arm's update is counted from where its baseline began
    assert runs["opd_v4-s0"]["origin_digest"] == runs["opd-s0"]["origin_digest"]
    assert runs["sft_random4-s0"]["origin_digest"] == runs["sft-s0"]["origin_digest"]
    assert runs["rlvr-s1"]["seed"] == 1


def test_the_second_run_of_the_command_gives_the_same_claims(study):
    outcome, again, claims = study
    assert again.usage == outcome.usage
    assert (outcome.results / "claims.json").read_bytes() == claims


def test_arms_move_within_their_span_and_their_bases_are_of_the_start(study):
    stages = study[0].out / "stages"
    records = {
        name: json.loads((stages / name / "run.json").read_text())["settings"] for name in ("opd_v16_adapter-s0",)
    }
    record = records["opd_v16_adapter-s0"]["projection_record"]
    assert record["leak"] < 1e-9
    assert record["basis_digest"] == checkpoint_digest(stages / "opd_v16_adapter-s0" / "basis" / "basis.safetensors")
    free = json.loads((stages / "opd_free-s0" / "run.json").read_text())["settings"]
    assert "projection_record" not in free


def test_the_free_arm_trains_the_layers_matrices_alone(study):
    from safetensors.torch import load_file

    stages = study[0].out / "stages"
    start = load_file(stages / "opd-s0" / "checkpoint-3" / "model.safetensors")
    end = load_file(stages / "opd_free-s0" / "checkpoint-12" / "model.safetensors")
    moved = {name for name in start if not start[name].equal(end[name])}
    assert moved == {name for name in start if "layers." in name and start[name].ndim == 2}


def test_evaluations_have_benchmarks_and_the_divergence(study):
    table = pl.read_parquet(study[0].results / "evaluations.parquet")
    six = {"held_out", "carries", "subtraction", "no_working", "three_digits", "strings"}
    arm = table.filter(pl.col("run") == "opd_v4-s0")
    assert set(arm["benchmark"]) == {*six, "selection"}
    assert set(arm.filter(pl.col("benchmark").is_in(six))["decoding"]) == {"avg@4"}
    divergence = table.filter((pl.col("run") == "opd-s0") & (pl.col("benchmark") == "kl_to_origin")).sort("step")
    assert divergence["step"].to_list() == [3, 6, 9, 12, 15]
    assert divergence["value"].min() > 0


def test_costs_and_gradients_are_in_the_results(study):
    results = study[0].results
    costs = {row["stage"]: row for row in json.loads((results / "costs.json").read_text())}
    assert costs["mix_0.5-s0"]["tokens"] > 0
    assert 0 < costs["mix_0.5-s0"]["signal_share"] < 1
    assert costs["rlvr_lr3e-05-s0"]["tags"] == {"learning_rate": "3e-05"}
    rows = json.loads((results / "gradients.json").read_text())
    assert {row["seed"] for row in rows} == {0}
    assert len(rows) == 14
    assert all(row["opd"] > 0 for row in rows)


def test_the_report_is_there(study):
    page = study[0].report.read_text(encoding="utf-8")
    assert "Projection arms" in page
