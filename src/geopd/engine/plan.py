"""From checkpoints to tasks: what is compared with what, what is not and why, and what it will cost."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path

from geopd.checkpoints import CheckpointError, Run, TensorInfo, holds_weights, is_adapter, located, open_run
from geopd.engine.cost import task_cost
from geopd.engine.inputs import Stamp, opened, stamp_of
from geopd.engine.options import MeasureOptions
from geopd.engine.run_plan import RunPlan, plan_run
from geopd.engine.workload import Kept, Location, RunEnds, RunSteps, Task
from geopd.matrices import CanonicalCheckpoint, Pair, canonical_names

ORIGIN = "origin"  # the word that stands for: as each run's run.json says
Digests = Mapping[tuple[Path, str], str | None]


@dataclass(frozen=True)
class Plan:
    """All runs of one call, the options they are measured with, and their checkpoints' files as they were found."""

    runs: tuple[RunPlan, ...]
    options: MeasureOptions
    stamps: Mapping[Path, Stamp]
    share: frozenset[tuple[Path, str]] | None = None
    """Of one shard: the tensors that are its to read; None for all."""

    @cached_property
    def bases(self) -> dict[Path, Path]:
        """What each adapter is read over: the origin its run is compared with."""
        return {path: plan.origin for plan in self.runs for _, path in plan.run.checkpoints if is_adapter(path)}

    def opened(self, path: Path) -> CanonicalCheckpoint:
        """The canonical matrices of one of its checkpoints.

        Raises:
            CheckpointError: as ``open_checkpoint``.
        """
        return opened(path, self.bases.get(path), per_head=self.options.per_head)

    @property
    def by_label(self) -> dict[str, RunPlan]:
        """The runs by their labels."""
        return {plan.run.label: plan for plan in self.runs}

    def run_pairs(self) -> list[tuple[RunPlan, RunPlan]]:
        """The runs two by two, ordered by label, that start from one origin; at least one of them without tags.

        A hundred controls of a baseline would make five thousand pairs, of which those with the baseline are asked for.
        """
        ordered = sorted(self.runs, key=lambda plan: plan.run.label)
        baselines = {plan.run.label for plan in ordered if plan.run.manifest is None or not plan.run.manifest.tags}
        return [
            (a, b)
            for a, b in combinations(ordered, 2)
            if a.origin == b.origin and not baselines.isdisjoint((a.run.label, b.run.label))
        ]

    def tasks(
        self,
        keys: Mapping[tuple[str, str], str],
        pair_keys: Mapping[tuple[str, str, str], str] | None = None,
        kept: Mapping[tuple[str, str], Kept] | None = None,
        digests: Digests | None = None,
    ) -> list[Task]:
        """Tasks for the (run, matrix) and (run, other, matrix) named, longest first: one per matrix and origin.

        ``kept``: older parts that say what is to be known of a run's first steps. ``digests``: of the tensors.
        """
        kept, digests = kept or {}, digests or {}
        runs: dict[tuple[Path, str], list[RunSteps]] = defaultdict(list)
        pairs: dict[tuple[Path, str], list[RunEnds]] = defaultdict(list)
        found: dict[tuple[Path, str], Pair] = {}
        for plan in self.runs:
            for name, steps in plan.pairs.items():
                item = (plan.run.label, name)
                if item not in keys:
                    continue
                located = tuple((step, self._tuned(plan, step, pair, digests)) for step, pair in steps.items())
                runs[plan.origin, name].append(RunSteps(plan.run.label, keys[item], located, kept.get(item)))
                found[plan.origin, name] = next(iter(steps.values()))
        for (run, other, name), key in (pair_keys or {}).items():
            one = self.by_label[run]
            pairs[one.origin, name].append(self._ends(one, self.by_label[other], name, key, digests))
            found.setdefault((one.origin, name), next(iter(one.pairs[name].values())))
        tasks = [
            Task(
                pair.weight,
                pair.shape,
                self._location(origin, pair.origin_tensor, digests),
                tuple(runs[origin, name]),
                self.options,
                self.options.selection.full(pair.weight),
                tuple(pairs[origin, name]),
            )
            for (origin, name), pair in found.items()
        ]
        return sorted(tasks, key=lambda task: (-task_cost(task), str(task.origin.checkpoint), task.weight.name))

    def all_tasks(self) -> list[Task]:
        """Everything there is to measure, as if nothing were measured yet."""
        keys = {(plan.run.label, name): "" for plan in self.runs for name in plan.pairs}
        pairs = {
            (one.run.label, other.run.label, name): ""
            for one, other in self.run_pairs()
            if self.options.pair_diagnostics
            for name in one.pairs.keys() & other.pairs.keys()
        }
        return self.tasks(keys, pairs)

    @cached_property
    def _headers(self) -> dict[Path, dict[str, TensorInfo]]:
        """What every checkpoint's header says, read once: runs may have more checkpoints than are kept open.

        What a checkpoint promises and cannot give is there too, as of no bytes: without it, its content is not known.
        """
        lost = {dict(plan.run.checkpoints)[step]: plan for plan in self.runs for step in plan.lost}
        found = {}
        for path in sorted(self.stamps):
            if path in lost:
                names = [pair.tuned_tensor for steps in lost[path].pairs.values() for pair in steps.values()]
                found[path] = _no_bytes(names)
                continue
            checkpoint = self.opened(path)
            found[path] = _no_bytes(checkpoint.unreadable) | checkpoint.tensors
        return found

    def _location(self, path: Path, tensor: str, digests: Digests) -> Location:
        info = self._headers[path].get(tensor)
        readable = digests.get((path, tensor)) is not None
        nbytes, per_head = info.nbytes if info else 0, self.options.per_head
        return Location(path, tensor, self.stamps[path], readable, nbytes, self.bases.get(path), per_head)

    def _tuned(self, plan: RunPlan, step: int | None, pair: Pair, digests: Digests) -> Location:
        return self._location(dict(plan.run.checkpoints)[step], pair.tuned_tensor, digests)

    def _ends(self, one: RunPlan, other: RunPlan, name: str, key: str, digests: Digests) -> RunEnds:
        (step, pair), (other_step, other_pair) = (list(plan.pairs[name].items())[-1] for plan in (one, other))
        ends = (self._tuned(one, step, pair, digests), self._tuned(other, other_step, other_pair, digests))
        return RunEnds(one.run.label, other.run.label, key, step, *ends)

    def tensors(self) -> dict[tuple[Path, str], int]:
        """Every tensor that the options select, of every checkpoint in the plan, with the bytes that can be read."""
        return {
            (path, name): info.nbytes
            for path, header in self._headers.items()
            for selected in (self._selected(header),)
            for name, info in sorted(header.items())
            if name in selected and (self.share is None or (path, name) in self.share)
        }

    def _selected(self, header: Mapping[str, TensorInfo]) -> set[str]:
        names = canonical_names({name: info.shape for name, info in header.items()})
        return {name for name, weight in names.items() if self.options.selection.entrywise(weight)}


