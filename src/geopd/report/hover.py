"""What a figure says under the pointer: every mark's name and values, as SVG titles over it, without any script."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, ScalarFormatter

_NAMES = "names_of_points"
_CATEGORIES = "axes_of_categories"
_CAPS = ("|", "_", "None", "none", "", " ", None)  # ends of whiskers, and lines without marks
_REACH = 4.5  # points around the middle of a mark
_CROWD = 2000  # points of one scatter: more lie over each other, and would make the page heavy


def name_points(artist: Artist, names: Sequence[str]) -> None:
    """Name the points of a scatter or line, one each; a scatter without names, or of over 2,000, says nothing."""
    vars(artist)[_NAMES] = list(names)


def name_rows(axes: Axes, names: Sequence[str], *, labels: bool = True) -> None:
    """One line of marks for each name from top to bottom; without ``labels`` the names are told by hovering alone."""
    axes.set_yticks(range(len(names)), [name if labels else "" for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    name_categories(axes, "y", names)


def name_categories(axes: Axes, which: str, names: Sequence[str]) -> None:
    """What 0, 1, 2... on an axis (x or y) are called, whether or not its ticks say it."""
    vars(axes).setdefault(_CATEGORIES, {})[which] = list(names)


def overlay(figure: Figure) -> str:
    """Transparent shapes with titles as an SVG group, in the coordinates of the SVG of a figure that is laid out."""
    shapes = [shape for axes in figure.axes for shape in _shapes(figure, axes)]
    return f'<g class="marks" fill="transparent" stroke="none">{"".join(shapes)}</g>' if shapes else ""


def _shapes(figure: Figure, axes: Axes) -> Iterator[str]:
    scale, top = 72 / figure.dpi, figure.bbox.height
    for image in axes.images:
        yield from _cells(figure, axes, image)
    for marks in (*axes.lines, *axes.collections):
        names = vars(marks).get(_NAMES)
        if isinstance(marks, Line2D) and marks.get_marker() not in _CAPS:
            points = np.asarray(marks.get_xydata(), dtype=float)
            names = names or [_in_legend(figure, axes, marks)] * len(points)
        elif isinstance(marks, PathCollection) and names and len(names) <= _CROWD:
            points = np.asarray(marks.get_offsets(), dtype=float)
        else:
            continue
        for (x, y), (px, py), name in zip(points, axes.transData.transform(points), names, strict=True):
            if np.isfinite([px, py]).all() and axes.bbox.padded(2).contains(px, py):
                title = _title(axes, name, [_said(axes, "x", x), _said(axes, "y", y)])
                yield f'<circle cx="{px * scale:.1f}" cy="{(top - py) * scale:.1f}" r="{_REACH}">{title}</circle>'


def _cells(figure: Figure, axes: Axes, image: AxesImage) -> Iterator[str]:
    scale, top = 72 / figure.dpi, figure.bbox.height
    bar = next((other.colorbar.ax for ax in figure.axes for other in ax.images if other.colorbar is not None), None)
    values = np.ma.filled(image.get_array(), np.nan)  # type: ignore[arg-type]
    for row, column in np.ndindex(*values.shape):
        value = float(values[row, column])
        if not np.isfinite(value):
            continue
        (x0, y0), (x1, y1) = axes.transData.transform([(column - 0.5, row + 0.5), (column + 0.5, row - 0.5)])
        number = ("", f"{value:.4g}") if bar is None else _said(bar, "y", value)
        title = _title(axes, "", [_said(axes, "y", row), _said(axes, "x", column), number])
        box = f'x="{x0 * scale:.1f}" y="{(top - y1) * scale:.1f}"'
        yield f'<rect {box} width="{(x1 - x0) * scale:.1f}" height="{(y1 - y0) * scale:.1f}">{title}</rect>'


def _title(axes: Axes, name: str, said: Sequence[tuple[str | None, str]]) -> str:
    categories = [text for label, text in said if label is None]
    values = [f"{label}: {text}" if label else text for label, text in said if label is not None]
    lines = dict.fromkeys(filter(None, [_heading(axes), name, *categories, *values]))
    return f"<title>{escape(chr(10).join(lines))}</title>"


def _said(axes: Axes, which: str, value: float) -> tuple[str | None, str]:
    """A coordinate in words: the axis's label, None where it has categories, and the value as its ticks say values."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    formatter, own = axis.get_major_formatter(), axes.fmt_xdata if which == "x" else axes.fmt_ydata
    rounded = value if float(value).is_integer() else float(f"{value:.4g}")
    if names := vars(axes).get(_CATEGORIES, {}).get(which):
        return None, names[min(max(round(value), 0), len(names) - 1)]
    if own is not None:
        return _label(axes, which), str(own(value))
    if isinstance(axis.get_major_locator(), FixedLocator):  # ticks with names of their own
        ticks = np.asarray(axis.get_majorticklocs())
        nearest = int(np.argmin(np.abs(ticks - value)))
        return axis.get_label_text() or None, formatter(ticks[nearest], nearest)
    numeric = isinstance(formatter, ScalarFormatter)
    return _label(axes, which), f"{rounded:.12g}" if numeric else formatter.format_data_short(rounded).strip()


def _label(axes: Axes, which: str) -> str:
    """An axis's label, or that of a panel it is shared with."""
    shared = axes.get_shared_x_axes() if which == "x" else axes.get_shared_y_axes()
    labels = [(ax.get_xlabel() if which == "x" else ax.get_ylabel()) for ax in (axes, *shared.get_siblings(axes))]
    return next(filter(None, labels), "")


def _heading(axes: Axes) -> str:
    """A panel's title, or that of the column it stands in."""
    titles = [ax.get_title(where) for ax in (axes, *_column(axes)) for where in ("left", "center", "right")]
    return next(filter(None, titles), "")


def _column(axes: Axes) -> list[Axes]:
    spec = axes.get_subplotspec()
    if spec is None or axes.figure is None:
        return []
    others = [(ax, other) for ax in axes.figure.axes if (other := ax.get_subplotspec()) is not None]
    return [ax for ax, other in others if (other.get_gridspec(), other.colspan) == (spec.get_gridspec(), spec.colspan)]


def _in_legend(figure: Figure, axes: Axes, line: Line2D) -> str:
    """What a legend calls marks that look like these; the same colour must do where its entry has no mark."""
    legends = [*figure.legends, *([own] if (own := axes.get_legend()) else [])]
    entries = [
        (handle, text.get_text())
        for legend in legends
        for handle, text in zip(legend.legend_handles, legend.get_texts(), strict=True)
        if isinstance(handle, Line2D)
    ]
    same = [(handle, text) for handle, text in entries if to_hex(handle.get_color()) == to_hex(line.get_color())]
    alike = [text for handle, text in same if _look(handle) == _look(line)]
    paler = [text for handle, text in entries if _look(handle) == _look(line) == (line.get_marker(), True)]
    unmarked = [text for handle, text in same if handle.get_marker() in _CAPS]
    return next(iter(alike or paler or unmarked), "")


def _look(line: Line2D) -> tuple[object, bool]:
    """The mark, and whether it is hollow."""
    return line.get_marker(), to_hex(line.get_markerfacecolor(), keep_alpha=True) in ("#00000000", "#ffffffff")
