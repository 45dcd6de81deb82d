"""How every figure looks: one colour per paradigm (Okabe-Ito), line style and marker per run within a paradigm."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import log10
from typing import Any

import matplotlib as mpl
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from geopd.report.groups import Group

COLOURS = {"sft": "#D55E00", "opd": "#0072B2", "rlvr": "#009E73", "mix": "#CC79A7", "other": "#595959"}
SHARED_SFT = "#B8860B"
"""Fine-tuning from the origin of the on-policy runs, told apart from fine-tuning from the base."""
INK, MUTED, RULE = "#222222", "#6b6b6b", "#d9d9d9"
NULL_MARKERS = {
    "gaussian": "D",
    "permuted": "s",
    "random_mask": "|",
    "random_walk": "^",
    "rounding": "v",
    "independent": "o",
}
NULL_LINES = {"gaussian": (0, (1, 1.5)), "random_walk": (0, (5, 1.5, 1, 1.5)), "rounding": (0, (5, 2))}
NULL_LABELS = {
    "gaussian": "Gaussian update of the same size",
    "permuted": "same update, permuted",
    "random_mask": "random mask",
    "random_walk": "random walk of the same steps",
    "rounding": "bf16 rounding alone",
    "independent": "independent runs",
}
MAX_LEGEND = 12
"""With more runs than this a legend names paradigms instead of runs."""

_LINES = ("-", "--", "-.", ":", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)))
_MARKERS = ("o", "s", "^", "v", "P", "X")
_RC: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial", "sans-serif"],
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e8e8e8",
    "grid.linewidth": 0.7,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.handlelength": 2.8,  # a dashed line must show its dashes beside its marker
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "svg.fonttype": "none",  # text stays text: light, searchable, read aloud
    "figure.dpi": 100,
    "savefig.dpi": 150,
}


@contextmanager
def styled() -> Iterator[None]:
    """Matplotlib settings of this report, without touching anyone else's."""
    with mpl.rc_context(_RC):
        yield


@dataclass(frozen=True)
class RunStyle:
    """How one run, or the runs of one group, are drawn and named."""

    run: str
    paradigm: str
    label: str
    colour: str
    line: Any
    marker: str


def group_styles(groups: Sequence[Group]) -> dict[str, RunStyle]:
    """Styles of all groups, in the order they are shown; fine-tuning from the shared origin has a colour of its own."""
    styles: dict[str, RunStyle] = {}
    for group in groups:
        i = sum(style.paradigm == group.paradigm for style in styles.values())
        line, marker = _LINES[i % len(_LINES)], _MARKERS[i % len(_MARKERS)]
        colour = SHARED_SFT if group.paradigm == "sft" and group.shared_origin else COLOURS[group.paradigm]
        styles[group.name] = RunStyle(group.name, group.paradigm, shorten(group.label), colour, line, marker)
    return styles


def shorten(text: str, limit: int = 26) -> str:
    """The text with its middle left out where it is longer than ``limit``."""
    if len(text) <= limit:
        return text
    half = (limit - 1) // 2
    return f"{text[:half]}…{text[-half:]}"


def new_figure(width: float, height: float) -> Figure:
    """An empty figure in inches; made without pyplot, so nothing global is left behind."""
    return Figure(figsize=(width, height), layout="constrained")


def run_legend(figure: Figure, styles: list[RunStyle], extra: Sequence[Artist] | None = None) -> None:
    """One legend below the panels: runs (or paradigms where there are many), then ``extra`` handles."""
    if len(styles) <= MAX_LEGEND:
        handles: list[Artist] = [run_handle(style) for style in styles]
    else:
        seen = dict.fromkeys(s.paradigm for s in styles)
        handles = [Line2D([], [], color=COLOURS[p], label=f"{p} ({_count(styles, p)} runs)") for p in seen]
    handles += list(extra or [])
    columns = _columns([str(handle.get_label()) for handle in handles], figure.get_figwidth())
    figure.legend(handles=handles, loc="outside lower center", ncols=columns)


def run_handle(style: RunStyle) -> Line2D:
    """Legend entry of a run or group."""
    return Line2D([], [], color=style.colour, linestyle=style.line, marker=style.marker, label=style.label)


def _columns(labels: list[str], width: float) -> int:
    """The most legend columns that fit the figure's width in inches; a legend fills column by column."""
    for columns in range(len(labels), 1, -1):
        full, longer = divmod(len(labels), columns)
        ends = [0, *accumulate(full + (i < longer) for i in range(columns))]
        widest = [max(map(len, labels[a:b])) for a, b in pairwise(ends)]
        if sum(0.085 * letters + 0.75 for letters in widest) <= width:
            return columns
    return 1


def chosen(styles: list[RunStyle], most: int) -> list[RunStyle]:
    """At most ``most`` runs, taken from every paradigm in turn, in display order."""
    turns = sorted(styles, key=lambda s: [t.run for t in styles if t.paradigm == s.paradigm].index(s.run))
    kept = {s.run for s in turns[:most]}
    return [s for s in styles if s.run in kept]


def _count(styles: list[RunStyle], paradigm: str) -> int:
    return sum(s.paradigm == paradigm for s in styles)


def null_handle(null: str, *, line: bool = False) -> Line2D:
    """Legend entry of a null model."""
    label = f"null: {NULL_LABELS.get(null, null.replace('_', ' '))}"
    if line:
        return Line2D([], [], color=MUTED, linestyle=NULL_LINES[null], linewidth=1.2, label=label)
    marker = NULL_MARKERS.get(null, "D")
    return Line2D([], [], color=MUTED, linestyle="", marker=marker, markerfacecolor="none", label=label)


def percent_axis(axes: Axes, which: str = "x") -> None:
    """Ticks of a share axis as percentages."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))


def maybe_log(
    axes: Axes, values: list[float], decades: float = 1.0, *, which: str = "y", percent: bool = False
) -> None:
    """A logarithmic axis where all values are positive and span more than ``decades``."""
    if percent:
        percent_axis(axes, which)
    if not values or min(values) <= 0 or max(values) / min(values) <= 10**decades:
        return
    (axes.set_yscale if which == "y" else axes.set_xscale)("log")
    span = log10(max(values) / min(values))
    if span > 2.5 and not percent:  # powers of ten say it best
        return
    # One labelled tick a decade would leave a short axis almost bare.
    axis = axes.yaxis if which == "y" else axes.xaxis
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if span < 2.5 else (1,)))
    axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%" if percent else f"{value:g}"))


def few_ticks(axes: Axes) -> None:
    """At most two labels a decade on a horizontal logarithmic axis: narrow panels have no room for more."""
    if axes.get_xscale() == "log":
        low, high = axes.get_xlim()
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 3) if high / low < 1e3 else (1,)))
