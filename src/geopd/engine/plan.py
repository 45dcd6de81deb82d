"""From checkpoints to tasks: what is compared with what, what is not and why, and what it will cost."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from geopd.checkpoints import CheckpointError, Run, holds_weights, open_run
from geopd.engine.inputs import opened
from geopd.engine.options import MeasureOptions
from geopd.engine.task import Location, RunEnds, RunSteps, Task
from geopd.matrices import Pair, Pairing, pair_checkpoints
from geopd.results import PARADIGMS

ORIGIN = "origin"  # the word that stands for: as each run's run.json says


@dataclass
class RunPlan:
    """One run against its origin: its paradigm, the pairs of every step, and what is left out."""

    run: Run
    origin: Path
    paradigm: str
    pairs: dict[str, dict[int | None, Pair]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    unselected: set[str] = field(default_factory=set)

    @property
    def steps(self) -> list[int | None]:
        """The run's steps in order."""
        return [step for step, _ in self.run.checkpoints]

    def coverage(self) -> dict[str, Any]:
        """What is compared and what is not, as the manifest records it."""
        return {
            "matched": sum(name not in self.failed for name in self.pairs),
            "not_selected": len(self.unselected),
            "skipped": [{"name": name, "reason": reason} for name, reason in sorted(self.skipped.items())],
            "failed": [{"matrix": name, "reason": reason} for name, reason in sorted(self.failed.items())],
            "warnings": self.warnings,
        }


@dataclass(frozen=True)
class Plan:
    """All runs of one call, and the options they are measured with."""

    runs: tuple[RunPlan, ...]
    options: MeasureOptions

    @property
    def by_label(self) -> dict[str, RunPlan]:
        """The runs by their labels."""
        return {plan.run.label: plan for plan in self.runs}

    def run_pairs(self) -> list[tuple[RunPlan, RunPlan]]:
        """The runs two by two, ordered by label, that start from one origin."""
        ordered = sorted(self.runs, key=lambda plan: plan.run.label)
        return [(a, b) for a, b in combinations(ordered, 2) if a.origin == b.origin]

    def tasks(
        self, keys: Mapping[tuple[str, str], str], pair_keys: Mapping[tuple[str, str, str], str] | None = None
    ) -> list[Task]:
        """Tasks for the (run, matrix) and (run, other, matrix) named, longest first: one per matrix and origin."""
        runs: dict[tuple[Path, str], list[RunSteps]] = defaultdict(list)
        pairs: dict[tuple[Path, str], list[RunEnds]] = defaultdict(list)
        found: dict[tuple[Path, str], Pair] = {}
        for plan in self.runs:
            for name, steps in plan.pairs.items():
                if (plan.run.label, name) not in keys:
                    continue
                located = tuple((step, _tuned(plan, step, pair)) for step, pair in steps.items())
                runs[plan.origin, name].append(RunSteps(plan.run.label, keys[plan.run.label, name], located))
                found[plan.origin, name] = next(iter(steps.values()))
        for (run, other, name), key in (pair_keys or {}).items():
            one = self.by_label[run]
            pairs[one.origin, name].append(_ends(one, self.by_label[other], name, key))
            found.setdefault((one.origin, name), next(iter(one.pairs[name].values())))
        tasks = [
            Task(
                pair.weight,
                pair.shape,
                Location(origin, pair.origin_tensor),
                tuple(runs[origin, name]),
                self.options,
                self.options.selection.full(pair.weight),
                tuple(pairs[origin, name]),
            )
            for (origin, name), pair in found.items()
        ]
        return sorted(tasks, key=lambda task: (-task_cost(task), str(task.origin.checkpoint), task.weight.name))

    def tensors(self) -> dict[tuple[Path, str], int]:
        """Every readable tensor of every checkpoint in the plan, with its size in bytes."""
        paths = {plan.origin for plan in self.runs} | {path for plan in self.runs for _, path in plan.run.checkpoints}
        return {
            (path, name): info.nbytes for path in sorted(paths) for name, info in sorted(opened(path).tensors.items())
        }


def _tuned(plan: RunPlan, step: int | None, pair: Pair) -> Location:
    return Location(dict(plan.run.checkpoints)[step], pair.tuned_tensor)


def _ends(one: RunPlan, other: RunPlan, name: str, key: str) -> RunEnds:
    (step, pair), (other_step, other_pair) = (list(plan.pairs[name].items())[-1] for plan in (one, other))
    ends = (_tuned(one, step, pair), _tuned(other, other_step, other_pair))
    return RunEnds(one.run.label, other.run.label, key, step, *ends)


def task_cost(task: Task) -> float:
    """Expected work in units of one multiply-add of a float64 SVD (m n min(m, n) of them make one).

    Constants from 256 x 256 to 12288 x 4096 on one core (docs/log.md): entrywise work, the update's triples (twice
    where there are increments too), and a decomposition, whose cubic part is a seventh of the SVD's.
    """
    entries, p = _size(task)
    groups = {diagnostic.group for diagnostic in task.diagnostics}
    cost = 20.0 * len(task.pairs)
    for run in task.runs:
        steps = len(run.steps)
        cost += 70.0 * steps
        if groups & {"full", "update"}:
            cost += 700.0 * (2 * steps - 1)
        if "full" in groups:
            cost += (0.14 * p + 800.0) * steps
    if "full" in groups:
        cost += 0.14 * p + 750.0
    return entries * cost * (1 + 2 * task.options.nulls)


