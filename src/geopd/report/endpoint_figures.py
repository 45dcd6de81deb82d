"""Figures of where runs end: sparsity, overlaps, energy in the principal subspaces, sparsity against update size."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from geopd.report.dots import dots_of, draw_dots
from geopd.report.drawing import Drawing, Subject, extremes, left_out, without
from geopd.report.map_figures import module_order
from geopd.report.style import INK, maybe_log, new_figure, null_handle, percent_axis, run_legend
from geopd.results.metrics import format_value
from geopd.results.summary import aggregate, aggregate_nulls, matched, rows_of

MAX_LANES = 8
"""With more runs than this the runs of a paradigm share a line."""
_BINS_A_DECADE = 8
_WIDEST_GAP = 4  # bins: half a decade


def sparsity_by_module(subject: Subject) -> Drawing:
    """Counterpart of the paper's Table 1: sparsity overall and per module type, beside the Gaussian null."""
    name, title = "sparsity", "How many weights did not visibly change"
    reading = (
        "Each mark is the share of weights left unchanged in bf16 (weighted by parameters); further right means a "
        "sparser update. Hollow diamonds: what a Gaussian update of the same size would leave unchanged."
    )
    rows = rows_of(subject.results, "update_sparsity")
    overall = aggregate(rows).filter(pl.col("value").is_not_null())
    if overall.is_empty():
        return Drawing(name, title, reading, missing=without(rows, "no run has an update sparsity"))
    nulls = rows_of(subject.results, "update_sparsity", table="nulls")
    lines = pl.concat([overall.with_columns(module=pl.lit("overall")), aggregate(rows, ["module"])], how="diagonal")
    marks = pl.concat(
        [
            aggregate_nulls(rows, nulls).with_columns(module=pl.lit("overall")),
            aggregate_nulls(rows, nulls, ["module"]),
        ],
        how="diagonal",
    )
    modules = ["overall", *module_order(rows)]
    styles = subject.present(overall)
    lanes = list(dict.fromkeys(s.run if len(styles) <= MAX_LANES else s.paradigm for s in styles))
    pitch = max(0.42, 0.17 * len(lanes))
    figure = new_figure(8.6, 1.1 + pitch * len(modules))
    axes = figure.subplots()
    offset = {lane: (i - (len(lanes) - 1) / 2) * 0.8 / len(lanes) for i, lane in enumerate(lanes)}
    rank = {s.run: offset[s.run if s.run in offset else s.paradigm] for s in styles}
    size = 7 if len(styles) <= MAX_LANES else 5
    where = {module: i for i, module in enumerate(modules)}
    for line in marks.filter(pl.col("null") == "gaussian").iter_rows(named=True):
        y = where[line["module"]] + rank[line["run"]]
        axes.plot(
            line["null_mean"], y, marker="D", color=INK, markerfacecolor="none", markersize=size, linestyle="", zorder=4
        )
    for style in styles:
        mine = lines.filter((pl.col("run") == style.run) & pl.col("value").is_not_null())
        ys = [where[m] + rank[style.run] for m in mine["module"]]
        axes.plot(mine["value"], ys, marker=style.marker, color=style.colour, linestyle="", markersize=4.5)
    _module_axis(axes, modules)
    has_null = not marks.filter(pl.col("null") == "gaussian").is_empty()
    run_legend(figure, styles, [null_handle("gaussian")] if has_null else [])
    values = dict(overall.select("run", "value").iter_rows())
    shows = f"Overall sparsity: {extremes('update_sparsity', values)}." + left_out(rows)
    return Drawing(name, title, reading, shows, figure)


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
    name, title = "overlaps", "Which weights the visible changes fall on"
    reading = (
        "Filled: mean over matrices, the bar spans the middle 90% of matrices (spread, not a confidence interval). The "
        "vertical line is chance: a random mask overlaps by alpha. Hollow marks: the nulls. A run at its hollow mark "
        "is explained by the size of its update."
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
        return Drawing(name, title, reading, missing=without(default, "no matrix has an overlap"))
    height = max(len(dots[p]) for p in panels if p[0] in alphas)
    figure = new_figure(9.2, len(alphas) * (0.75 + 0.3 * height) + 0.5)
    grid = figure.subplots(len(alphas), 2, squeeze=False)
    marks: set[str] = set()
    for line, alpha in zip(grid, alphas, strict=True):
        for axes, metric, label in zip(line, metrics, ("principal mask", "smallest weights"), strict=True):
            marks |= draw_dots(axes, dots[alpha, metric], labels=metric == metrics[0])
            axes.axvline(float(alpha), color=INK, linewidth=0.9)
            axes.set_title(f"overlap with the {label}, alpha = {alpha}")
            percent_axis(axes)
    for axes in grid[-1]:
        axes.set_xlabel("share of visibly changed entries")
    styles = [dot.style for dot in max(dots.values(), key=len)]
    chance = Line2D([], [], color=INK, linewidth=0.9, label="chance (random mask)")
    run_legend(figure, styles, [*(null_handle(n) for n in sorted(marks)), chance])
    return Drawing(name, title, reading, _overlap_facts(dots, alphas[0], metrics) + left_out(default), figure)


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
    name, title = "principal_energy", "How much of the update lies in the origin's leading directions"
    reading = (
        "Share of the update's squared norm inside the origin's top-k singular subspace; bars span the middle 90% of "
        "matrices. Hollow diamonds: an update without any preferred direction. Further right than the diamond means "
        "aligned with the principal directions, which mask overlaps cannot see."
    )
    metrics = ("principal_energy_left", "principal_energy_right")
    rows = rows_of(subject.results, *metrics)
    nulls = rows_of(subject.results, *metrics, table="nulls")
    dots = [dots_of(subject, rows.filter(pl.col("metric") == m), nulls.filter(pl.col("metric") == m)) for m in metrics]
    if not any(dots):
        return Drawing(name, title, reading, missing=without(rows, "no matrix has a principal energy"))
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
    return Drawing(name, title, reading, shows + "." + left_out(rows), figure)


def sparsity_against_size(subject: Subject) -> Drawing:
    """Every matrix a dot: sparsity over relative update norm, with the Gaussian null's curve."""
    name, title = "sparsity_against_size", "Sparsity against the size of the update"
    reading = (
        "Every dot is one matrix of one run at its last checkpoint. The dark curve is what a Gaussian update of the "
        "same size leaves unchanged. Dots on the curve are sparse because their update is small."
    )
    rows = rows_of(subject.results, "update_sparsity").filter(pl.col("status") == "ok")
    sizes = rows_of(subject.results, "relative_update_norm").filter((pl.col("status") == "ok") & (pl.col("value") > 0))
    both = rows.join(
        sizes.select("run", "step", "matrix", size="value"), on=["run", "step", "matrix"], nulls_equal=True
    )
    if both.is_empty():
        return Drawing(name, title, reading, missing="no matrix has both a sparsity and a relative update norm")
    figure = new_figure(8.2, 4.6)
    axes = figure.subplots()
    styles = subject.present(both)
    for style in styles:
        mine = both.filter(pl.col("run") == style.run)
        look: dict[str, Any] = {"c": style.colour, "marker": style.marker, "alpha": 0.65, "linewidths": 0}
        axes.scatter(mine["size"], mine["value"], s=16, rasterized=True, **look)
    curve = _null_curve(subject, both)
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
    return Drawing(name, title, reading, shows, figure)


def _null_curve(subject: Subject, both: pl.DataFrame) -> tuple[list[float], list[float]] | None:
    """Medians over bins of equal width in log size; broken where no sizes lie: a line would invent nulls."""
    nulls = rows_of(subject.results, "update_sparsity", table="nulls").filter(pl.col("null") == "gaussian")
    points = matched(both, nulls).filter(pl.col("size") > 0)
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
