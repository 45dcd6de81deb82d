"""``geopd merge``: the shards of a spread measurement into one results folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def merge(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The results folder to fold into.")],
    shards: Annotated[
        list[Path] | None,
        typer.Argument(metavar="SHARD...", help="What the shards were given as --out.  [default: OUT itself]"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON.")] = False,
) -> None:
    """Fold the shards of one measurement into one results folder, as if it had not been spread.

    Refused where a shard is missing or unfinished, or two are of other inputs or settings.

    Example: geopd merge results
    """
    from geopd.engine.merging import merge as fold

    outcome = fold(out, shards or [])
    if as_json:
        counts = {"shards": outcome.shards, "matrices": outcome.matrices}
        typer.echo(json.dumps({"out": str(out), **counts, "failed": outcome.failed, "notes": list(outcome.notes)}))
    else:
        lost = sum(map(len, outcome.failed.values()))
        of_them = f", {lost} of them failed" if lost else ""
        typer.echo(f"{outcome.shards} shard(s), {outcome.matrices} measured{of_them} -> {out}")
        for note in outcome.notes:
            typer.echo(f"note: {note}", err=True)
        for label, reasons in outcome.failed.items():
            for matrix, reason in list(reasons.items())[:10]:
                typer.echo(f"failed: {label}: {matrix}: {reason}", err=True)
        typer.echo(f"next: geopd show {out}   |   geopd report {out}")
    raise typer.Exit(outcome.exit_code)
