"""How far projection arms left their subspace: the leak that each run's record keeps, by group of seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from geopd.report.groups import Group, half_width
from geopd.results import Results

_LEAST = 5e-4
"""A smaller share rounds to nothing as a percentage."""


@dataclass(frozen=True)
class Leak:
    """Leak of a group: share of the energy of the increment since the projection began, outside its subspace.

    ``value`` is the mean over seeds, ``half`` half its 95% t interval (None with one seed), ``worst`` the largest share
    of a single matrix over all seeds (None where it was not stored).
    """

    value: float
    half: float | None
    worst: float | None


def leak_of(results: Results, group: Group) -> Leak | None:
    """The leak of a group, from ``manifest.json``; None where not every run has one."""
    records = [_record(results, run) for run in group.runs]
    shares = [record["leak"] for record in records if record.get("leak") is not None]
    if len(shares) < len(group.runs):
        return None
    worst = [found["leak"] for record in records if (found := record.get("leak_worst"))]
    return Leak(fmean(shares), half_width(shares), max(worst, default=None))


def _record(results: Results, run: str) -> dict[str, Any]:
    settings = results.manifest.get("inputs", {}).get(run, {}).get("run_settings") or {}
    return settings.get("projection_record") or {}


def leak_cell(leak: Leak | None) -> tuple[str, str]:
    """A leak for a table: the share, and below it its interval and the worst matrix."""
    if leak is None:
        return "–", ""
    half = "" if leak.half is None or leak.value < _LEAST else f"± {100 * leak.half:.1f}"
    worst = "" if leak.worst is None else f"worst matrix {share(leak.worst)}"
    return share(leak.value), ", ".join(filter(None, (half, worst)))


def share(value: float) -> str:
    """A share in percent; as a power of ten where percent would round it to nothing."""
    return f"{100 * value:.1f} %" if value >= _LEAST else f"{value:.0e}"


def leak_range(leaks: Sequence[Leak]) -> str:
    """The smallest and the largest mean of several arms in words; empty for none."""
    if not leaks:
        return ""
    low, high = min(leak.value for leak in leaks), max(leak.value for leak in leaks)
    return share(low) if low == high else f"{share(low)} to {share(high)}"
