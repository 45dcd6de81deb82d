"""One run against its origin: what of each step is compared, what is not and why, and which steps are lost."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from geopd.checkpoints import CheckpointError, Run, is_adapter
from geopd.engine.inputs import opened
from geopd.engine.options import MeasureOptions
from geopd.matrices import Pair, Pairing, pair_checkpoints
from geopd.results import PARADIGMS


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
    lost: dict[int | None, str] = field(default_factory=dict)
    """Steps whose checkpoint cannot be opened, with the reason: their rows will say that they failed."""

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


def plan_run(origin: Path, run: Run, options: MeasureOptions, paradigm: str | None) -> RunPlan:
    """Pair every step of a run with its origin; steps that cannot be opened are in ``lost``.

    Raises:
        ValueError: if the paradigm is none, no step can be opened, or nothing matches.
    """
    paradigm = paradigm or (run.manifest.paradigm if run.manifest else "other")
    if paradigm not in PARADIGMS:
        raise ValueError(f"{run.label}: paradigm {paradigm!r} is none of {', '.join(PARADIGMS)}")
    plan = RunPlan(run, origin, paradigm, warnings=list(run.warnings))
    skipped: dict[str, dict[str, list[int | None]]] = defaultdict(lambda: defaultdict(list))
    before, sound = opened(origin, per_head=options.per_head), False
    for step, path in run.checkpoints:
        try:
            after = opened(path, origin if is_adapter(path) else None, per_head=options.per_head)
        except CheckpointError as error:
            plan.lost[step] = str(error)
        else:
            sound |= _add(plan, step, pair_checkpoints(before, after), options, skipped)
    if len(plan.lost) == len(run.checkpoints):
        raise CheckpointError(next(iter(plan.lost.values())))
    _add_lost(plan)
    for name, reasons in skipped.items():
        plan.skipped[name] = "; ".join(_with_steps(reason, steps, plan.steps) for reason, steps in reasons.items())
    if not sound:
        _nothing(plan)
    return plan


def _add(
    plan: RunPlan,
    step: int | None,
    pairing: Pairing,
    options: MeasureOptions,
    skipped: dict[str, dict[str, list[int | None]]],
) -> bool:
    """Add a step; whether there is a tensor of it to compare."""
    sound = False
    for name, pair in pairing.matched.items():
        if options.selection.entrywise(pair.weight):
            plan.pairs.setdefault(name, {})[step] = pair
            sound = True
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
    return sound


def _add_lost(plan: RunPlan) -> None:
    """Ask of the steps that cannot be opened what the others hold: their tasks will fail with the reason."""
    if not plan.lost:
        return
    for name, steps in plan.pairs.items():
        like = replace(next(iter(steps.values())), nbytes=0)
        plan.pairs[name] = {
            step: like if step in plan.lost else steps[step]
            for step in plan.steps
            if step in plan.lost or step in steps
        }
    plan.warnings += [f"step {step} cannot be opened: {reason}" for step, reason in plan.lost.items()]


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
