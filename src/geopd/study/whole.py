"""The whole study as data: seeds, projections, controls, a learning-rate ladder and variants around one seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from geopd.study.experiments import (
    ARMS,
    FEW_ARMS,
    RAW_ALPHAS,
    ladder,
    locked_arms,
    mixtures,
    rollout_control,
    second_domain,
    second_student,
    second_teacher,
    token_controls,
    with_seed,
)
from geopd.study.recipe import CORE, QUICK
from geopd.study.stages import Locked, Scale, Stage
from geopd.training.language_model import ModelShape

__all__ = ["SCALES", "Grid", "narrowed", "scale_of", "whole_study"]

SMALL_STUDENT = ModelShape(hidden=96, layers=4, heads=3, key_value_heads=1, intermediate=288)
SMALL_TEACHER = ModelShape(hidden=128, layers=4, heads=4, key_value_heads=2, intermediate=384)
MOE_TEACHER = ModelShape(hidden=128, layers=4, heads=4, key_value_heads=2, intermediate=256, experts=4, active=2)
_SQRT_ARMS = (Locked("update", 4, "adapter"), Locked("update", 16, "adapter", "sqrt"), Locked("random", 16, "adapter"))


@dataclass(frozen=True, slots=True)
class Grid:
    """What a whole study varies around the stages of one seed.

    Args:
        starts: by baseline, the step its projection arms start from.
        arms: by baseline, the projection arms.
        rates: learning rates of the ladder beside the baselines'.
        alphas: of the mixtures, without the ends.
        benchmarks: problems of each benchmark.
        gradients: prompts of the gradient covariance.
        shapes: of the second teacher, the mixture-of-experts teacher and the second student.
        every_seed: whether controls, ladder and variants have every seed, instead of the first alone.
    """

    starts: dict[str, int]
    arms: dict[str, Sequence[Locked]]
    rates: Sequence[float]
    alphas: Sequence[float]
    benchmarks: int
    gradients: int
    shapes: tuple[ModelShape, ModelShape, ModelShape]
    every_seed: bool = False


def whole_study(core: Scale, grid: Grid, seeds: Sequence[int], name: str, about: str) -> Scale:
    """Every experiment around the stages of a scale of one seed.

    Args:
        core: base, teacher, sft, opd, rlvr and sft_continued.
        grid: what is varied.
        seeds: each draws base and anchor again; the teacher is one.
        name: of the scale.
        about: one sentence.
    """
    one = {stage.name: stage for stage in core.stages}
    for baseline in grid.starts:
        one[baseline] = replace(one[baseline], evaluation=replace(one[baseline].evaluation, benchmarks=grid.benchmarks))
    one["opd"] = replace(one["opd"], evaluation=replace(one["opd"].evaluation, gradients=grid.gradients))
    locked = [
        arm for of, start in grid.starts.items() for arm in locked_arms(one[of], start, grid.arms[of], grid.benchmarks)
    ]
    controls, variants = _controls(one, grid), _variants(one, grid)
    stages: tuple[Stage, ...] = (one["teacher"],)
    for seed in seeds:
        extra = [*controls, *variants] if grid.every_seed or seed == seeds[0] else []
        stages += with_seed([*one.values(), *locked, *extra], seed, shared=("teacher",))
    runs = {stage.name for stage in [*locked, *controls, *variants] if stage.tags} | set(core.measured)
    plain = {stage.name: stage.name.removesuffix(f"-s{stage.seed}") for stage in stages}
    return Scale(
        name=name,
        about=about,
        stages=stages,
        measured=tuple(label for label, stage in plain.items() if stage in runs),
    )


def _controls(one: dict[str, Stage], grid: Grid) -> list[Stage]:
    opd = one["opd"]
    rungs = [stage for of in (opd, one["rlvr"]) for stage in ladder(of, grid.rates)]
    return [*token_controls(opd), *rollout_control(opd), *mixtures(opd, grid.alphas), *rungs]


def _variants(one: dict[str, Stage], grid: Grid) -> list[Stage]:
    base, teacher, sft, opd = (one[name] for name in ("base", "teacher", "sft", "opd"))
    small, experts, student = grid.shapes
    return [
        *second_teacher("teacher_small", teacher, opd, small, 0.6 * teacher.cost),
        *second_teacher("moe_teacher", teacher, opd, experts, 1.7 * teacher.cost),
        *second_student(base, sft, opd, student),
        *second_domain(base, teacher, sft, opd, slip=0.35),
    ]


FULL = Grid(
    starts={"sft": 100, "opd": 40, "rlvr": 40},
    arms={"sft": ARMS, "opd": ARMS, "rlvr": FEW_ARMS},
    rates=(1e-5, 1e-4),
    alphas=RAW_ALPHAS,
    benchmarks=500,
    gradients=64,
    shapes=(SMALL_TEACHER, MOE_TEACHER, SMALL_STUDENT),
)
_ALL_ARMS = (*ARMS, *_SQRT_ARMS)
EXHAUSTIVE = replace(
    FULL,
    starts={"sft": 100, "sft_continued": 40, "opd": 40, "rlvr": 40},
    arms=dict.fromkeys(("sft", "sft_continued", "opd", "rlvr"), _ALL_ARMS),
    rates=(3e-6, 1e-5, 1e-4, 3e-4),
    every_seed=True,
)


def _one_seed(core: Scale, seeds: Sequence[int]) -> Scale:
    """A scale without experiments under other seeds; several are told apart by name and share the teacher."""
    if len(seeds) == 1:
        return replace(core, stages=tuple(replace(stage, seed=seeds[0]) for stage in core.stages))
    teacher = tuple(stage for stage in core.stages if stage.name == "teacher")
    drawn = tuple(stage for seed in seeds for stage in with_seed(core.stages, seed, shared=("teacher",)))
    return replace(core, stages=teacher + drawn, measured=tuple(f"{m}-s{s}" for s in seeds for m in core.measured))


SCALES: dict[str, tuple[tuple[int, ...], Callable[[Sequence[int]], Scale]]] = {
    "quick": ((0,), lambda seeds: _one_seed(QUICK, seeds)),
    "core": ((0,), lambda seeds: _one_seed(CORE, seeds)),
    "full": (
        (0, 1, 2),
        lambda seeds: whole_study(
            CORE,
            FULL,
            seeds,
            "full",
            "Seeds with a base and an anchor each, projections, and one seed of each control.",
        ),
    ),
    "exhaustive": (
        (0, 1, 2, 3, 4),
        lambda seeds: whole_study(
            CORE,
            EXHAUSTIVE,
            seeds,
            "exhaustive",
            "The whole grid: every projection, control and variant on every seed.",
        ),
    ),
}
"""By name: the seeds a scale has unless others are asked for, and how it is built from seeds."""


def scale_of(name: str, seeds: Sequence[int] | None = None) -> Scale:
    """The stages of a scale.

    Args:
        name: ``quick``, ``core``, ``full`` or ``exhaustive``.
        seeds: other seeds than the scale's own.

    Raises:
        ValueError: the scale is unknown, or the seeds are not different numbers of 0 or more.
    """
    if name not in SCALES:
        raise ValueError(f"scale {name!r} is unknown: use one of {', '.join(SCALES)}")
    usual, build = SCALES[name]
    chosen = tuple(usual if seeds is None else seeds)
    if not chosen or len(set(chosen)) < len(chosen) or min(chosen) < 0:
        raise ValueError(f"seeds {list(chosen)}: give different numbers of 0 or more, such as 0,1,2")
    return build(chosen)


def narrowed(scale: Scale, only: Sequence[str]) -> Scale:
    """The stages whose names match one of the globs, and what they start from.

    Raises:
        ValueError: a glob matches nothing.
    """
    stages = {stage.name: stage for stage in scale.stages}
    kept: set[str] = set()
    for pattern in only:
        found = {name for name in stages if fnmatchcase(name, pattern)}
        if not found:
            raise ValueError(f"--only {pattern}: matches no stage of scale {scale.name}; --list prints their names")
        kept |= found
    for stage in reversed(scale.stages):  # parents come before children
        if stage.name in kept:
            kept |= {parent.stage for parent in stage.parents}
    return replace(
        scale,
        stages=tuple(stage for stage in scale.stages if stage.name in kept),
        measured=tuple(name for name in scale.measured if name in kept),
    )
