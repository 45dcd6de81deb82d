"""Dot plots: a measured mean with its spread over matrices, its nulls as hollow marks beside it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import polars as pl
from matplotlib.axes import Axes

from geopd.report.curves import whisker
from geopd.report.drawing import Subject
from geopd.report.hover import name_rows
from geopd.report.style import INK, NULL_MARKERS, RunStyle
from geopd.results.summary import aggregate, aggregate_nulls


@dataclass(frozen=True)
class Dot:
    """One line of a dot plot; ``line`` is its row of the folded table."""

    style: RunStyle
    value: float
    low: float
    high: float
    nulls: dict[str, float] = field(default_factory=dict)
    line: dict[str, Any] = field(default_factory=dict)


def dots_of(subject: Subject, rows: pl.DataFrame, nulls: pl.DataFrame) -> list[Dot]:
    """One dot per group for the rows of a single metric, in display order; groups without a value are absent."""
    marks: dict[str, dict[str, float]] = {}
    means = subject.fold(aggregate_nulls(rows, nulls), ["null"], value="null_mean")
    for name, null, mean in means.select("run", "null", "null_mean").iter_rows():
        marks.setdefault(name, {})[null] = mean
    folded = subject.fold(aggregate(rows).filter(pl.col("value").is_not_null()))
    lines = {line["run"]: line for line in folded.iter_rows(named=True)}
    return [
        Dot(style, lines[name]["value"], lines[name]["p05"], lines[name]["p95"], marks.get(name, {}), lines[name])
        for name, style in subject.styles.items()
        if name in lines
    ]


def draw_dots(axes: Axes, dots: list[Dot], *, labels: bool = True, spread: bool = True) -> set[str]:
    """Groups from top to bottom; returns the names of the nulls that were drawn as marks.

    ``spread`` draws the pale bar over the middle 90% of matrices.
    """
    drawn: set[str] = set()
    for y, dot in enumerate(dots):
        if spread:
            look: dict[str, Any] = {"linewidth": 2.2, "alpha": 0.35, "solid_capstyle": "butt"}
            axes.plot([dot.low, dot.high], [y, y], color=dot.style.colour, **look)
        for null, value in dot.nulls.items():
            if null == "random_mask":  # the same for every run: drawn as a line across
                continue
            drawn.add(null)
            marker = NULL_MARKERS.get(null, "D")
            axes.plot(
                value, y, marker=marker, color=INK, markerfacecolor="none", markersize=8.5, linestyle="", zorder=4
            )
        whisker(axes, y, dot.line, dot.style.colour)
        axes.plot(dot.value, y, marker=dot.style.marker, color=dot.style.colour, markersize=5, linestyle="")
    name_rows(axes, [dot.style.label for dot in dots], labels=labels)
    return drawn
