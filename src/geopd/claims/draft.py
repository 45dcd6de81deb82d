"""A comparison of controls with their references, put together statement by statement."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import copysign
from statistics import fmean
from typing import Any

from geopd.claims.comparisons import Comparison
from geopd.claims.orders import BAND
from geopd.claims.readouts import Path, Readouts
from geopd.claims.tagged import TaggedRun, first_by_seed, redrawn
from geopd.claims.trajectories import MIN_CHECKPOINTS
from geopd.claims.verdicts import Statement


@dataclass(frozen=True)
class Control:
    """Runs of one kind: what they are called and how they are marked; without tags a baseline."""

    id: str
    label: str
    tags: Mapping[str, str] = field(default_factory=dict)
    paradigm: str = "opd"

    @property
    def wanted(self) -> str:
        """How a run of it is marked."""
        tags = ", ".join(f"{name}={value}" for name, value in self.tags.items())
        return f"{self.label} (paradigm {self.paradigm}, {'tags ' + tags if tags else 'without tags'})"


OPD, RLVR = Control("opd", "OPD"), Control("rlvr", "RLVR", paradigm="rlvr")


@dataclass
class Draft:
    """Statements about controls, with the runs and numbers behind them, on their way to a comparison."""

    readouts: Readouts
    statements: list[Statement] = field(default_factory=list)
    cast: dict[str, dict[int, TaggedRun]] = field(default_factory=dict)
    values: dict[str, dict[str, Any]] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)
    marked: set[str] = field(default_factory=set)

    def stays(self, text: str, control: Control, reference: Control, *, whole: bool) -> None:
        """The control's stable rank is within 15% of the reference's: at the end, or where they are furthest apart.

        Furthest is where the mean log ratio over seeds is: one step for all seeds, so that deviations of either sign
        at different steps do not cancel.
        """
        found, reason = self._meetings(control, reference)
        short = [seed for seed, (path, *_) in found.items() if len(path.values) < MIN_CHECKPOINTS]
        if whole and short:
            found = {seed: meeting for seed, meeting in found.items() if seed not in short}
            reason = f"{control.label}: fewer than {MIN_CHECKPOINTS} checkpoints in common with {reference.label}"
        steps = set.intersection(*(set(path.values) for path, *_ in found.values())) if whole and found else set()
        ratios = {step: {seed: path.log_ratio(step, *pair) for seed, (path, *pair) in found.items()} for step in steps}
        if whole:
            values = max((ratios[step] for step in sorted(steps)), key=lambda r: abs(fmean(r.values())), default={})
        else:
            values = {seed: path.log_ratio(path.end, *pair) for seed, (path, *pair) in found.items()}
            steps = {path.end for path, *_ in found.values()}
        self._state(text, values, steps, reason, margin=BAND)

    def departs(self, text: str, control: Control, reference: Control, towards: Control) -> None:
        """The control's stable rank ends more than 15% away from the reference's, on the side of ``towards``."""
        found, reason = self._meetings(control, reference, towards)
        values: dict[int, float] = {}
        steps: set[int] = set()
        nowhere = None
        for seed, (path, run, other, target) in found.items():
            way = path.log_ratio(path.end, target, other)
            values[seed] = copysign(1.0, way) * path.log_ratio(path.end, run, other) - BAND
            steps.add(path.end)
            if abs(way) <= BAND:
                nowhere = f"{towards.label} itself ends within 15% of {reference.label}: there is nowhere to depart to"
        self._state(text, values, steps, nowhere or reason)

    def _state(
        self, text: str, values: dict[int, float], steps: set[int], reason: str | None, margin: float | None = None
    ) -> None:
        single = self.readouts.spread(sorted(steps), self._runs(OPD)) if len(values) == 1 else None
        self.statements.append(Statement(text, values, margin=margin, reason=reason, yardstick=single))

    def _meetings(self, control: Control, *others: Control) -> tuple[dict[int, tuple[Any, ...]], str | None]:
        """By seed ``(path, run, other, ...)`` at common checkpoints, and what is missing or shaky about them."""
        runs = self._runs(control)
        self.marked |= {run.name for run in self._fitting(control)}
        if not runs:
            return {}, f"no run for {control.wanted}"
        found: dict[int, tuple[Any, ...]] = {}
        lacking = None
        for seed, run in runs.items():
            partners = [self._runs(other, run).get(seed) for other in others]
            if None in partners:
                absent = others[partners.index(None)]
                lacking = f"no run for {absent.wanted} with the seed and origin of {run.name}"
                continue
            together = [run, *(partner for partner in partners if partner is not None)]
            path = self.readouts.path(self.readouts.metric, together)
            if not path.values:
                lacking = f"no stable rank at a checkpoint that {', '.join(r.name for r in together)} share"
                continue
            found[seed] = (path, *together)
            self._describe(path, together)
            for part, member in zip((control, *others), together, strict=True):
                self.cast.setdefault(part.label, {})[seed] = member
        used = [run for _, *together in found.values() for run in together]
        return found, self.readouts.shaky(used) if found else lacking

    def _describe(self, path: Path, together: list[TaggedRun]) -> None:
        run, other = together[:2]
        furthest = path.furthest(run, other)
        for member in together:
            self.values.setdefault(member.name, self.readouts.described(member, path.end))
            self.steps[member.name] = path.end
        self.values[run.name] |= {
            "log_ratio": path.log_ratio(path.end, run, other),
            "largest_log_ratio": path.log_ratio(furthest, run, other),
            "largest_at_step": furthest,
        }
        if "alpha" in run.tags:
            self.values[run.name]["signal_share"] = self.readouts.signal_share(run)

    def _runs(self, control: Control, beside: TaggedRun | None = None) -> dict[int, TaggedRun]:
        fitting = self._fitting(control)
        if beside is not None:
            fitting = [run for run in fitting if (run.seed, run.origin) == (beside.seed, beside.origin)]
        return first_by_seed(fitting)

    def _fitting(self, control: Control) -> list[TaggedRun]:
        return [run for run in self.readouts.runs if run.paradigm == control.paradigm and run.tags == control.tags]

    def comparison(self, id_: str, label: str, quantity: str) -> Comparison:
        """What was put together."""
        everyone = {run.name: run for cast in self.cast.values() for run in cast.values()}
        return Comparison(
            id=id_,
            label=label,
            quantity=quantity,
            statements=self.statements,
            runs={role: [run.name for _, run in sorted(cast.items())] for role, cast in self.cast.items()},
            values={name: value for name, value in self.values.items() if name in everyone},
            matched="steps",
            matched_at={"step": {name: self.steps[name] for name in everyone}},
            left_out=sorted(self.marked - set(everyone)),
            seeds=max((len(cast) for cast in self.cast.values()), default=0),
            redrawn=redrawn(*(cast for cast in self.cast.values() if len(cast) > 1)),
        )
