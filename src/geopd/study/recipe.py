"""The stages of one seed as data: the miniature itself, and a quick one that only walks the path.

Settings were chosen by accuracy on the selection split and by time, never by the geometry they give; the figures are in
``docs/log.md``. Adam's epsilon, betas and weight decay are equal for every paradigm that is compared.
"""

from __future__ import annotations

from dataclasses import replace

from geopd.study.stages import EvaluationPlan, OnPolicy, Parent, Phase, Scale, Stage
from geopd.training.language_model import ModelShape
from geopd.training.settings import OptimiserSettings

__all__ = ["CORE", "MAX_NEW_TOKENS", "QUICK"]

MAX_NEW_TOKENS = 12
STUDENT = ModelShape(hidden=128, layers=4, heads=4, key_value_heads=2, intermediate=384)
TEACHER = ModelShape(hidden=192, layers=4, heads=6, key_value_heads=2, intermediate=576)
MEASURED = ("sft", "opd", "rlvr", "sft_continued")
RUN = EvaluationPlan(divergence=100)
"""What is evaluated behind a measured run."""

CORE = Scale(
    name="core",
    about="One seed of the whole pipeline on a laptop's CPU, in about ten minutes.",
    stages=(
        Stage(
            name="base",
            paradigm="other",
            shape=STUDENT,
            optimiser=OptimiserSettings(1600, 2e-3, "cosine_to_tenth", warmup_steps=100),
            phases=(Phase(300, "mixture"), Phase(1300, "mixture", worked=0.6, slip=0.35)),
            saved=(1600,),
            cost=180,
        ),
        Stage(
            name="teacher",
            paradigm="other",
            shape=TEACHER,
            optimiser=OptimiserSettings(960, 2e-3, "cosine_to_tenth", warmup_steps=100),
            phases=(Phase(960, "arithmetic"),),
            saved=(960,),
            cost=215,
        ),
        Stage(
            name="sft",
            paradigm="sft",
            start=Parent("base", 1600),
            optimiser=OptimiserSettings(450, 5e-4, "cosine_to_tenth", warmup_steps=45),
            phases=(Phase(450, "arithmetic", direct=0.5, slip=0.12),),
            saved=(25, 50, 100, 150, 250, 350, 450),
            evaluation=RUN,
            cost=75,
        ),
        Stage(
            name="opd",
            paradigm="opd",
            start=Parent("sft", 450),
            teacher=Parent("teacher", 960),
            optimiser=OptimiserSettings(160, 3e-5),
            on_policy=OnPolicy(alpha=1.0, prompts=32, samples=4),
            saved=(20, 40, 60, 80, 120, 160),
            evaluation=RUN,
            cost=105,
        ),
        Stage(
            name="rlvr",
            paradigm="rlvr",
            start=Parent("sft", 450),
            optimiser=OptimiserSettings(240, 3e-5),
            on_policy=OnPolicy(alpha=0.0, prompts=16, samples=8),
            saved=(20, 40, 80, 120, 160, 240),
            evaluation=RUN,
            cost=105,
        ),
        Stage(
            name="sft_continued",
            paradigm="sft",
            start=Parent("sft", 450),
            # opd's optimiser and as many sequences a step: the paradigm is the one factor that differs.
            optimiser=OptimiserSettings(160, 3e-5),
            batch=128,
            phases=(Phase(160, "arithmetic"),),
            saved=(20, 40, 60, 80, 120, 160),
            evaluation=RUN,
            cost=60,
        ),
    ),
    measured=MEASURED,
)

_QUICK_EVALUATION = EvaluationPlan(selection=100, held_out=200)
_QUICK_RUN = replace(_QUICK_EVALUATION, divergence=20)
_QUICK_STUDENT = ModelShape(hidden=64, layers=2, heads=2, key_value_heads=1, intermediate=128)
_QUICK_TEACHER = ModelShape(hidden=96, layers=2, heads=3, key_value_heads=1, intermediate=192)

QUICK = Scale(
    name="quick",
    about="The whole path in under two minutes: the models barely learn, so the numbers carry no meaning.",
    stages=(
        Stage(
            name="base",
            paradigm="other",
            shape=_QUICK_STUDENT,
            optimiser=OptimiserSettings(120, 2e-3, "cosine_to_tenth", warmup_steps=20),
            phases=(Phase(60, "mixture"), Phase(60, "mixture", worked=0.6, slip=0.35)),
            saved=(120,),
            evaluation=_QUICK_EVALUATION,
            cost=12,
        ),
        Stage(
            name="teacher",
            paradigm="other",
            shape=_QUICK_TEACHER,
            optimiser=OptimiserSettings(120, 2e-3, "cosine_to_tenth", warmup_steps=20),
            phases=(Phase(120, "arithmetic"),),
            saved=(120,),
            evaluation=_QUICK_EVALUATION,
            cost=14,
        ),
        Stage(
            name="sft",
            paradigm="sft",
            start=Parent("base", 120),
            optimiser=OptimiserSettings(50, 5e-4, "cosine_to_tenth", warmup_steps=5),
            phases=(Phase(50, "arithmetic", direct=0.5, slip=0.12),),
            saved=(5, 10, 20, 35, 50),
            evaluation=_QUICK_RUN,
            cost=11,
        ),
        Stage(
            name="opd",
            paradigm="opd",
            start=Parent("sft", 50),
            teacher=Parent("teacher", 120),
            optimiser=OptimiserSettings(15, 1e-4, warmup_steps=2),
            on_policy=OnPolicy(alpha=1.0, prompts=16, samples=4, pool=500),
            saved=(3, 6, 9, 12, 15),
            evaluation=_QUICK_RUN,
            cost=13,
        ),
        Stage(
            name="rlvr",
            paradigm="rlvr",
            start=Parent("sft", 50),
            optimiser=OptimiserSettings(15, 1e-4, warmup_steps=2),
            on_policy=OnPolicy(alpha=0.0, prompts=8, samples=8, pool=500),
            saved=(3, 6, 9, 12, 15),
            evaluation=_QUICK_RUN,
            cost=13,
        ),
        Stage(
            name="sft_continued",
            paradigm="sft",
            start=Parent("sft", 50),
            optimiser=OptimiserSettings(15, 1e-4, warmup_steps=2),
            batch=64,
            phases=(Phase(15, "arithmetic"),),
            saved=(3, 6, 9, 12, 15),
            evaluation=_QUICK_RUN,
            cost=10,
        ),
    ),
    measured=MEASURED,
)
