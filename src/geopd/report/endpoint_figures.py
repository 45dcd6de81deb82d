"""Figures of where runs end: sparsity, overlaps, energy in the principal subspaces."""

from __future__ import annotations

from typing import Any

import polars as pl
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from geopd.report.curves import whisker
from geopd.report.dots import dots_of, draw_dots
from geopd.report.drawing import Drawing, Subject, extremes, left_out, without
from geopd.report.map_figures import module_order
from geopd.report.style import INK, RunStyle, new_figure, null_handle, percent_axis, run_legend
from geopd.results.metrics import format_value
from geopd.results.summary import aggregate, aggregate_nulls, rows_of

MAX_LANES = 8
"""With more runs than this the runs of a paradigm share a line."""


def sparsity_by_module(subject: Subject) -> Drawing:
    """Counterpart of the paper's Table 1: sparsity overall and per module type, beside the Gaussian null."""
    drawing = Drawing(
        "sparsity",
        "How many weights did not visibly change",
        "Each mark is the share of weights left unchanged in bf16 (weighted by parameters); further right means a "
        "sparser update." + (" Whiskers: 95% t interval over seeds." if subject.seeded else ""),
        "Hollow diamonds: what a Gaussian update of the same size would leave unchanged. A mark on its diamond is "
        "sparse because its update is small, not because it chose its weights.",
        counterpart="Table 1",
    )
    rows = rows_of(subject.results, "update_sparsity")
    overall = aggregate(rows).filter(pl.col("value").is_not_null())
    if overall.is_empty():
        return drawing.absent(without(rows, "no run has an update sparsity"))
    nulls = rows_of(subject.results, "update_sparsity", table="nulls").filter(pl.col("null") == "gaussian")
    modules = ["overall", *module_order(rows)]
    whole = subject.fold(overall)
    styles = subject.present(whole)
    lanes = list(dict.fromkeys(s.run if len(styles) <= MAX_LANES else s.paradigm for s in styles))
    pitch = max(0.42, 0.17 * len(lanes))
    figure = new_figure(8.6, 1.1 + pitch * len(modules))
    axes = figure.subplots()
    offset = {lane: (i - (len(lanes) - 1) / 2) * 0.8 / len(lanes) for i, lane in enumerate(lanes)}
    rank = {s.run: offset[s.run if s.run in offset else s.paradigm] for s in styles}
    marks = _by_module(subject, aggregate_nulls(rows, nulls), aggregate_nulls(rows, nulls, ["module"]), "null_mean")
    _module_marks(axes, modules, styles, rank, _by_module(subject, overall, aggregate(rows, ["module"])), marks)
    _module_axis(axes, modules)
    run_legend(figure, styles, [] if marks.is_empty() else [null_handle("gaussian")])
    values = dict(whole.select("run", "value").iter_rows())
    return drawing.drawn(figure, f"Overall sparsity: {extremes('update_sparsity', values)}." + left_out(rows))


def _by_module(subject: Subject, overall: pl.DataFrame, modules: pl.DataFrame, value: str = "value") -> pl.DataFrame:
    lines = pl.concat([overall.with_columns(module=pl.lit("overall")), modules], how="diagonal")
    return subject.fold(lines.filter(pl.col(value).is_not_null()), ["module"], value)


def _module_marks(
    axes: Axes,
    modules: list[str],
    styles: list[RunStyle],
    rank: dict[str, float],
    lines: pl.DataFrame,
    marks: pl.DataFrame,
) -> None:
    size = 7 if len(styles) <= MAX_LANES else 5
    where = {module: i for i, module in enumerate(modules)}
    hollow: dict[str, Any] = {"marker": "D", "color": INK, "markerfacecolor": "none", "linestyle": "", "zorder": 4}
    for line in marks.iter_rows(named=True):
        axes.plot(line["null_mean"], where[line["module"]] + rank[line["run"]], markersize=size, **hollow)
    for style in styles:
        for line in lines.filter(pl.col("run") == style.run).iter_rows(named=True):
            y = where[line["module"]] + rank[style.run]
            whisker(axes, y, line, style.colour)
            axes.plot(line["value"], y, marker=style.marker, color=style.colour, linestyle="", markersize=4.5)


def _module_axis(axes: Axes, modules: list[str]) -> None:
    axes.set_yticks(range(len(modules)), modules)
    axes.set_ylim(len(modules) - 0.5, -0.5)
    axes.axhline(0.5, color=INK, linewidth=0.7)
    axes.grid(visible=False, axis="y")
    for y in range(1, len(modules), 2):
        axes.axhspan(y - 0.5, y + 0.5, color="#f5f5f5", zorder=0)
    percent_axis(axes)
    axes.set_xlabel("update sparsity (share of entries unchanged in bf16)")