def _size(task: Task) -> tuple[int, int]:
    shape = task.shape if len(task.shape) == 2 else (*task.shape, 1)
    return shape[0] * shape[1], min(shape)


def make_plan(
    base: str | Path, runs: Sequence[str | Path], options: MeasureOptions, paradigms: Mapping[str, str] | None = None
) -> Plan:
    """Open every checkpoint's headers and pair each with its origin; no weights are read.

    ``base`` is a checkpoint, or the word ``origin``: taken from each run's ``run.json``. A run is a path or
    ``label=path``. ``paradigms`` overrides what ``run.json`` says, by label.

    Raises:
        ValueError: if a run or option is unusable, two runs share a label, or nothing matches.
    """
    if not runs:
        raise ValueError("no run given: name a tuned checkpoint or a folder of step-numbered checkpoints")
    opened_runs = [_open(argument) for argument in runs]
    labels = [run.label for run in opened_runs]
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise ValueError(f"two runs are labelled {', '.join(twice)}: give each its own label, as in label=PATH")
    paradigms = dict(paradigms or {})
    if unknown := sorted(set(paradigms) - set(labels)):
        raise ValueError(f"--paradigm: no run labelled {', '.join(unknown)}; runs are {', '.join(labels)}")
    return Plan(tuple(_plan_run(base, run, options, paradigms.get(run.label)) for run in opened_runs), options)


def _open(argument: str | Path) -> Run:
    text = str(argument)
    label, equals, path = text.partition("=")
    # a path that exists as written wins over the label form, so that a '=' in a folder name needs no escape
    if equals and label and not Path(text).exists():
        return open_run(path, label)
    return open_run(text)


def _plan_run(base: str | Path, run: Run, options: MeasureOptions, paradigm: str | None) -> RunPlan:
    origin = run.origin_path() if str(base) == ORIGIN else _base(Path(base).absolute())
    paradigm = paradigm or (run.manifest.paradigm if run.manifest else "other")
    if paradigm not in PARADIGMS:
        raise ValueError(f"{run.label}: paradigm {paradigm!r} is none of {', '.join(PARADIGMS)}")
    plan = RunPlan(run, origin, paradigm, warnings=list(run.warnings))
    skipped: dict[str, dict[str, list[int | None]]] = defaultdict(lambda: defaultdict(list))
    for step, path in run.checkpoints:
        pairing = pair_checkpoints(opened(origin), opened(path))
        _add(plan, step, pairing, options, skipped)
    for name, reasons in skipped.items():
        plan.skipped[name] = "; ".join(_with_steps(reason, steps, plan.steps) for reason, steps in reasons.items())
    if not any(name not in plan.failed for name in plan.pairs):
        _nothing(plan)
    return plan


def _base(path: Path) -> Path:
    if holds_weights(path):
        return path
    inside = open_run(path)
    if len(inside.checkpoints) > 1:
        names = ", ".join(folder.name for _, folder in inside.checkpoints)
        raise CheckpointError(f"{path}: a base is one checkpoint, and this folder holds {names}; name one of them")
    return inside.checkpoints[0][1]


def _add(
    plan: RunPlan,
    step: int | None,
    pairing: Pairing,
    options: MeasureOptions,
    skipped: dict[str, dict[str, list[int | None]]],
) -> None:
    for name, pair in pairing.matched.items():
        if options.selection.entrywise(pair.weight):
            plan.pairs.setdefault(name, {})[step] = pair
        else:
            plan.unselected.add(name)
    for skip in pairing.skipped:
        if skip.weight is not None and not options.selection.entrywise(skip.weight):
            plan.unselected.add(skip.name)
        elif not skip.failed:
            skipped[skip.name][skip.reason].append(step)
        else:
            plan.failed.setdefault(skip.name, skip.reason)
            if skip.pair is not None:  # its task will fail with this reason, and the tables then say so
                plan.pairs.setdefault(skip.name, {})[step] = skip.pair
    plan.warnings += [warning for warning in pairing.warnings if warning not in plan.warnings]


def _with_steps(reason: str, steps: list[int | None], every: list[int | None]) -> str:
    return reason if steps == every else f"{reason} (at step {', '.join(map(str, steps))})"


def _nothing(plan: RunPlan) -> None:
    if plan.unselected and not plan.failed and not plan.skipped:
        raise CheckpointError(f"{plan.run.path}: --matrices selects none of its {len(plan.unselected)} tensors")
    reasons = [f"{name}: {reason}" for name, reason in sorted((plan.skipped | plan.failed).items())]
    more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
    raise CheckpointError(
        f"{plan.run.path}: nothing in it matches {plan.origin}: {reasons[0] if reasons else 'both are empty'}{more}; "
        "is this the run's base?"
    )
