"""One number per run beside its matched null: the read-outs that orders and equivalences are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import polars as pl

from geopd.claims.roles import Cast
from geopd.results import Results, parameters_of
from geopd.results.summary import NULL_ORDER, aggregate, aggregate_nulls, rotation, rows_of

NAMES = {"sft": "SFT", "opd": "OPD", "rlvr": "RLVR"}


@dataclass(frozen=True)
class Numbers:
    """What was measured, the number per run, the null's name, the null's number per run, and the settings behind it.

    ``unresolved`` names the runs of which some matrix has no reliable value, so that the mean is over the others.
    """

    quantity: str
    values: dict[str, float] = field(default_factory=dict)
    null: str | None = None
    nulls: dict[str, float] = field(default_factory=dict)
    settings: tuple[str, ...] = ()
    unresolved: frozenset[str] = frozenset()

    def parameter(self, name: str) -> float | None:
        """A parameter's number where all settings agree on it."""
        found = {parameters_of(text).get(name) for text in self.settings}
        only = found.pop() if len(found) == 1 else None
        return None if only is None else float(only)


@dataclass(frozen=True)
class Endpoint:
    """A read-out of each run's last checkpoint, linear in the values of the metrics that it names."""

    metrics: tuple[str, ...]
    read: Callable[[Results], Numbers]


def mean_of(metric: str, *, alpha: float | None = None) -> Endpoint:
    """The headline mean of a metric; overlaps at the paper figure's alpha where it was measured, else the default."""

    def read(results: Results) -> Numbers:
        parameters: dict[str, Any] = {"alpha": alpha, "view": "bf16"} if alpha is not None else {}
        if alpha is not None and rows_of(results, metric, **parameters).is_empty():
            parameters = {}
        rows = rows_of(results, metric, **parameters)
        nulls = rows_of(results, metric, table="nulls", **parameters)
        return _collect(metric, rows, nulls)

    return Endpoint((metric,), read)


def _visible_density(results: Results) -> Numbers:
    # Another name keeps the aggregate from weighting by parameters.
    unweighted = pl.lit("visible_density").alias("metric")
    rows = rows_of(results, "update_sparsity").with_columns(unweighted, value=1 - pl.col("value"))
    nulls = rows_of(results, "update_sparsity", table="nulls").with_columns(unweighted, mean=1 - pl.col("mean"))
    return _collect("visible_density", rows, nulls)


VISIBLE_DENSITY = Endpoint(("update_sparsity",), _visible_density)
"""``1 - sparsity`` averaged over matrices without weights, as in the mask figure."""


_ROTATIONS = ("rotation_left_mean_deg", "rotation_right_mean_deg")


def _middle_layer_rotation(results: Results) -> Numbers:
    rows = rows_of(results, *_ROTATIONS)
    layers = rows["layer"].drop_nulls().unique().sort()
    if layers.is_empty():
        return Numbers("rotation")
    middle = layers[len(layers) // 2]
    return _rotation(results, rows.filter(pl.col("layer") == middle), f"of layer {middle}")


def _mean_rotation(results: Results) -> Numbers:
    return _rotation(results, rows_of(results, *_ROTATIONS), "over matrices")


def _rotation(results: Results, rows: pl.DataFrame, where: str) -> Numbers:
    values = _both_sides(aggregate(rows), "value")
    nulls = aggregate_nulls(rows, rows_of(results, *_ROTATIONS, table="nulls"))
    name = _first(nulls)
    null_values = _both_sides(nulls.filter(pl.col("null") == (name or "")), "null_mean")
    return Numbers(f"mean rotation {where}, degrees", values, name, null_values)


def _both_sides(lines: pl.DataFrame, column: str) -> dict[str, float]:
    sides: dict[str, dict[str, Any]] = {}
    for item in lines.iter_rows(named=True):
        sides.setdefault(item["run"], {})[item["metric"]] = item[column]
    return {run: angle for run, line in sides.items() if (angle := rotation(line)) is not None}


MIDDLE_LAYER_ROTATION = Endpoint(_ROTATIONS, _middle_layer_rotation)
"""Mean principal angle of both sides over the matrices of the middle layer, in degrees."""
MEAN_ROTATION = Endpoint(_ROTATIONS, _mean_rotation)
"""The same over the matrices of all layers."""


def _first(nulls: pl.DataFrame) -> str | None:
    found = set(nulls["null"])
    return next((name for name in NULL_ORDER if name in found), min(found, default=None))


def _collect(metric: str, rows: pl.DataFrame, null_rows: pl.DataFrame) -> Numbers:
    values, nulls = aggregate(rows), aggregate_nulls(rows, null_rows)
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
        frozenset(rows.filter(pl.col("status") == "unresolved")["run"]),
    )


def by_seed(cast: Cast, role: str, values: dict[str, Any]) -> dict[int, float]:
    """A role's numbers by seed."""
    return {s: values[c[role]] for s, c in cast.seeds.items() if role in c and c[role] in values}


def only(results: Results, runs: Iterable[str], metrics: Iterable[str]) -> Results:
    """The same folder with only these runs and metrics in its tables; quicker to read many times over."""
    wanted = pl.col("run").is_in(list(runs)) & pl.col("metric").is_in(list(metrics)) & pl.col("other_run").is_null()
    return replace(results, measurements=results.measurements.filter(wanted), nulls=results.nulls.filter(wanted))
