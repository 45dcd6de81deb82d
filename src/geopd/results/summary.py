"""Aggregates over matrices: one line per run, per module or per step, each with its matched null and what was left out.

Headline scope: the decoder layers' 2-D weights, that is everything except embeddings, head, norms and biases.
Sparsity is weighted by parameter count, every other metric is an unweighted mean over matrices. Only ``ok`` values
enter; the others are counted. Quantiles describe the spread over matrices; they are not confidence intervals.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import polars as pl

from geopd.results.metrics import METRICS
from geopd.results.reading import Results
from geopd.results.schema import KEY, PARADIGMS

NOT_HEADLINE = ("embedding", "head", "norm", "bias", "vector")
WEIGHTED = ("update_sparsity",)
"""Metrics averaged with the parameter count as weight."""
NULL_ORDER = ("random_walk", "gaussian", "permuted", "random_mask")
"""Where a metric has several nulls, the one shown first."""
_QUANTILES = {"p05": 0.05, "p25": 0.25, "p75": 0.75, "p95": 0.95}
_GROUP = ("run", "step")


def rows_of(
    results: Results,
    *metrics: str,
    scope: str = "layers",
    every_step: bool = False,
    table: str = "measurements",
    **parameters: Any,
) -> pl.DataFrame:
    """Rows of the named metrics (all without names): at default settings, or wherever the settings say so.

    Args:
        results: a results folder, read.
        metrics: metric names; none means every metric.
        scope: ``layers`` (headline) or ``all`` (with embeddings, head, norms and biases).
        every_step: all checkpoints instead of each run's last.
        table: ``measurements`` or ``nulls``.
        parameters: tokens the setting must contain, such as ``alpha=0.3, view="bf16"``; replaces the default filter.

    Raises:
        ValueError: if the scope is unknown.
    """
    if scope not in ("layers", "all"):
        raise ValueError(f"scope {scope!r} is unknown; use 'layers' or 'all'")
    frame: pl.DataFrame = getattr(results, table).filter(pl.col("other_run").is_null())
    if not every_step:
        frame = _last_step(frame, results.measurements)
    if metrics:
        frame = frame.filter(pl.col("metric").is_in(metrics))
    if scope == "layers":
        frame = frame.filter(~pl.col("module").is_in(NOT_HEADLINE))
    if not parameters:
        return frame.filter(pl.col("is_default"))
    tokens = pl.concat_str(pl.lit(";"), "setting", pl.lit(";"))
    return frame.filter([tokens.str.contains(f";{k}={v};", literal=True) for k, v in parameters.items()])


def _last_step(frame: pl.DataFrame, measurements: pl.DataFrame) -> pl.DataFrame:
    last = measurements.filter(pl.col("other_run").is_null()).group_by("run").agg(pl.col("step").max().alias("last"))
    joined = frame.join(last, on="run")
    return joined.filter(pl.col("step").eq_missing(pl.col("last"))).drop("last")


def _weight() -> pl.Expr:
    weighted = pl.col("metric").is_in(WEIGHTED)
    return pl.when(weighted).then(pl.col("rows") * pl.col("cols")).otherwise(1).cast(pl.Float64)


def _settings() -> pl.Expr:
    return pl.col("setting").unique().sort().str.join(" | ").alias("setting")


def aggregate(rows: pl.DataFrame, by: Sequence[str] = ()) -> pl.DataFrame:
    """One line per run, step, ``by`` and metric: mean, median, spread and how many rows were left out.

    Columns: ``run step *by metric setting value median p05 p25 p75 p95 matrices undefined unresolved failed``.
    ``value`` is null where no row is ``ok``. Settings that differ between matrices are joined with a bar.
    """
    good = pl.col("status") == "ok"
    value = pl.col("value").filter(good)
    weight = _weight().filter(good)
    return (
        rows.group_by([*_GROUP, *by, "metric"])
        .agg(
            _settings(),
            pl.when(good.any()).then((value * weight).sum() / weight.sum()).alias("value"),
            value.median().alias("median"),
            *(value.quantile(q, "linear").alias(name) for name, q in _QUANTILES.items()),
            good.sum().cast(pl.Int64).alias("matrices"),
            *(
                (pl.col("status") == status).sum().cast(pl.Int64).alias(status)
                for status in ("undefined", "unresolved", "failed")
            ),
        )
        .sort([*_GROUP, *by, "metric"])
    )


def matched(rows: pl.DataFrame, nulls: pl.DataFrame) -> pl.DataFrame:
    """Measured ``ok`` rows beside the nulls of the same key: the rows' columns, ``null`` and ``null_mean``."""
    right = nulls.select([*KEY, "null", pl.col("mean").alias("null_mean")])
    return rows.filter(pl.col("status") == "ok").join(right, on=KEY, how="inner", nulls_equal=True)


