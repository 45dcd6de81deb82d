"""Figures of what the size of an update explains: endpoint metrics over relative update norm, beside the null."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from geopd.report.drawing import Drawing, Subject
from geopd.report.groups import Group
from geopd.report.hover import name_points
from geopd.report.style import COLOURS, INK, MUTED, RunStyle, few_ticks, maybe_log, new_figure, run_legend
from geopd.results.metrics import format_value
from geopd.results.summary import aggregate, aggregate_nulls, matched, rows_of

_BINS_A_DECADE = 8
_WIDEST_GAP = 4  # bins: half a decade
KINDS = {
    "baseline": ("o", "baseline"),
    "learning_rate": ("D", "other learning rate"),
    "projection": ("^", "projection arm"),
    "control": ("s", "control"),
    "variant": ("P", "variant"),
}
"""What a run is beside its baseline, by its tags: marker and name."""
PANELS = (
    ("update_sparsity", "update sparsity"),
    ("low_magnitude_overlap", "low-magnitude overlap"),
    ("principal_overlap", "principal overlap"),
    ("spectral_shift", "normalised spectral shift"),
    ("rotation", "mean rotation, degrees"),
)


def sparsity_against_size(subject: Subject) -> Drawing:
    """Every matrix a dot: sparsity over relative update norm, with the Gaussian null's curve."""
    drawing = Drawing(
        "sparsity_against_size",
        "Sparsity against the size of the update",
        "Every dot is one matrix of one run at its last checkpoint; further right means a larger update.",
        "The dark curve is what a Gaussian update of the same size leaves unchanged. Dots on the curve are sparse "
        "because their update is small.",
    )
    rows = rows_of(subject.results, "update_sparsity").filter(pl.col("status") == "ok")
    sizes = rows_of(subject.results, "relative_update_norm").filter((pl.col("status") == "ok") & (pl.col("value") > 0))
    both = rows.join(
        sizes.select("run", "step", "matrix", size="value"), on=["run", "step", "matrix"], nulls_equal=True
    )
    if both.is_empty():
        return drawing.absent("no matrix has both a sparsity and a relative update norm")
    figure = new_figure(8.2, 4.6)
    axes = figure.subplots()
    styles = [s for s in subject.styles.values() if not both.filter(pl.col("run").is_in(_runs(subject, s))).is_empty()]
    for style in styles:
        mine = both.filter(pl.col("run").is_in(_runs(subject, style)))
        look: dict[str, Any] = {"c": style.colour, "marker": style.marker, "alpha": 0.65, "linewidths": 0}
        dots = axes.scatter(mine["size"], mine["value"], s=16, rasterized=True, **look)
        name_points(dots, [f"{matrix} of {run}" for matrix, run in mine.select("matrix", "run").iter_rows()])
    nulls = rows_of(subject.results, "update_sparsity", table="nulls").filter(pl.col("null") == "gaussian")
    curve = null_curve(matched(both, nulls))
    if curve is not None:
        axes.plot(*curve, color=INK, linewidth=1.2, marker=".", markersize=4)
    maybe_log(axes, both["size"].to_list(), which="x")
    maybe_log(axes, both["value"].to_list(), percent=True)
    axes.set_xlabel("relative update norm (update over origin, Frobenius)")
    axes.set_ylabel("update sparsity")
    handle = Line2D([], [], color=INK, linewidth=1.2, label="null: Gaussian update of the same size (median)")
    run_legend(figure, styles, [handle] if curve is not None else [])
    low, middle, high = np.quantile((both["value"] * both["size"]).to_numpy(), [0.25, 0.5, 0.75])
    shows = (
        f"{both.height} matrices; sparsity times relative norm has median {middle:.2g} "
        f"(middle half {low:.2g} to {high:.2g})."
    )
    return drawing.drawn(figure, shows)


def _runs(subject: Subject, style: RunStyle) -> list[str]:
    return list(subject.groups[style.run].runs)


