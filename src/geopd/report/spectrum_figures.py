"""Counterpart of Figure 2: principal angles and the drift of singular values, index by index."""

from __future__ import annotations

import numpy as np
import polars as pl
from matplotlib.axes import Axes

from geopd.report.drawing import Drawing, Subject, extremes, per_run
from geopd.report.groups import half_width
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

Found = dict[RunStyle, list[dict[str, Curves]]]
"""For each group and each of its runs the curves of every matrix."""


def spectra(subject: Subject) -> Drawing:
    """Angles and singular-value drift, for one matrix of the middle layer and over all matrices."""
    drawing = Drawing(
        "spectra",
        "How far singular subspaces and values moved",
        "Top: one matrix of the middle layer, index by index"
        + (" (mean over seeds, shaded: 95% t interval)" if subject.seeded else "")
        + ". Bottom: median over all matrices with the middle 90% shaded, by index as a share of the vector's length. "
        "Angles near 0 mean an unmoved subspace; drift is the change of each singular value relative to itself. Bands "
        "are left out where there are more than 8 runs.",
        "Any update rotates subspaces and shifts values, the more the larger it is: the rotation and shift of a "
        "Gaussian update of the same size stand under the numbers of the table at the top.",
        counterpart="Figure 2",
    )
    styles = list(subject.styles.values())
    curves = {style: [_curves(subject.results, run) for run in subject.groups[style.run].runs] for style in styles}
    curves = {style: found for style, runs in curves.items() if (found := [run for run in runs if run])}
    if not curves:
        return drawing.absent("no angle or singular-value vectors were stored")
    matrix = _representative(subject.results, curves)
    stored = [c for runs in curves.values() for found in runs for c in found.values()]
    columns = [i for i in range(3) if any(c[i].size for c in stored)]
    figure = new_figure(10 / 3 * len(columns), 5.6)
    grid = figure.subplots(2, len(columns), squeeze=False)
    for place, column in enumerate(columns):
        _draw_one(grid[0, place], curves, matrix, column)
        _draw_all(grid[1, place], curves, column)
        for axes, scope in zip(grid[:, place], (matrix, "all matrices"), strict=True):
            axes.set_ylabel("degrees" if column < 2 else "relative change")
            axes.set_title(f"{scope}\n{_PANELS[column]}" if place == 0 else _PANELS[column])
    run_legend(figure, list(curves))
    return drawing.drawn(figure, _facts(curves, matrix))


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


def _representative(results: Results, curves: Found) -> str:
    """A matrix of the middle layer that most runs have; the query projection where that leaves a choice."""
    counts: dict[str, int] = {}
    every = [found for runs in curves.values() for found in runs]
    for matrix in (matrix for found in every for matrix in found):
        counts[matrix] = counts.get(matrix, 0) + 1
    about = results.measurements.filter(pl.col("matrix").is_in(list(counts))).unique("matrix")
    layers = about["layer"].drop_nulls().unique().sort()
    middle = layers[len(layers) // 2] if len(layers) else None
    # matrices with angles first: an index asked for may not fit the smaller ones
    angles = {matrix for found in every for matrix, curve in found.items() if curve[1].size}
    ranked = sorted(
        about.select("matrix", "layer", "module").iter_rows(),
        key=lambda row: (row[0] not in angles, row[1] != middle, -counts[row[0]], row[2] != "q_proj", row[0]),
    )
    return str(ranked[0][0])


def _draw_one(axes: Axes, curves: Found, matrix: str, column: int) -> None:
    shown: list[float] = []
    for style, runs in curves.items():
        every = _of(runs, matrix, column)
        if not every:
            continue
        seeds = np.array([values[: min(map(len, every))] for values in every])
        index = np.unique(np.linspace(0, seeds.shape[1] - 1, min(seeds.shape[1], _MAX_POINTS)).astype(int))
        seeds = seeds[:, index]
        middle = seeds.mean(axis=0)
        axes.plot(index + 1, middle, color=style.colour, linestyle=style.line, linewidth=1.4)
        if len(every) > 2 and len(curves) <= MAX_SHADED:
            half = np.array([half_width(column_) or 0.0 for column_ in seeds.T.tolist()])
            axes.fill_between(index + 1, middle - half, middle + half, color=style.colour, alpha=0.15, linewidth=0)
        shown += middle.tolist()
    _finish(axes, shown)
    axes.set_xlabel("index")


def _draw_all(axes: Axes, curves: Found, column: int) -> None:
    shown: list[float] = []
    for style, runs in curves.items():
        every = [c[column] for found in runs for c in found.values() if c[column].size]
        pooled = [np.interp(_GRID, np.linspace(0, 1, values.size), values) for values in every]
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


def _of(runs: list[dict[str, Curves]], matrix: str, column: int) -> list[np.ndarray]:
    """One curve per seed that has this matrix."""
    return [found[matrix][column] for found in runs if matrix in found and found[matrix][column].size]


def _finish(axes: Axes, shown: list[float]) -> None:
    # Single zeros (a value that did not move) must not keep a wide range from its logarithmic axis.
    maybe_log(axes, [value for value in shown if value > 0])


def _facts(curves: Found, matrix: str) -> str:
    right = {style.run: _of(runs, matrix, 1) for style, runs in curves.items()}
    right = {name: every for name, every in right.items() if every}
    if not right:
        drift = {style.run: _of(runs, matrix, 2) for style, runs in curves.items()}
        moved = {name: float(np.mean([np.median(v) for v in every])) for name, every in drift.items() if every}
        return f"No angles were stored; median drift in {matrix}: {extremes('spectral_shift', moved)}."
    means = {name: float(np.mean([v.mean() for v in every])) for name, every in right.items()}
    parts = {
        name: f"{means[name]:.2g}° (largest {max(float(v.max()) for v in every):.2g}°)" for name, every in right.items()
    }
    return f"Mean right angle in {matrix}, degrees: {per_run(parts, extremes('rotation_right_mean_deg', means))}."