def aggregate_nulls(rows: pl.DataFrame, nulls: pl.DataFrame, by: Sequence[str] = ()) -> pl.DataFrame:
    """The matched nulls, averaged over the same matrices in the same way as the measured values.

    Columns: ``run step *by metric null value null_mean log_ratio matrices``. ``value`` is the measured mean over the
    matrices that have this null, ``log_ratio`` the effect size ``log(value / null_mean)``, null where either is not
    positive.
    """
    weight = _weight()
    mean = ((pl.col(c) * weight).sum() / weight.sum() for c in ("value", "null_mean"))
    return (
        matched(rows, nulls)
        .group_by([*_GROUP, *by, "metric", "null"])
        .agg(*(e.alias(c) for e, c in zip(mean, ("value", "null_mean"), strict=True)), pl.len().alias("matrices"))
        .with_columns(
            pl.when((pl.col("value") > 0) & (pl.col("null_mean") > 0))
            .then((pl.col("value") / pl.col("null_mean")).log())
            .alias("log_ratio")
        )
        .sort([*_GROUP, *by, "metric", "null"])
    )


def complete(rows: pl.DataFrame) -> pl.DataFrame:
    """Rows of the matrices that are ``ok`` at every checkpoint of their run, metric by metric and setting by setting.

    A matrix that enters or leaves between checkpoints would move a mean along training without any weight moving.
    """
    return rows.filter((pl.col("status") == "ok").all().over("run", "matrix", "metric", "setting"))


def rotation(row: dict[str, Any], suffix: str = "") -> float | None:
    """Mean principal angle in degrees of a summary line: both sides' mean, or the one side that is defined.

    ``suffix`` picks a column beside the value's own, such as ``_null_gaussian``.
    """
    sides = [row.get(f"rotation_{side}_mean_deg{suffix}") for side in ("left", "right")]
    known = [side for side in sides if side is not None]
    return sum(known) / len(known) if known else None


def summarise(results: Results, *, every_step: bool = False) -> pl.DataFrame:
    """One row per run at its last step (or per step): the headline numbers, their matched nulls and effect sizes.

    Columns: ``run paradigm seed origin step matrices parameters undefined unresolved failed``, then for each metric
    present ``M`` (mean; for sparsity weighted by parameters), ``M_median``, ``M_p05``, ``M_p95`` (spread over
    matrices, not a confidence interval), ``M_setting``, and for each of its nulls ``M_null_NAME`` and
    ``M_log_ratio_NAME``; ``update_sparsity_all_parameters`` also counts embeddings, head, norms and biases.
    Undefined, unresolved and failed count the default rows left out over all metrics.
    """
    rows = rows_of(results, every_step=every_step)
    lines: dict[tuple[str, int | None], dict[str, Any]] = {}
    everything = rows_of(results, scope="all", every_step=every_step)
    for run, step in everything.select(_GROUP).unique().sort(_GROUP).iter_rows():
        lines[run, step] = _opening(results, rows, run, step)
    for run in sorted(set(results.runs["run"]) - {run for run, _ in lines}):  # nothing of it could be measured
        lines[run, None] = _opening(results, rows, run, None)
    for item in aggregate(rows).iter_rows(named=True):
        name = item["metric"]
        lines[item["run"], item["step"]] |= {
            name: item["value"],
            **{f"{name}_{part}": item[part] for part in ("median", "p05", "p95", "setting")},
        }
    sparsity = everything.filter(pl.col("metric") == "update_sparsity")
    for item in aggregate(sparsity).iter_rows(named=True):
        lines[item["run"], item["step"]]["update_sparsity_all_parameters"] = item["value"]
    nulls = rows_of(results, every_step=every_step, table="nulls")
    for item in aggregate_nulls(rows, nulls).iter_rows(named=True):
        lines[item["run"], item["step"]] |= {
            f"{item['metric']}_null_{item['null']}": item["null_mean"],
            f"{item['metric']}_log_ratio_{item['null']}": item["log_ratio"],
        }
    return _as_frame(list(lines.values()))