def _no_bytes(names: Iterable[str]) -> dict[str, TensorInfo]:
    return {name: TensorInfo(name, (1, 1), "unreadable", 0) for name in names}


def make_plan(
    base: str | Path, runs: Sequence[str | Path], options: MeasureOptions, paradigms: Mapping[str, str] | None = None
) -> Plan:
    """Open every checkpoint's headers and pair each with its origin; no weights are read.

    Of a run's steps some may be such that they cannot be opened: they are in its ``lost``.

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
    # the stamps come first: what changes from here on is noticed
    origins = {run.label: run.origin_path() if str(base) == ORIGIN else _base(base) for run in opened_runs}
    paths = {*origins.values(), *(path for run in opened_runs for _, path in run.checkpoints)}
    stamps = {path: stamp_of(path) for path in sorted(paths)}
    plans = [plan_run(origins[run.label], run, options, paradigms.get(run.label)) for run in opened_runs]
    return Plan(tuple(plans), options, stamps)


def _open(argument: str | Path) -> Run:
    text = str(argument)
    label, equals, path = text.partition("=")
    # a path that exists as written wins over the label form, so that a '=' in a folder name needs no escape
    if equals and label and not Path(text).exists():
        return open_run(path, label)
    return open_run(text)


def _base(base: str | Path) -> Path:
    path = located(base).absolute()
    if holds_weights(path):
        return path
    inside = open_run(path)
    if len(inside.checkpoints) > 1:
        names = ", ".join(folder.name for _, folder in inside.checkpoints)
        raise CheckpointError(f"{path}: a base is one checkpoint, and this folder holds {names}; name one of them")
    return inside.checkpoints[0][1]
