"""Everything that is done to one seed's baselines: projection arms, controls, a learning-rate ladder, variants.

Each function takes baseline stages and returns stages that differ from them in the factor it is named after, with that
factor in the run's tags. :func:`with_seed` then draws a list of stages again under another seed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from geopd.study.stages import EvaluationPlan, Locked, Parent, Phase, Stage
from geopd.training.language_model import ModelShape

__all__ = [
    "ARMS",
    "FEW_ARMS",
    "RAW_ALPHAS",
    "ladder",
    "locked_arms",
    "mixtures",
    "rollout_control",
    "second_domain",
    "second_student",
    "second_teacher",
    "token_controls",
    "with_seed",
]

ARMS = (
    Locked("none"),
    Locked("update", 16),
    Locked("random", 16),
    Locked("origin", 16),
    Locked("update", 4),
    Locked("random", 4),
    Locked("update", 16, "adapter"),
)
FEW_ARMS = ARMS[:3]
RAW_ALPHAS = (0.75, 0.5, 0.25, 0.05, 0.01)
_SELECTION = 300


def with_seed(stages: Iterable[Stage], seed: int, shared: Sequence[str] = ()) -> tuple[Stage, ...]:
    """The stages under another seed, renamed ``<name>-s<seed>``; those in ``shared`` stay what they are."""

    def name_of(name: str) -> str:
        return name if name in shared else f"{name}-s{seed}"

    def move(parent: Parent | None) -> Parent | None:
        return None if parent is None else Parent(name_of(parent.stage), parent.step)

    return tuple(
        replace(
            stage,
            name=name_of(stage.name),
            draws=stage.draws or stage.name,
            seed=seed,
            start=move(stage.start),
            origin=move(stage.origin),
            teacher=move(stage.teacher),
        )
        for stage in stages
        if stage.name not in shared
    )


def locked_arms(of: Stage, start: int, arms: Sequence[Locked], benchmarks: int) -> tuple[Stage, ...]:
    """Training from a baseline's step ``start`` to its end, confined (arXiv 2606.07082, section 5).

    All arms draw the same data and start with a fresh optimiser, without weight decay; learning rate and schedule
    (over the steps left) are the baseline's.
    """
    steps = of.optimiser.steps - start
    saved = tuple(sorted({max(1, round(steps * quarter / 4)) for quarter in (1, 2, 3, 4)}))
    found = []
    for arm in arms:
        tags = {"projection": arm.basis, "start": str(start)}
        if arm.k:
            tags |= {"k": str(arm.k), "mode": arm.mode}
        if arm.lr_scale != "none":
            tags["lr_scale"] = arm.lr_scale
        found.append(
            replace(
                of,
                name="_".join([of.name, *_arm_name(arm)]),
                draws=f"{of.name}_locked",
                tags=tags,
                start=Parent(of.name, start),
                origin=of.start,
                optimiser=replace(of.optimiser, steps=steps, weight_decay=0.0, warmup_steps=min(10, steps // 4)),
                saved=saved,
                phases=_phases_of(of, steps),
                locked=arm,
                evaluation=EvaluationPlan(min(_SELECTION, benchmarks), 0, ("greedy",), benchmarks),
                cost=0.9 * of.cost * steps / of.optimiser.steps,
            )
        )
    return tuple(found)


def _arm_name(arm: Locked) -> list[str]:
    if arm.basis == "none":
        return ["free"]
    name = [f"{'v' if arm.basis == 'update' else arm.basis}{arm.k}"]
    return name + (["adapter"] if arm.mode == "adapter" else []) + (["sqrt"] if arm.lr_scale == "sqrt" else [])


def _phases_of(of: Stage, steps: int) -> tuple[Phase, ...]:
    return (replace(of.phases[-1], steps=steps),) if of.phases else ()


def _control(of: Stage, name: str, tags: dict[str, str], **signal: object) -> Stage:
    """A stage like ``of``, drawing the same prompts, with another signal."""
    assert of.on_policy is not None
    return replace(
        of,
        name=name,
        draws=of.draws or of.name,
        tags=tags,
        on_policy=replace(of.on_policy, **signal),  # type: ignore[arg-type]
        evaluation=replace(of.evaluation, benchmarks=0, gradients=0),
    )


def token_controls(opd: Stage) -> tuple[Stage, ...]:
    """Distillation on the top or a random quarter or half of each response's tokens (section 6)."""
    return tuple(
        _control(
            opd,
            f"{opd.name}_{'top' if selection == 'top-gap' else selection}{round(100 * rho)}",
            {"token_selection": selection, "rho": f"{rho:g}"},
            token_selection=selection,
            rho=rho,
        )
        for selection in ("top-gap", "random")
        for rho in (0.25, 0.5)
    )


