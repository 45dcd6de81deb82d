"""A figure with its words: title, how to read it, what it shows here; or the reason it is not drawn."""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl
from matplotlib.figure import Figure

from geopd.report.style import RunStyle, run_styles
from geopd.results import Results
from geopd.results.metrics import format_value


@dataclass(frozen=True)
class Drawing:
    """One figure of the report. ``figure`` is None where there is nothing to draw; ``missing`` then says why."""

    name: str
    title: str
    reading: str
    shows: str = ""
    figure: Figure | None = None
    missing: str | None = None


@dataclass(frozen=True)
class Subject:
    """What all figures draw from: the results and the runs' styles."""

    results: Results
    styles: dict[str, RunStyle]

    @classmethod
    def of(cls, results: Results) -> Subject:
        """The subject of a results folder, read."""
        return cls(results, run_styles(results))

    def present(self, frame: pl.DataFrame) -> list[RunStyle]:
        """Styles of the runs in a frame, in display order."""
        runs = set(frame["run"])
        return [style for run, style in self.styles.items() if run in runs]


def main_benchmark(evaluations: pl.DataFrame) -> tuple[str, str] | None:
    """The benchmark and decoding to show where there is room for one.

    Sampled decoding before greedy, since its spread is smaller; then ``held_out``; then the most problems.
    """
    kinds = evaluations.group_by("benchmark", "decoding").agg(pl.col("n").max()).sort("benchmark", "decoding").rows()
    ranked = sorted(kinds, key=lambda k: (not k[1].startswith("avg@"), k[0] != "held_out", -(k[2] or 0)))
    return (ranked[0][0], ranked[0][1]) if ranked else None


def left_out(rows: pl.DataFrame) -> str:
    """A sentence counting the rows without a usable value; empty where there are none."""
    counts = {s: int((rows["status"] == s).sum()) for s in ("undefined", "unresolved", "failed")}
    total = sum(counts.values())
    if not total:
        return ""
    parts = ", ".join(f"{n} {status}" for status, n in counts.items() if n)
    return f" Left out: {parts} of {rows.height} values."


def without(rows: pl.DataFrame, text: str) -> str:
    """Why nothing can be drawn: ``text``, and the most frequent reason the rows give."""
    return f"{text} ({reason})" if (reason := commonest(rows)) else text


def commonest(rows: pl.DataFrame) -> str:
    """The most frequent note of the rows that have no usable value; empty where there is none."""
    notes = rows.filter(pl.col("status") != "ok")["note"].drop_nulls()
    return str(notes.mode().sort()[0]) if len(notes) else ""


def per_run(parts: dict[str, str], otherwise: str) -> str:
    """What each run shows, where they are few enough to read; else ``otherwise``."""
    return ", ".join(f"{run} {text}" for run, text in parts.items()) if len(parts) <= 6 else otherwise


def extremes(metric: str, values: dict[str, float]) -> str:
    """The lowest and highest run of a metric in words; the single run where there is one."""
    if len(values) == 1:
        ((run, value),) = values.items()
        return f"{run} {format_value(metric, value)}"
    low, high = min(values, key=values.__getitem__), max(values, key=values.__getitem__)
    return f"lowest {low} ({format_value(metric, values[low])}), highest {high} ({format_value(metric, values[high])})"
