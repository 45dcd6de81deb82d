"""The Three-Gate account as far as it can be measured: anchor, geometry and precision."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from geopd.report.drawing import KL, Drawing, Subject
from geopd.report.groups import half_width
from geopd.report.hover import name_points
from geopd.report.size_figures import KINDS, checkpoints, kind_of
from geopd.report.style import COLOURS, INK, MUTED, few_ticks, maybe_log, new_figure
from geopd.results.summary import matched, rows_of

Points = pl.DataFrame


def gates(subject: Subject) -> Drawing | None:
    """Gate I: divergence against update norm; II: rotation against Wedin's bound; III: predicted visibility."""
    if subject.results.evaluations.filter(pl.col("benchmark") == KL).is_empty():
        return None
    drawing = Drawing(
        "gates",
        "The three gates: how far, how turned, how visible",
        "I: divergence of the policy from the origin of its run (of fine-tuning from the base that is the base), on "
        "its own samples, over the norm of the whole update; large marks are ends of runs. II: sine of the largest "
        "principal angle of each matrix over Wedin's bound, norm of the update over the spectral gap; matrices without "
        "a gap are left out. III: the entries that the fp32 update moves by half a bf16 step or more, held against "
        "those found changed in bf16 (Jaccard index of both sets); every dot a matrix of a baseline.",
        "I: a policy that answers to second order alone follows the dashed slope of 2 whatever the direction. II: no "
        "matrix can lie above the diagonal; far below it the bound says little. III: on the diagonal predicted and "
        "seen entries agree as well as for an update of the same size without any structure; where most entries are "
        "seen, most of any agreement is density.",
    )
    baselines = subject.baselines
    first, second, third = divergence_points(subject), wedin_points(baselines), visible_points(baselines)
    figure = new_figure(11, 4.2)
    panels = figure.subplots(1, 3)
    _divergence_panel(panels[0], first)
    _bound_panel(panels[1], second)
    _visible_panel(panels[2], third)
    handles = [
        Line2D([], [], color=COLOURS[p], marker="o", linestyle="", label=p)
        for p in COLOURS
        if p in set(first["paradigm"])
    ]
    kinds = set(first["kind"])
    handles += [
        Line2D([], [], color=MUTED, marker=marker, linestyle="", label=name)
        for kind, (marker, name) in KINDS.items()
        if kind in kinds and len(kinds) > 1
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=5)
    return drawing.drawn(figure, _gate_facts(baselines, first, second, third))


def _known(subject: Subject) -> pl.DataFrame:
    about = [(run, g.paradigm, kind_of(g)) for g in subject.groups.values() for run in g.runs]
    return pl.DataFrame(about, schema=["run", "paradigm", "kind"], orient="row")


def divergence_points(subject: Subject) -> Points:
    """One line per evaluated checkpoint: ``run step paradigm kind norm kl last``.

    ``norm`` is the Frobenius norm over all layers' matrices together, ``kl`` in nats per response.
    """
    rows = rows_of(subject.results, "update_norm", every_step=True).filter(pl.col("status") == "ok")
    norms = rows.group_by("run", "step").agg(norm=(pl.col("value") ** 2).sum().sqrt())
    kl = subject.results.evaluations.filter(pl.col("benchmark") == KL).select("run", "step", kl="value")
    both = norms.join(kl, on=["run", "step"], nulls_equal=True).join(_known(subject), on="run")
    return both.with_columns(last=pl.col("step").eq_missing(pl.col("step").max().over("run")))


def _divergence_panel(axes: Axes, points: Points) -> None:
    axes.set_title("I. divergence and update norm")
    axes.set_xlabel("norm of the whole update")
    axes.set_ylabel("KL to the origin, nats a response")
    good = points.filter((pl.col("kl") > 0) & (pl.col("norm") > 0))
    for (paradigm, kind, last), some in good.group_by("paradigm", "kind", "last"):
        look: dict[str, Any] = {"c": COLOURS[str(paradigm)], "marker": KINDS[str(kind)][0], "linewidths": 0.4}
        look |= {"s": 26, "alpha": 1.0} if last else {"s": 7, "alpha": 0.5}
        name_points(axes.scatter(some["norm"], some["kl"], edgecolors="white", **look), checkpoints(some))
    if good.height < 2:
        return
    middle = good.select((pl.col("kl") / pl.col("norm") ** 2).median()).item()
    ends = np.array([good["norm"].min(), good["norm"].max()], dtype=float)
    axes.plot(ends, middle * ends**2, color=INK, linewidth=1.0, linestyle="--")
    maybe_log(axes, good["norm"].to_list(), which="x", decades=0.3)
    few_ticks(axes)
    maybe_log(axes, good["kl"].to_list(), decades=0.3)


def wedin_points(subject: Subject) -> Points:
    """One line per matrix at the end of each run: ``run matrix paradigm bound sine``, where the bound applies.

    bound = ||dW||_2 / (sigma_k(W0) - sigma_{k+1}(W+)), sine = max over sides of the sine of the largest angle; the
    gap must be positive (paper, section 7). k is the number of stored angles.
    """
    norms = rows_of(subject.results, "update_operator_norm").filter(pl.col("status") == "ok")
    paradigms = dict(_known(subject).select("run", "paradigm").iter_rows())
    found = []
    for run, matrix, step, norm in norms.select("run", "matrix", "step", "value").iter_rows():
        vectors = subject.results.vectors(run, matrix)
        label = "final" if step is None else str(step)
        sides = [a for side in ("left", "right") if (a := vectors.get(f"{label}/angles_{side}")) is not None and a.size]
        before, after = vectors.get("sigma_origin"), vectors.get(f"{label}/sigma")
        if not sides or before is None or after is None:
            continue
        k = sides[0].size
        gap = float(before[k - 1]) - (float(after[k]) if k < after.size else 0.0)
        if gap > 0:
            sine = max(float(np.sin(np.radians(side.max()))) for side in sides)
            found.append((run, matrix, paradigms[run], norm / gap, sine))
    schema = {"run": pl.String, "matrix": pl.String, "paradigm": pl.String, "bound": pl.Float64, "sine": pl.Float64}
    return pl.DataFrame(found, schema=schema, orient="row")


