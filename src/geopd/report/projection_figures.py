"""Counterparts of Figures 6 and 8: training confined to a low-dimensional channel, against training that is free."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import polars as pl
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from geopd.report.curves import draw_path, whisker
from geopd.report.drawing import Drawing, Subject
from geopd.report.groups import Group, half_width
from geopd.report.hover import name_rows
from geopd.report.leaks import leak_of, leak_range
from geopd.report.style import INK, MUTED, new_figure, percent_axis
from geopd.results.summary import aggregate, rows_of

_BASES = {
    "none": ("free", "#222222", "o"),
    "update": ("update's top-{k}", "#0072B2", "s"),
    "random": ("random {k}", "#E69F00", "^"),
    "origin": ("origin's top-{k}", "#CC79A7", "v"),
}
_LINES = {"4": "--", "16": "-"}
BENCHMARKS = ("held_out", "carries", "subtraction", "no_working", "three_digits", "strings")
"""The benchmarks at the end of every arm, in the order shown; others follow by name."""
CURVE = ("selection", "greedy")
END = "avg@4"
_Z = 1.96
PARADIGMS = ("opd", "sft", "rlvr")


@dataclass(frozen=True)
class Arm:
    """How one kind of projection is named and drawn, the same for every paradigm."""

    label: str
    colour: str
    marker: str
    line: Any
    rank: tuple[Any, ...]
    narrow: bool = False
    """Four dimensions, or an adapter: drawn apart from the gradient mode in sixteen."""


def arm_of(group: Group) -> Arm | None:
    """The arm a group's tags describe; None where it is no projection arm."""
    tags = group.tags
    if "projection" not in tags:
        return None
    basis, k, mode = tags["projection"], tags.get("k", ""), tags.get("mode", "gradient")
    name, colour, marker = _BASES.get(basis, (basis + " {k}", MUTED, "P"))
    label, line = name.format(k=k).strip(), _LINES.get(k, "-")
    if mode == "adapter":
        label += ", adapter" + (", lr × √(n/K)" if tags.get("lr_scale") == "sqrt" else "")
        colour, marker = ("#009E73", "D") if tags.get("lr_scale") != "sqrt" else ("#56B4E9", "P")
        line = ":"
    order = list(_BASES)
    rank = (-int(k or 99), mode == "adapter", order.index(basis) if basis in order else len(order), label)
    return Arm(label, colour, marker, line, rank, k == "4" or mode == "adapter")


def arms(subject: Subject, paradigm: str) -> list[tuple[Arm, Group]]:
    """The projection arms of a paradigm, free first, wide before narrow."""
    found = [(arm, g) for g in subject.groups.values() if g.paradigm == paradigm and (arm := arm_of(g)) is not None]
    return sorted(found, key=lambda pair: pair[0].rank)


def _baseline(subject: Subject, arm: Group) -> Group | None:
    """The untagged group that an arm continues: same paradigm, same origin kind."""
    same = (g for g in subject.groups.values() if not g.tags and g.paradigm == arm.paradigm)
    return next((g for g in same if g.shared_origin == arm.shared_origin), None)