def null_curve(points: pl.DataFrame) -> tuple[list[float], list[float]] | None:
    """Medians of ``null_mean`` over bins of equal width in log ``size``; none with fewer than two points.

    The curve is broken where no sizes lie: a line across would invent nulls.
    """
    points = points.filter(pl.col("size") > 0)
    if points.height < 2:
        return None
    cut = points.with_columns(bin=(pl.col("size").log10() * _BINS_A_DECADE).floor())
    curve = cut.group_by("bin").agg(pl.col("size").median(), pl.col("null_mean").median()).sort("size")
    sizes, means, last = list[float](), list[float](), math.inf
    for position, size, mean in curve.select("bin", "size", "null_mean").iter_rows():
        if position - last > _WIDEST_GAP:
            sizes.append(math.nan)
            means.append(math.nan)
        sizes.append(size)
        means.append(mean)
        last = position
    return sizes, means


def kind_of(group: Group) -> str:
    """Which kind of run a group is, from its tags."""
    if not group.tags:
        return "baseline"
    return next((kind for kind in ("learning_rate", "projection", "variant") if kind in group.tags), "control")


def update_size(subject: Subject) -> Drawing | None:
    """Endpoint metrics of every run and checkpoint over relative update norm; only where runs are many kinds."""
    if len({kind_of(group) for group in subject.groups.values()}) < 2:
        return None
    drawing = Drawing(
        "update_size",
        "What the size of the update explains, over all runs",
        "Large marks: the end of every run, mean over matrices; small dots: its earlier checkpoints. The horizontal "
        "axis is the mean relative update norm. Colour is the paradigm, shape what the run is beside its baseline.",
        "Dark dots: the Gaussian null of every run and checkpoint; the line is their median. Runs that differ from "
        "each other only along the line differ in the size of their update and in nothing else that this metric sees.",
    )
    points = size_points(subject)
    panels = [(m, label) for m, label in PANELS if not points.filter(pl.col("metric") == m).is_empty()]
    if not panels:
        return drawing.absent("no run has both a relative update norm and an endpoint metric")
    figure = new_figure(10.2, 6.4)
    grid = figure.subplots(2, 3).ravel()
    for axes, (metric, label) in zip(grid, panels, strict=False):
        _size_panel(axes, points.filter(pl.col("metric") == metric), percent=metric in _SHARES)
        axes.set_title(label)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    for axes in grid[max(len(panels) - 3, 0) : len(panels)]:
        axes.set_xlabel("relative update norm")
    _size_legend(figure.legend, points)
    return drawing.drawn(figure, _size_facts(points, panels))


_SHARES = ("update_sparsity", "low_magnitude_overlap", "principal_overlap")


def size_points(subject: Subject) -> pl.DataFrame:
    """One line per run, step and metric: ``value null_mean size paradigm kind last``, means over matrices.

    ``rotation`` is the mean of both sides, where both are defined, of the values and of the nulls alike.
    """
    sides = ("rotation_left_mean_deg", "rotation_right_mean_deg")
    wanted = ("update_sparsity", "low_magnitude_overlap", "principal_overlap", "spectral_shift", *sides)
    rows = rows_of(subject.results, *wanted, "relative_update_norm", every_step=True)
    means = aggregate(rows).filter(pl.col("value").is_not_null()).select("run", "step", "metric", "value")
    nulls = aggregate_nulls(rows, rows_of(subject.results, *wanted, every_step=True, table="nulls"))
    gaussian = nulls.filter(pl.col("null") == "gaussian").select("run", "step", "metric", "null_mean")
    lines = means.join(gaussian, on=["run", "step", "metric"], how="left", nulls_equal=True)
    turned = (
        lines.filter(pl.col("metric").is_in(sides))
        .group_by("run", "step")
        .agg(metric=pl.lit("rotation"), value=pl.col("value").mean(), null_mean=pl.col("null_mean").mean())
    )
    sizes = lines.filter(pl.col("metric") == "relative_update_norm").select("run", "step", size="value")
    about = [(run, g.paradigm, kind_of(g)) for g in subject.groups.values() for run in g.runs]
    known = pl.DataFrame(about, schema=["run", "paradigm", "kind"], orient="row")
    everything = pl.concat([lines, turned.select(lines.columns)]).join(sizes, on=["run", "step"], nulls_equal=True)
    return everything.join(known, on="run").with_columns(
        last=pl.col("step").eq_missing(pl.col("step").max().over("run"))
    )


