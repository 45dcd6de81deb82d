"""Claims about the path: slopes over training progress, bands, and how early a run reaches its final subspace."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl

from geopd.claims.endpoints import NAMES, Measured, by_seed
from geopd.claims.roles import ROLES, Cast
from geopd.claims.verdicts import Statement, order
from geopd.results import Results
from geopd.results.summary import aggregate, aggregate_nulls, complete, rows_of

BAND = float(np.log(1.15))
"""Equivalence margin of stable rank, declared beforehand: within 15% as a log ratio."""
MIN_CHECKPOINTS = 3
HIGH_SIMILARITY = 0.5
"""What "high from the first checkpoint" is taken to mean: more than half of the final subspace is there."""

Path = list[tuple[float, float]]
"""(progress, value) in step order; progress is step over last step."""


def paths(results: Results, metric: str, **parameters: Any) -> dict[str, Path]:
    """Per run the unweighted mean over the matrices that are ``ok`` at every checkpoint which has the metric.

    At default settings, or at those that ``parameters`` name.
    """
    rows = rows_of(results, metric, every_step=True, **parameters).filter(pl.col("step").is_not_null())
    return _paths(aggregate(complete(rows)), "value", results)


def null_paths(results: Results, metric: str, names: tuple[str, ...]) -> tuple[str | None, dict[str, Path]]:
    """The first of the named nulls that is there, averaged over the same matrices."""
    rows = complete(rows_of(results, metric, every_step=True).filter(pl.col("step").is_not_null()))
    nulls = aggregate_nulls(rows, rows_of(results, metric, every_step=True, table="nulls"))
    found = set(nulls["null"])
    name = next((name for name in names if name in found), None)
    return name, _paths(nulls.filter(pl.col("null") == (name or "")), "null_mean", results)


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


def hill_trend(results: Results, cast: Cast) -> Measured:
    """SFT and OPD rise, RLVR falls; unresolved where the sign of a slope depends on the k of the index."""
    found = paths(results, "hill_tail")
    null, nulls = null_paths(results, "hill_tail", ("gaussian", "permuted"))
    statements = [_trend(cast, role, sign, found, nulls) for role, sign in (("sft", 1), ("opd", 1), ("rlvr", -1))]
    if _signs_differ(results):
        reason = "the sign of a slope depends on the k of the Hill index"
        statements = [replace(statement, reason=reason) for statement in statements]
    return Measured("Hill tail index over training", _describe(found), statements, null, _last(nulls))


def _signs_differ(results: Results) -> bool:
    settings = results.measurements.filter(pl.col("metric") == "hill_tail")["setting"].unique()
    sizes = settings.str.extract(r"(?:^|;)k=(\d+)").drop_nulls().unique()
    slopes = [_slopes(paths(results, "hill_tail", k=k)) for k in sizes]
    return any(len({s[run] > 0 for s in slopes if run in s}) > 1 for s in slopes for run in s)


def stable_rank_path(results: Results, cast: Cast) -> Measured:
    """SFT expands, OPD stays within ±15%, RLVR contracts and ends within 15% of OPD; OPD ends below SFT.

    Uses the estimate without rounding noise where the folder has it for every checkpoint of a run.
    """
    metric, found, reason = "stable_rank_denoised", paths(results, "stable_rank_denoised"), None
    if set(raw := paths(results, "stable_rank")) - set(found):
        metric, found = "stable_rank", raw
    if metric == "stable_rank" or _any_unresolved(results, cast, metric):
        reason = "the stable rank without rounding noise is not resolved at every checkpoint"
    null, nulls = null_paths(results, metric, ("gaussian", "permuted"))
    ends, null_ends = _last(found), _last(nulls)
    opd, rlvr = by_seed(cast, "opd", ends), by_seed(cast, "rlvr", ends)
    gap = {s: float(np.log(rlvr[s] / opd[s])) for s in opd.keys() & rlvr.keys()}
    null_opd, null_rlvr = by_seed(cast, "opd", null_ends), by_seed(cast, "rlvr", null_ends)
    null_gap = {s: float(np.log(null_rlvr[s] / null_opd[s])) for s in null_opd.keys() & null_rlvr.keys()}
    statements = [
        _trend(cast, "sft", 1, found, nulls),
        Statement(
            "OPD stays within 15%",
            by_seed(cast, "opd", _slopes(found)),
            by_seed(cast, "opd", _slopes(nulls)),
            margin=BAND,
        ),
        _trend(cast, "rlvr", -1, found, nulls),
        Statement("RLVR ends within 15% of OPD", gap, null_gap, margin=BAND),
        order(
            "OPD ends below SFT",
            opd,
            by_seed(cast, "sft", ends),
            null_low=null_opd,
            null_high=by_seed(cast, "sft", null_ends),
        ),
    ]
    statements = [replace(statement, reason=reason) for statement in statements]
    label = "stable rank without rounding noise" if metric == "stable_rank_denoised" else "stable rank"
    return Measured(f"{label} over training", _describe(found), statements, null, null_ends)


def _any_unresolved(results: Results, cast: Cast, metric: str) -> bool:
    """Whether a value of the cast's runs is left out of its path: what is left may be few and unlike the rest."""
    rows = rows_of(results, metric, every_step=True).filter(pl.col("status") == "unresolved")
    return not {run for role in ROLES for run in cast.runs(role)}.isdisjoint(rows["run"])


