"""``geopd claims``: the paper's statements, question by question."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table


def claims(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A results folder whose runs carry paradigms.")],
    every: Annotated[bool, typer.Option("--all", help="Every comparison of every claim, in words.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print claims.json and nothing else.")] = False,
) -> None:
    """Say which of the paper's statements show in this folder, and whether their nulls show them too.

    Writes claims.json. Verdicts speak over seeds, each with its own base and anchor: one seed leaves them unresolved.
    The estimate is that of the part nearest to the decision line: for an order the log ratio of its two sides, above
    zero where the claim is right; the interval is over seeds.

    Example: geopd claims results/
    """
    from geopd.claims import decide_claims

    entries = decide_claims(folder)
    if json_output:
        import json

        typer.echo(json.dumps(entries, indent=1, allow_nan=False))
        return
    _print(entries, every)


def _print(entries: list[dict[str, Any]], every: bool) -> None:
    from rich.console import Console

    from geopd.claims.catalogue import QUESTIONS

    console = Console()
    if not console.is_terminal:
        console = Console(width=200 if every else 150)
    for question, text in QUESTIONS.items():
        mine = [entry for entry in entries if entry["question"] == question]
        if mine:
            console.print(f"\n{question}: {text}", style="bold", markup=False)
            console.print(_table(mine, every))
    for word in ("unresolved", "not measured"):
        for reason, numbers in _reasons(entries, every, word).items():
            console.print(f"{word[0].upper()}{word[1:]} ({', '.join(numbers)}): {reason}.", markup=False)


def _reasons(entries: list[dict[str, Any]], every: bool, verdict: str) -> dict[str, list[str]]:
    """The reasons behind a verdict, each with the numbers of the claims that it keeps from more."""
    found: dict[str, list[str]] = {}
    for entry in entries:
        for comparison in entry["comparisons"] if every else [_speaker(entry)]:
            if comparison["verdict"] == verdict and comparison["reason"]:
                numbers = found.setdefault(comparison["reason"], [])
                numbers += [] if entry["number"] in numbers else [entry["number"]]
    return found


def _speaker(entry: dict[str, Any]) -> dict[str, Any]:
    """The comparison that speaks for a claim."""
    comparisons: list[dict[str, Any]] = entry["comparisons"]
    return next(c for c in comparisons if c["id"] == entry["summary"])


def _table(entries: list[dict[str, Any]], every: bool) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    names = ("claim", "shows here", "null shows it", "verdict", "beyond null", "decided by", "estimate", "interval")
    for name in ("claim", "compared", *names[1:5], "in words") if every else names:
        table.add_column(name, overflow="fold")
    for entry in entries:
        for i, comparison in enumerate(entry["comparisons"] if every else [_speaker(entry)]):
            opening = (entry["number"], entry["title"]) if i == 0 else ("", "")
            words = (comparison["shows_here"], comparison["null_shows"], _verdict(comparison), _beyond(comparison))
            if every:
                table.add_row(*opening, comparison["id"], *words, comparison["sentence"])
            else:
                table.add_row(*opening, *words, *_numbers(comparison))
    return table


def _verdict(comparison: dict[str, Any]) -> str:
    needed = comparison["seeds_needed"]
    return f"{comparison['verdict']}{f' (about {needed} seeds would settle it)' if needed else ''}"


def _beyond(comparison: dict[str, Any]) -> str:
    if comparison["verdict"] != "held" or comparison["explained"] != "yes":
        return str(comparison["beyond_null"])
    return "hardly: explained by it" if comparison["beyond_null"] == "yes" else "explained by it"


def _numbers(comparison: dict[str, Any]) -> tuple[str, str, str]:
    estimate, interval = comparison["estimate"], comparison["interval"]
    return (
        comparison["deciding"] or "–",
        "–" if estimate is None else f"{estimate:.3g}",
        "–" if interval is None else f"{interval[0]:.3g} to {interval[1]:.3g}",
    )
