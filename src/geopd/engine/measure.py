"""Measuring: plan, verify the inputs' digests, do what is not done, fold the tables."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)

from geopd.checkpoints import CheckpointError, combine_digests
from geopd.engine.cost import Estimate, choose_workers, estimate
from geopd.engine.executor import run_tasks
from geopd.engine.folding import fold
from geopd.engine.inputs import digest_tensors
from geopd.engine.options import MeasureOptions
from geopd.engine.pairs import pair_key
from geopd.engine.plan import ORIGIN, Plan, RunPlan, make_plan
from geopd.engine.task import Task
from geopd.results import Store, digest_of

NUMERICS = 4  # part of every part's name: raise it when the same inputs should give other numbers
Digests = dict[tuple[Path, str], str | None]


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
) -> MeasureOutcome:
    """Measure runs against their origin into a results folder; the same call again does only what is left.

    ``base``: a checkpoint, or ``origin`` (each run's ``run.json`` says). ``runs``: paths or ``label=path``, each a
    checkpoint or a folder of step-numbered ones. The same ``out`` accumulates runs. ``workers``: processes, None for as
    many as cores and memory allow. ``replace``: measure a label anew although its inputs changed.

    Metrics of two runs are computed for all pairs of this call's runs that have one origin checkpoint; a run measured
    in a later call is compared with the runs of that call only, so name again those it should be compared with.

    Raises:
        ValueError: if an input or option is unusable, nothing matches, the folder holds other settings, or a label is
            there already with other inputs.
        RuntimeError: if a worker process died; what had finished is kept.
    """
    console = Console(stderr=True, quiet=quiet)
    options = options or MeasureOptions()
    # an option out of range is refused before anything is read
    _ = options.parameters, options.selection, options.diagnostics
    plan = make_plan(base, runs, options, paradigms)
    out = Path(out)
    before = _manifest(out)
    _check_settings(out, before, plan.options)
    digests = _digest(plan, console)
    verified = str(base) == ORIGIN
    entries = {run.run.label: _run_entry(run, digests, verified=verified) for run in plan.runs}
    keys = {(run.run.label, name): _key(run, name, digests, plan.options) for run in plan.runs for name in run.pairs}
    try:
        store = Store(out)
    except OSError as error:
        raise ValueError(f"--out {out}: cannot be written ({error.strerror}); name another folder") from error
    stale = _stale(out, before, entries, replace)
    parts = {run.run.label: {name: keys[run.run.label, name] for name in run.pairs} for run in plan.runs}
    pairs = _pair_keys(plan, keys)
    missing = {item: key for item, key in keys.items() if not _finished(store, key)}
    tasks = plan.tasks(missing, {item: key for item, key in pairs.items() if not _finished(store, key)})
    _announce(console, plan, len(keys) - len(missing))
    _perform(store, tasks, workers, console)
    with store.folding():
        before = _manifest(out)  # another call may have added its runs meanwhile
        _check_settings(out, before, plan.options)
        stale |= fold(store, plan, before, entries, parts, pairs)
        store.discard(stale - {key for run in parts.values() for key in run.values()})
    failed = _failures(store, plan, parts, pairs)
    return MeasureOutcome(out, len(missing), len(keys) - len(missing), failed)


def _manifest(out: Path) -> dict[str, Any] | None:
    path = out / "manifest.json"
    if not path.is_file():
        return None
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not readable as JSON ({error}); remove the folder or name another --out") from error
    return manifest


def _check_settings(out: Path, before: dict[str, Any] | None, options: MeasureOptions) -> None:
    if before is None:
        return
    asked = options.as_settings()
    for name, value in before["settings"].items():
        if asked.get(name) != value:
            raise ValueError(
                f"{out}: was measured with {name} = {value}, not {asked.get(name)}; "
                "use the same settings, or another --out"
            )


def _digest(plan: Plan, console: Console) -> Digests:
    sizes = plan.tensors()
    columns = (SpinnerColumn(), TextColumn("reading inputs"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    quiet = console.quiet or not console.is_terminal  # elsewhere a bar that goes away leaves an empty line behind
    with Progress(*columns, console=console, transient=True, disable=quiet) as progress:
        bar = progress.add_task("", total=sum(sizes.values()))
        return digest_tensors(sizes, 2, lambda done: progress.advance(bar, done))


def _checkpoint_digest(path: Path, digests: Digests) -> str | None:
    tensors = {name: value for (where, name), value in digests.items() if where == path}
    known = {name: value for name, value in tensors.items() if value is not None}
    return combine_digests(known) if len(known) == len(tensors) else None


def _run_entry(run: RunPlan, digests: Digests, *, verified: bool) -> dict[str, Any]:
    origin = _checkpoint_digest(run.origin, digests)
    manifest = run.run.manifest
    if (
        verified
        and manifest is not None
        and manifest.origin is not None
        and manifest.origin.digest not in (None, origin)
    ):
        raise CheckpointError(
            f"{run.origin}: not the checkpoint that {run.run.label} started from: its digest is {origin}, run.json "
            f"says {manifest.origin.digest}; restore it, or name the base yourself"
        )
    return {
        "path": str(run.run.path),
        "origin": str(run.origin),
        "origin_digest": origin,
        "steps": run.steps,
        "digests": [_checkpoint_digest(path, digests) for _, path in run.run.checkpoints],
        "paradigm": run.paradigm,
        "seed": manifest.seed if manifest else None,
        "tags": manifest.tags if manifest else {},
        "run_settings": manifest.settings if manifest else {},
        "evaluations": list(run.run.evaluations),
    }


def _key(run: RunPlan, name: str, digests: Digests, options: MeasureOptions) -> str:
    paths = dict(run.run.checkpoints)
    steps = run.pairs[name]
    first = next(iter(steps.values()))
    relevant = {key: value for key, value in options.as_settings().items() if key != "matrices"}
    return digest_of(
        {
            "numerics": NUMERICS,
            "run": run.run.label,
            "matrix": name,
            "full": options.selection.full(first.weight),
            "origin": digests.get((run.origin, first.origin_tensor)),
            "steps": [[step, digests.get((paths[step], pair.tuned_tensor))] for step, pair in steps.items()],
            "settings": relevant,
        }
    )


def _pair_keys(plan: Plan, keys: Mapping[tuple[str, str], str]) -> dict[tuple[str, str, str], str]:
    """Part names of the runs two by two, by (run, other run, matrix)."""
    if not plan.options.pair_diagnostics:
        return {}
    found = {}
    for one, other in plan.run_pairs():
        run, second = one.run.label, other.run.label
        for name in one.pairs.keys() & other.pairs.keys():
            found[run, second, name] = pair_key(keys[run, name], keys[second, name])
    return dict(sorted(found.items()))


def _stale(out: Path, before: dict[str, Any] | None, entries: dict[str, dict[str, Any]], replace: bool) -> set[str]:
    """Parts of labels that are measured anew."""
    stale: set[str] = set()
    for label, entry in entries.items():
        old = before["inputs"].get(label) if before else None
        if before is None or old is None:
            continue
        now = dict(zip(entry["steps"], entry["digests"], strict=True))
        known = [(old["origin_digest"], entry["origin_digest"])]
        known += [(digest, now.get(step, "gone")) for step, digest in zip(old["steps"], old["digests"], strict=True)]
        # no digest: it was damaged then, so a repaired one is welcome
        if any(was not in (None, digest) for was, digest in known) and not replace:
            raise ValueError(
                f"{out}: already holds a run labelled {label} with other inputs ({old['path']} from {old['origin']}); "
                "give this one another label, or --replace that one"
            )
        stale |= set(before["parts"][label].values())
    return stale


def _finished(store: Store, key: str) -> bool:
    return store.has(key) and not store.record(key)["retry"]


def _announce(console: Console, plan: Plan, finished: int) -> None:
    for run in plan.runs:
        covered = run.coverage()
        console.print(
            f"[bold]{escape(run.run.label)}[/] ({run.paradigm}): {covered['matched']} tensors matched over "
            f"{len(run.steps)} checkpoint(s), {len(run.skipped)} skipped, {len(run.failed)} damaged",
            highlight=False,
            soft_wrap=True,
        )
        for warning in run.warnings:
            console.print(f"  [yellow]note[/] {escape(warning)}", highlight=False, soft_wrap=True)
        for name, reason in list(run.skipped.items())[:5] + list(run.failed.items())[:5]:
            console.print(f"  [yellow]left out[/] {escape(f'{name}: {reason}')}", highlight=False, soft_wrap=True)
    if finished:
        console.print(f"{finished} finished before: kept", highlight=False)


def _perform(store: Store, tasks: list[Task], workers: int | None, console: Console) -> None:
    if not tasks:
        return
    expected = estimate(tasks)
    count = choose_workers(workers, expected, len(tasks))
    console.print(_describe(expected, count, len(tasks)), highlight=False)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=console.quiet) as progress:
        bar = progress.add_task("measuring", total=len(tasks))
        for task, parts in run_tasks(tasks, count):
            for part in parts:
                store.commit(part)
            progress.update(bar, advance=1, description=escape(task.weight.name))
        progress.update(bar, description="measured")


def _describe(expected: Estimate, workers: int, tasks: int) -> str:
    seconds = max(expected.seconds / workers, expected.longest)
    span = (
        f"{seconds:.0f} s"
        if seconds < 90
        else f"{seconds / 60:.0f} min"
        if seconds < 5400
        else f"{seconds / 3600:.1f} h"
    )
    memory = expected.worker_bytes * workers / (1 << 30)
    return f"{tasks} matrices in {workers} process(es): about {span}, up to {memory:.1f} GB of memory"


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
