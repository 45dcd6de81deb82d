"""Counterparts of Figures 7 and 9: what changes the path of the update when one factor of distillation is changed."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from geopd.report.curves import BAND, band_handle, draw_path, keep_to
from geopd.report.drawing import Drawing, Subject
from geopd.report.groups import Group
from geopd.report.path_figures import numbered
from geopd.report.style import COLOURS, INK, maybe_log, new_figure
from geopd.results.metrics import format_value, metric_of
from geopd.results.summary import aggregate, complete, rows_of

METRICS = ("stable_rank", "update_norm", "hill_tail")
_SELECTIONS = {
    ("top-gap", "0.25"): ("top 25% of tokens by gap", "#D55E00", "-"),
    ("top-gap", "0.5"): ("top 50% of tokens by gap", "#D55E00", "--"),
    ("random", "0.25"): ("random 25% of tokens", "#7F5AA8", "-"),
    ("random", "0.5"): ("random 50% of tokens", "#7F5AA8", "--"),
}


def paths(subject: Subject) -> pl.DataFrame:
    """Folded means of the path metrics over steps, for every group."""
    rows = numbered(rows_of(subject.results, *METRICS, every_step=True))
    return subject.fold(aggregate(complete(rows)).filter(pl.col("value").is_not_null()), ["metric"])


def baseline_of(subject: Subject, paradigm: str) -> Group | None:
    """The untagged runs of a paradigm, the yardstick of its controls."""
    same = [g for g in subject.groups.values() if g.paradigm == paradigm and not g.tags]
    return next(iter(sorted(same, key=lambda g: not g.shared_origin)), None)


def controls(subject: Subject) -> Drawing | None:
    """Counterpart of Figure 7: token sparsification and teacher rollouts beside the baseline of distillation."""
    sparse = [g for g in subject.groups.values() if "token_selection" in g.tags]
    sparse.sort(key=lambda g: (g.tags["token_selection"] != "top-gap", g.tags.get("rho", "")))
    rollouts = [g for g in subject.groups.values() if "rollouts" in g.tags]
    columns = [(title, some) for title, some in (("Token sparsification", sparse), ("Rollouts", rollouts)) if some]
    if not columns:
        return None
    drawing = Drawing(
        "controls",
        "Whether fewer tokens or other rollouts change the path",
        "The update since the origin over steps. Blue with its band: the baseline of distillation over its seeds. The "
        "other lines change one factor: which response tokens carry the loss, or who generated the responses.",
        "Seeds alone move the baseline within its band: a control inside the band does what another seed would do. A "
        "control with one seed can leave the band by chance too.",
        counterpart="Figure 7",
    )
    means = paths(subject)
    base = baseline_of(subject, "opd")
    if means.is_empty() or base is None:
        return drawing.absent("a control needs a path and its baseline's")
    figure = new_figure(4.3 * len(columns) + 0.6, 7.6)
    grid = figure.subplots(3, len(columns), squeeze=False, sharex="col", sharey="row")
    handles: dict[str, Line2D] = {}
    for place, (title, some) in enumerate(columns):
        for axes, metric in zip(grid[:, place], METRICS, strict=True):
            mine = means.filter(pl.col("metric") == metric)
            for group in (base, *some):
                look = _control_look(group)
                path = mine.filter(pl.col("run") == group.name).sort("step")
                draw_path(axes, path["step"].to_list(), path, **{k: v for k, v in look.items() if k != "label"})
                handles[look["label"]] = Line2D([], [], **look)
            axes.set_ylabel(metric_of(metric).label)
        grid[0, place].set_title(title)
        grid[-1, place].set_xlabel("training step")
    for axes, metric in zip(grid[:, 0], METRICS, strict=True):
        names = [g.name for g in (base, *sparse, *rollouts)]
        keep_to(axes, means.filter((pl.col("metric") == metric) & pl.col("run").is_in(names)))
    extra = [band_handle()] if len(base.runs) > 2 else []
    figure.legend(handles=[*handles.values(), *extra], loc="outside lower center", ncols=3)
    return drawing.drawn(figure, _control_facts(means, base, [*sparse, *rollouts]))


def _control_look(group: Group) -> dict[str, Any]:
    tags = group.tags
    if "rollouts" in tags:
        return {"color": "#009E73", "linestyle": "-", "marker": "D", "label": f"{tags['rollouts']} rollouts"}
    if "token_selection" in tags:
        key = (tags["token_selection"], tags.get("rho", ""))
        label, colour, line = _SELECTIONS.get(key, (f"{key[0]} {key[1]} of tokens", INK, ":"))
        return {"color": colour, "linestyle": line, "marker": "s" if key[0] == "top-gap" else "^", "label": label}
    return {"color": COLOURS["opd"], "linestyle": "-", "marker": "o", "label": f"baseline, {group.label}"}


def _control_facts(means: pl.DataFrame, base: Group, some: list[Group]) -> str:
    """Each control's stable rank at the end as a share of the baseline's."""
    ends = means.filter(pl.col("metric") == "stable_rank").sort("step").group_by("run", maintain_order=True).last()
    lines = {line["run"]: line for line in ends.iter_rows(named=True)}
    if base.name not in lines:
        return "The baseline has no stable rank at every checkpoint."
    yardstick = lines[base.name]
    half = "" if yardstick["half"] is None else f" ± {format_value('stable_rank', yardstick['half'])}"
    parts = [
        f"{_control_look(g)['label']} {100 * (lines[g.name]['value'] / yardstick['value'] - 1):+.0f}%"
        for g in some
        if g.name in lines
    ]
    value = format_value("stable_rank", yardstick["value"])
    return f"Stable rank at the end: baseline {value}{half}; relative to it {', '.join(parts)}."


def mixtures(subject: Subject, *, normalised: bool) -> list[tuple[float, Group]]:
    """The objective mixtures by descending alpha; raw ones end in the baselines, alpha 1 and 0."""
    found = [
        (float(g.tags["alpha"]), g)
        for g in subject.groups.values()
        if "alpha" in g.tags and (g.tags.get("normalise") == "true") == normalised
    ]
    if found and not normalised:
        have = {alpha for alpha, _ in found}
        ends = ((1.0, "opd"), (0.0, "rlvr"))
        found += [(a, g) for a, p in ends if a not in have and (g := baseline_of(subject, p)) is not None]
    return sorted(found, key=lambda pair: -pair[0])


def mixture_paths(subject: Subject) -> Drawing | None:
    """Counterpart of Figure 9: the path for every mixture of distillation and reward, raw and normalised."""
    columns = [
        (t, m)
        for t, n in (("Raw signals", False), ("Both signals at unit size", True))
        if (m := mixtures(subject, normalised=n))
    ]
    if not columns:
        return None
    drawing = Drawing(
        "mixture_paths",
        "Whether mixing distillation with reward changes the path",
        "The update since the origin over steps, for every share alpha of distillation (blue: all distillation; "
        "green: all reward). Left the raw signals, right both brought to unit size before mixing. The raw ends "
        "are the baselines with their seeds; normalised ends are trained with distillation's steps and batch.",
        "Of raw signals the louder one may dominate at any alpha, so alpha is not a share of the gradient; "
        "normalised, it is. A line inside the band of an end cannot be told from that end.",
        counterpart="Figure 9",
    )
    means = paths(subject)
    if means.is_empty():
        return drawing.absent("a mixture needs a path of at least one checkpoint")
    figure = new_figure(4.3 * len(columns) + 0.6, 7.6)
    grid = figure.subplots(3, len(columns), squeeze=False, sharex=True, sharey="row")
    alphas: dict[float, Line2D] = {}
    for place, (title, found) in enumerate(columns):
        for axes, metric in zip(grid[:, place], METRICS, strict=True):
            mine = means.filter(pl.col("metric") == metric)
            for alpha, group in found:
                look = {"color": alpha_colour(alpha), "marker": "o" if 0 < alpha < 1 else "s"}
                path = mine.filter(pl.col("run") == group.name).sort("step")
                draw_path(axes, path["step"].to_list(), path, **look)
                alphas[alpha] = Line2D([], [], **look, label=f"alpha {alpha:g}")
            axes.set_ylabel(metric_of(metric).label if place == 0 else "")
        grid[0, place].set_title(title)
        grid[-1, place].set_xlabel("training step")
    names = [g.name for _, found in columns for _, g in found]
    for axes, metric in zip(grid[:, 0], METRICS, strict=True):
        keep_to(axes, means.filter((pl.col("metric") == metric) & pl.col("run").is_in(names)))
    handles = [alphas[a] for a in sorted(alphas, reverse=True)]
    figure.legend(handles=[*handles, band_handle()], loc="outside lower center", ncols=4)
    return drawing.drawn(figure, _mixture_facts(means, columns))


def alpha_colour(alpha: float) -> Any:
    """From reward's green over grey violet to distillation's blue, by rank of the usual alphas."""
    if alpha in (0.0, 1.0):
        return COLOURS["opd" if alpha else "rlvr"]
    return colormaps["plasma"](float(np.interp(alpha, [0, 0.05, 0.25, 0.5, 1], [0.8, 0.66, 0.45, 0.3, 0.05])))


def _mixture_facts(means: pl.DataFrame, columns: list[tuple[str, list[tuple[float, Group]]]]) -> str:
    ends = means.filter(pl.col("metric") == "stable_rank").sort("step").group_by("run", maintain_order=True).last()
    values = dict(ends.select("run", "value").iter_rows())
    parts = []
    for title, found in columns:
        said = [f"{alpha:g}: {format_value('stable_rank', values[g.name])}" for alpha, g in found if g.name in values]
        parts.append(f"{title.lower()}, alpha {', '.join(said)}")
    return f"Stable rank at the end: {'; '.join(parts)}."


def mixture_ends(subject: Subject) -> Drawing | None:
    """Where the mixtures end, against alpha: stable rank, norm and Hill, raw and normalised."""
    raw, normal = mixtures(subject, normalised=False), mixtures(subject, normalised=True)
    if not raw and not normal:
        return None
    drawing = Drawing(
        "mixture_ends",
        "Where the mixtures end, against the share of distillation",
        "Each mark is a run's end; alpha is spaced evenly, not to scale. Filled: raw signals, hollow: both at unit "
        "size. Shaded across: the baselines of distillation (blue) and reward (green), " + BAND + ".",
        "Marks inside a band cannot be told from another seed of that baseline. A control with one seed can leave it "
        "by chance too.",
        counterpart="Figure 9",
    )
    means = paths(subject)
    ends = means.sort("step").group_by("run", "metric", maintain_order=True).last()
    if ends.is_empty():
        return drawing.absent("no mixture has a value at its end")
    places = {alpha: i for i, alpha in enumerate(sorted({a for a, _ in raw + normal}))}
    figure = new_figure(10.2, 3.8)
    for axes, metric in zip(figure.subplots(1, 3), METRICS, strict=True):
        lines = {line["run"]: line for line in ends.filter(pl.col("metric") == metric).iter_rows(named=True)}
        for paradigm in ("opd", "rlvr"):
            base = baseline_of(subject, paradigm)
            if base and base.name in lines and lines[base.name]["half"] is not None and len(base.runs) > 2:
                value, half = lines[base.name]["value"], lines[base.name]["half"]
                axes.axhspan(value - half, value + half, color=COLOURS[paradigm], alpha=0.14, linewidth=0)
        shown = [
            _ends_line(axes, found, lines, places, hollow=hollow) for found, hollow in ((raw, False), (normal, True))
        ]
        axes.set_xticks(range(len(places)), [f"{alpha:g}" for alpha in places])
        axes.set_xlabel("alpha, share of distillation")
        axes.set_title(metric_of(metric).label)
        maybe_log(axes, [v for some in shown for v in some], decades=0.7)
    handles = [
        Line2D([], [], color=INK, marker="o", label="raw signals"),
        Line2D([], [], color=INK, marker="o", markerfacecolor="none", linestyle="--", label="both at unit size"),
    ]
    figure.legend(handles=[*handles, band_handle()], loc="outside lower center", ncols=3)
    columns = [(t, m) for t, m in (("Raw signals", raw), ("both at unit size", normal)) if m]
    return drawing.drawn(figure, _mixture_facts(means, columns))


def _ends_line(
    axes: Axes, found: list[tuple[float, Group]], lines: dict[str, Any], places: dict[float, int], *, hollow: bool
) -> list[float]:
    points = [(places[alpha], alpha, lines[g.name]["value"]) for alpha, g in found if g.name in lines]
    axes.plot(
        [p[0] for p in points], [p[2] for p in points], color=INK, linewidth=0.8, linestyle="--" if hollow else "-"
    )
    for x, alpha, value in points:
        colour = alpha_colour(alpha)
        axes.plot(x, value, marker="o", color=colour, markerfacecolor="white" if hollow else colour, linestyle="")
    return [p[2] for p in points]