def projection_curves(subject: Subject) -> Drawing | None:
    """Counterpart of Figure 6: learning curves from the projection's start, for every arm of a paradigm."""
    paradigms = [p for p in PARADIGMS if arms(subject, p)]
    if not paradigms:
        return None
    drawing = Drawing(
        "projection_curves",
        "Training inside a channel: learning curves",
        "Greedy accuracy on the selection split against steps since the projection began (vertical line). Grey: the "
        "baseline before and after that point, with weight decay and its own optimiser state; every arm, the free one "
        "too, starts afresh from its checkpoint. Solid: 16 dimensions, dashed: 4, dotted: adapter. Lines are means "
        "over seeds; shaded: 95% t interval of the difference from the free arm, seed by seed.",
        "A random subspace of as many dimensions knows nothing of the run. Only what the update's own subspace keeps "
        "and the random one loses speaks for a channel.",
        counterpart="Figure 6",
    )
    table = subject.accuracies.filter((pl.col("benchmark") == CURVE[0]) & (pl.col("decoding") == CURVE[1]))
    scores = subject.fold(table.filter(pl.col("step").is_not_null()))
    drawn = {g.name for p in paradigms for _, g in arms(subject, p)} & set(scores["run"])
    if not drawn:
        return drawing.absent("no arm was evaluated greedily on the selection split")
    figure = new_figure(3.6 * len(paradigms) + 0.4, 7.4)
    shown: dict[str, Arm] = {}
    grid = figure.subplots(2, len(paradigms), squeeze=False, sharex="col", sharey="col")
    for column, paradigm in zip(grid.T, paradigms, strict=True):
        found = arms(subject, paradigm)
        shown |= {arm.label: arm for arm, _ in found}
        _curve_panel(column[0], subject, [pair for pair in found if not pair[0].narrow], scores)
        if any(arm.narrow for arm, _ in found):
            kept = [p for p in found if p[0].narrow or p[1].tags["projection"] == "none"]
            _curve_panel(column[1], subject, kept, scores)
        else:
            column[1].set_axis_off()
            column[0].tick_params(labelbottom=True)
        column[0].set_title(paradigm.upper())
        column[1].set_xlabel("steps since the projection began")
        percent_axis(column[0], "y")
    grid[0, 0].set_ylabel("gradient mode, 16 dimensions\naccuracy (selection, greedy)")
    grid[1, 0].set_ylabel("4 dimensions, and the adapter\naccuracy (selection, greedy)")
    handles = _arm_handles(shown)
    handles.append(Line2D([], [], color=MUTED, linewidth=1.0, label="baseline run"))
    handles.append(Patch(facecolor=MUTED, alpha=0.25, linewidth=0, label="difference from free, 95% t interval"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
    return drawing.drawn(figure, _curve_facts(subject, paradigms, scores))


def _curve_panel(axes: Axes, subject: Subject, found: list[tuple[Arm, Group]], scores: pl.DataFrame) -> None:
    if found:
        _baseline_path(axes, subject, found[0][1], scores)
    paths = {group.name: scores.filter(pl.col("run") == group.name).sort("step") for _, group in found}
    free = next((paths[group.name] for _, group in found if group.tags["projection"] == "none"), None)
    for arm, group in found:
        path = paths[group.name] if free is None else _beside(paths[group.name], free)
        draw_path(axes, path["step"].to_list(), path, color=arm.colour, marker=arm.marker, linestyle=arm.line)


def _beside(path: pl.DataFrame, free: pl.DataFrame) -> pl.DataFrame:
    """An arm's path with the interval of its difference from the free arm, seed by seed, in place of its own."""
    others = dict(free.select("step", "each").iter_rows())
    halves = []
    for step, each in path.select("step", "each").iter_rows():
        other = others.get(step, [])
        paired = len(each) == len(other) > 1 and list(each) != list(other)
        halves.append(half_width([a - b for a, b in zip(each, other, strict=True)]) if paired else None)
    return path.with_columns(pl.Series("half", halves, dtype=pl.Float64))


def _baseline_path(axes: Axes, subject: Subject, arm: Group, scores: pl.DataFrame) -> None:
    start = int(arm.tags.get("start", 0))
    axes.axvline(0, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
    if (group := _baseline(subject, arm)) is None:
        return
    path = scores.filter(pl.col("run") == group.name).sort("step")
    axes.plot(path["step"] - start, path["value"], color=MUTED, linewidth=1.0, alpha=0.8)
    at_start = path.filter(pl.col("step") == start)
    axes.plot(at_start["step"] - start, at_start["value"], color=INK, marker="o", markerfacecolor="white", linestyle="")


def _arm_handles(shown: dict[str, Arm]) -> list[Any]:
    ranked = sorted(shown.values(), key=lambda arm: arm.rank)
    return [Line2D([], [], color=a.colour, marker=a.marker, linestyle=a.line, label=a.label) for a in ranked]


def _curve_facts(subject: Subject, paradigms: list[str], scores: pl.DataFrame) -> str:
    parts = []
    for paradigm in paradigms:
        found = arms(subject, paradigm)
        ends = {
            arm.label: mine.sort("step").row(-1, named=True)["value"]
            for arm, group in found
            if not (mine := scores.filter(pl.col("run") == group.name)).is_empty()
        }
        said = [f"{label} {100 * ends[label]:.1f}%" for label in ends if "adapter" not in label]
        if said:
            parts.append(f"{paradigm.upper()} at the end: {', '.join(said)}")
    seeds = max(len(group.runs) for p in paradigms for _, group in arms(subject, p))
    return ". ".join(parts) + f". {'One seed' if seeds == 1 else f'{seeds} seeds'} an arm."


def end_scores(subject: Subject) -> pl.DataFrame:
    """Folded accuracies at the end of every arm: ``avg@4`` where it was taken, one line per group and benchmark."""
    groups = [g for g in subject.groups.values() if arm_of(g) is not None]
    table = subject.only(groups).accuracies.filter(pl.col("decoding") == END)
    last = table.filter(pl.col("step").eq_missing(pl.col("step").max().over("run")))
    return subject.fold(last, ["benchmark", "decoding"])


def update_norms(subject: Subject) -> dict[str, dict[str, Any]]:
    """Folded relative update norms at the end of every arm that has one: from the run's origin, means over matrices."""
    groups = [g for g in subject.groups.values() if arm_of(g) is not None]
    means = aggregate(rows_of(subject.only(groups).results, "relative_update_norm"))
    folded = subject.fold(means.filter(pl.col("value").is_not_null()))
    return {line["run"]: line for line in folded.iter_rows(named=True)}


def benchmark_order(scores: pl.DataFrame) -> list[str]:
    """Benchmarks in the order shown."""
    found = set(scores["benchmark"])
    return [b for b in BENCHMARKS if b in found] + sorted(found - set(BENCHMARKS))


def projection_benchmarks(subject: Subject) -> Drawing | None:
    """Counterpart of Figure 8: every arm on every benchmark at its end."""
    paradigms = [p for p in PARADIGMS if arms(subject, p)]
    if not paradigms:
        return None
    drawing = Drawing(
        "projection_benchmarks",
        "Training inside a channel: benchmarks at the end",
        "Each mark is what an arm's accuracy (avg@4) differs by from the free arm of the same paradigm, in points, "
        "seed by seed. Whiskers: 95% t interval of that difference over seeds; with one seed 1.96 standard errors over "
        "problems. The figure at the line is the free arm's own accuracy. Arms are matched in K, mode, learning rate "
        "and steps, not in the length of their steps.",
        "An arm left of the line with its whisker lost by being confined. A random subspace that does as well as the "
        "update's own says that any few dimensions would do.",
        counterpart="Figure 8",
    )
    scores = end_scores(subject)
    if scores.is_empty():
        return drawing.absent(f"no arm has a benchmark at {END}")
    benchmarks = benchmark_order(scores)
    heights = [len(arms(subject, p)) + 1.2 for p in paradigms]
    figure = new_figure(1.75 * len(benchmarks) + 1.8, 0.24 * sum(heights) + 0.9)
    grid = figure.subplots(len(paradigms), len(benchmarks), squeeze=False, height_ratios=heights)
    for line, paradigm in zip(grid, paradigms, strict=True):
        for axes, benchmark in zip(line, benchmarks, strict=True):
            mine = scores.filter(pl.col("benchmark") == benchmark)
            _benchmark_panel(axes, arms(subject, paradigm), mine, labels=axes is line[0])
        place = {"transform": line[-1].transAxes, "va": "center", "fontweight": "bold", "rotation": 270}
        line[-1].text(1.03, 0.5, paradigm.upper(), **place)
    for axes, benchmark in zip(grid[0], benchmarks, strict=True):
        axes.set_title(benchmark.replace("_", " "))
    return drawing.drawn(figure, _benchmark_facts(subject, paradigms, scores))


def _benchmark_panel(axes: Axes, found: list[tuple[Arm, Group]], scores: pl.DataFrame, *, labels: bool) -> None:
    lines = {line["run"]: line for line in scores.iter_rows(named=True)}
    free = next((lines.get(group.name) for _, group in found if group.tags["projection"] == "none"), None)
    for y, (arm, group) in enumerate(found):
        if free is None or (line := lines.get(group.name)) is None:
            continue
        if line is free:
            axes.axvline(0, color=MUTED, linestyle=(0, (1, 1.5)), linewidth=1.0)
            axes.annotate(f"{100 * free['value']:.0f}%", (0, y), (4, 0), textcoords="offset points", va="center")
        else:
            whisker(axes, y, (gap := _gap(line, free)), arm.colour)
        axes.plot(0 if line is free else gap["value"], y, color=arm.colour, marker=arm.marker, linestyle="")
    name_rows(axes, [arm.label for arm, _ in found], labels=labels)
    axes.margins(x=0.15)
    axes.locator_params(axis="x", nbins=3)


def _gap(line: dict[str, Any], free: dict[str, Any]) -> dict[str, Any]:
    """An arm against the free one, in points and paired by seed; over problems where one of them has a single seed."""
    if line["seeds"] == free["seeds"] > 1:
        each = [100 * (one - other) for one, other in zip(line["each"], free["each"], strict=True)]
        return {"value": fmean(each), "each": each, "seeds": len(each), "half": half_width(each)}
    spread = _Z * math.hypot(line["se"] or 0.0, free["se"] or 0.0)
    return {"value": 100 * (line["value"] - free["value"]), "seeds": 1, "half": 100 * spread}


def _benchmark_facts(subject: Subject, paradigms: list[str], scores: pl.DataFrame) -> str:
    """Per paradigm the gap of each arm in gradient mode to the free one, on the first benchmark."""
    benchmark = benchmark_order(scores)[0]
    lines = {line["run"]: line for line in scores.filter(pl.col("benchmark") == benchmark).iter_rows(named=True)}
    parts = []
    for paradigm in paradigms:
        known = {arm.label: lines[g.name] for arm, g in arms(subject, paradigm) if g.name in lines}
        free = known.pop("free", None)
        if free is None or not known:
            continue
        gaps = {label: _gap(line, free) for label, line in known.items() if "adapter" not in label}
        said = ", ".join(
            f"{label} {gap['value']:+.1f}" + (f" ± {gap['half']:.1f}" if gap["half"] is not None else "")
            for label, gap in gaps.items()
        )
        parts.append(f"{paradigm.upper()} free {100 * free['value']:.1f}%; against it, in points: {said}")
    return f"On {benchmark.replace('_', ' ')}: " + ". ".join(parts) + "." + _channel_facts(subject, paradigms)


def _channel_facts(subject: Subject, paradigms: list[str]) -> str:
    """How far the arms in gradient mode left their subspace, and how long their updates are beside the free arm's."""
    leaks, lengths, norms = list[str](), list[str](), update_norms(subject)
    for paradigm in paradigms:
        confined = {arm.label: g for arm, g in arms(subject, paradigm) if g.tags.get("mode") == "gradient"}
        found = [leak for group in confined.values() if (leak := leak_of(subject.results, group)) is not None]
        if found:
            leaks.append(f"{paradigm.upper()} {leak_range(found)}")
        free = next((norms.get(g.name) for _, g in arms(subject, paradigm) if g.tags["projection"] == "none"), None)
        ratios = {a: norms[g.name]["value"] / free["value"] for a, g in confined.items() if free and g.name in norms}
        if ratios:
            longest = max(ratios, key=ratios.__getitem__)
            lengths.append(f"{paradigm.upper()} {min(ratios.values()):.2f} to {ratios[longest]:.2f} ({longest})")
    text = ""
    if leaks:
        text += f" Leak of the arms in gradient mode, the increment's energy outside the subspace: {', '.join(leaks)}."
    if lengths:
        text += f" Their relative update norm is this many times the free arm's: {', '.join(lengths)}."
    return text
