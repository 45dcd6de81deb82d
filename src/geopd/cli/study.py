"""``geopd study``: the paper in miniature, from training to report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def study(
    scale: Annotated[str, typer.Option(help="quick (the path only; numbers not meaningful) or core.")] = "core",
    out: Annotated[Path, typer.Option(help="The study's folder.")] = Path("runs/study"),
    seed: Annotated[int, typer.Option(help="Draws base, anchor and everything behind them.")] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """Train a base, an SFT anchor, a teacher, OPD and RLVR in miniature, measure them and write the report.

    Stops and resumes by itself: the same command again does only what is left.

    Example: geopd study --scale core --out runs/study
    """
    from geopd.study import run_study

    outcome = run_study(scale=scale, out=out, seed=seed, quiet=quiet)
    typer.echo(f"report: {outcome.report}")
    typer.echo(f"next: geopd show {outcome.results}")
