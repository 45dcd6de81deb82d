"""Dot plots: a measured mean with its spread over matrices, its nulls as hollow marks beside it."""

from __future__ import annotations

from dataclasses import dataclass, field

import polars as pl
from matplotlib.axes import Axes

from geopd.report.drawing import Subject
from geopd.report.style import INK, NULL_MARKERS, RunStyle
from geopd.results.summary import aggregate, aggregate_nulls


@dataclass(frozen=True)
class Dot:
    """One line of a dot plot."""

    style: RunStyle
    value: float
    low: float
    high: float
    nulls: dict[str, float] = field(default_factory=dict)


def dots_of(subject: Subject, rows: pl.DataFrame, nulls: pl.DataFrame) -> list[Dot]:
    """One dot per run for the rows of a single metric, in display order; runs without a value are absent."""
    marks: dict[str, dict[str, float]] = {}
    for run, null, mean in aggregate_nulls(rows, nulls).select("run", "null", "null_mean").iter_rows():
        marks.setdefault(run, {})[null] = mean
    lines = {line["run"]: line for line in aggregate(rows).iter_rows(named=True) if line["value"] is not None}
    return [
        Dot(style, lines[run]["value"], lines[run]["p05"], lines[run]["p95"], marks.get(run, {}))
        for run, style in subject.styles.items()
        if run in lines
    ]


def draw_dots(axes: Axes, dots: list[Dot], *, labels: bool = True) -> set[str]:
    """Runs from top to bottom; returns the names of the nulls that were drawn as marks."""
    drawn: set[str] = set()
    for y, dot in enumerate(dots):
        axes.plot([dot.low, dot.high], [y, y], color=dot.style.colour, linewidth=2.2, alpha=0.35, solid_capstyle="butt")
        for null, value in dot.nulls.items():
            if null == "random_mask":  # the same for every run: drawn as a line across
                continue
            drawn.add(null)
            marker = NULL_MARKERS.get(null, "D")
            axes.plot(
                value, y, marker=marker, color=INK, markerfacecolor="none", markersize=8.5, linestyle="", zorder=4
            )
        axes.plot(dot.value, y, marker=dot.style.marker, color=dot.style.colour, markersize=5, linestyle="")
    axes.set_yticks(range(len(dots)), [dot.style.label if labels else "" for dot in dots])
    axes.set_ylim(len(dots) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    return drawn
