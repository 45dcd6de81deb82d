"""``geopd plan``: what a measurement would compare and cost; measures nothing."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from geopd.cli.measure import _Base, _Matrices, _Metrics, _PerHead, _Runs

_LISTED = 10  # tensors left out that are named for each run


def plan(
    base: _Base,
    runs: _Runs,
    matrices: _Matrices = None,
    metrics: _Metrics = None,
    per_head: _PerHead = False,
    nulls: Annotated[int, typer.Option(min=0, help="Draws of nulls; each costs two checkpoints.")] = 0,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes.  [default: as cores and memory allow]")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Say what would be compared, what would be left out and why, and what it would cost.

    Probes this machine for a few seconds; reads headers, and of weights only what that and the first difference take.

    Example: geopd plan Qwen3-8B-Base runs/sft
    """
    from geopd.engine import MeasureOptions, make_plan
    from geopd.engine.preflight import preflight

    given = {"matrices": matrices, "metrics": metrics}
    chosen = {key: tuple(value) for key, value in given.items() if value}
    options = MeasureOptions(nulls=nulls, per_head=per_head, **chosen)  # type: ignore[arg-type]
    summary = preflight(make_plan(base, runs, options), workers)
    if as_json:
        typer.echo(json.dumps(summary, allow_nan=False))
    else:
        _print(summary)


def _print(summary: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape as markup_escape

    from geopd.engine.progress import span
    from geopd.results.printable import printable

    def escape(text: str) -> str:
        return markup_escape(printable(text))

    console = Console(highlight=False, soft_wrap=True)
    for label, run in summary["runs"].items():
        console.print(
            f"[bold]{escape(label)}[/]: "
            + escape(f"{run['matched']} tensors matched with {run['origin']}, {_steps(run['steps'])}")
        )
        formats = " and ".join(run["formats"])
        console.print(f"  read as {escape(formats)}; the base as {escape(run['origin_format'])}")
        for dtypes, count in run["dtypes"].items():
            console.print(f"  {count} tensors {escape(dtypes)}")
        if run["not_selected"]:
            console.print(f"  {run['not_selected']} tensors not selected")
        for warning in run["warnings"]:
            console.print(f"  [yellow]note:[/] {escape(warning)}")
        for item in run["skipped"][:_LISTED]:
            console.print(escape(f"  left out: {item['name']}: {item['reason']}"))
        if (rest := len(run["skipped"]) - _LISTED) > 0:
            console.print(f"  left out: {rest} more (--json lists them)")
        for item in run["failed"]:
            console.print(escape(f"  damaged: {item['matrix']}: {item['reason']}"))
    reading = f" (about {span(summary['reading_seconds'])})" if summary["reading_seconds"] else ""
    console.print(
        f"{summary['matrices']} tensors to measure, {_gigabytes(summary['bytes'])} to read{reading}; then about "
        f"{span(summary['seconds_one_worker'])} on one worker, {span(summary['seconds'])} on {summary['workers']}, "
        f"{_gigabytes(summary['bytes_per_worker'])} of memory a worker"
    )
    for item in summary["costliest"]:
        shape = " x ".join(map(str, item["shape"]))
        console.print(f"  {escape(item['matrix'])} ({shape}): {span(item['seconds'])}")


def _gigabytes(count: int) -> str:
    return f"{count / 2**30:.2f} GB"


def _steps(steps: list[int | None]) -> str:
    numbered = [str(step) for step in steps if step is not None]
    return f"at step(s) {', '.join(numbered)}" if numbered else "one checkpoint"
