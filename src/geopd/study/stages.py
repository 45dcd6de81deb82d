"""The vocabulary of a study: a stage is a frozen description of one training run, and a scale is a list of them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from geopd.training.language_model import ModelShape
from geopd.training.settings import OptimiserSettings

__all__ = [
    "EvaluationPlan",
    "Locked",
    "OnPolicy",
    "Parent",
    "Phase",
    "Scale",
    "Stage",
    "stage_from_json",
    "stage_key",
    "stage_seed",
]

_RECIPE_VERSION = 2
"""Raised when the code behind a stage changes what the same settings produce, so finished stages run again."""


@dataclass(frozen=True, slots=True)
class Parent:
    """A checkpoint of another stage."""

    stage: str
    step: int


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of supervised steps on one kind of text.

    Args:
        steps: optimiser steps.
        source: ``mixture`` (the pretraining mixture, loss on every token), ``arithmetic`` or ``strings``
            (demonstrations, loss on the response).
        worked: share of worked arithmetic in the mixture.
        direct: share of demonstrations without working.
        slip: probability of a wrong digit in a worked text or a demonstration.
    """

    steps: int
    source: str
    worked: float = 0.0
    direct: float = 0.0
    slip: float = 0.0


@dataclass(frozen=True, slots=True)
class OnPolicy:
    """Rollouts of a score-weighted stage.

    Args:
        alpha: weight of distillation, 1 for OPD and 0 for RLVR.
        prompts: problems a step.
        samples: responses a problem.
        pool: distinct training problems to draw from.
        normalise: bring both signals to unit root mean square before mixing.
        token_selection: ``all``, ``top-gap`` or ``random``.
        rho: share of response tokens that carry the signal.
        rollouts: ``student`` or ``teacher``: who samples.
        problem: ``arithmetic`` or ``strings``.
    """

    alpha: float
    prompts: int
    samples: int
    pool: int = 6000
    normalise: bool = False
    token_selection: str = "all"
    rho: float = 1.0
    rollouts: str = "student"
    problem: str = "arithmetic"


@dataclass(frozen=True, slots=True)
class Locked:
    """Where a stage may move, counted from its ``origin``: one arm of the projection experiment.

    In every arm the optimiser starts fresh and only the layers' matrices train.

    Args:
        basis: ``none`` (the free arm), ``update`` (leading right singular vectors of the update so far), ``random`` or
            ``origin`` (those of the origin's weights).
        k: columns of every V; 0 for the free arm.
        mode: ``gradient`` or ``adapter``.
        lr_scale: ``sqrt`` for sqrt(n / K) times the learning rate in mode ``adapter``.
    """

    basis: str
    k: int = 0
    mode: str = "gradient"
    lr_scale: str = "none"


@dataclass(frozen=True, slots=True)
class EvaluationPlan:
    """Problems evaluated behind a stage; every number of problems may be 0 for none.

    Args:
        selection: problems of the selection split, at every saved step.
        held_out: problems of the held-out split, at the last saved step only.
        decodings: how responses to these are decoded.
        benchmarks: problems of each of the six benchmarks, avg@4, at the last saved step.
        divergence: prompts of the KL divergence to the origin, at every saved step.
        gradients: prompts of the gradient covariance at the start, under both on-policy signals; needs a teacher.
        problem: ``arithmetic`` or ``strings``: whose splits.
    """

    selection: int = 500
    held_out: int = 2000
    decodings: tuple[str, ...] = ("greedy", "avg@8")
    benchmarks: int = 0
    divergence: int = 0
    gradients: int = 0
    problem: str = "arithmetic"


