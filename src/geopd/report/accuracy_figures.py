"""Figures of what was learned: accuracy over steps, and geometry at equal accuracy."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
from matplotlib.axes import Axes

from geopd.report.curves import Clock, band_handle, draw_path
from geopd.report.drawing import Drawing, Subject, main_benchmark
from geopd.report.path_figures import numbered, over_seeds, runs_with_path
from geopd.report.style import RunStyle, maybe_log, new_figure, percent_axis, run_legend
from geopd.results.metrics import metric_of
from geopd.results.summary import aggregate, complete, rows_of

MAX_KINDS = 6
"""With more benchmarks than this those taken only at the end of runs are left to other figures."""
_Z = 1.96


def accuracy(subject: Subject) -> Drawing:
    """Accuracy over steps for every benchmark and decoding, with 95% error bars."""
    drawing = Drawing(
        "accuracy",
        "What the runs learned",
        "Accuracy at each evaluated checkpoint; bars are 95% intervals over problems (1.96 standard errors), drawn for "
        "single runs." + over_seeds(subject),
        "A run that learned nothing stays within its bars from its first checkpoint to its last; two runs differ only "
        "where their bars or bands are apart.",
    )
    table = subject.accuracies
    if table.is_empty():
        return drawing.absent("the folder has no evaluations")
    table = subject.fold(table, ["benchmark", "decoding"])
    kinds = _kinds(table)
    columns = min(len(kinds), 3)
    lines = -(-len(kinds) // columns)
    figure = new_figure(max(3.3 * columns, 5), 2.6 * lines + 1)
    grid = figure.subplots(lines, columns, squeeze=False).ravel()
    clock = Clock(numbered(table)) if not numbered(table).is_empty() else None
    for axes, (benchmark, decoding) in zip(grid, kinds, strict=False):
        mine = table.filter((pl.col("benchmark") == benchmark) & (pl.col("decoding") == decoding))
        for style in subject.present(mine):
            _accuracy_line(axes, style, clock, mine.filter(pl.col("run") == style.run))
        axes.set_title(f"{benchmark}, {decoding}")
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, -0.02), min(high, 1.02))  # an interval over few seeds may leave the possible
        percent_axis(axes, "y")
        if clock is not None:
            clock.label(axes)
    for axes in grid[len(kinds) :]:
        axes.set_axis_off()
    for axes in grid[::columns]:
        axes.set_ylabel("accuracy")
    run_legend(figure, subject.present(table), [band_handle()] if table["seeds"].max() > 2 else [])  # type: ignore[operator]
    return drawing.drawn(figure, _accuracy_facts(table, kinds))


def _kinds(table: pl.DataFrame) -> list[tuple[str, str]]:
    """Benchmarks and decodings to draw; of many, those with a path and ``held_out`` at its largest."""
    counts = table.group_by("benchmark", "decoding").agg(
        path=pl.len() > pl.col("run").n_unique(), largest=pl.col("n").max()
    )
    if counts.height > MAX_KINDS:
        reported = (pl.col("benchmark") == "held_out") & (
            pl.col("largest") == pl.col("largest").max().over("benchmark")
        )
        counts = counts.filter(pl.col("path") | reported)
    return [(str(b), str(d)) for b, d in counts.select("benchmark", "decoding").sort("benchmark", "decoding").rows()]


def _accuracy_line(axes: Axes, style: RunStyle, clock: Clock | None, mine: pl.DataFrame) -> None:
    look: dict[str, Any] = {"color": style.colour, "marker": style.marker}
    path = numbered(mine).sort("step")
    if clock is not None and path.height > 1 and path["seeds"].min() > 1:  # type: ignore[operator]
        draw_path(axes, clock.times(style.run, path["step"]), path, linestyle=style.line, **look)
        return
    bars = look | {"capsize": 2, "elinewidth": 0.9}
    half = [h if h is not None else _Z * (se or 0.0) for h, se in mine.sort("step").select("half", "se").iter_rows()]
    if clock is not None and not path.is_empty():
        axes.errorbar(clock.times(style.run, path["step"]), path["value"], yerr=half, linestyle=style.line, **bars)
        return
    end = clock.last.get(style.run) if clock else None
    axes.errorbar([end or 0] * mine.height, mine["value"], yerr=half, linestyle="", **bars)


def _accuracy_facts(table: pl.DataFrame, kinds: list[tuple[str, str]]) -> str:
    parts = []
    for benchmark, decoding in kinds[:2]:
        mine = table.filter((pl.col("benchmark") == benchmark) & (pl.col("decoding") == decoding))
        last = mine.sort("step").group_by("run", maintain_order=True).last()
        best = last.sort("value", descending=True).row(0, named=True)
        parts.append(
            f"Best at its last checkpoint on {benchmark} ({decoding}): {best['run']}, {100 * best['value']:.1f}%"
            + (f" ± {100 * half:.1f}" if (half := margin(best)) is not None else "")
            + f" on {best['n']:.0f} problems."
        )
    return " ".join(parts)


def margin(line: dict[str, Any]) -> float | None:
    """Half a 95% interval of a folded evaluation: over seeds where there are several, else over problems."""
    if line["half"] is not None:
        return float(line["half"])
    return None if line["se"] is None else _Z * float(line["se"])


def accuracy_against_geometry(subject: Subject) -> Drawing:
    """The same geometry at equal accuracy: each run's path in the plane of accuracy and a geometric quantity."""
    drawing = Drawing(
        "accuracy_against_geometry",
        "Geometry at equal accuracy",
        "Each line is one run's checkpoints"
        + (" (mean over seeds)" if subject.seeded else "")
        + ". Compare runs at the same place of the horizontal axis: differences that vanish there came from how far "
        "training had gone. Runs from different origins start at different accuracies.",
        "Had training length alone decided the geometry, the lines of runs from one origin would lie on each other.",
    )
    wanted = ("update_sparsity", "rotation_right_mean_deg", "stable_rank")
    table = numbered(subject.accuracies)
    rows = complete(numbered(rows_of(subject.results, *wanted, every_step=True)))
    means = subject.fold(aggregate(rows).filter(pl.col("value").is_not_null()), ["metric"])
    # a path needs the benchmark that was taken at most checkpoints, often the selection split
    most = pl.len().over("benchmark", "decoding")
    if (kind := main_benchmark(table.filter(most == most.max()))) is None:
        return drawing.absent("the folder has no evaluations at numbered checkpoints")
    scores = subject.fold(table.filter((pl.col("benchmark") == kind[0]) & (pl.col("decoding") == kind[1])))
    both = means.join(scores.select("run", "step", score="value"), on=["run", "step"])
    metrics = [m for m in wanted if runs_with_path(both.filter(pl.col("metric") == m))]
    if not metrics:
        return drawing.absent("no run has geometry and accuracy at two checkpoints")
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
    return drawing.drawn(figure, _common_accuracy(subject, both))


def _common_accuracy(subject: Subject, both: pl.DataFrame) -> str:
    shared = [name for name, group in subject.groups.items() if group.shared_origin]
    for whose, runs in (("All runs", both), ("The runs of one origin", both.filter(pl.col("run").is_in(shared)))):
        spans = runs.group_by("run").agg(low=pl.col("score").min(), high=pl.col("score").max())
        if spans.height > 1 and (low := max(spans["low"])) < (high := min(spans["high"])):
            return f"{whose} pass through accuracies from {100 * low:.1f}% to {100 * high:.1f}%: compare them there."
    return "No accuracy is reached by all runs, so they cannot be compared at equal accuracy."
