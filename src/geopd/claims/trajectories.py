"""Claims about the path: slopes over training progress, bands, and how early a run reaches its final subspace."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import polars as pl

from geopd.claims.comparisons import Comparison
from geopd.claims.endpoints import NAMES, by_seed
from geopd.claims.orders import BAND
from geopd.claims.roles import ROLES, Cast, casts, missing_roles
from geopd.claims.verdicts import Statement, order
from geopd.results import Results
from geopd.results.summary import aggregate, aggregate_nulls, complete, rows_of

MIN_CHECKPOINTS = 3
"""Fewer are no path."""

Path = list[tuple[float, float]]
"""(progress, value) in step order; progress is step over last step."""


def paths(results: Results, metric: str, **parameters: Any) -> dict[str, Path]:
    """Per run the unweighted mean over the matrices that are ``ok`` at every checkpoint which has the metric.

    At default settings, or at those that ``parameters`` name.
    """
    return _paths(aggregate(_along(results, metric, **parameters)), "value", results)


def null_paths(
    results: Results, metric: str, names: tuple[str, ...], **parameters: Any
) -> tuple[str | None, dict[str, Path]]:
    """The first of the named nulls that is there, averaged over the same matrices."""
    rows = _along(results, metric, **parameters)
    nulls = aggregate_nulls(rows, rows_of(results, metric, every_step=True, table="nulls", **parameters))
    found = set(nulls["null"])
    name = next((name for name in names if name in found), None)
    return name, _paths(nulls.filter(pl.col("null") == (name or "")), "null_mean", results)


def _along(results: Results, metric: str, **parameters: Any) -> pl.DataFrame:
    rows = rows_of(results, metric, every_step=True, **parameters).filter(pl.col("step").is_not_null())
    # A checkpoint without a single value (increments have none at the first) takes no matrix out of the others.
    return complete(rows.filter((pl.col("status") == "ok").any().over("run", "step", "metric", "setting")))


def _paths(lines: pl.DataFrame, column: str, results: Results) -> dict[str, Path]:
    last: dict[str, int] = dict(results.measurements.group_by("run").agg(pl.col("step").max()).iter_rows())
    found: dict[str, Path] = {}
    for run, step, value in lines.sort("step").select("run", "step", column).iter_rows():
        if value is not None and last[run]:
            found.setdefault(run, []).append((step / last[run], value))
    return found


def slope(path: Path) -> float | None:
    """Least-squares slope of ``log(value)`` per unit of progress; None below three checkpoints or a value <= 0."""
    if len(path) < MIN_CHECKPOINTS or min(value for _, value in path) <= 0:
        return None
    x, y = np.array(path).T
    return float(np.polyfit(x, np.log(y), 1)[0])


def _slopes(found: dict[str, Path], sign: int = 1) -> dict[str, float]:
    return {run: sign * s for run, path in found.items() if (s := slope(path)) is not None}


def _describe(found: dict[str, Path]) -> dict[str, Any]:
    return {
        run: {"first": path[0][1], "last": path[-1][1], "log_slope": slope(path), "checkpoints": len(path)}
        for run, path in found.items()
    }


def _trend(cast: Cast, role: str, sign: int, measured: dict[str, Path], nulls: dict[str, Path]) -> Statement:
    return Statement(
        f"{NAMES[role]} {'rises' if sign > 0 else 'falls'}",
        by_seed(cast, role, _slopes(measured, sign)),
        by_seed(cast, role, _slopes(nulls, sign)),
    )


@dataclass(frozen=True)
class Lines:
    """A metric along every run: what it is, the paths, the name of the null, its paths."""

    quantity: str
    found: dict[str, Path]
    null: str | None
    nulls: dict[str, Path]


def over_paths(
    results: Results,
    look: Callable[[Cast], tuple[Lines, list[Statement]]],
    *,
    suffix: str = "",
    note: str = "",
    null_at: Callable[[Path], float] = lambda path: path[-1][1],
) -> list[Comparison]:
    """The same statements with SFT from the base and from the origin of the others, over whole paths.

    Args:
        results: a results folder, read.
        look: the lines of a cast and what is said of them.
        suffix: what the comparisons' ids end in.
        note: what their labels end in.
        null_at: the number that stands for a run's null path.
    """
    found = []
    for cast in casts(results):
        lines, statements = look(cast)
        found.append(
            Comparison(
                id=f"{cast.id}{suffix}",
                label=f"{cast.label}{note}",
                quantity=lines.quantity,
                statements=statements,
                runs={role: cast.runs(role) for role in ROLES},
                values=_describe(lines.found),
                null=lines.null,
                nulls={run: null_at(path) for run, path in lines.nulls.items()},
                left_out=cast.left_out,
                seeds=len(cast.seeds),
                redrawn=cast.redrawn,
                missing=missing_roles(results, cast),
            )
        )
    return found


def hill_trend(results: Results) -> list[Comparison]:
    """SFT and OPD rise, RLVR falls; unresolved where the sign of a slope depends on the k of the index.

    Where one k alone was measured nothing can be said of the others.
    """
    lines = Lines(
        "Hill tail index over training",
        paths(results, "hill_tail"),
        *null_paths(results, "hill_tail", ("gaussian", "permuted")),
    )
    torn = _of_two_signs(results)

    def look(cast: Cast) -> tuple[Lines, list[Statement]]:
        statements = []
        for role, sign in (("sft", 1), ("opd", 1), ("rlvr", -1)):
            shaky = not torn.isdisjoint(cast.runs(role))
            reason = f"the sign of {NAMES[role]}'s slope depends on the k of the Hill index" if shaky else None
            statements.append(replace(_trend(cast, role, sign, lines.found, lines.nulls), reason=reason))
        return lines, statements

    return over_paths(results, look)


def _of_two_signs(results: Results) -> set[str]:
    """Runs whose Hill tail rises at one k and falls at another."""
    settings = results.measurements.filter(pl.col("metric") == "hill_tail")["setting"].unique()
    sizes = settings.str.extract(r"(?:^|;)k=(\d+)").drop_nulls().unique()
    slopes = [_slopes(paths(results, "hill_tail", k=k)) for k in sizes]
    return {run for s in slopes for run in s if len({other[run] > 0 for other in slopes if run in other}) > 1}


def stable_rank_path(results: Results) -> list[Comparison]:
    """SFT expands, OPD stays within ±15%, RLVR contracts and ends within 15% of OPD; OPD ends below SFT.

    Uses the estimate without rounding noise where every run of the cast has it; one value of the cast that is not
    resolved keeps the cast unresolved.
    """
    nulls = ("gaussian", "permuted")
    raw, denoised = (
        Lines(f"{label} over training", paths(results, metric), *null_paths(results, metric, nulls))
        for label, metric in (
            ("stable rank", "stable_rank"),
            ("stable rank without rounding noise", "stable_rank_denoised"),
        )
    )

    def look(cast: Cast) -> tuple[Lines, list[Statement]]:
        lacking = (set(cast.everyone) & set(raw.found)) - set(denoised.found)
        shaky = lacking or _any_unresolved(results, cast, "stable_rank_denoised")
        reason = "the stable rank without rounding noise is not resolved at every checkpoint" if shaky else None
        lines = raw if lacking else denoised
        return lines, [replace(statement, reason=reason) for statement in _band_and_ends(cast, lines)]

    return over_paths(results, look)


def _band_and_ends(cast: Cast, lines: Lines) -> list[Statement]:
    ends, null_ends = last_values(lines.found), last_values(lines.nulls)
    sft, opd, rlvr = (by_seed(cast, role, ends) for role in ROLES)
    null_sft, null_opd, null_rlvr = (by_seed(cast, role, null_ends) for role in ROLES)
    slopes, null_slopes = (by_seed(cast, "opd", _slopes(paths_)) for paths_ in (lines.found, lines.nulls))
    gap = order("RLVR ends within 15% of OPD", opd, rlvr, null_low=null_opd, null_high=null_rlvr)
    return [
        _trend(cast, "sft", 1, lines.found, lines.nulls),
        Statement("OPD's trend over the run is within 15%", slopes, null_slopes, margin=BAND),
        _trend(cast, "rlvr", -1, lines.found, lines.nulls),
        replace(gap, margin=BAND, contrast=False),
        order("OPD ends below SFT", opd, sft, null_low=null_opd, null_high=null_sft),
    ]


def _any_unresolved(results: Results, cast: Cast, metric: str) -> bool:
    """Whether a value of the cast's runs is left out of its path: what is left may be few and unlike the rest."""
    rows = rows_of(results, metric, every_step=True).filter(pl.col("status") == "unresolved")
    return not set(cast.everyone).isdisjoint(rows["run"])


def last_values(found: dict[str, Path]) -> dict[str, float]:
    """Each run's value at its last checkpoint that has one."""
    return {run: path[-1][1] for run, path in found.items()}
