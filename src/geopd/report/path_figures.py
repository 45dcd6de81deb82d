"""Figures of the path: stable rank, norm and Hill tail, similarity to the final subspace, similarity of steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
from matplotlib.artist import Artist
from matplotlib.axes import Axes

from geopd.report.curves import Clock, band_handle, draw_path
from geopd.report.drawing import Drawing, Subject, extremes, left_out, per_run
from geopd.report.style import NULL_LINES, maybe_log, new_figure, null_handle, run_legend
from geopd.results.metrics import format_value, metric_of
from geopd.results.summary import aggregate, aggregate_nulls, complete, rows_of


def trajectories(subject: Subject) -> Drawing:
    """Counterpart of Figure 4: stable rank, Frobenius norm and Hill tail of the cumulative update over training."""
    drawing = Drawing(
        "trajectories",
        "The update as training goes on",
        "The update since the origin, averaged over the matrices that have a value at every checkpoint. A low flat "
        "stable rank means few directions carry the update; a smaller Hill index means a heavier head."
        + over_seeds(subject),
        "Dotted: a Gaussian update of the same size; dashed: bf16 rounding alone, where the stored weights carry it.",
        counterpart="Figure 4",
    )
    wanted = ("stable_rank", "stable_rank_denoised", "update_norm", "hill_tail")
    rows = numbered(rows_of(subject.results, *wanted, every_step=True))
    means = subject.fold(aggregate(complete(rows)).filter(pl.col("value").is_not_null()), ["metric"])
    metrics = [m for m in wanted if runs_with_path(means.filter(pl.col("metric") == m))]
    if not metrics:
        return drawing.absent("a path needs a run with at least two numbered checkpoints")
    null_rows = rows_of(subject.results, *wanted, every_step=True, table="nulls")
    nulls = subject.fold(aggregate_nulls(complete(rows), null_rows), ["metric", "null"], "null_mean")
    figure = new_figure(max(3.3 * len(metrics), 5), 3.6)
    drawn: set[str] = set()
    clock = Clock(means)
    for axes, metric in zip(np.atleast_1d(figure.subplots(1, len(metrics))), metrics, strict=True):
        mine = means.filter(pl.col("metric") == metric)
        found = nulls.filter((pl.col("metric") == metric) & pl.col("null").is_in(list(NULL_LINES)))
        drawn |= _draw_paths(axes, subject, clock, mine, found)
        about = metric_of(metric)
        axes.set_title(about.label)
        axes.set_ylabel(about.unit)
        maybe_log(axes, [*mine["value"], *found["null_mean"]], decades=0.7)
        clock.label(axes)
    run_legend(figure, subject.present(means), path_handles(means, drawn))
    return drawing.drawn(figure, _path_facts(means, metrics) + left_out(rows))


def over_seeds(subject: Subject) -> str:
    """What the shading means, where there is any."""
    return " Lines are means over seeds; shaded: 95% t interval over seeds." if subject.seeded else ""


def path_handles(means: pl.DataFrame, nulls: set[str]) -> list[Artist]:
    """Legend entries of the nulls' lines and of the shading."""
    handles: list[Artist] = [null_handle(null, line=True) for null in sorted(nulls)]
    return handles + ([band_handle()] if means["seeds"].max() > 2 else [])  # type: ignore[operator]


def numbered(rows: pl.DataFrame) -> pl.DataFrame:
    """Rows of checkpoints with a step number."""
    return rows.filter(pl.col("step").is_not_null())


def runs_with_path(means: pl.DataFrame) -> list[str]:
    """Names with at least two lines."""
    return means.group_by("run").len().filter(pl.col("len") > 1)["run"].to_list()


def _draw_paths(axes: Axes, subject: Subject, clock: Clock, means: pl.DataFrame, nulls: pl.DataFrame) -> set[str]:
    for style in subject.present(means):
        path = means.filter(pl.col("run") == style.run).sort("step")
        look: dict[str, Any] = {"color": style.colour, "linestyle": style.line, "marker": style.marker}
        draw_path(axes, clock.times(style.run, path["step"]), path, **look)
        for (kind,), null in nulls.filter(pl.col("run") == style.run).sort("step").group_by("null"):
            times = clock.times(style.run, null["step"])
            line = NULL_LINES[str(kind)]
            axes.plot(times, null["null_mean"], color=style.colour, linestyle=line, linewidth=1.2)
    return set(nulls["null"])


