"""The grid of the whole study: what it varies, what it shares, and how it is narrowed."""

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from geopd.cli import app
from geopd.study.recipe import CORE
from geopd.study.schedule import predicted_minutes, work_behind
from geopd.study.stages import stage_from_json, stage_seed
from geopd.study.whole import SCALES, narrowed, scale_of


@pytest.fixture(scope="module")
def full():
    return scale_of("full")


def by_name(scale):
    return {stage.name: stage for stage in scale.stages}


def test_every_seed_redraws_base_and_anchor_and_all_share_one_teacher(full):
    stages = by_name(full)
    assert full.seeds == (0, 1, 2)
    for name in ("base", "sft", "opd", "rlvr", "sft_continued"):
        mine = [stages[f"{name}-s{seed}"] for seed in full.seeds]
        assert [stage.seed for stage in mine] == [0, 1, 2]
        assert len({stage_seed(stage) for stage in mine}) == 3
    for seed in full.seeds:
        assert stages[f"opd-s{seed}"].start.stage == f"sft-s{seed}"
        assert stages[f"sft-s{seed}"].start.stage == f"base-s{seed}"
        assert stages[f"opd-s{seed}"].teacher.stage == "teacher"


def test_the_baselines_are_the_core_stages(full):
    stages = by_name(full)
    for stage in CORE.stages:
        same = stages["teacher" if stage.name == "teacher" else f"{stage.name}-s0"]
        assert (same.optimiser, same.phases, same.on_policy, same.saved) == (
            stage.optimiser,
            stage.phases,
            stage.on_policy,
            stage.saved,
        )
        assert stage_seed(same) == stage_seed(stage)
        assert same.tags == {}


@pytest.mark.parametrize("of", ["opd", "sft", "rlvr"])
def test_arms_differ_in_their_basis_alone_and_start_where_the_baseline_was(full, of):
    stages = by_name(full)
    baseline = stages[f"{of}-s1"]
    arms = [s for s in full.stages if s.locked and s.name.startswith(f"{of}_") and s.seed == 1]
    assert [(a.locked.basis, a.locked.k) for a in arms][:3] == [("none", 0), ("update", 16), ("random", 16)]
    assert len(arms) == (3 if of == "rlvr" else 7)
    same = {(a.optimiser, a.start, a.origin, a.teacher, a.on_policy, a.phases, a.saved, stage_seed(a)) for a in arms}
    assert len(same) == 1
    start = arms[0].start
    assert start.stage == baseline.name
    assert 0.15 <= start.step / baseline.optimiser.steps <= 0.25
    assert arms[0].optimiser.steps == baseline.optimiser.steps - start.step
    assert arms[0].origin == baseline.start
    assert arms[0].optimiser.weight_decay == 0
    assert set(full.measured) >= {a.name for a in arms}


def test_controls_change_one_factor_and_see_the_baselines_draws(full):
    stages = by_name(full)
    baseline = stages["opd-s0"]
    controls = [s for s in full.stages if s.tags and not s.locked and "variant" not in s.tags and s.seed == 0]
    kinds = {frozenset(s.tags) for s in controls}
    assert kinds == {
        frozenset({"token_selection", "rho"}),
        frozenset({"rollouts"}),
        frozenset({"alpha"}),
        frozenset({"alpha", "normalise"}),
        frozenset({"learning_rate"}),
    }
    alphas = {s.tags["alpha"] for s in controls if "alpha" in s.tags and "normalise" not in s.tags}
    assert alphas == {"0.75", "0.5", "0.25", "0.05", "0.01"}
    for stage in controls:
        of = stages["rlvr-s0"] if stage.name.startswith("rlvr") else baseline
        assert stage_seed(stage) == stage_seed(of)
        assert stage.start == of.start
        changed = {
            field
            for field in ("alpha", "normalise", "token_selection", "rho", "rollouts", "prompts", "samples")
            if getattr(stage.on_policy, field) != getattr(of.on_policy, field)
        }
        if stage.optimiser != of.optimiser:
            changed.add("learning_rate")
            assert stage.optimiser == replace(of.optimiser, learning_rate=float(stage.tags["learning_rate"]))
        assert changed <= set(stage.tags)


def test_variants_have_a_teacher_student_or_problem_of_their_own(full):
    stages = by_name(full)
    variants = {s.tags["variant"]: s for s in full.stages if "variant" in s.tags}
    assert set(variants) == {"teacher_small", "moe_teacher", "student_small", "strings"}
    assert stages[variants["moe_teacher"].teacher.stage].shape.experts > 1
    assert stages[stages[variants["student_small"].start.stage].start.stage].shape.hidden < 128
    assert variants["strings"].on_policy.problem == variants["strings"].evaluation.problem == "strings"


@pytest.mark.parametrize("name", list(SCALES))
def test_stages_survive_their_json(name):
    for stage in scale_of(name).stages:
        read = stage_from_json(json.loads(json.dumps(stage.settings())))
        assert replace(read, cost=stage.cost) == stage


def test_narrowing_keeps_what_a_stage_starts_from(full):
    few = narrowed(full, ["opd_v4-s1"])
    assert {stage.name for stage in few.stages} == {"teacher", "base-s1", "sft-s1", "opd-s1", "opd_v4-s1"}
    assert few.measured == ("sft-s1", "opd-s1", "opd_v4-s1")
    with pytest.raises(ValueError, match="--only nothing: matches no stage of scale full"):
        narrowed(full, ["nothing"])


def test_seeds_are_checked():
    for wrong in ([], [1, 1], [-1]):
        with pytest.raises(ValueError, match="give different numbers of 0 or more"):
            scale_of("core", wrong)
    assert [stage.seed for stage in scale_of("core", [4]).stages] == [4] * 6
    assert {stage.name for stage in scale_of("core", [4, 5]).stages} >= {"teacher", "opd-s4", "opd-s5"}


def test_the_prediction_is_the_work_over_the_workers_or_the_longest_chain():
    core = scale_of("core")
    costs = {stage.name: stage.cost for stage in core.stages}
    chain = costs["base"] + costs["sft"] + max(costs["opd"], costs["rlvr"])
    assert work_behind(core)["base"] == chain
    measured = 1.0 * sum(len(s.saved) for s in core.stages if s.name in core.measured)
    assert predicted_minutes(core, 1) == pytest.approx((sum(costs.values()) + measured) / 60)
    assert predicted_minutes(core, 100) == pytest.approx((chain + measured / 100) / 60)


def test_the_list_is_printed_and_nothing_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    listed = CliRunner().invoke(app, ["study", "--scale", "full", "--list", "--json", "--only", "opd_v4-s0"])
    found = json.loads(listed.stdout)
    assert [row["stage"] for row in found["stages"]][-1] == "opd_v4-s0"
    assert found["predicted_minutes"] > 1
    plain = CliRunner().invoke(app, ["study", "--scale", "full", "--list"])
    assert "98 stages, about" in plain.stdout
    assert not list(tmp_path.iterdir())
