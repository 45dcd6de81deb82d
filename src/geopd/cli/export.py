"""``geopd export``: the tables as CSV."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A results folder written by `geopd measure --out`.")],
    csv: Annotated[Path, typer.Option(metavar="OUTDIR", help="Folder for the CSV files; made where missing.")],
) -> None:
    """Write measurements, nulls, runs, evaluations and the summary as CSV, at full precision.

    Lists (steps, digests) are joined with ';'; a missing value is an empty field.

    Example: geopd export results/ --csv tables/
    """
    import polars as pl

    from geopd.results import read_results, write_atomically
    from geopd.results.summary import summarise

    if csv.exists() and not csv.is_dir():
        raise ValueError(f"--csv {csv}: is a file; name a folder")
    results = read_results(folder)
    lists = [name for name, kind in results.runs.schema.items() if isinstance(kind, pl.List)]
    frames = {
        "measurements": results.measurements,
        "nulls": results.nulls,
        "runs": results.runs.with_columns(pl.col(lists).cast(pl.List(pl.String)).list.join(";")),
        "evaluations": results.evaluations,
        "summary": summarise(results, every_step=True),
    }
    for name, frame in frames.items():
        path = csv / f"{name}.csv"
        write_atomically(path, frame.write_csv)
        typer.echo(f"{path}: {frame.height} rows")
