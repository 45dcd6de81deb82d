"""Stages as they really run, in processes of their own, at the smallest size."""

import json

import pytest
from safetensors.torch import load_file

from geopd.checkpoints import checkpoint_digest, open_run
from geopd.study.run import train_stages
from geopd.study.stages import EvaluationPlan, OnPolicy, Parent, Phase, Scale, Stage
from geopd.training import ModelShape, OptimiserSettings

PLAN = EvaluationPlan(selection=8, held_out=10, decodings=("greedy", "avg@2"))
TINY = Scale(
    "tiny",
    "For tests.",
    (
        Stage(
            name="base",
            paradigm="other",
            shape=ModelShape(hidden=32, layers=2, heads=2, key_value_heads=1, intermediate=48),
            optimiser=OptimiserSettings(6, 1e-2, "cosine_to_tenth", warmup_steps=1),
            phases=(Phase(3, "mixture", worked=0.5, slip=0.1), Phase(3, "arithmetic")),
            batch=8,
            saved=(1, 6),
            evaluation=PLAN,
        ),
        Stage(
            name="opd",
            paradigm="opd",
            start=Parent("base", 6),
            teacher=Parent("base", 1),
            optimiser=OptimiserSettings(2, 1e-3, warmup_steps=0),
            on_policy=OnPolicy(alpha=1.0, prompts=2, samples=2, pool=20),
            saved=(1, 2),
            evaluation=PLAN,
        ),
    ),
    ("opd",),
)


@pytest.fixture(scope="module")
def twice(tmp_path_factory):
    folders = [tmp_path_factory.mktemp(name) for name in ("first", "second")]
    for folder in folders:
        train_stages(TINY, folder, quiet=True)
    return folders


def test_the_same_seed_gives_bit_identical_checkpoints(twice):
    paths = [sorted(folder.glob("stages/*/checkpoint-*/model.safetensors")) for folder in twice]
    assert len(paths[0]) == len(paths[1]) == 4
    for one, two in zip(*paths, strict=True):
        assert one.read_bytes() == two.read_bytes(), one


def test_evaluations_repeat(twice):
    one, two = ((folder / "stages/opd/evaluations.json").read_text() for folder in twice)
    assert one == two


def test_a_stage_is_a_run_with_its_origin(twice):
    run = open_run(twice[0] / "stages" / "opd", "opd")
    assert [step for step, _ in run.checkpoints] == [1, 2]
    assert run.manifest.paradigm == "opd"
    assert run.manifest.seed == 0
    assert run.manifest.settings["on_policy"]["alpha"] == 1.0
    anchor = twice[0] / "stages" / "base" / "checkpoint-6"
    assert run.origin_path() == anchor
    assert run.manifest.origin.digest == checkpoint_digest(anchor)


def test_evaluations_cover_the_plan(twice):
    run = open_run(twice[0] / "stages" / "opd")
    rows = {(row["step"], row["benchmark"], row["decoding"]): row["n"] for row in run.evaluations}
    expected = {(step, "selection", decoding): 8 for step in (1, 2) for decoding in PLAN.decodings}
    assert rows == expected | {(2, "held_out", decoding): 10 for decoding in PLAN.decodings}


def test_distillation_moved_every_matrix(twice):
    stages = twice[0] / "stages"
    before = load_file(stages / "base" / "checkpoint-6" / "model.safetensors")
    after = load_file(stages / "opd" / "checkpoint-2" / "model.safetensors")
    assert all(not (before[name] == after[name]).all() for name in before if before[name].dim() == 2)


def test_nothing_was_printed_and_the_marker_tells_the_cost(twice):
    for name in ("base", "opd"):
        folder = twice[0] / "stages" / name
        assert (folder / "log.txt").read_text() == ""
        usage = json.loads((folder / "finished.json").read_text())["usage"]
        assert usage["peak_memory_bytes"] > 2**27
        assert usage["core_seconds"] > 0
