"""Lines and marks with their seeds: a shaded 95% t interval from three seeds on, thin lines for two."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from geopd.report.style import INK, MUTED, percent_axis

BAND = "95% t interval over seeds"


class Clock:
    """Steps as they are, or as a share of each run's last step where the runs' lengths are too far apart."""

    def __init__(self, lines: pl.DataFrame) -> None:
        self.last = dict(lines.group_by("run").agg(pl.col("step").max()).iter_rows())
        ends = [end for end in self.last.values() if end]
        self.relative = bool(ends) and max(ends) > 3 * min(ends)

    def times(self, run: str, steps: Iterable[int]) -> list[float]:
        """Positions of steps on the axis."""
        return [step / self.last[run] if self.relative and self.last[run] else float(step) for step in steps]

    def label(self, axes: Axes) -> None:
        """Name and tick the axis."""
        axes.set_xlabel("training progress" if self.relative else "training step")
        if self.relative:
            percent_axis(axes)
        else:
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def draw_path(axes: Axes, times: list[float], path: pl.DataFrame, **look: Any) -> None:
    """The mean of a folded path (columns ``value half each seeds``) and what its seeds allow to show of the spread."""
    axes.plot(times, path["value"], **look)
    if path.is_empty():
        return
    colour = look.get("color", INK)
    if path["seeds"].min() == 2:  # an interval from two seeds is wider than any panel
        for values in np.array(path["each"].to_list()).T:
            axes.plot(times, values, color=colour, linewidth=0.6, alpha=0.7)
    elif (path["half"].is_not_null()).all():
        low, high = (path["value"] - path["half"]).to_numpy(), (path["value"] + path["half"]).to_numpy()
        axes.fill_between(times, low, high, color=colour, alpha=0.16, linewidth=0)


def keep_to(axes: Axes, lines: pl.DataFrame) -> None:
    """Vertical limits that show every value and, as long as it leaves the values readable, the interval around them."""
    if lines.is_empty() or lines["seeds"].max() == 1:
        return
    low, high = float(lines["value"].min()), float(lines["value"].max())  # type: ignore[arg-type]
    span = (high - low) or 0.1 * abs(high) or 1.0
    banded = lines.filter((pl.col("seeds") > 2) & pl.col("half").is_not_null())
    if not banded.is_empty():
        low = min(low, max(low - span, banded.select((pl.col("value") - pl.col("half")).min()).item()))
        high = max(high, min(high + span, banded.select((pl.col("value") + pl.col("half")).max()).item()))
    axes.set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low))


def whisker(axes: Axes, y: float, line: dict[str, Any], colour: str, size: float = 5) -> None:
    """The 95% t interval over seeds as a horizontal whisker; with two seeds a dot for each instead."""
    if line["seeds"] == 2:
        axes.plot(line["each"], [y, y], marker=".", color=colour, linestyle="-", linewidth=0.7, markersize=size)
    elif line["half"] is not None:
        look: dict[str, Any] = {"ecolor": INK, "elinewidth": 1.1, "capsize": 2.5, "zorder": 3}
        axes.errorbar(line["value"], y, xerr=line["half"], linestyle="", **look)


def band_handle() -> Patch:
    """Legend entry of the shaded interval."""
    return Patch(facecolor=MUTED, alpha=0.25, linewidth=0, label=BAND)
