"""``geopd check``: thresholds for pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from geopd.results.thresholds import Finding

_WORST = 10


def check(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A results folder written by `geopd measure --out`.")],
    fail_if: Annotated[
        list[str],
        typer.Option("--fail-if", help="METRIC OP NUMBER with OP one of > >= < <=; repeat for several."),
    ],
    run: Annotated[list[str] | None, typer.Option(help="Only this run; repeat for several (default: all).")] = None,
    over: Annotated[str, typer.Option(help="'matrix': every matrix on its own; 'mean': the run's mean.")] = "matrix",
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Fail (exit code 1) where a run's last step crosses a threshold, and name the worst matrices.

    Looks at default settings and the layers' 2-D weights. A metric without any usable value cannot be decided and
    fails too.

    Example: geopd check results/ --fail-if 'update_sparsity>0.999' --fail-if 'spectral_shift>=0.01'
    """
    from geopd.results import read_results
    from geopd.results.thresholds import check_thresholds, parse_threshold

    results = read_results(folder)
    known = sorted(set(results.measurements["metric"]))
    findings = check_thresholds(results, [parse_threshold(t, known) for t in fail_if], runs=run or [], over=over)
    if json_output:
        import json

        typer.echo(json.dumps([_as_json(finding) for finding in findings], indent=1, allow_nan=False))
    else:
        for finding in findings:
            _print(finding, "matrices" if over == "matrix" else "mean")
    if not all(finding.passed for finding in findings):
        raise typer.Exit(1)


def _as_json(finding: Finding) -> dict[str, Any]:
    return {
        "run": finding.run,
        "step": finding.step,
        "fail_if": str(finding.threshold),
        "passed": finding.passed,
        "decided": finding.decided,
        "left_out": finding.left_out,
        "crossed": [{"matrix": name, "value": value} for name, value in finding.crossed],
    }


def _print(finding: Finding, unit: str) -> None:
    left_out = f", {finding.left_out} without a usable value" if finding.left_out else ""
    opening = f"{finding.run}: {finding.threshold}"
    if not finding.decided:
        typer.echo(f"FAIL {opening}: cannot be decided, no usable value{left_out}")
        return
    if finding.passed:
        typer.echo(f"ok   {opening}: crossed by none of {finding.decided} {unit}{left_out}")
        return
    typer.echo(f"FAIL {opening}: crossed by {len(finding.crossed)} of {finding.decided} {unit}{left_out}")
    for name, value in finding.crossed[:_WORST]:
        typer.echo(f"     {name}: {value:.6g}")
    if (rest := len(finding.crossed) - _WORST) > 0:
        typer.echo(f"     … and {rest} more")
