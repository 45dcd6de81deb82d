"""``geopd claims``: the paper's statements, line by line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def claims(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A results folder whose runs carry paradigms.")],
    json_output: Annotated[bool, typer.Option("--json", help="Print claims.json and nothing else.")] = False,
) -> None:
    """Say which of the paper's statements show in this folder, and whether their nulls show them too.

    Writes claims.json. Verdicts speak over seeds, each with its own base and anchor: one seed leaves them unresolved.

    Example: geopd claims results/
    """
    from geopd.claims import decide_claims

    entries = decide_claims(folder)
    if json_output:
        import json

        typer.echo(json.dumps(entries, indent=1, allow_nan=False))
        return
    _print(entries)


def _print(entries: list[dict[str, Any]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=150)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("claim", "compared", "shows here", "null shows it", "verdict", "in words"):
        table.add_column(name, overflow="fold")
    for entry in entries:
        for i, comparison in enumerate(entry["comparisons"]):
            table.add_row(
                entry["title"] if i == 0 else "",
                "SFT from the base" if comparison["id"] == "paper" else "same origin",
                comparison["shows_here"],
                comparison["null_shows"],
                comparison["verdict"],
                comparison["sentence"],
            )
    console.print(table)
    reasons = {c["reason"] for entry in entries for c in entry["comparisons"] if c["verdict"] == "unresolved"}
    for reason in sorted(filter(None, reasons)):
        console.print(f"Unresolved: {reason}.", markup=False)
