"""Counterpart of Tables 1 and 6 over variants: other teachers, students and domains beside the baseline's seeds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import polars as pl
from matplotlib.axes import Axes

from geopd.report.accuracy_figures import margin
from geopd.report.control_figures import baseline_of
from geopd.report.curves import whisker
from geopd.report.dots import Dot, dots_of, draw_dots
from geopd.report.drawing import Drawing, Subject, extremes, main_benchmark
from geopd.report.groups import Group
from geopd.report.hover import name_rows
from geopd.report.style import MUTED, maybe_log, new_figure, null_handle, percent_axis
from geopd.report.tables import show_half
from geopd.results.metrics import format_value, metric_of
from geopd.results.summary import rows_of

PANELS = (
    "update_sparsity",
    "low_magnitude_overlap",
    "principal_overlap",
    "rotation_right_mean_deg",
    "spectral_shift",
    "relative_update_norm",
    "stable_rank",
)
_SHARES = ("update_sparsity", "low_magnitude_overlap", "principal_overlap")


def variant_groups(subject: Subject) -> list[Group]:
    """Distillation's baseline and its variants, the baseline first; empty without variants."""
    found = [g for g in subject.groups.values() if "variant" in g.tags and g.paradigm == "opd"]
    base = baseline_of(subject, "opd")
    return [*([base] if base else []), *found] if found else []


def variants(subject: Subject) -> Drawing | None:
    """Endpoint metrics of distillation over variants, beside the baseline and its seeds."""
    groups = variant_groups(subject)
    if not groups:
        return None
    drawing = Drawing(
        "variants",
        "Whether other teachers, students and domains give the same geometry",
        "Each mark is a run's end, a mean over matrices (for the baseline over seeds too, with its 95% t interval, "
        "continued down the panel as a grey band). A variant in another domain is scored in that domain.",
        "Hollow diamonds: a Gaussian update of the same size. The grey band is what other seeds of the baseline may "
        "give; a variant has one seed, whose like may lie outside by chance.",
        counterpart="Tables 1 and 6",
    )
    some = subject.only(groups)
    named = {
        g.name: replace(some.styles[g.name], label=g.tags.get("variant", g.label).replace("_", " ")) for g in groups
    }
    some = Subject(some.results, some.groups, named)
    panels = {m: dots_of(some, rows_of(some.results, m), rows_of(some.results, m, table="nulls")) for m in PANELS}
    panels = {metric: [_gaussian(dot) for dot in dots] for metric, dots in panels.items() if dots}
    if not panels:
        return drawing.absent("no variant has an endpoint metric")
    figure = new_figure(11, 1.6 + 0.5 * len(groups))
    grid = figure.subplots(2, 4).ravel()
    marks: set[str] = set()
    for place, (axes, (metric, dots)) in enumerate(zip(grid, panels.items(), strict=False)):
        marks |= draw_dots(axes, dots, labels=place % 4 == 0, spread=False)
        _baseline_band(axes, dots[0].line)
        axes.set_title(metric_of(metric).label, fontsize=8.5)
        shown = [v for d in dots for v in (d.value, *d.nulls.values())]
        maybe_log(axes, shown, which="x", decades=0.7, percent=metric in _SHARES)
        axes.margins(x=0.15)
        if axes.get_xscale() == "linear":
            axes.locator_params(axis="x", nbins=4)
    _accuracy_panel(grid[len(panels)], some)
    for axes in grid[len(panels) + 1 :]:
        axes.set_axis_off()
    if marks:
        figure.legend(handles=[null_handle(n) for n in sorted(marks)], loc="outside lower center")
    values = {d.style.run: d.value for d in panels.get("update_sparsity", [])}
    shows = f"Sparsity: {extremes('update_sparsity', values)}. " if values else ""
    return drawing.drawn(figure, shows + _outside(panels))


def _gaussian(dot: Dot) -> Dot:
    nulls = {name: value for name, value in dot.nulls.items() if name == "gaussian"}
    return Dot(dot.style, dot.value, dot.low, dot.high, nulls, dot.line)


def _baseline_band(axes: Axes, line: dict[str, Any]) -> None:
    if line["half"] is not None and line["seeds"] > 2:
        axes.axvspan(line["value"] - line["half"], line["value"] + line["half"], color=MUTED, alpha=0.14, linewidth=0)


def _accuracy_panel(axes: Axes, some: Subject) -> None:
    kind = main_benchmark(some.accuracies)
    if kind is None:
        axes.set_axis_off()
        return
    table = some.accuracies.filter((pl.col("benchmark") == kind[0]) & (pl.col("decoding") == kind[1]))
    last = table.filter(pl.col("step").eq_missing(pl.col("step").max().over("run")))
    lines = {line["run"]: line for line in some.fold(last).iter_rows(named=True)}
    shown = [style for name, style in some.styles.items() if name in lines]
    for y, style in enumerate(shown):
        line = lines[style.run]
        whisker(axes, y, line if line["seeds"] > 1 else line | {"half": margin(line)}, style.colour)
        axes.plot(line["value"], y, marker=style.marker, color=style.colour, linestyle="")
    axes.set_title(f"accuracy ({kind[0]}, {kind[1]})", fontsize=8.5)
    name_rows(axes, [style.label for style in shown], labels=False)
    percent_axis(axes)


def _outside(panels: dict[str, list[Dot]]) -> str:
    """Which variants lie outside the baseline's interval, metric by metric."""
    parts = []
    for metric, dots in panels.items():
        base = dots[0].line
        if base["half"] is None or base["seeds"] < 3:
            continue
        out = [d.style.label for d in dots[1:] if abs(d.value - base["value"]) > base["half"]]
        value = f"{format_value(metric, base['value'])} {show_half(metric, base['half'])}"
        parts.append(f"{metric_of(metric).label} ({value}): {', '.join(out) or 'none'}")
    if not parts:
        return "The baseline has too few seeds for an interval."
    return f"Outside the baseline's interval: {'; '.join(parts)}."
