"""``geopd show``: the summary in the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from geopd.results import Results

_COLUMNS = (
    ("update_sparsity", "sparsity"),
    ("rotation", "rotation"),
    ("spectral_shift", "NSS"),
    ("principal_overlap", "principal overlap"),
    ("low_magnitude_overlap", "low-mag. overlap"),
    ("stable_rank", "stable rank"),
    ("update_norm", "norm"),
)


def show(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A results folder written by `geopd measure --out`.")],
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON, unrounded, and nothing else.")] = False,
    top: Annotated[int, typer.Option(min=0, help="How many of the matrices that moved most to list per run.")] = 10,
    timing: Annotated[
        bool, typer.Option("--timing", help="Instead, where the time went: by module, and the slowest matrices.")
    ] = False,
) -> None:
    """Show what each run did to the weights: one line a run, its nulls, and the matrices that moved most.

    Example: geopd show results/
    """
    from rich.console import Console

    from geopd.results import read_results

    if timing:
        _show_timing(folder, json_output, top)
        return
    _require_tables(folder)
    results = read_results(folder)
    content = _content(results, top)
    if json_output:
        import json

        typer.echo(json.dumps(content, indent=1, allow_nan=False))
        return
    console = Console()
    if not console.is_terminal:  # a pipe has no width of its own; 80 columns would fold every number
        console = Console(width=150)
    _print(console, content)


def _require_tables(folder: Path) -> None:
    from geopd.results.task_log import read_log

    if (folder / "manifest.json").is_file():
        return
    if read_log(folder):
        raise ValueError(
            f"{folder}: not measured to its end yet; the same `geopd measure` command goes on from there, and "
            f"`geopd show {folder} --timing` says what is done"
        )
    if (folder / "shards").is_dir():
        raise ValueError(f"{folder}: holds shards that are not merged yet; when all are done: geopd merge {folder}")


def _content(results: Results, top: int) -> dict[str, Any]:
    from geopd.results import PARADIGMS
    from geopd.results.reference import REFERENCE
    from geopd.results.summary import movers, rotation, summarise

    runs = [line | {"rotation": rotation(line)} for line in summarise(results).iter_rows(named=True)]
    runs.sort(key=lambda line: (PARADIGMS.index(line["paradigm"]), len(line["run"]), line["run"]))
    coverage = results.manifest.get("coverage", {})
    return {
        "folder": str(results.root),
        "runs": runs,
        "movers": {line["run"]: movers(results, line["run"], top).to_dicts() for line in runs} if top else {},
        "failed_matrices": {run: about.get("failed", []) for run, about in coverage.items()},
        "origins": sorted({line["origin"] or "unknown" for line in runs}),
        "paper": {metric: REFERENCE[metric] for metric, _ in _COLUMNS},
    }


def _print(console: Console, content: dict[str, Any]) -> None:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title=escape(content["folder"]), title_justify="left", pad_edge=False)
    for name in ("run", "step", *(label for _, label in _COLUMNS)):
        table.add_column(name, overflow="fold")
    for line in content["runs"]:
        step = "–" if line["step"] is None else str(line["step"])
        kind = f"\n[dim]{line['paradigm']}[/dim]" if line["paradigm"] != line["run"] else ""
        table.add_row(escape(line["run"]) + kind, step, *(_cell(m, line) for m, _ in _COLUMNS))
    table.add_section()
    for role in ("sft", "opd", "rlvr"):
        cells = [f"[dim]{content['paper'][metric][role]}[/dim]" for metric, _ in _COLUMNS]
        table.add_row(f"[dim]paper, Qwen3-8B {role.upper()}[/dim]", "", *cells)
    console.print(table)
    console.print(
        "[dim]null: a Gaussian update of the same size. Means over the layers' 2-D weights, sparsity weighted by "
        "parameters. The paper's numbers are for orientation only (overlaps at alpha = 0.3).[/dim]"
    )
    if len(content["origins"]) > 1:
        origins = ", ".join(content["origins"])
        console.print(f"The runs start from {len(content['origins'])} origins: {origins}.", markup=False)
    for line in content["runs"]:
        _print_left_out(console, line, content["failed_matrices"].get(line["run"], []))
    for run, moved in content["movers"].items():
        _print_movers(console, run, moved)


def _cell(metric: str, line: dict[str, Any]) -> str:
    from geopd.results.metrics import format_value
    from geopd.results.summary import rotation

    value, null = line.get(metric), line.get(f"{metric}_null_gaussian")
    if metric == "rotation":
        text, null_text = ("–" if v is None else f"{v:.3g}°" for v in (value, rotation(line, "_null_gaussian")))
        return text if null_text == "–" else f"{text}\n[dim]null {null_text}[/dim]"
    text = format_value(metric, value)
    return text if null is None else f"{text}\n[dim]null {format_value(metric, null)}[/dim]"


def _print_left_out(console: Console, line: dict[str, Any], failed: list[dict[str, str]]) -> None:
    from geopd.results.printable import printable

    counts = ", ".join(f"{line[s]} {s}" for s in ("undefined", "unresolved", "failed") if line[s])
    if counts:
        console.print(f"{line['run']}: left out of the means: {counts} values", markup=False)
    for item in failed[:5]:
        reason = f"{line['run']}: {item['matrix']} could not be measured: {item['reason']}"
        console.print(printable(reason), markup=False)
    if len(failed) > 5:
        console.print(f"{line['run']}: … and {len(failed) - 5} more failed matrices (manifest.json)", markup=False)


def _print_movers(console: Console, run: str, moved: list[dict[str, Any]]) -> None:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from geopd.results.metrics import format_value, metric_of
    from geopd.results.printable import printable

    if not moved:
        return
    by = moved[0]["ranked_by"]
    table = Table(box=box.SIMPLE_HEAD, title=f"{escape(run)}: moved most", title_justify="left", pad_edge=False)
    for name in ("matrix", metric_of(by).label, "sparsity", "rotation left / right", "stable rank"):
        table.add_column(name)
    for line in moved:
        sides = [line[f"rotation_{side}_mean_deg"] for side in ("left", "right")]
        table.add_row(
            escape(printable(line["matrix"])),
            format_value(by, line["value"]),
            format_value("update_sparsity", line["update_sparsity"]),
            " / ".join("–" if side is None else f"{side:.3g}°" for side in sides),
            format_value("stable_rank", line["stable_rank"]),
        )
    console.print(table)


def _show_timing(folder: Path, json_output: bool, top: int) -> None:
    """Seconds as the log has them, also of a measurement that has not ended yet."""
    from geopd.results.printable import printable
    from geopd.results.task_log import LOG, read_log
    from geopd.results.task_log import timing as timing_of

    lines = read_log(folder)
    if not lines:
        raise ValueError(f"{folder}: no {LOG} here, or nothing in it; name a folder written by `geopd measure --out`")
    content = timing_of(lines)
    if json_output:
        import json

        typer.echo(json.dumps(content, indent=1, allow_nan=False))
        return
    lost = f", {content['workers_lost']} workers lost" if content["workers_lost"] else ""
    failed = f", {content['failed']} failed" if content["failed"] else ""
    typer.echo(f"{content['tasks']} tasks in workers: {_spent(content).lstrip()}{failed}{lost}")
    if content["factor"] is not None:
        typer.echo(f"expected {content['expected_seconds']:.1f} s: it took {content['factor']:.2f} times as long")
    if content["bytes_factor"] is not None:
        typer.echo(
            f"largest worker {content['peak_bytes'] / 2**30:.2f} GB, {content['bytes_factor']:.2f} times the expected"
        )
    for item in content["modules"]:
        typer.echo(f"  {item['module']:<12} {item['tasks']:>5} tasks {_spent(item)}")
    if top:
        typer.echo("slowest:")
    for item in content["matrices"][:top]:
        shape = f"{item['rows']} x {item['cols']}"
        typer.echo(f"  {printable(item['matrix']):<40} {shape:>16} {_spent(item)}  {item['method']}")


def _spent(item: dict[str, Any]) -> str:
    return f"{item['seconds']:>10.1f} s ({item['cpu_seconds']:.1f} s of processor)"