@dataclass(frozen=True, slots=True)
class Stage:
    """One training run.

    Args:
        name: folder name.
        paradigm: what ``run.json`` says: sft, opd, rlvr, mix or other.
        optimiser: the optimiser's settings; its steps are the stage's.
        saved: steps at which checkpoints are kept; the last is the stage's end.
        evaluation: what is evaluated.
        seed: of every draw of this stage.
        draws: stages with equal ``draws`` and seed see the same data in the same order; the name when empty.
        tags: in what the run differs from its paradigm's baseline, for ``run.json``; empty for a baseline.
        start: checkpoint to start from; None initialises a model of ``shape``.
        origin: checkpoint that updates are counted from; ``start`` when None.
        teacher: checkpoint of the teacher, for OPD.
        shape: dimensions of a model made from scratch.
        batch: texts a step, for supervised stages.
        phases: curriculum of a supervised stage.
        on_policy: rollouts of a score-weighted stage.
        locked: the subspace training is confined to.
        cost: expected core-seconds, for the time left and the order of work only.

    Raises:
        ValueError: the description contradicts itself.
    """

    name: str
    paradigm: str
    optimiser: OptimiserSettings
    saved: tuple[int, ...]
    evaluation: EvaluationPlan = field(default_factory=EvaluationPlan)
    seed: int = 0
    draws: str = ""
    tags: dict[str, str] = field(default_factory=dict)
    start: Parent | None = None
    origin: Parent | None = None
    teacher: Parent | None = None
    shape: ModelShape | None = None
    batch: int = 64
    phases: tuple[Phase, ...] = ()
    on_policy: OnPolicy | None = None
    locked: Locked | None = None
    cost: float = 1.0

    def __post_init__(self) -> None:
        if self.locked is not None and (self.origin is None or self.optimiser.weight_decay != 0):
            raise ValueError(f"stage {self.name}: a locked stage needs an origin and weight decay 0")
        if (self.start is None) == (self.shape is None):
            raise ValueError(f"stage {self.name}: give either a checkpoint to start from or a shape")
        if bool(self.phases) == (self.on_policy is not None):
            raise ValueError(f"stage {self.name}: give either supervised phases or on-policy rollouts")
        if self.phases and sum(phase.steps for phase in self.phases) != self.optimiser.steps:
            raise ValueError(f"stage {self.name}: the phases' steps must add up to {self.optimiser.steps}")
        if not self.saved or list(self.saved) != sorted(set(self.saved)) or self.saved[-1] != self.optimiser.steps:
            raise ValueError(f"stage {self.name}: saved steps must ascend and end at {self.optimiser.steps}")

    @property
    def roles(self) -> dict[str, Parent]:
        """Checkpoints this stage reads, by what they are to it."""
        found = {"start": self.start, "teacher": self.teacher, "origin": self.origin}
        return {role: parent for role, parent in found.items() if parent is not None}

    @property
    def parents(self) -> tuple[Parent, ...]:
        """The same without their roles."""
        return tuple(self.roles.values())

    def settings(self) -> dict[str, Any]:
        """Everything that decides the stage's result, as JSON types."""
        content: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        del content["cost"]  # an expectation, which changes nothing
        return content


@dataclass(frozen=True, slots=True)
class Scale:
    """A named list of stages and the runs that are measured.

    Args:
        name: ``quick``, ``core``, ``full`` or ``exhaustive``.
        about: one sentence for the report.
        stages: in an order where parents come first.
        measured: names of stages whose runs are measured at every checkpoint.
    """

    name: str
    about: str
    stages: tuple[Stage, ...]
    measured: tuple[str, ...]

    def __post_init__(self) -> None:
        seen: dict[str, Stage] = {}
        for stage in self.stages:
            for parent in stage.parents:
                if parent.stage not in seen or parent.step not in seen[parent.stage].saved:
                    raise ValueError(
                        f"stage {stage.name} needs {parent.stage} at step {parent.step}, not saved before it"
                    )
            seen[stage.name] = stage
        if len(seen) < len(self.stages):
            raise ValueError(f"scale {self.name} names a stage twice")
        unknown = set(self.measured) - set(seen)
        if unknown:
            raise ValueError(f"scale {self.name} measures unknown stages {sorted(unknown)}: name stages it has")

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds of the measured runs, ascending."""
        return tuple(sorted({stage.seed for stage in self.stages if stage.name in self.measured}))


def stage_key(stage: Stage, parents: list[dict[str, Any]]) -> str:
    """Digest of what a stage's result depends on: its settings, and its parents' keys and weights."""
    content = {"version": _RECIPE_VERSION, "settings": stage.settings(), "parents": parents}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def stage_seed(stage: Stage) -> int:
    """The seed of a stage's draws: one for every pair of ``draws`` and seed, below 2**31."""
    digest = hashlib.blake2b(f"{stage.seed}/{stage.draws or stage.name}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1


def stage_from_json(content: dict[str, Any]) -> Stage:
    """A stage from :meth:`Stage.settings`; the expected cost is not part of it."""
    fields = dict(content)
    kinds = {"shape": ModelShape, "on_policy": OnPolicy, "locked": Locked}
    for name, kind in {**dict.fromkeys(("start", "origin", "teacher"), Parent), **kinds}.items():
        if fields[name] is not None:
            fields[name] = kind(**fields[name])
    fields["optimiser"] = OptimiserSettings(**fields["optimiser"])
    plan = dict(fields["evaluation"])
    plan["decodings"] = tuple(plan["decodings"])
    fields["evaluation"] = EvaluationPlan(**plan)
    fields["phases"] = tuple(Phase(**phase) for phase in fields["phases"])
    fields["saved"] = tuple(fields["saved"])
    return Stage(**fields)


def stage_folder(stages: Path, name: str) -> Path:
    """Where a finished stage lies."""
    return stages / name


def partial_folder(stages: Path, name: str) -> Path:
    """Where an unfinished stage is written."""
    return stages / f".{name}.partial"