def _last(found: dict[str, Path]) -> dict[str, float]:
    return {run: path[-1][1] for run, path in found.items()}


def early_lock(results: Results, cast: Cast) -> Measured:
    """OPD's first checkpoint is nearer its final subspace than SFT and RLVR are, at equal progress and equal norm.

    Both are interpolated at the later of their first checkpoints, by training progress or by the share of the final
    update norm that is reached.
    """
    found = paths(results, "subspace_similarity")
    null, nulls = null_paths(results, "subspace_similarity", ("random_walk", "gaussian"))
    norms = paths(results, "update_norm")
    firsts = {run: path[0][1] for run, path in found.items() if len(path) > 1}
    null_firsts = {run: path[0][1] for run, path in nulls.items() if len(path) > 1}
    opd, null_opd = by_seed(cast, "opd", firsts), by_seed(cast, "opd", null_firsts)
    half = order(
        "OPD's first checkpoint has more than half of its final subspace",
        dict.fromkeys(opd, HIGH_SIMILARITY),
        opd,
        null_low=dict.fromkeys(null_opd, HIGH_SIMILARITY),
        null_high=null_opd,
    )
    statements = [half]
    for role in ("sft", "rlvr"):
        for clock, axis in (("progress", None), ("norm", norms)):
            there, here = _at_common_start(cast, role, found, axis)
            null_there, null_here = _at_common_start(cast, role, nulls, axis)
            text = f"OPD above {NAMES[role]} at equal {clock}"
            statements.append(order(text, there, here, null_low=null_there, null_high=null_here))
    return Measured("similarity to the final subspace", _describe(found), statements, null, null_firsts)


def _at_common_start(
    cast: Cast, role: str, found: dict[str, Path], norms: dict[str, Path] | None
) -> tuple[dict[int, float], dict[int, float]]:
    """Similarity of ``role`` and of OPD where both have started, by seed, on a clock of progress or of norm."""
    there: dict[int, float] = {}
    here: dict[int, float] = {}
    for seed, runs in cast.seeds.items():
        if "opd" not in runs or role not in runs:
            continue
        own, other = (_clocked(found.get(runs[r], []), norms, runs[r]) for r in ("opd", role))
        if len(own) < 2 or len(other) < 2:
            continue
        start = max(min(x for x, _ in own), min(x for x, _ in other))
        there[seed], here[seed] = (float(np.interp(start, *np.array(sorted(path)).T)) for path in (other, own))
    return there, here


def _clocked(path: Path, norms: dict[str, Path] | None, run: str) -> Path:
    if norms is None:
        return path
    sizes = dict(norms.get(run, []))
    end = norms[run][-1][1] if sizes else 0.0
    return [(sizes[progress] / end, value) for progress, value in path if progress in sizes and end > 0]
