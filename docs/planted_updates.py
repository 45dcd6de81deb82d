"""Draw docs/planted_updates.png: the diagnostics on updates whose truth is known.

    .venv/bin/python docs/planted_updates.py

W0 is 1024 x 1024 in bf16, its entries of standard deviation .02, its singular values falling as 1/sqrt(i). One update
of rank 16 with equal singular values (stable rank exactly 16, unrelated to W0) is planted at eight sizes, and W0 plus
the update is stored in bf16 again. Every point is what ``geopd.diagnostics`` measures on the two stored matrices. The
numbers behind the picture are printed, and the others that docs/meaning.md quotes.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from torch import Tensor

from geopd.diagnostics import CATALOGUE, Comparison, OriginMatrix, Parameters
from geopd.diagnostics.noise_nulls import nulls_hill, nulls_stable_rank
from geopd.diagnostics.rounding import TOO_NOISY
from geopd.report.style import COLOURS, INK, MUTED, new_figure, percent_axis, styled
from geopd.results import Measurement, Null, Status

PICTURE = Path(__file__).with_suffix(".png")
SIDE, RANK, SPREAD, ALPHA = 1024, 16, 0.02, 0.5
DECAY = 2.9e-3  # sum of learning rate times weight decay over the SFT schedule of arXiv 2606.07082
SIZES = (2e-6, 5e-6, 1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4)
DRAWN = (
    "rounding_noise_share",
    "stable_rank",
    "stable_rank_denoised",
    "update_sparsity",
    "low_magnitude_overlap",
    "principal_overlap",
)
RAW, CLEAN, LOW, PRINCIPAL = COLOURS["sft"], COLOURS["opd"], COLOURS["rlvr"], COLOURS["mix"]


class Measured(NamedTuple):
    """One planted update as measured: headline values by metric, and nulls by (metric, name)."""

    size: float
    values: dict[str, Measurement]
    nulls: dict[tuple[str, str], Null]


def with_spectrum(sigma: Tensor, draw: torch.Generator) -> Tensor:
    """A matrix of rms 1 with these singular values, up to scale, between random frames."""
    frames = (torch.randn(SIDE, len(sigma), generator=draw, dtype=torch.float64) for _ in range(2))
    left, right = (torch.linalg.qr(frame)[0] for frame in frames)
    made: Tensor = (left * sigma) @ right.T * (SIDE / torch.linalg.vector_norm(sigma))
    return made


def stored_origin(draw: torch.Generator) -> OriginMatrix:
    """W0 as it lies on disk."""
    falling = torch.arange(1, SIDE + 1, dtype=torch.float64) ** -0.5
    return OriginMatrix(
        (SPREAD * with_spectrum(falling, draw)).bfloat16(), Parameters(alphas=(ALPHA,), hill_k=(16, 64))
    )


def stored_updates(origin: OriginMatrix, draw: torch.Generator) -> dict[float, Comparison]:
    """The stored pair of every planted size."""
    update = with_spectrum(torch.ones(RANK, dtype=torch.float64), draw)
    return {size: Comparison(origin, (origin.stored.double() + size * update).bfloat16()) for size in SIZES}


def measured(size: float, comparison: Comparison, metrics: tuple[str, ...] = DRAWN) -> Measured:
    """One stored pair, measured."""
    asked = [diagnostic for diagnostic in CATALOGUE if set(diagnostic.metrics) & set(metrics)]
    values = [item for diagnostic in asked for item in diagnostic.measure(comparison) if item.is_default]
    nulls = [item for diagnostic in asked for item in diagnostic.nulls(comparison) if item.is_default]
    return Measured(size, {item.metric: item for item in values}, {(item.metric, item.null): item for item in nulls})


def usable(point: Measured, metric: str) -> bool:
    """Whether a value is resolved; the raw stable rank is not where rounding makes too much of the update."""
    noise = point.values["rounding_noise_share"].value
    return point.values[metric].status is Status.OK and not (
        metric == "stable_rank" and noise is not None and noise > TOO_NOISY
    )


def dots(axes: Axes, points: list[Measured], metric: str, colour: str, marker: str, *, line: bool = False) -> None:
    """Measured values over the planted size, hollow where unresolved."""
    found = [(point, value) for point in points if (value := point.values[metric].value) is not None]
    if line:
        axes.plot([point.size for point, _ in found], [value for _, value in found], color=colour, linewidth=1)
    for point, value in found:
        face = colour if usable(point, metric) else "white"
        axes.plot(point.size, value, marker, color=colour, markerfacecolor=face, markersize=6, zorder=3)


def null_line(axes: Axes, points: list[Measured], metric: str) -> None:
    """The Gaussian null of the same stored size or density."""
    values = [point.nulls[metric, "gaussian"].mean for point in points]
    axes.plot([point.size for point in points], values, color=MUTED, linewidth=1.3)


def draw_ranks(axes: Axes, points: list[Measured]) -> None:
    """Raw and denoised stable rank against the true one and against rounding alone."""
    noise = points[-1].nulls["stable_rank", "rounding"].mean
    axes.axhline(RANK, color=INK, linewidth=1)
    axes.axhline(noise, color=MUTED, linewidth=1.2, linestyle=(0, (1, 1.5)))
    dots(axes, points, "stable_rank", RAW, "o", line=True)
    dots(axes, points, "stable_rank_denoised", CLEAN, "s", line=True)
    axes.set_yscale("log")
    axes.set_ylim(1.4, 480)
    axes.yaxis.set_major_locator(FixedLocator([2, 4, 8, 16, 32, 64, 128, 256]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.text(5.5e-4, noise * 1.1, "rounding noise alone", color=MUTED, ha="right", va="bottom")
    axes.text(1.6e-6, RANK * 1.1, "truth: 16", color=INK, va="bottom")
    axes.text(1.5e-5, 60, "as stored", color=RAW)
    axes.text(1.6e-5, 7.5, "without rounding\n(denoised)", color=CLEAN, va="center", linespacing=1.1)
    axes.set_title("Stable rank: a false contraction")


def draw_sparsity(axes: Axes, points: list[Measured]) -> None:
    """Sparsity and its size-matched null."""
    null_line(axes, points, "update_sparsity")
    dots(axes, points, "update_sparsity", INK, "o")
    axes.set_ylim(0, 1.04)
    percent_axis(axes, "y")
    axes.text(1.8e-6, 0.04, "dots: rank-16 update\nline: Gaussian update\nof the same stored size", linespacing=1.3)
    axes.set_title("Update sparsity: mostly size")


def draw_overlaps(axes: Axes, points: list[Measured]) -> None:
    """Both mask overlaps, their density-matched null and alpha."""
    axes.axhline(ALPHA, color=MUTED, linewidth=1.2, linestyle=(0, (4, 2)))
    for metric, colour, marker in (("low_magnitude_overlap", LOW, "^"), ("principal_overlap", PRINCIPAL, "v")):
        null_line(axes, points, metric)
        dots(axes, points, metric, colour, marker)
    axes.set_ylim(0, 1.04)
    percent_axis(axes, "y")
    axes.text(3.6e-5, 0.92, "low-magnitude", color=LOW)
    axes.text(3.6e-5, 0.26, "principal", color=PRINCIPAL)
    axes.text(1.6e-6, ALPHA + 0.02, "alpha", color=MUTED, va="bottom")
    axes.set_title("Mask overlaps: not alpha")


def draw_all(points: list[Measured]) -> None:
    """Three panels, 900 pixels wide."""
    with styled():
        figure = new_figure(9.0, 3.3)
        panels = figure.subplots(1, 3)
        for axes, fill in zip(panels, (draw_ranks, draw_sparsity, draw_overlaps), strict=True):
            axes.set_xscale("log")
            axes.set_xlim(1.4e-6, 7e-4)
            fill(axes, points)
        panels[1].set_xlabel("rms of the planted update before rounding, weight units")
        figure.legend(
            handles=[
                Line2D([], [], color=INK, linestyle="", marker="o", label="measured"),
                Line2D(
                    [],
                    [],
                    color=INK,
                    linestyle="",
                    marker="o",
                    markerfacecolor="white",
                    label=f"unresolved, or over {TOO_NOISY:.0%} rounding",
                ),
                Line2D([], [], color=MUTED, linewidth=1.3, label="Gaussian null, matched to what was stored"),
            ],
            loc="outside lower center",
            ncols=3,
        )
        figure.savefig(PICTURE, dpi=100)


def table(points: list[Measured]) -> str:
    """What the picture shows, in numbers: one line a size; in brackets the Gaussian null."""
    lines = [f"{'rms':>6}  " + "  ".join(f"{metric:>22}" for metric in DRAWN)]
    for point in points:
        cells = []
        for metric in DRAWN:
            value, null = point.values[metric].value, point.nulls.get((metric, "gaussian"))
            text = "undefined" if value is None else f"{value:.4g}{'' if usable(point, metric) else ' unresolved'}"
            cells.append(f"{text}{f' ({null.mean:.4g})' if null else '':s}")
        lines.append(f"{point.size:6.0e}  " + "  ".join(f"{cell:>22}" for cell in cells))
    return "\n".join(lines)


def beside(origin: OriginMatrix, update: Comparison) -> str:
    """What rounding alone reads, angles against their null, and weight decay with nothing else."""
    noise = next(item.mean for item in nulls_stable_rank(update) if item.null == "rounding")
    tails = {item.setting: item.mean for item in nulls_hill(update) if item.null == "rounding"}
    hill = "; ".join(f"{name} {mean:.3g}" for name, mean in tails.items())
    turned = measured(0.0, update, ("rotation_right_mean_deg",))
    angles = []
    for summary in ("mean", "median", "max"):
        metric = f"rotation_right_{summary}_deg"
        null = turned.nulls.get((metric, "gaussian"))
        angles.append(
            f"{summary} {turned.values[metric].value:.3g} ({'no null' if null is None else f'{null.mean:.3g}'})"
        )
    decayed = Comparison(origin, (origin.stored.double() * (1 - DECAY)).bfloat16())
    shrunk = measured(0.0, decayed, ("update_sparsity", "decay_coefficient", "spectral_shift", "stable_rank"))
    kept = "; ".join(f"{name} {item.value:.4g}" for name, item in shrunk.values.items())
    return "\n".join(
        [
            f"stable rank of rounding alone: {noise:.4g}",
            f"Hill index of rounding alone: {hill}",
            f"right rotation in degrees at rms 1e-4: {', '.join(angles)}",
            f"weight decay of {DECAY:g} alone: {kept}",
        ]
    )


def main() -> None:
    """Measure, draw, print."""
    torch.set_num_threads(1)
    draw = torch.Generator().manual_seed(0)
    origin = stored_origin(draw)
    updates = stored_updates(origin, draw)
    points = [measured(size, comparison) for size, comparison in updates.items()]
    draw_all(points)
    print(table(points), beside(origin, updates[1e-4]), sep="\n")


if __name__ == "__main__":
    main()