def _opening(results: Results, rows: pl.DataFrame, run: str, step: int | None) -> dict[str, Any]:
    mine = rows.filter((pl.col("run") == run) & pl.col("step").eq_missing(pl.lit(step, dtype=pl.Int64)))
    shapes = mine.unique("matrix")
    known = results.runs.filter(pl.col("run") == run)
    about = known.row(0, named=True) if known.height else {}
    return {
        "run": run,
        "paradigm": p if (p := about.get("paradigm")) in PARADIGMS else "other",
        "seed": about.get("seed"),
        "origin": about.get("origin"),
        "step": step,
        "matrices": shapes.height,
        "parameters": int((shapes["rows"] * shapes["cols"]).sum()),
        **{s: mine.filter(pl.col("status") == s).height for s in ("undefined", "unresolved", "failed")},
    }


def _as_frame(lines: list[dict[str, Any]]) -> pl.DataFrame:
    columns: dict[str, Any] = {
        "run": pl.String,
        "paradigm": pl.String,
        "seed": pl.Int64,
        "origin": pl.String,
        "step": pl.Int64,
        **dict.fromkeys(("matrices", "parameters", "undefined", "unresolved", "failed"), pl.Int64),
    }
    found = {key for line in lines for key in line} - set(columns)
    order = [*METRICS, *sorted(found)]  # the catalogue's order first, unknown metrics after it
    ranked = sorted(found, key=lambda key: (next(i for i, name in enumerate(order) if key.startswith(name)), key))
    columns |= {key: pl.String if key.endswith("_setting") else pl.Float64 for key in ranked}
    return pl.DataFrame(lines, schema=columns)


def movers(results: Results, run: str, n: int = 10) -> pl.DataFrame:
    """The ``n`` matrices of a run that moved most at its last step, by relative update norm.

    Folders with entrywise metrics only are ranked by visible change, the least sparse first. Columns: ``matrix
    module layer ranked_by value`` and the other headline metrics of those matrices where they are ``ok``.

    Raises:
        ValueError: if the folder has no such run.
    """
    if run not in set(results.runs["run"]) | set(results.measurements["run"]):
        raise ValueError(f"{results.root}: no run {run!r}; it has {', '.join(sorted(results.runs['run']))}")
    rows = rows_of(results).filter((pl.col("run") == run) & (pl.col("status") == "ok"))
    by = "relative_update_norm"
    if rows.filter(pl.col("metric") == by).is_empty():
        by = "update_sparsity"
    ranked = (
        rows.filter(pl.col("metric") == by)
        .sort(["value", "matrix"], descending=[by == "relative_update_norm", False])
        .head(n)
        .select("matrix", "module", "layer", pl.col("metric").alias("ranked_by"), "value")
    )
    for name in ("update_sparsity", "rotation_left_mean_deg", "rotation_right_mean_deg", "stable_rank"):
        other = rows.filter(pl.col("metric") == name).select("matrix", pl.col("value").alias(name))
        ranked = ranked.join(other, on="matrix", how="left", maintain_order="left")
    return ranked