def overlaps(subject: Subject) -> Drawing:
    """Counterpart of Figure 3: which weights the visible changes fall on, against chance and the Gaussian null."""
    drawing = Drawing(
        "overlaps",
        "Which weights the visible changes fall on",
        "Filled: mean over matrices, the bar spans the middle 90% of matrices (spread, not a confidence interval)."
        + (" Whiskers: 95% t interval over seeds." if subject.seeded else ""),
        "The vertical line: a random mask overlaps by alpha. Hollow marks: the nulls. A run at its hollow mark is "
        "explained by the size of its update.",
        counterpart="Figure 3",
    )
    metrics = ("principal_overlap", "low_magnitude_overlap")
    default = rows_of(subject.results, *metrics)
    alphas = _alphas(rows_of(subject.results, *metrics, view="bf16"), default)
    panels = [(alpha, metric) for alpha in alphas for metric in metrics]
    rows = {p: rows_of(subject.results, p[1], alpha=p[0], view="bf16") for p in panels}
    dots = {
        p: dots_of(subject, rows[p], rows_of(subject.results, p[1], table="nulls", alpha=p[0], view="bf16"))
        for p in panels
    }
    alphas = [a for a in alphas if any(dots[a, m] for m in metrics)]
    if not alphas:
        return drawing.absent(without(default, "no matrix has an overlap"))
    height = max(len(dots[p]) for p in panels if p[0] in alphas)
    figure = new_figure(9.2, len(alphas) * (0.75 + 0.3 * height) + 0.5)
    grid = figure.subplots(len(alphas), 2, squeeze=False)
    marks: set[str] = set()
    for line, alpha in zip(grid, alphas, strict=True):
        for axes, metric, label in zip(line, metrics, ("principal mask", "smallest weights"), strict=True):
            marks |= draw_dots(axes, dots[alpha, metric], labels=metric == metrics[0])
            axes.axvline(float(alpha), color=INK, linewidth=0.9)
            axes.set_title(f"overlap with the {label}, alpha = {alpha}")
            axes.locator_params(axis="x", nbins=6)
            percent_axis(axes)
    for axes in grid[-1]:
        axes.set_xlabel("share of visibly changed entries")
    styles = [dot.style for dot in max(dots.values(), key=len)]
    chance = Line2D([], [], color=INK, linewidth=0.9, label="chance (random mask)")
    run_legend(figure, styles, [*(null_handle(n) for n in sorted(marks)), chance])
    return drawing.drawn(figure, _overlap_facts(dots, alphas[0], metrics) + left_out(default))


def _alphas(rows: pl.DataFrame, default: pl.DataFrame) -> list[str]:
    pattern = r"(?:^|;)alpha=([^;]+)"
    first = default["setting"].str.extract(pattern).drop_nulls().unique().to_list()
    others = rows["setting"].str.extract(pattern).drop_nulls().unique().sort().to_list()
    return first[:1] + [alpha for alpha in others if alpha not in first[:1]]


def _overlap_facts(dots: dict[tuple[str, str], list[Any]], alpha: str, metrics: tuple[str, ...]) -> str:
    parts = []
    for metric in metrics:
        gaussian = [d for d in dots[alpha, metric] if d.nulls.get("gaussian")]
        values = {d.style.run: d.value for d in dots[alpha, metric]}
        if not values:
            continue
        text = f"{metric.replace('_', ' ').capitalize()} at alpha = {alpha}: {extremes(metric, values)}"
        if gaussian:
            worst = max(abs(d.value / d.nulls["gaussian"] - 1) for d in gaussian)
            text += f"; within {100 * worst:.2g}% of the Gaussian null"
        parts.append(text + ".")
    return " ".join(parts)


def principal_energy(subject: Subject) -> Drawing:
    """Share of the update's energy inside the origin's leading singular subspaces, against an isotropic update."""
    drawing = Drawing(
        "principal_energy",
        "How much of the update lies in the origin's leading directions",
        "Share of the update's squared norm inside the origin's top-k singular subspace; bars span the middle 90% of "
        "matrices." + (" Whiskers: 95% t interval over seeds." if subject.seeded else ""),
        "Hollow diamonds: an update without any preferred direction. Further right than the diamond means aligned "
        "with the principal directions, which mask overlaps cannot see.",
    )
    metrics = ("principal_energy_left", "principal_energy_right")
    rows = rows_of(subject.results, *metrics)
    nulls = rows_of(subject.results, *metrics, table="nulls")
    dots = [dots_of(subject, rows.filter(pl.col("metric") == m), nulls.filter(pl.col("metric") == m)) for m in metrics]
    if not any(dots):
        return drawing.absent(without(rows, "no matrix has a principal energy"))
    figure = new_figure(9.2, 1.3 + 0.3 * max(map(len, dots)))
    marks: set[str] = set()
    for axes, some, side in zip(figure.subplots(1, 2), dots, ("left (output)", "right (input)"), strict=True):
        marks |= draw_dots(axes, some, labels=side.startswith("left"))
        axes.set_title(f"{side} subspace")
        axes.set_xlim(left=0)
        percent_axis(axes)
        axes.set_xlabel("share of the update's energy")
    run_legend(figure, [dot.style for dot in max(dots, key=len)], [null_handle(n) for n in sorted(marks)])
    right = dots[1] or dots[0]
    shows = f"{'Right' if dots[1] else 'Left'} side: {extremes(metrics[1], {d.style.run: d.value for d in right})}"
    expected = [d.nulls["gaussian"] for d in right if "gaussian" in d.nulls]
    if expected:
        shows += f"; an isotropic update would have {format_value(metrics[1], sum(expected) / len(expected))}"
    return drawing.drawn(figure, shows + "." + left_out(rows))
