"""Counterpart of Figure 2: principal angles and the drift of singular values, index by index."""

from __future__ import annotations

import numpy as np
import polars as pl
from matplotlib.axes import Axes

from geopd.report.drawing import Drawing, Subject, extremes, per_run
from geopd.report.style import RunStyle, maybe_log, new_figure, percent_axis, run_legend
from geopd.results import Results
from geopd.results.summary import NOT_HEADLINE

_GRID = np.linspace(0, 1, 65)
"""Relative index on which matrices of different sizes are pooled."""
_MAX_POINTS = 200
MAX_SHADED = 8
"""With more runs than this the shaded bands would hide each other and are left out."""
_PANELS = ("left principal angles", "right principal angles", "drift of singular values")

Curves = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Left angles, right angles (degrees, ascending) and |sigma+ - sigma0| / sigma0 (descending sigma); may be empty."""


def spectra(subject: Subject) -> Drawing:
    """Angles and singular-value drift, for one matrix of the middle layer and over all matrices."""
    name, title = "spectra", "How far singular subspaces and values moved"
    reading = (
        "Top: one matrix of the middle layer, index by index. Bottom: median over all matrices with the middle 90% "
        "shaded, by index as a share of the vector's length. Angles near 0 mean an unmoved subspace; drift is the "
        "change of each singular value relative to itself. Bands are left out where there are more than 8 runs."
    )
    curves = {style: _curves(subject.results, style.run) for style in subject.styles.values()}
    curves = {style: found for style, found in curves.items() if found}
    if not curves:
        return Drawing(name, title, reading, missing="no angle or singular-value vectors were stored")
    matrix = _representative(subject.results, curves)
    columns = [i for i in range(3) if any(c[i].size for found in curves.values() for c in found.values())]
    figure = new_figure(10 / 3 * len(columns), 5.6)
    grid = figure.subplots(2, len(columns), squeeze=False)
    for place, column in enumerate(columns):
        _draw_one(grid[0, place], curves, matrix, column)
        _draw_all(grid[1, place], curves, column)
        for axes, scope in zip(grid[:, place], (matrix, "all matrices"), strict=True):
            axes.set_ylabel("degrees" if column < 2 else "relative change")
            axes.set_title(f"{scope}\n{_PANELS[column]}" if place == 0 else _PANELS[column])
    run_legend(figure, list(curves))
    return Drawing(name, title, reading, _facts(curves, matrix), figure)


def _curves(results: Results, run: str) -> dict[str, Curves]:
    steps = results.measurements.filter(pl.col("run") == run)["step"]
    last = steps.max()
    label = "final" if last is None else str(last)
    modules = dict(results.measurements.filter(pl.col("run") == run).select("matrix", "module").iter_rows())
    found: dict[str, Curves] = {}
    for matrix in results.manifest["parts"].get(run, {}):
        if modules.get(matrix, "other") in NOT_HEADLINE:
            continue
        vectors = results.vectors(run, matrix)
        empty = np.empty(0)
        before, after = vectors.get("sigma_origin", empty), vectors.get(f"{label}/sigma", empty)
        shared = min(before.size, after.size)
        before, after = before[:shared], after[:shared]
        # A singular value at the level of rounding has no meaningful relative change.
        live = before > 1e-7 * before.max(initial=0.0)
        drift = np.abs(after[live] - before[live]) / before[live]
        curve = (vectors.get(f"{label}/angles_left", empty), vectors.get(f"{label}/angles_right", empty), drift)
        if any(part.size for part in curve):
            found[matrix] = curve
    return found


def _representative(results: Results, curves: dict[RunStyle, dict[str, Curves]]) -> str:
    """A matrix of the middle layer that most runs have; the query projection where that leaves a choice."""
    counts: dict[str, int] = {}
    for found in curves.values():
        for matrix in found:
            counts[matrix] = counts.get(matrix, 0) + 1
    about = results.measurements.filter(pl.col("matrix").is_in(list(counts))).unique("matrix")
    layers = about["layer"].drop_nulls().unique().sort()
    middle = layers[len(layers) // 2] if len(layers) else None
    # matrices with angles first: an index asked for may not fit the smaller ones
    angles = {matrix for found in curves.values() for matrix, curve in found.items() if curve[1].size}
    ranked = sorted(
        about.select("matrix", "layer", "module").iter_rows(),
        key=lambda row: (row[0] not in angles, row[1] != middle, -counts[row[0]], row[2] != "q_proj", row[0]),
    )
    return str(ranked[0][0])


def _draw_one(axes: Axes, curves: dict[RunStyle, dict[str, Curves]], matrix: str, column: int) -> None:
    shown: list[float] = []
    for style, found in curves.items():
        values = found.get(matrix, (np.empty(0),) * 3)[column]
        if not values.size:
            continue
        index = np.unique(np.linspace(0, values.size - 1, min(values.size, _MAX_POINTS)).astype(int))
        axes.plot(index + 1, values[index], color=style.colour, linestyle=style.line, linewidth=1.4)
        shown += values[index].tolist()
    _finish(axes, shown)
    axes.set_xlabel("index")


def _draw_all(axes: Axes, curves: dict[RunStyle, dict[str, Curves]], column: int) -> None:
    shown: list[float] = []
    for style, found in curves.items():
        pooled = [
            np.interp(_GRID, np.linspace(0, 1, c[column].size), c[column]) for c in found.values() if c[column].size
        ]
        if not pooled:
            continue
        low, middle, high = np.quantile(np.array(pooled), [0.05, 0.5, 0.95], axis=0)
        if len(curves) <= MAX_SHADED:
            axes.fill_between(_GRID, low, high, color=style.colour, alpha=0.15, linewidth=0)
        axes.plot(_GRID, middle, color=style.colour, linestyle=style.line, linewidth=1.4)
        shown += [*low, *high]
    _finish(axes, shown)
    axes.set_xlabel("index, share of the vector")
    percent_axis(axes)


def _finish(axes: Axes, shown: list[float]) -> None:
    # Single zeros (a value that did not move) must not keep a wide range from its logarithmic axis.
    maybe_log(axes, [value for value in shown if value > 0])


def _facts(curves: dict[RunStyle, dict[str, Curves]], matrix: str) -> str:
    parts: dict[str, str] = {}
    means: dict[str, float] = {}
    for style, found in curves.items():
        right = found.get(matrix, (np.empty(0),) * 3)[1]
        if right.size:
            means[style.run] = float(right.mean())
            parts[style.run] = f"{right.mean():.2g}° (largest {right.max():.2g}°)"
    if not parts:
        moved = {s.run: float(np.median(f[matrix][2])) for s, f in curves.items() if matrix in f and f[matrix][2].size}
        return f"No angles were stored; median drift in {matrix}: {extremes('spectral_shift', moved)}."
    return f"Mean right angle in {matrix}, degrees: {per_run(parts, extremes('rotation_right_mean_deg', means))}."
