"""Measuring: plan, hold the folder, verify the inputs' digests, do what is not done, fold the tables."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from dataclasses import replace as with_fields
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl
from rich.markup import escape
from torch import Tensor

from geopd.engine.cost import Estimate, choose_workers, estimate, probed, task_seconds
from geopd.engine.decomposition_cache import DecompositionCache
from geopd.engine.execution import Execution
from geopd.engine.executor import InProcess
from geopd.engine.extending import extended, older_part
from geopd.engine.folder import held, manifest_of
from geopd.engine.folding import fold
from geopd.engine.inputs import digest_tensors
from geopd.engine.local_execution import LocalExecution, devices_of
from geopd.engine.options import MeasureOptions
from geopd.engine.part_names import NUMERICS, pair_keys, part_key, replaced_parts, run_entry, verify_origins
from geopd.engine.plan import ORIGIN, Digests, Plan, make_plan
from geopd.engine.progress import Reporter, reporter, span
from geopd.engine.shards import Shard, forget_shard, record_shard
from geopd.engine.task_lines import task_line
from geopd.engine.zeroed_blocks import tell_zeroed, zeroed_block
from geopd.results import Store
from geopd.results.task_log import append_line

__all__ = ["NUMERICS", "MeasureOutcome", "measure"]


@dataclass(frozen=True, slots=True)
class MeasureOutcome:
    """What a call of ``measure`` did: matrices measured now, found finished, failed (with reasons), per run label.

    Matrices of two runs together are not counted, but their failures are told under the first.
    """

    out: Path
    measured: int
    resumed: int
    failed: dict[str, dict[str, str]]

    @property
    def exit_code(self) -> int:
        """0 done, 1 some matrices failed."""
        return 1 if any(self.failed.values()) else 0


def measure(
    base: str | Path,
    runs: Sequence[str | Path],
    out: str | Path,
    *,
    options: MeasureOptions | None = None,
    paradigms: Mapping[str, str] | None = None,
    workers: int | None = 1,
    replace: bool = False,
    quiet: bool = True,
    progress: str | None = None,
    device: str = "auto",
    execution: Execution | None = None,
    cache: DecompositionCache | None = None,
    shard: Shard | None = None,
) -> MeasureOutcome:
    """Measure runs against their origin into a results folder; the same call again does only what is left.

    ``base``: a checkpoint, or ``origin`` (each run's ``run.json`` says). ``runs``: paths or ``label=path``, each a
    checkpoint or a folder of step-numbered ones. The same ``out`` accumulates runs. ``workers``: processes, None for as
    many as cores and memory allow. ``replace``: measure a label anew although its inputs changed. ``progress``: bar,
    json or none, by default as ``quiet`` says. ``device``: auto, cpu or cuda. ``execution``: who runs the tasks and
    where, None for this machine. ``cache``: where origins' decompositions are kept; no value depends on it. ``shard``:
    measure only its share, into a folder of its own under ``out``, for ``merge``.

    Metrics of two runs are computed for the pairs of this call's runs that have one origin checkpoint, unless both
    carry tags (controls are held against their baselines, not against one another). A run measured in a later call is
    compared with the runs of that call only, so name again those it should be compared with.

    Raises:
        ValueError: if an input or option is unusable, nothing matches, another process holds the folder, it has other
            settings, or a label is there already with other inputs.
        RuntimeError: if no worker can be had; what had finished is kept.
        OSError: if the folder cannot be written any more; what had finished is kept.
    """
    options = options or MeasureOptions()
    # an option out of range is refused before anything is read
    _ = options.parameters, options.selection, options.diagnostics
    report = reporter(progress or ("none" if quiet else "bar"))
    devices = (execution.device,) if execution else devices_of(device)
    whole = make_plan(base, runs, options, paradigms)
    plan, out = (whole, Path(out)) if shard is None else (shard.share_of(whole), shard.folder(Path(out)))
    _check_settings(out, manifest_of(out), options)
    with held(out):
        forget_shard(out)
        call = _Call(plan, out, report, cache, verified=str(base) == ORIGIN, replace=replace)
        outcome = call.perform(workers, devices, execution)
        if shard is not None:
            record_shard(out, shard, whole, call.digests)
        return outcome


class _Call:
    """One call with the folder in its hands."""

    def __init__(
        self,
        plan: Plan,
        out: Path,
        report: Reporter,
        cache: DecompositionCache | None,
        *,
        verified: bool,
        replace: bool,
    ) -> None:
        self.plan, self.report, self.out = plan, report, out
        self.before = manifest_of(out)
        self.digests = digests = _digest(plan, report)
        if verified:
            verify_origins(plan, digests)
        self.entries = {run.run.label: run_entry(run, digests) for run in plan.runs}
        self.stale = replaced_parts(out, self.before, self.entries, replace=replace)
        named = [(run, name) for run in plan.runs for name in run.pairs]
        self.keys = {(run.run.label, name): part_key(run, name, digests, plan.options) for run, name in named}
        self.pairs = pair_keys(plan, self.keys)
        try:
            self.store = Store(out)
        except OSError as error:
            raise ValueError(f"--out {out}: cannot be written ({error.strerror}); name another folder") from error
        self.missing = {item: key for item, key in self.keys.items() if not self._finished(key)}
        kept = {}
        for run, name in named:
            if (run.run.label, name) in self.missing:
                of_first = partial(part_key, run, name, digests, plan.options)
                if older := older_part(self.store, len(run.pairs[name]), of_first):
                    kept[run.run.label, name] = older
        missing_pairs = {item: key for item, key in self.pairs.items() if not self._finished(key)}
        self.tasks = plan.tasks(self.missing, missing_pairs, kept, digests)
        if cache is not None:
            lent = with_fields(cache, numerics=NUMERICS, since=time.time())
            self.tasks = [with_fields(task, cache=lent) for task in self.tasks]

    def _finished(self, key: str) -> bool:
        return self.store.has(key) and not self.store.record(key)["retry"]

    def perform(self, workers: int | None, devices: tuple[str, ...], execution: Execution | None) -> MeasureOutcome:
        """Run the tasks and fold the tables."""
        finished = len(self.keys) - len(self.missing)
        _announce(self.report, self.plan, self.entries, finished)
        estimated = self._run(workers, devices, execution) if self.tasks else None
        parts = {run.run.label: {name: self.keys[run.run.label, name] for name in run.pairs} for run in self.plan.runs}
        with self.store.folding(), _writing(self.out):
            device = devices[0].partition(":")[0]
            about = (self.plan.options.as_settings(), {run.run.label: run.coverage() for run in self.plan.runs})
            gone = fold(self.store, *about, self.before, self.entries, parts, self.pairs, estimated, device)
            self.store.discard((gone | self.stale) - {key for run in parts.values() for key in run.values()})
        failed = _failures(self.store, self.plan, parts, self.pairs)
        return MeasureOutcome(self.out, len(self.missing), finished, failed)

    def _run(self, workers: int | None, devices: tuple[str, ...], execution: Execution | None) -> dict[str, Any]:
        """Run the tasks, committing each as it ends; what was expected, for the manifest."""
        machine = probed(self.tasks)
        expected = estimate(self.tasks, machine)
        execution = execution or _local(workers, devices, expected, len(self.tasks))
        self.report.say(escape(_describe(expected, execution.workers, len(self.tasks))))
        kept = {run.key: run.kept for task in self.tasks for run in task.runs if run.kept}
        costs = [task_seconds(task, machine) for task in self.tasks]
        with self.report.measuring(costs, execution.current) as done:
            try:
                for task, outcome in execution.run(self.tasks):
                    line = task_line(task, outcome, task_seconds(task, machine), devices[0])
                    with _writing(self.out):
                        for part in outcome.parts:
                            older = kept.get(part.key)
                            self.store.commit(extended(self.store, older, part) if older else part)
                        append_line(self.out, line)
                    done(line)
            finally:
                execution.cancel()
        about = {"tasks": len(self.tasks), "workers": execution.workers, "machine": asdict(machine)}
        return asdict(expected) | about


def _local(workers: int | None, devices: tuple[str, ...], expected: Estimate, tasks: int) -> Execution:
    count = choose_workers(workers, expected, tasks)
    if devices != ("cpu",):
        count = min(count, len(devices))
    return LocalExecution(count, devices) if count else InProcess(devices[0])


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    """What goes wrong with the folder, said as such.

    Raises:
        OSError: naming the folder and the reason.
    """
    try:
        yield
    except (OSError, pl.exceptions.PolarsError) as error:
        raise OSError(
            f"{out}: cannot be written ({error}); what had finished is kept: make room and run the same command again"
        ) from error


def _check_settings(out: Path, before: dict[str, Any] | None, options: MeasureOptions) -> None:
    if before is None:
        return
    asked = options.as_settings()
    for name, value in {"per_head": False, **before["settings"]}.items():
        if asked.get(name) != value:
            raise ValueError(
                f"{out}: was measured with {name} = {value}, not {asked.get(name)}; "
                "use the same settings, or another --out"
            )


def _digest(plan: Plan, report: Reporter) -> Digests:
    sizes = plan.tensors()
    zeroed: dict[tuple[Path, str], int] = {}

    def look(path: Path, name: str, tensor: Tensor) -> None:
        if (at := zeroed_block(tensor)) is not None:
            zeroed[path, name] = at

    with report.reading(sum(sizes.values())) as advance:
        digests = digest_tensors(sizes, plan.opened, 2, advance, look)
    for run in plan.runs:
        tell_zeroed(run, zeroed)
    return digests


def _announce(report: Reporter, plan: Plan, entries: Mapping[str, dict[str, Any]], finished: int) -> None:
    for run in plan.runs:
        covered = run.coverage()
        report.say(
            f"[bold]{escape(run.run.label)}[/] ({run.paradigm}): {covered['matched']} tensors matched over "
            f"{len(run.steps)} checkpoint(s), {len(run.skipped)} skipped, {len(run.failed)} damaged"
        )
        for warning in run.warnings:
            report.say(f"  [yellow]note[/] {escape(warning)}")
        entry = entries[run.run.label]
        for step, digest in zip(run.steps, entry["digests"], strict=True):
            if digest is not None and digest == entry["origin_digest"]:
                at = "" if step is None else f" at step {step}"
                report.say(f"  [yellow]note[/] nothing changed{at}: the same content as {escape(entry['origin'])}")
        for name, reason in list(run.skipped.items())[:5] + list(run.failed.items())[:5]:
            report.say(f"  [yellow]left out[/] {escape(f'{name}: {reason}')}")
    if finished:
        report.say(f"{finished} finished before: kept")


def _describe(expected: Estimate, workers: int, tasks: int) -> str:
    seconds = max(expected.seconds / workers, expected.longest)
    memory = expected.worker_bytes * workers / (1 << 30)
    return f"{tasks} matrices in {workers} process(es): about {span(seconds)}, up to {memory:.1f} GB of memory"


def _failures(
    store: Store, plan: Plan, parts: dict[str, dict[str, str]], pairs: Mapping[tuple[str, str, str], str]
) -> dict[str, dict[str, str]]:
    """Failed matrices with their reasons, by run; of two runs only what is not told of either."""
    failed = {}
    for label, run in plan.by_label.items():
        reasons = {name: store.record(key)["failure"] for name, key in parts[label].items()}
        failed[label] = {**run.failed, **{name: reason for name, reason in reasons.items() if reason}}
    for (label, other, name), key in pairs.items():
        reason = store.record(key)["failure"]
        if reason and name not in failed[label] and name not in failed[other]:
            failed[label][f"{name} against {other}"] = reason
    return failed