def _bound_panel(axes: Axes, points: Points) -> None:
    axes.set_title("II. rotation and its bound")
    axes.set_xlabel("Wedin's bound on the sine")
    axes.set_ylabel("sine of the largest principal angle")
    good = points.filter((pl.col("bound") > 0) & (pl.col("sine") > 0))
    if good.is_empty():
        axes.text(0.5, 0.5, "no matrix has a spectral gap", ha="center", color=MUTED, transform=axes.transAxes)
        return
    _diagonal(axes, good, "bound", "sine", top=1.0)
    maybe_log(axes, good["bound"].to_list(), which="x", decades=0.3)
    few_ticks(axes)
    maybe_log(axes, good["sine"].to_list(), decades=0.3)


def visible_points(subject: Subject) -> Points:
    """One line per matrix at the end of each run: ``run matrix paradigm realised predicted density``.

    realised = ``visible_mask_jaccard`` of the entries predicted and found visible, predicted = its Gaussian null, both
    Jaccard indices; density = share of entries seen, 1 - update sparsity.
    """
    rows = rows_of(subject.results, "visible_mask_jaccard")
    found = matched(rows, rows_of(subject.results, "visible_mask_jaccard", table="nulls"))
    both = found.select("run", "matrix", realised="value", predicted="null_mean")
    seen = rows_of(subject.results, "update_sparsity").filter(pl.col("status") == "ok")
    both = both.join(seen.select("run", "matrix", density=1 - pl.col("value")), on=["run", "matrix"])
    return both.join(_known(subject), on="run")


def _visible_panel(axes: Axes, points: Points) -> None:
    axes.set_title("III. predicted and seen entries")
    axes.set_xlabel("agreement, Gaussian of equal size")
    axes.set_ylabel("agreement measured (Jaccard)")
    if points.is_empty():
        axes.text(0.5, 0.5, "needs weights stored wider than bf16", ha="center", color=MUTED, transform=axes.transAxes)
        axes.set(xticks=[], yticks=[])
        return
    _diagonal(axes, points, "predicted", "realised", top=1.0)


def _diagonal(axes: Axes, points: Points, x: str, y: str, *, top: float) -> None:
    for (paradigm,), some in points.group_by("paradigm"):
        look: dict[str, Any] = {"c": COLOURS[str(paradigm)], "s": 12, "alpha": 0.6, "linewidths": 0}
        dots = axes.scatter(some[x], some[y], rasterized=True, **look)
        name_points(dots, [f"{matrix} of {run}" for matrix, run in some.select("matrix", "run").iter_rows()])
    low = min(float(points[x].min()), float(points[y].min()))  # type: ignore[arg-type]
    axes.plot([low, top], [low, top], color=INK, linewidth=1.0)


def slopes(points: Points) -> dict[str, float]:
    """Least-squares slope of ln KL against ln norm within each run, over its checkpoints with a positive value of both.

    Runs with fewer than three such checkpoints, or with one norm throughout, have none.
    """
    good = points.filter((pl.col("kl") > 0) & (pl.col("norm") > 0))
    found = {}
    for (run,), mine in good.group_by("run"):
        if mine.height > 2 and mine["norm"].n_unique() > 1:
            found[str(run)] = float(np.polyfit(np.log(mine["norm"].to_numpy()), np.log(mine["kl"].to_numpy()), 1)[0])
    return found


def _slope_facts(baselines: Subject, points: Points) -> str:
    """Mean slope of each baseline's runs, with half its 95% t interval over seeds."""
    found, parts = slopes(points), []
    for name, group in baselines.groups.items():
        if mine := [found[run] for run in group.runs if run in found]:
            half = half_width(mine)
            parts.append(f"{name} {np.mean(mine):.2f}" + ("" if half is None else f" ± {half:.2f}"))
    if not parts:
        return ""
    return f"I: within a run the divergence from its origin grows with the norm to the power {', '.join(parts)}"


def _gate_facts(baselines: Subject, first: Points, second: Points, third: Points) -> str:
    parts = [slope] if (slope := _slope_facts(baselines, first)) else []
    if not second.is_empty():
        above = second.filter(pl.col("sine") > pl.col("bound")).height
        share = second.select((pl.col("sine") / pl.col("bound")).median()).item()
        useful = second.filter(pl.col("bound") < 1).height
        parts.append(
            f"II: {second.height} matrices with a gap, {above} above the bound; it is below 1, and says something, "
            f"for {useful}, and the sine is typically {share:.2g} of it"
        )
    if not third.is_empty():
        mean, null, density = third.select(pl.col("realised", "predicted", "density").mean()).row(0)
        unrelated = third.select((pl.col("density") / (2 - pl.col("density"))).mean()).item()
        parts.append(
            f"III: {100 * density:.1f}% of the entries are seen; predicted and seen agree by {mean:.3f}, those of a "
            f"Gaussian update by {null:.3f}, unrelated masks of that density would by {unrelated:.3f}"
        )
    return "; ".join(parts) + "." if parts else "Too few checkpoints with a divergence."