def _path_facts(means: pl.DataFrame, metrics: list[str]) -> str:
    metric = "stable_rank" if "stable_rank" in metrics else metrics[0]
    lines = means.filter(pl.col("metric") == metric).sort("step")
    parts: dict[str, str] = {}
    ends: dict[str, float] = {}
    for run in sorted(runs_with_path(lines)):
        values = lines.filter(pl.col("run") == run)["value"]
        ends[run] = values[-1]
        parts[run] = f"{format_value(metric, values[0])} → {format_value(metric, values[-1])}"
    return (
        f"{metric_of(metric).label.capitalize()}, first to last checkpoint: "
        f"{per_run(parts, f'at the end {extremes(metric, ends)}')}."
    )


def similarity(subject: Subject) -> Drawing:
    """Counterpart of Figure 5: how much of the final update subspace is already there, for each K."""
    reading = (
        "Overlap of the update's top-K right singular subspace with the one at the run's last checkpoint; every "
        "run ends at 1 by definition." + over_seeds(subject)
    )
    chance = (
        "A walk of the same steps in ever new directions (dashes and dots) rises too: only what lies above it is a "
        "lock. Dotted: the floor K/n of an update with no preferred direction."
    )
    title = "How early the final subspace is reached"
    drawing = Drawing("similarity", title, reading, chance, counterpart="Figure 5")
    return _similarities(subject, drawing, "subspace_similarity", "similarity to the final subspace")


def increments(subject: Subject) -> Drawing:
    """Whether successive stretches of training move in one channel, for each K."""
    reading = (
        "Overlap of the top-K right singular subspaces of what two successive stretches between checkpoints added."
        + over_seeds(subject)
    )
    chance = (
        "Unlike the similarity of cumulative updates, a walk in ever new directions stays at the floor K/n (dotted)."
    )
    title = "Whether successive steps share a channel"
    drawing = Drawing("increments", title, reading, chance)
    return _similarities(subject, drawing, "increment_similarity", "similarity of increments")


def _similarities(subject: Subject, drawing: Drawing, metric: str, label: str) -> Drawing:
    rows = numbered(rows_of(subject.results, metric, every_step=True, view="native"))
    k = pl.col("setting").str.extract(r"(?:^|;)k=(\d+)").cast(pl.Int64).alias("k")
    # undefined at the first checkpoint for increments: what no matrix has is no checkpoint of the path
    has_any = pl.col("value").is_not_null().any().over("run", "step", "setting")
    rows = rows.with_columns(k).filter(has_any)
    means = subject.fold(aggregate(complete(rows), ["k"]).filter(pl.col("value").is_not_null()), ["k"])
    sizes = [size for size in sorted(set(means["k"])) if runs_with_path(means.filter(pl.col("k") == size))]
    if not sizes:
        return drawing.absent("a path needs a run with enough numbered checkpoints")
    null_rows = rows_of(subject.results, metric, every_step=True, table="nulls", view="native")
    nulls = subject.fold(aggregate_nulls(complete(rows), null_rows, ["k"]), ["k", "null"], "null_mean")
    nulls = nulls.filter(pl.col("null").is_in(list(NULL_LINES)))
    figure = new_figure(max(3.6 * len(sizes), 5), 3.6)
    drawn: set[str] = set()
    clock = Clock(means)
    clock.relative = True
    for axes, size in zip(np.atleast_1d(figure.subplots(1, len(sizes), sharey=True)), sizes, strict=True):
        here = nulls.filter(pl.col("k") == size)
        drawn |= _draw_paths(axes, subject, clock, means.filter(pl.col("k") == size), here)
        axes.set_title(f"K = {size}")
        axes.set_ylim(0, 1.05)
        clock.label(axes)
    figure.axes[0].set_ylabel(label)
    run_legend(figure, subject.present(means), path_handles(means, drawn))
    paths = means.filter(pl.col("run").is_in(list(runs_with_path(means)))).sort("step")
    found = []
    for size in sizes:
        first = paths.filter(pl.col("k") == size).group_by("run", maintain_order=True).first()
        found.append(f"K = {size}: {extremes(metric, dict(first.select('run', 'value').iter_rows()))}")
    return drawing.drawn(figure, f"At the first checkpoint that has it, {'; '.join(found)}." + left_out(rows))
