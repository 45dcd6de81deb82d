"""The whole miniature: train, measure, decide the claims, write the report."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from geopd.study.outcome import (
    HILL_K,
    PRINCIPAL_RANK,
    ROTATION_K,
    SIMILARITY_K,
    StudyOutcome,
    study_notes,
    write_costs,
    write_gradients,
    write_notes,
)
from geopd.study.progress import StudyDisplay
from geopd.study.schedule import Schedule, read_marker
from geopd.study.stages import Scale, stage_folder
from geopd.study.whole import narrowed, scale_of

__all__ = ["run_study", "train_stages"]

_WORKERS = 2


def run_study(
    scale: str = "core",
    out: Path | str = Path("runs/study"),
    seeds: Sequence[int] | None = None,
    only: Sequence[str] = (),
    quiet: bool = False,
) -> StudyOutcome:
    """Run the paper in miniature, or what is left of it, and write its report.

    A finished stage with the same settings is not run again, so the same call resumes after an interruption.

    Args:
        scale: ``quick`` (numbers not meaningful), ``core``, ``full`` or ``exhaustive``.
        out: the study's folder; a folder holds one scale at a time.
        seeds: draws of the base, the anchor and everything behind them; the scale's own by default.
        only: globs over stage names: run these and what they start from, and report on what is there.
        quiet: show no progress.

    Returns:
        Paths, accuracies and times.

    Raises:
        ValueError: the scale is unknown, a glob matches nothing, or another process is running in ``out``.
        StageFailedError: a stage's process failed; its log is named.
        KeyboardInterrupt: on Ctrl-C, behind ending the stages' processes.
    """
    begun, folder = time.monotonic(), Path(out)
    whole = scale_of(scale, seeds)
    chosen = narrowed(whole, only) if only else whole
    with _sole_process(folder):
        train_stages(chosen, folder, quiet=quiet)
        results = folder / "results"
        report = _measure_and_report(_finished(whole, folder) if only else whole, folder, results, quiet=quiet)
    stages = folder / "stages"
    markers = {stage.name: read_marker(stages, stage.name) or {} for stage in chosen.stages}
    return StudyOutcome(
        out=folder,
        results=results,
        report=report,
        stages={name: stage_folder(stages, name) for name in markers},
        accuracy={name: marker["accuracy"] for name, marker in markers.items()},
        usage={name: marker["usage"] for name, marker in markers.items()},
        seconds=time.monotonic() - begun,
    )


def train_stages(scale: Scale, out: Path, *, quiet: bool = False, workers: int = _WORKERS) -> Schedule:
    """Train and evaluate every stage under ``out/stages`` that is not finished with these settings.

    Raises:
        StageFailedError: a stage's process failed.
    """
    console = Console(stderr=True)
    with StudyDisplay(scale, quiet, console) as display:
        schedule = Schedule(scale, out / "stages", workers, display.update)
        try:
            schedule.run()
        except KeyboardInterrupt:
            if not quiet:
                console.print(
                    "Interrupted; finished stages are kept, stages under way start over. Run the same command to go on."
                )
            raise
    return schedule


def _finished(scale: Scale, out: Path) -> Scale:
    """The stages of a scale that have finished."""
    done = [stage.name for stage in scale.stages if read_marker(out / "stages", stage.name) is not None]
    return narrowed(scale, done)


def _measure_and_report(scale: Scale, out: Path, results: Path, *, quiet: bool) -> Path:
    """Measure the runs, or what is left of it, and write notes, claims and report; the report's path."""
    from geopd.claims import decide_claims
    from geopd.engine import MeasureOptions, measure
    from geopd.report import write_report

    stages = out / "stages"
    runs = [f"{name}={stage_folder(stages, name)}" for name in scale.measured]
    if not runs:
        raise ValueError("none of these stages is measured: name a run, such as opd, with --only as well")
    measure(
        base="origin",
        runs=runs,
        out=results,
        options=MeasureOptions(
            rotation_k=ROTATION_K, principal_rank=PRINCIPAL_RANK, similarity_k=SIMILARITY_K, hill_k=HILL_K
        ),
        workers=_WORKERS,
        replace=True,  # a stage that ran again with other settings keeps its label
        quiet=quiet,
    )
    write_notes(results, study_notes(scale, stages))
    write_costs(results, scale, stages)
    write_gradients(results, scale, stages)
    decide_claims(results)
    return Path(write_report(results))


@contextmanager
def _sole_process(out: Path) -> Iterator[None]:
    """Hold the study's folder; the lock goes with the process, whatever ends it."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another study is running in {out}: wait for it, or choose another --out") from error
        yield
