"""Gradient covariance at the anchor: effective rank under distillation against reward, on the same rollouts."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from geopd.report.curves import whisker
from geopd.report.drawing import Drawing, Subject
from geopd.report.groups import half_width
from geopd.report.hover import name_points, name_rows
from geopd.report.style import COLOURS, INK, maybe_log, new_figure

_Z = 1.96
MAX_MATRICES = 30
"""With more matrices than this a line stands for a module type."""


def gradient_ranks(subject: Subject) -> Drawing | None:
    """Effective ranks of the per-sample gradients' covariance and their paired log ratio."""
    rows = subject.results.gradients
    if not rows:
        return None
    drawing = Drawing(
        "gradient_ranks",
        "Whether distillation's gradients spread over more directions than reward's",
        "Effective rank of the covariance of per-sample gradients at the anchor, same parameters and rollouts. Left: "
        "every dot a matrix of a seed. Right: log of the ratio, distillation over reward, per matrix; filled: "
        "gradients as they are, hollow: each scaled to unit length. Whiskers: 95% t interval over seeds; with one "
        "seed 1.96 standard errors, jackknifed over prompts.",
        "Equal spread puts dots on the diagonal and ratios on zero. A gap that goes away at unit length came from how "
        "unequal the gradients' sizes are, not from their directions. It speaks of gradients at one point, not of the "
        "update.",
    )
    good = [row for row in rows if row["log_ratio"] is not None]
    if not good:
        return drawing.absent(f"no matrix has an effective rank under both ({rows[0].get('note')})")
    key = "matrix" if len({row["matrix"] for row in good}) <= MAX_MATRICES else "module"
    names = list(dict.fromkeys(row[key] for row in sorted(good, key=lambda r: (r["layer"] or 0, r["module"]))))
    figure = new_figure(10, 1.6 + max(2.6, 0.27 * len(names)))
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.4))
    _scatter(left, good)
    _ratios(right, good, key, names)
    handles = [
        Line2D([], [], color=INK, marker="o", linestyle="", label="gradients as they are"),
        Line2D([], [], color=INK, marker="o", markerfacecolor="none", linestyle="", label="at unit length"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return drawing.drawn(figure, _facts(rows, good))


def _scatter(axes: Axes, good: list[dict[str, Any]]) -> None:
    pairs = [(row["rlvr"], row["opd"]) for row in good]
    unit = [(row["rlvr_unit"], row["opd_unit"]) for row in good if row.get("log_ratio_unit") is not None]
    look: dict[str, Any] = {"marker": "o", "linestyle": "", "color": COLOURS["opd"], "markersize": 4.5}
    (plain,) = axes.plot(*np.array(pairs).T, **look)
    name_points(plain, [f"{row['matrix']}, seed {row['seed']}" for row in good])
    if unit:
        (hollow,) = axes.plot(*np.array(unit).T, **look, markerfacecolor="none")
        at_unit = [row for row in good if row.get("log_ratio_unit") is not None]
        name_points(hollow, [f"{row['matrix']}, seed {row['seed']}, at unit length" for row in at_unit])
    values = [v for pair in pairs + unit for v in pair]
    low, high = min(values) * 0.8, max(values) * 1.25
    axes.plot([low, high], [low, high], color=INK, linewidth=1.0)
    maybe_log(axes, [low, high], which="x", decades=0)
    maybe_log(axes, [low, high], decades=0)
    axes.set_xlabel("effective rank under reward")
    axes.set_ylabel("effective rank under distillation")
    axes.set_title("same rollouts, two signals")


def _ratios(axes: Axes, good: list[dict[str, Any]], key: str, names: list[str]) -> None:
    for y, name in enumerate(names):
        mine = [row for row in good if row[key] == name]
        for suffix, offset in (("", -0.15), ("_unit", 0.15)):
            line = ratio(mine, suffix)
            if line is None:
                continue
            whisker(axes, y + offset, line, COLOURS["opd"])
            look: dict[str, Any] = {"color": COLOURS["opd"], "markerfacecolor": "white" if suffix else COLOURS["opd"]}
            axes.plot(line["value"], y + offset, marker="o", linestyle="", zorder=4, **look)
    axes.axvline(0, color=INK, linewidth=1.0)
    name_rows(axes, names)
    axes.set_xlabel("log ratio of effective ranks, distillation over reward")
    axes.set_title("paired log ratio")


def ratio(rows: list[dict[str, Any]], suffix: str = "") -> dict[str, Any] | None:
    """Mean log ratio over seeds (per seed over its rows) with its half-width: ``value half each seeds``."""
    by_seed: dict[Any, list[float]] = {}
    for row in rows:
        if row.get(f"log_ratio{suffix}") is not None:
            by_seed.setdefault(row["seed"], []).append(row[f"log_ratio{suffix}"])
    if not by_seed:
        return None
    each = [float(np.mean(values)) for _, values in sorted(by_seed.items())]
    half = half_width(each)
    if half is None:
        errors = [row[f"se{suffix}"] for row in rows if row.get(f"se{suffix}") is not None]
        half = _Z * float(np.sqrt(np.sum(np.square(errors)))) / len(errors) if errors else None
    return {"value": float(np.mean(each)), "half": half, "each": each, "seeds": len(each)}


def _facts(rows: list[dict[str, Any]], good: list[dict[str, Any]]) -> str:
    parts = []
    for suffix, label in (("", "as they are"), ("_unit", "at unit length")):
        line = ratio(good, suffix)
        if line is not None:
            about = f" ± {line['half']:.2f}" if line["half"] is not None else ""
            parts.append(f"{label} {line['value']:.2f}{about}, a factor of {np.exp(line['value']):.2f}")
    left = len(rows) - len(good)
    seeds = len({row["seed"] for row in good})
    text = f"Mean log ratio over matrices, {seeds} seed{'s' if seeds > 1 else ''}: gradients {'; '.join(parts)}."
    return text + (f" Left out: {left} of {len(rows)} rows without a value." if left else "")
