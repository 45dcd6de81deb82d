"""``geopd plan``: what a measurement would compare and cost; measures nothing."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from geopd.cli.measure import _Base, _Matrices, _Metrics, _Runs


def plan(
    base: _Base,
    runs: _Runs,
    matrices: _Matrices = None,
    metrics: _Metrics = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Say what would be compared, what would be left out and why, and what it would cost.

    Example: geopd plan Qwen3-8B-Base runs/sft
    """
    from geopd.engine import MeasureOptions, estimate, make_plan

    given = {"matrices": matrices, "metrics": metrics}
    options = MeasureOptions(**{key: tuple(value) for key, value in given.items() if value})  # type: ignore[arg-type]
    made = make_plan(base, runs, options)
    tasks = made.tasks({(run.run.label, name): "" for run in made.runs for name in run.pairs})
    expected = estimate(tasks)
    summary = {
        "runs": {run.run.label: {"steps": run.steps, "origin": str(run.origin), **run.coverage()} for run in made.runs},
        "matrices": len(tasks),
        "bytes": sum(made.tensors().values()),
        "seconds_one_worker": expected.seconds,
        "bytes_per_worker": expected.worker_bytes,
        "largest": [{"matrix": task.weight.name, "shape": list(task.shape)} for task in tasks[:5]],
    }
    if as_json:
        typer.echo(json.dumps(summary))
    else:
        _print(summary)


def _print(summary: dict[str, object]) -> None:
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False, soft_wrap=True)
    runs = summary["runs"]
    assert isinstance(runs, dict)
    for label, run in runs.items():
        console.print(
            f"[bold]{escape(label)}[/]: "
            + escape(f"{run['matched']} tensors matched with {run['origin']}, {_steps(run['steps'])}")
        )
        for warning in run["warnings"]:
            console.print(escape(f"  note: {warning}"))
        for item in run["skipped"]:
            console.print(escape(f"  left out: {item['name']}: {item['reason']}"))
        for item in run["failed"]:
            console.print(escape(f"  damaged: {item['matrix']}: {item['reason']}"))
    console.print(
        f"{summary['matrices']} tensors to measure, {_gigabytes(summary['bytes'])} to read, about "
        f"{summary['seconds_one_worker']:.0f} s on one worker once started, {_gigabytes(summary['bytes_per_worker'])} "
        "of memory a worker"
    )


def _gigabytes(count: object) -> str:
    assert isinstance(count, int)
    return f"{count / 2**30:.2f} GB"


def _steps(steps: list[int | None]) -> str:
    numbered = [str(step) for step in steps if step is not None]
    return f"at step(s) {', '.join(numbered)}" if numbered else "one checkpoint"
