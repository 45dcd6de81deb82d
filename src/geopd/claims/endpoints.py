"""Claims about where runs end: one number per run, its matched null, and the order the paper reports."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import polars as pl

from geopd.claims.roles import Cast
from geopd.claims.verdicts import Statement, order
from geopd.results import Results, parameters_of
from geopd.results.summary import NULL_ORDER, aggregate, aggregate_nulls, rotation, rows_of

NAMES = {"sft": "SFT", "opd": "OPD", "rlvr": "RLVR"}


@dataclass(frozen=True)
class Measured:
    """What a claim looks at: numbers per run, those of one null, and the statements made of them."""

    quantity: str
    values: dict[str, Any]
    statements: list[Statement]
    null: str | None = None
    nulls: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Numbers:
    """What was measured, the number per run, the null's name, the null's number per run, and the settings behind it."""

    quantity: str
    values: dict[str, float] = field(default_factory=dict)
    null: str | None = None
    nulls: dict[str, float] = field(default_factory=dict)
    settings: tuple[str, ...] = ()

    def parameter(self, name: str) -> float | None:
        """A parameter's number where all settings agree on it."""
        found = {parameters_of(text).get(name) for text in self.settings}
        only = found.pop() if len(found) == 1 else None
        return None if only is None else float(only)


Endpoint = Callable[[Results], Numbers]


def mean_of(metric: str, *, alpha: float | None = None) -> Endpoint:
    """The headline mean of a metric; overlaps at the paper figure's alpha where it was measured, else the default."""

    def measure(results: Results) -> Numbers:
        parameters: dict[str, Any] = {"alpha": alpha, "view": "bf16"} if alpha is not None else {}
        if alpha is not None and not _has_ok(rows_of(results, metric, **parameters)):
            parameters = {}
        rows = rows_of(results, metric, **parameters)
        nulls = rows_of(results, metric, table="nulls", **parameters)
        return _collect(metric, aggregate(rows), aggregate_nulls(rows, nulls))

    return measure


def visible_density(results: Results) -> Numbers:
    """``1 - sparsity`` averaged over matrices without weights, as in the mask figure."""
    # Another name keeps the aggregate from weighting by parameters.
    unweighted = pl.lit("visible_density").alias("metric")
    rows = rows_of(results, "update_sparsity").with_columns(unweighted, value=1 - pl.col("value"))
    nulls = rows_of(results, "update_sparsity", table="nulls").with_columns(unweighted, mean=1 - pl.col("mean"))
    return _collect("visible_density", aggregate(rows), aggregate_nulls(rows, nulls))


def middle_layer_rotation(results: Results) -> Numbers:
    """Mean principal angle of both sides over the matrices of the middle layer, in degrees."""
    metrics = ("rotation_left_mean_deg", "rotation_right_mean_deg")
    rows = rows_of(results, *metrics)
    layers = rows["layer"].drop_nulls().unique().sort()
    if layers.is_empty():
        return Numbers("rotation")
    middle = layers[len(layers) // 2]
    rows = rows.filter(pl.col("layer") == middle)
    lines: dict[str, dict[str, Any]] = {}
    for item in aggregate(rows).iter_rows(named=True):
        lines.setdefault(item["run"], {})[item["metric"]] = item["value"]
    values = {run: angle for run, line in lines.items() if (angle := rotation(line)) is not None}
    nulls = aggregate_nulls(rows, rows_of(results, *metrics, table="nulls"))
    name = _first(nulls)
    of_null: dict[str, dict[str, Any]] = {}
    for item in nulls.filter(pl.col("null") == (name or "")).iter_rows(named=True):
        of_null.setdefault(item["run"], {})[item["metric"]] = item["null_mean"]
    null_values = {run: angle for run, line in of_null.items() if (angle := rotation(line)) is not None}
    return Numbers(f"mean rotation of layer {middle}, degrees", values, name, null_values)


def _has_ok(rows: pl.DataFrame) -> bool:
    return not rows.filter(pl.col("status") == "ok").is_empty()


def _first(nulls: pl.DataFrame) -> str | None:
    found = set(nulls["null"])
    return next((name for name in NULL_ORDER if name in found), min(found, default=None))


def _collect(metric: str, values: pl.DataFrame, nulls: pl.DataFrame) -> Numbers:
    settings = sorted(set(values["setting"]))
    name = _first(nulls)
    matched = nulls.filter(pl.col("null") == (name or ""))
    return Numbers(
        f"{metric.replace('_', ' ')} ({' | '.join(settings)})",
        {run: v for run, v in values.select("run", "value").iter_rows() if v is not None},
        name,
        dict(matched.select("run", "null_mean").iter_rows()),
        # matrices of other settings are joined with a bar
        tuple(part for text in settings for part in text.split(" | ")),
    )


def by_seed(cast: Cast, role: str, values: dict[str, Any]) -> dict[int, float]:
    """A role's numbers by seed."""
    return {s: values[c[role]] for s, c in cast.seeds.items() if role in c and c[role] in values}


def ordering(endpoint: Endpoint, *ranks: str) -> Callable[[Results, Cast], Measured]:
    """A claim that the roles named in ``ranks`` come in this rising order, pair by neighbouring pair."""
    return lambda results, cast: _ordered(endpoint(results), cast, ranks)


def _ordered(numbers: Numbers, cast: Cast, ranks: Sequence[str]) -> Measured:
    statements = [
        order(
            f"{NAMES[low]} < {NAMES[high]}",
            by_seed(cast, low, numbers.values),
            by_seed(cast, high, numbers.values),
            null_low=by_seed(cast, low, numbers.nulls),
            null_high=by_seed(cast, high, numbers.nulls),
        )
        for low, high in pairwise(ranks)
    ]
    return Measured(numbers.quantity, numbers.values, statements, numbers.null, numbers.nulls)


def principal_overlap(results: Results, cast: Cast) -> Measured:
    """RLVR lowest, SFT highest, and OPD below the overlap ``alpha`` of a uniformly random mask."""
    numbers = mean_of("principal_overlap", alpha=0.3)(results)
    measured, alpha = _ordered(numbers, cast, ("rlvr", "opd", "sft")), numbers.parameter("alpha")
    if alpha is None:
        return measured
    opd, null = by_seed(cast, "opd", numbers.values), by_seed(cast, "opd", numbers.nulls)
    baseline = order(
        f"OPD < {alpha:g}, the overlap of a random mask",
        opd,
        dict.fromkeys(opd, alpha),
        null_low=null,
        null_high=dict.fromkeys(null, alpha),
    )
    return replace(measured, statements=[*measured.statements, baseline])
