"""Heat tables, layer by module: where weights stayed put, and where the update went."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
from matplotlib.colors import LogNorm, Normalize

from geopd.report.drawing import Drawing, Subject, left_out, without
from geopd.report.hover import name_categories
from geopd.report.style import RunStyle, chosen, new_figure, percent_axis
from geopd.results.metrics import format_value
from geopd.results.summary import aggregate, rows_of

MAX_MAPS = 12
"""Tables shown at most."""
_TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 0.7, 0.85, 1, 1.2, 1.5, 2, 5, 10, 20, 50, 100)


def module_order(rows: pl.DataFrame) -> list[str]:
    """Module types in the order they come in a layer, unusual ones last."""
    usual = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "router")
    found = set(rows["module"])
    return [m for m in usual if m in found] + sorted(found - set(usual))


def sparsity_map(subject: Subject) -> Drawing:
    """Heat tables of sparsity, layer by module, one per run on a common colour scale."""
    drawing = Drawing(
        "sparsity_map",
        "Where in the network weights stayed put",
        "One table per run" + _means(subject) + ": rows are layers, columns module types; brighter means "
        "sparser. Grey: no value.",
        "A Gaussian update of one relative size everywhere would leave a table of nearly one colour; it follows the "
        "size of each weight's own update otherwise (see sparsity against size).",
    )
    return _maps(subject, drawing, "update_sparsity", "is least sparse")


def change_map(subject: Subject) -> Drawing:
    """Heat tables of the relative update norm over the run's median matrix, layer by module, one per run."""
    drawing = Drawing(
        "change_map",
        "Where in the network the update went",
        "One table per run" + _means(subject) + ": rows are layers, columns module types; the update's size relative "
        "to the weight's own, as a multiple of the run's median matrix. Orange moved more than that, purple less. "
        "Grey: no value.",
        "An update spread evenly over the network would be white everywhere (1×).",
    )
    return _maps(subject, drawing, "relative_update_norm", "moved furthest")


def _means(subject: Subject) -> str:
    return " (mean over its seeds)" if subject.seeded else ""


def _maps(subject: Subject, drawing: Drawing, metric: str, extreme: str) -> Drawing:
    rows = rows_of(subject.results, metric).filter(pl.col("layer").is_not_null())
    good = rows.filter(pl.col("status") == "ok")
    if good.is_empty():
        return drawing.absent(without(rows, f"no layer has the metric {metric}"))
    if metric != "update_sparsity":
        good = good.with_columns(value=pl.col("value") / pl.col("value").median().over("run"))
    cells = subject.fold(aggregate(good, ["layer", "module"]), ["layer", "module"])
    drawable = subject.present(cells)
    styles = chosen(drawable, MAX_MAPS)
    columns = min(len(styles), 4)
    lines = -(-len(styles) // columns)
    layers = good["layer"].n_unique()
    figure = new_figure(2.3 * columns + 1.4, lines * (1.1 + max(0.16 * layers, 1.1)))
    grid = figure.subplots(lines, columns, squeeze=False).ravel()
    image = _draw_maps(grid, styles, cells, metric)
    for axes in grid[len(styles) :]:
        axes.set_axis_off()
    for axes in grid[::columns]:
        axes.set_ylabel("layer")
    bar = figure.colorbar(image, ax=grid.tolist(), shrink=0.9, aspect=30)
    if metric == "update_sparsity":
        bar.set_label("update sparsity")
        percent_axis(bar.ax, "y")
    else:
        bar.set_label("multiple of the run's median")
        bar.ax.fmt_ydata = lambda value: f"{value:.3g}×"
        low, high = image.get_clim()
        ticks = _apart([tick for tick in _TICKS if low <= tick <= high], 0.09 * float(np.log(high / low)))
        bar.set_ticks(ticks, labels=[f"{tick:g}×" for tick in ticks], minor=False)
        bar.minorticks_off()
    ranked = rows.filter(pl.col("status") == "ok").sort("value", descending=metric != "update_sparsity")
    most = ranked.row(0, named=True)
    shows = f"The matrix that {extreme}: {most['matrix']} of {most['run']} ({format_value(metric, most['value'])})."
    if len(styles) < len(drawable):
        shows += f" Shown: {len(styles)} of {len(drawable)} runs, some of every paradigm."
    return drawing.drawn(figure, shows + left_out(rows))


def _apart(ticks: list[float], least: float) -> list[float]:
    """The ticks whose logarithms lie at least that far from 1 and from each other, taken from 1 outwards."""
    kept: list[float] = []
    for tick in sorted(ticks, key=lambda tick: abs(np.log(tick))):
        if all(abs(np.log(tick / other)) >= least for other in kept):
            kept.append(tick)
    return sorted(kept)


def _draw_maps(grid: Any, styles: list[RunStyle], good: pl.DataFrame, metric: str) -> Any:
    modules, layers = module_order(good), sorted(set(good["layer"]))
    if metric == "update_sparsity":
        low, high = (float(v) for v in np.quantile(good["value"].to_numpy(), [0, 1]))
        look = {"cmap": "cividis", "norm": Normalize(low, max(high, low + 1e-12))}
    else:
        good = good.filter(pl.col("value").is_finite() & (pl.col("value") > 0))
        reach = max(1.2, float(np.exp(np.abs(np.log(good["value"].to_numpy())).max(initial=0))))
        look = {"cmap": "PuOr_r", "norm": LogNorm(1 / reach, reach)}
    image: Any = None
    for axes, style in zip(grid, styles, strict=False):
        table = np.full((len(layers), len(modules)), np.nan)
        mine = good.filter(pl.col("run") == style.run)
        for layer, module, value in mine.select("layer", "module", "value").iter_rows():
            table[layers.index(layer), modules.index(module)] = value
        axes.set_facecolor("#cccccc")
        image = axes.imshow(table, aspect="auto", **look)
        axes.set_title(style.label)
        axes.grid(visible=False)
        name_categories(axes, "x", modules)
        name_categories(axes, "y", [f"layer {layer}" for layer in layers])
        axes.set_xticks(range(len(modules)), [m.removesuffix("_proj") for m in modules], rotation=60, ha="right")
        every = max(1, len(layers) // 8)
        axes.set_yticks(range(0, len(layers), every), [str(layer) for layer in layers[::every]])
    return image
