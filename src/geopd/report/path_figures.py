"""Figures of the path: stable rank, norm and Hill tail, similarity to the final subspace, accuracy."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from geopd.report.drawing import Drawing, Subject, extremes, left_out, main_benchmark, per_run
from geopd.report.style import NULL_LINES, RunStyle, maybe_log, new_figure, null_handle, percent_axis, run_legend
from geopd.results.metrics import format_value, metric_of
from geopd.results.summary import aggregate, aggregate_nulls, complete, rows_of


def trajectories(subject: Subject) -> Drawing:
    """Counterpart of Figure 4: stable rank, Frobenius norm and Hill tail of the cumulative update over training."""
    name, title = "trajectories", "The update as training goes on"
    reading = (
        "The update since the origin, averaged over the matrices that have a value at every checkpoint. A low flat "
        "stable rank means few directions carry the update; a smaller Hill index means a heavier head. Dotted: a "
        "Gaussian update of the same size; dashed: bf16 rounding alone, where the stored weights carry it."
    )
    wanted = ("stable_rank", "stable_rank_denoised", "update_norm", "hill_tail")
    rows = _numbered(rows_of(subject.results, *wanted, every_step=True))
    means = aggregate(complete(rows)).filter(pl.col("value").is_not_null())
    metrics = [m for m in wanted if _runs_with_path(means.filter(pl.col("metric") == m))]
    if not metrics:
        return Drawing(name, title, reading, missing="a path needs a run with at least two numbered checkpoints")
    nulls = aggregate_nulls(complete(rows), rows_of(subject.results, *wanted, every_step=True, table="nulls"))
    figure = new_figure(max(3.3 * len(metrics), 5), 3.6)
    drawn: set[str] = set()
    clock = _Clock(means)
    for axes, metric in zip(np.atleast_1d(figure.subplots(1, len(metrics))), metrics, strict=True):
        mine = means.filter(pl.col("metric") == metric)
        found = nulls.filter((pl.col("metric") == metric) & pl.col("null").is_in(list(NULL_LINES)))
        drawn |= _draw_paths(axes, subject, clock, mine, found)
        about = metric_of(metric)
        axes.set_title(about.label)
        axes.set_ylabel(about.unit)
        maybe_log(axes, [*mine["value"], *found["null_mean"]], decades=0.7)
        clock.label(axes)
    run_legend(figure, subject.present(means), [null_handle(n, line=True) for n in sorted(drawn)])
    return Drawing(name, title, reading, _path_facts(means, metrics) + left_out(rows), figure)


class _Clock:
    """Steps as they are, or as a share of each run's last step where the runs' lengths are too far apart."""

    def __init__(self, lines: pl.DataFrame) -> None:
        self.last = dict(lines.group_by("run").agg(pl.col("step").max()).iter_rows())
        ends = [end for end in self.last.values() if end]
        self.relative = bool(ends) and max(ends) > 3 * min(ends)

    def times(self, run: str, steps: Iterable[int]) -> list[float]:
        return [step / self.last[run] if self.relative and self.last[run] else float(step) for step in steps]

    def label(self, axes: Axes) -> None:
        axes.set_xlabel("training progress" if self.relative else "training step")
        if self.relative:
            percent_axis(axes)
        else:
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def _numbered(rows: pl.DataFrame) -> pl.DataFrame:
    return rows.filter(pl.col("step").is_not_null())


def _runs_with_path(means: pl.DataFrame) -> list[str]:
    return means.group_by("run").len().filter(pl.col("len") > 1)["run"].to_list()


def _draw_paths(axes: Axes, subject: Subject, clock: _Clock, means: pl.DataFrame, nulls: pl.DataFrame) -> set[str]:
    for style in subject.present(means):
        path = means.filter(pl.col("run") == style.run).sort("step")
        look: dict[str, Any] = {"color": style.colour, "linestyle": style.line, "marker": style.marker}
        axes.plot(clock.times(style.run, path["step"]), path["value"], **look)
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
    for run in sorted(_runs_with_path(lines)):
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
        "run ends at 1 by definition. A walk of the same steps in ever new directions (dashes and dots) rises "
        "too: only what lies above it is a lock. Dotted: the floor K/n of an update with no preferred direction."
    )
    title = "How early the final subspace is reached"
    return _similarities(
        subject, "similarity", title, reading, "subspace_similarity", "similarity to the final subspace"
    )


def increments(subject: Subject) -> Drawing:
    """Whether successive stretches of training move in one channel, for each K."""
    reading = (
        "Overlap of the top-K right singular subspaces of what two successive stretches between checkpoints added. "
        "Unlike the similarity of cumulative updates, a walk in ever new directions stays at the floor K/n (dotted)."
    )
    title = "Whether successive steps share a channel"
    return _similarities(subject, "increments", title, reading, "increment_similarity", "similarity of increments")


def _similarities(subject: Subject, name: str, title: str, reading: str, metric: str, label: str) -> Drawing:
    rows = _numbered(rows_of(subject.results, metric, every_step=True, view="native"))
    k = pl.col("setting").str.extract(r"(?:^|;)k=(\d+)").cast(pl.Int64).alias("k")
    # undefined at the first checkpoint for increments: what no matrix has is no checkpoint of the path
    has_any = pl.col("value").is_not_null().any().over("run", "step", "setting")
    rows = rows.with_columns(k).filter(has_any)
    means = aggregate(complete(rows), ["k"]).filter(pl.col("value").is_not_null())
    sizes = [size for size in sorted(set(means["k"])) if _runs_with_path(means.filter(pl.col("k") == size))]
    if not sizes:
        return Drawing(name, title, reading, missing="a path needs a run with enough numbered checkpoints")
    null_rows = rows_of(subject.results, metric, every_step=True, table="nulls", view="native")
    nulls = aggregate_nulls(complete(rows), null_rows, ["k"]).filter(pl.col("null").is_in(list(NULL_LINES)))
    figure = new_figure(max(3.6 * len(sizes), 5), 3.6)
    drawn: set[str] = set()
    clock = _Clock(means)
    clock.relative = True
    for axes, size in zip(np.atleast_1d(figure.subplots(1, len(sizes), sharey=True)), sizes, strict=True):
        here = nulls.filter(pl.col("k") == size)
        drawn |= _draw_paths(axes, subject, clock, means.filter(pl.col("k") == size), here)
        axes.set_title(f"K = {size}")
        axes.set_ylim(0, 1.05)
        clock.label(axes)
    figure.axes[0].set_ylabel(label)
    run_legend(figure, subject.present(means), [null_handle(n, line=True) for n in sorted(drawn)])
    first = means.filter(pl.col("k") == sizes[-1]).sort("step").group_by("run", maintain_order=True).first()
    firsts = {run: value for run, value in first.select("run", "value").iter_rows() if run in _runs_with_path(means)}
    shows = f"At the first checkpoint that has it, K = {sizes[-1]}: {extremes(metric, firsts)}." + left_out(rows)
    return Drawing(name, title, reading, shows, figure)


def accuracy(subject: Subject) -> Drawing:
    """Accuracy over steps for every benchmark and decoding, with 95% error bars."""
    name, title = "accuracy", "What the runs learned"
    reading = "Accuracy at each evaluated checkpoint; bars are 95% intervals over problems (1.96 standard errors)."
    table = subject.results.evaluations
    if table.is_empty():
        return Drawing(name, title, reading, missing="the folder has no evaluations")
    kinds = table.select("benchmark", "decoding").unique().sort("benchmark", "decoding").rows()
    columns = min(len(kinds), 3)
    lines = -(-len(kinds) // columns)
    figure = new_figure(max(3.3 * columns, 5), 2.6 * lines + 1)
    grid = figure.subplots(lines, columns, squeeze=False).ravel()
    clock = _Clock(_numbered(table)) if not _numbered(table).is_empty() else None
    for axes, (benchmark, decoding) in zip(grid, kinds, strict=False):
        mine = table.filter((pl.col("benchmark") == benchmark) & (pl.col("decoding") == decoding))
        for style in subject.present(mine):
            _accuracy_line(axes, style, clock, mine.filter(pl.col("run") == style.run))
        axes.set_title(f"{benchmark}, {decoding}")
        percent_axis(axes, "y")
        if clock is not None:
            clock.label(axes)
    for axes in grid[len(kinds) :]:
        axes.set_axis_off()
    for axes in grid[::columns]:
        axes.set_ylabel("accuracy")
    run_legend(figure, subject.present(table))
    return Drawing(name, title, reading, _accuracy_facts(table, kinds), figure)


def _accuracy_line(axes: Axes, style: RunStyle, clock: _Clock | None, mine: pl.DataFrame) -> None:
    numbered = _numbered(mine).sort("step")
    bars: dict[str, Any] = {"color": style.colour, "marker": style.marker, "capsize": 2, "elinewidth": 0.9}
    if clock is not None and not numbered.is_empty():
        times = clock.times(style.run, numbered["step"])
        half = 1.96 * numbered["se"].fill_null(0.0).to_numpy()
        axes.errorbar(times, numbered["value"], yerr=half, linestyle=style.line, **bars)
        return
    end = clock.last.get(style.run) if clock else None
    half = 1.96 * mine["se"].fill_null(0.0).to_numpy()
    axes.errorbar([end or 0] * mine.height, mine["value"], yerr=half, linestyle="", **bars)


def _accuracy_facts(table: pl.DataFrame, kinds: list[tuple[str, str]]) -> str:
    parts = []
    for benchmark, decoding in kinds[:2]:
        mine = table.filter((pl.col("benchmark") == benchmark) & (pl.col("decoding") == decoding))
        last = mine.sort("step").group_by("run", maintain_order=True).last()
        best = last.sort("value", descending=True).row(0, named=True)
        parts.append(
            f"Best at its last checkpoint on {benchmark} ({decoding}): {best['run']}, {100 * best['value']:.1f}%"
            + (f" ± {196 * best['se']:.1f}" if best["se"] is not None else "")
            + f" on {best['n']} problems."
        )
    return " ".join(parts)


def accuracy_against_geometry(subject: Subject) -> Drawing:
    """The same geometry at equal accuracy: each run's path in the plane of accuracy and a geometric quantity."""
    name, title = "accuracy_against_geometry", "Geometry at equal accuracy"
    reading = (
        "Each line is one run's checkpoints. Compare runs at the same height of the horizontal axis: differences that "
        "vanish there came from how far training had gone. Runs from different origins start at different accuracies."
    )
    wanted = ("update_sparsity", "rotation_right_mean_deg", "stable_rank")
    table = _numbered(subject.results.evaluations)
    means = aggregate(complete(_numbered(rows_of(subject.results, *wanted, every_step=True))))
    # a path needs the benchmark that was taken at most checkpoints, often the selection split
    most = pl.len().over("benchmark", "decoding")
    if (kind := main_benchmark(table.filter(most == most.max()))) is None:
        return Drawing(name, title, reading, missing="the folder has no evaluations at numbered checkpoints")
    scores = table.filter((pl.col("benchmark") == kind[0]) & (pl.col("decoding") == kind[1]))
    both = means.filter(pl.col("value").is_not_null()).join(
        scores.select("run", "step", score="value"), on=["run", "step"]
    )
    metrics = [m for m in wanted if _runs_with_path(both.filter(pl.col("metric") == m))]
    if not metrics:
        return Drawing(name, title, reading, missing="no run has geometry and accuracy at two checkpoints")
    figure = new_figure(max(3.3 * len(metrics), 5), 3.6)
    for axes, metric in zip(np.atleast_1d(figure.subplots(1, len(metrics))), metrics, strict=True):
        mine = both.filter(pl.col("metric") == metric)
        for style in subject.present(mine):
            path = mine.filter(pl.col("run") == style.run).sort("step")
            line = {"color": style.colour, "linestyle": style.line, "marker": style.marker}
            axes.plot(path["score"], path["value"], **line)
        about = metric_of(metric)
        axes.set_title(about.label)
        axes.set_ylabel(about.unit)
        axes.set_xlabel(f"accuracy ({kind[0]}, {kind[1]})")
        maybe_log(axes, mine["value"].to_list(), decades=0.7, percent=metric == "update_sparsity")
        percent_axis(axes)
    run_legend(figure, subject.present(both))
    return Drawing(name, title, reading, _common_accuracy(both), figure)


def _common_accuracy(both: pl.DataFrame) -> str:
    spans = both.group_by("run").agg(low=pl.col("score").min(), high=pl.col("score").max())
    low, high = max(spans["low"]), min(spans["high"])
    if low >= high:
        return "No accuracy is reached by all runs, so they cannot be compared at equal accuracy."
    return f"All runs pass through accuracies from {100 * low:.1f}% to {100 * high:.1f}%: compare them there."
