"""``geopd study``: the paper in miniature, from training to report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def study(
    scale: Annotated[
        str, typer.Option(help="quick (the path only; numbers not meaningful), core, full or exhaustive.")
    ] = "core",
    out: Annotated[Path, typer.Option(help="The study's folder.")] = Path("runs/study"),
    seeds: Annotated[
        str | None, typer.Option(metavar="0,1,2", help="Each draws its own base and anchor. Default: the scale's.")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="Only these stages and what they need; repeatable.")
    ] = None,
    list_stages: Annotated[bool, typer.Option("--list", help="Print the stages and predicted minutes; run none.")] = (
        False
    ),
    json_output: Annotated[bool, typer.Option("--json", help="With --list: as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """Train the paper's paradigms in miniature, measure them, decide its claims and write the report.

    Stops and resumes by itself: the same command again does only what is left.

    Examples:

      geopd study --out runs/study

      geopd study --scale full --out runs/full

      geopd study --scale full --out runs/full --only 'opd_v*' --seeds 0
    """
    chosen = _seeds(seeds)
    if list_stages:
        _list(scale, chosen, only or [], json_output)
        return
    if json_output:
        raise ValueError("--json goes with --list; the tables of a study are in its results folder")
    from geopd.study import run_study

    outcome = run_study(scale=scale, out=out, seeds=chosen, only=only or (), quiet=quiet)
    typer.echo(f"report: {outcome.report}")
    typer.echo(f"next: geopd show {outcome.results}")


def _seeds(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"--seeds {text}: give whole numbers separated by commas, such as 0,1,2") from error


def _list(scale: str, seeds: list[int] | None, only: list[str], json_output: bool) -> None:
    from geopd.study.schedule import predicted_minutes
    from geopd.study.whole import narrowed, scale_of

    chosen = scale_of(scale, seeds)
    chosen = narrowed(chosen, only) if only else chosen
    total = predicted_minutes(chosen)
    if json_output:
        import json

        rows = [
            {
                "stage": stage.name,
                "paradigm": stage.paradigm,
                "seed": stage.seed,
                "parents": [parent.stage for parent in stage.parents],
                "steps": stage.optimiser.steps,
                "minutes": stage.cost / 60,
                "tags": stage.tags,
            }
            for stage in chosen.stages
        ]
        typer.echo(json.dumps({"stages": rows, "predicted_minutes": total}, indent=1))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("stage", "paradigm", "seed", "from", "steps", "minutes", "differs in"):
        table.add_column(name, justify="right" if name in ("seed", "steps", "minutes") else "left")
    for stage in chosen.stages:
        tags = ", ".join(f"{key} {value}" for key, value in stage.tags.items())
        origin = stage.start.stage if stage.start else "scratch"
        cells = (stage.name, stage.paradigm, stage.seed, origin, stage.optimiser.steps, f"{stage.cost / 60:.1f}", tags)
        table.add_row(*map(str, cells))
    console = Console()
    (console if console.is_terminal else Console(width=150)).print(table)
    typer.echo(f"{len(chosen.stages)} stages, about {total:.0f} minutes on two cores, measuring and report included")