def rollout_control(opd: Stage) -> tuple[Stage, ...]:
    """Distillation on responses that the teacher writes (section 6)."""
    return (_control(opd, f"{opd.name}_teacher_rollouts", {"rollouts": "teacher"}, rollouts="teacher"),)


def mixtures(opd: Stage, alphas: Sequence[float] = RAW_ALPHAS) -> tuple[Stage, ...]:
    """Both signals mixed, raw and at unit root mean square, the latter at the ends too (section 6)."""
    found = []
    for normalise in (False, True):
        for alpha in (1.0, *alphas, 0.0) if normalise else alphas:
            tags = {"alpha": f"{alpha:g}"} | ({"normalise": "true"} if normalise else {})
            name = f"mix_{alpha:g}" + ("_normalised" if normalise else "")
            stage = _control(opd, name, tags, alpha=alpha, normalise=normalise)
            paradigm = {1.0: "opd", 0.0: "rlvr"}.get(alpha, "mix")
            found.append(replace(stage, paradigm=paradigm))
    return tuple(found)


def ladder(of: Stage, rates: Sequence[float]) -> tuple[Stage, ...]:
    """The same training at other learning rates: what of the geometry is the update's size."""
    return tuple(
        replace(
            _control(of, f"{of.name}_lr{rate:g}", {"learning_rate": f"{rate:g}"}),
            optimiser=replace(of.optimiser, learning_rate=rate),
        )
        for rate in rates
    )


def second_teacher(name: str, teacher: Stage, opd: Stage, shape: ModelShape, cost: float) -> tuple[Stage, ...]:
    """Another teacher, trained as the first, and distillation from it."""
    other = replace(teacher, name=name, shape=shape, cost=cost)
    distilled = _control(opd, f"{opd.name}_{name}", {"variant": name})
    return other, replace(distilled, teacher=Parent(name, other.saved[-1]))


def second_student(base: Stage, sft: Stage, opd: Stage, shape: ModelShape) -> tuple[Stage, ...]:
    """A student of another size: its own base, anchor and distillation."""
    plan = replace(opd.evaluation, benchmarks=0, gradients=0)
    small = replace(base, name=f"{base.name}_small", shape=shape, cost=0.7 * base.cost)
    anchor = replace(
        sft,
        name=f"{sft.name}_small",
        start=Parent(small.name, small.saved[-1]),
        saved=sft.saved[-1:],
        evaluation=plan,
        cost=0.7 * sft.cost,
    )
    name = "student_small"
    student = replace(
        opd,
        name=f"{opd.name}_{name}",
        tags={"variant": name},
        start=Parent(anchor.name, anchor.saved[-1]),
        evaluation=plan,
        cost=0.8 * opd.cost,
    )
    return small, anchor, student


def second_domain(base: Stage, teacher: Stage, sft: Stage, opd: Stage, slip: float) -> tuple[Stage, ...]:
    """Copying, reversing and sorting digits: an anchor that slips, a teacher that does not, and distillation."""
    assert opd.on_policy is not None
    plan = replace(opd.evaluation, benchmarks=0, gradients=0, problem="strings")
    other = replace(
        teacher,
        name="teacher_strings",
        phases=(Phase(teacher.optimiser.steps, "strings"),),
        evaluation=replace(teacher.evaluation, problem="strings"),
    )
    anchor = replace(
        sft,
        name="sft_strings",
        start=Parent(base.name, base.saved[-1]),
        phases=(Phase(sft.optimiser.steps, "strings", slip=slip),),
        saved=sft.saved[-1:],
        evaluation=plan,
    )
    student = replace(
        opd,
        name="opd_strings",
        tags={"variant": "strings"},
        start=Parent(anchor.name, anchor.saved[-1]),
        teacher=Parent(other.name, other.saved[-1]),
        on_policy=replace(opd.on_policy, problem="strings"),
        evaluation=plan,
    )
    return other, anchor, student