def checkpoints(points: pl.DataFrame) -> list[str]:
    """What points with a ``run`` and a ``step`` are called."""
    return [run if step is None else f"{run}, step {step}" for run, step in points.select("run", "step").iter_rows()]


def _size_panel(axes: Axes, points: pl.DataFrame, *, percent: bool) -> None:
    null = points.filter(pl.col("null_mean").is_not_null())
    axes.scatter(null["size"], null["null_mean"], s=4, c=INK, alpha=0.35, linewidths=0, rasterized=True)
    if (curve := null_curve(null)) is not None:
        axes.plot(*curve, color=INK, linewidth=1.0)
    early = points.filter(~pl.col("last"))
    for paradigm in early["paradigm"].unique():
        some = early.filter(pl.col("paradigm") == paradigm)
        look: dict[str, Any] = {"s": 7, "alpha": 0.5, "linewidths": 0, "rasterized": True}
        name_points(axes.scatter(some["size"], some["value"], c=COLOURS[paradigm], **look), checkpoints(some))
    for (paradigm, kind), some in points.filter("last").group_by("paradigm", "kind"):
        colour, marker = COLOURS[str(paradigm)], KINDS[str(kind)][0]
        look = {"s": 30 if kind == "baseline" else 22, "edgecolors": "white", "linewidths": 0.4, "zorder": 3}
        name_points(axes.scatter(some["size"], some["value"], c=colour, marker=marker, **look), checkpoints(some))
    maybe_log(axes, points["size"].to_list(), which="x", decades=0.7)
    few_ticks(axes)
    maybe_log(axes, points["value"].to_list(), decades=0.7, percent=percent)


def _size_legend(legend: Any, points: pl.DataFrame) -> None:
    handles = [
        Line2D([], [], color=COLOURS[p], marker="o", linestyle="", label=p)
        for p in COLOURS
        if p in set(points["paradigm"])
    ]
    handles += [
        Line2D([], [], color=MUTED, marker=marker, linestyle="", label=name)
        for kind, (marker, name) in KINDS.items()
        if kind in set(points["kind"])
    ]
    handles.append(Line2D([], [], color=INK, marker=".", linewidth=1.0, label="null: Gaussian update of the same size"))
    legend(handles=handles, loc="outside lower center", ncols=5)


def _size_facts(points: pl.DataFrame, panels: list[tuple[str, str]]) -> str:
    """Range of each metric over the ends of runs, and where it lies beside its null: median and range of log ratios."""
    parts = []
    for metric, label in panels:
        ends = points.filter((pl.col("metric") == metric) & pl.col("last") & pl.col("null_mean").is_not_null())
        ends = ends.filter((pl.col("value") > 0) & (pl.col("null_mean") > 0))
        if ends.height < 3:
            continue
        ratios = ends.select(ratio=pl.col("value") / pl.col("null_mean"))["ratio"]
        off, least, most = np.exp(np.quantile(np.log(ratios.to_numpy()), [0.5, 0.0, 1.0]))
        spread = ends.select(pl.col("value").max() / pl.col("value").min()).item()
        name = "rotation_left_mean_deg" if metric == "rotation" else metric
        low, high = format_value(name, ends["value"].min()), format_value(name, ends["value"].max())  # type: ignore[arg-type]
        parts.append(
            f"{label}: {low} to {high} over {ends.height} runs (a factor of {spread:.3g}), at the median "
            f"{_beside(off)} its null ({_beside(least)} to {_beside(most)}; above it in {int((ratios > 1).sum())} runs)"
        )
    return "; ".join(parts)[:1].upper() + "; ".join(parts)[1:] + "."


def _beside(ratio: float) -> str:
    """A ratio as a percentage above or below."""
    off = 100 * abs(ratio - 1)
    return f"{off:{'.0f' if off >= 10 else '.2g'}}% {'above' if ratio >= 1 else 'below'}"
