"""A figure with its words: title, what it shows here, how to read it, what chance would give; or why it is absent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import polars as pl
from matplotlib.figure import Figure

from geopd.report.groups import Group, fold, groups_of
from geopd.report.style import RunStyle, group_styles
from geopd.results import Results
from geopd.results.metrics import format_value

KL = "kl_to_origin"
"""Benchmark whose value is no accuracy but nats per response."""


@dataclass(frozen=True)
class Drawing:
    """One figure of the report. ``figure`` is None where there is nothing to draw; ``missing`` then says why."""

    name: str
    title: str
    reading: str
    chance: str
    shows: str = ""
    figure: Figure | None = None
    missing: str | None = None
    counterpart: str = ""
    """The paper's table or figure that it answers."""

    def drawn(self, figure: Figure, shows: str) -> Drawing:
        """With its figure and what it shows here."""
        return replace(self, figure=figure, shows=shows)

    def absent(self, reason: str) -> Drawing:
        """Without a figure, for this reason."""
        return replace(self, missing=reason)


@dataclass(frozen=True)
class Subject:
    """What all figures draw from: the results, and its runs in groups of seeds with a style each."""

    results: Results
    groups: dict[str, Group]
    styles: dict[str, RunStyle]

    @classmethod
    def of(cls, results: Results) -> Subject:
        """The subject of a results folder, read."""
        groups = groups_of(results)
        return cls(results, {group.name: group for group in groups}, group_styles(groups))

    @cached_property
    def baselines(self) -> Subject:
        """The untagged runs only, or all where every run has tags."""
        return self.only([g for g in self.groups.values() if not g.tags] or list(self.groups.values()))

    def only(self, groups: Sequence[Group]) -> Subject:
        """The same subject with nothing but these groups, in the tables too."""
        names = {group.name for group in groups}
        if names == set(self.groups):
            return self
        runs = pl.col("run").is_in([run for group in groups for run in group.runs])
        kept = {
            name: getattr(self.results, name).filter(runs) for name in ("measurements", "nulls", "runs", "evaluations")
        }
        styles = {name: style for name, style in self.styles.items() if name in names}
        return Subject(replace(self.results, **kept), {group.name: group for group in groups}, styles)

    @cached_property
    def accuracies(self) -> pl.DataFrame:
        """The evaluations that are accuracies."""
        return self.results.evaluations.filter(pl.col("benchmark") != KL)

    def fold(self, lines: pl.DataFrame, by: Sequence[str] = (), value: str = "value") -> pl.DataFrame:
        """Means and intervals over seeds, see ``groups.fold``; ``run`` then holds the names of groups."""
        return fold(list(self.groups.values()), lines, by, value)

    def present(self, frame: pl.DataFrame) -> list[RunStyle]:
        """Styles of the groups in a folded frame, in display order."""
        names = set(frame["run"])
        return [style for name, style in self.styles.items() if name in names]

    @property
    def seeded(self) -> bool:
        """Whether any group has several seeds."""
        return any(len(group.runs) > 1 for group in self.groups.values())


def main_benchmark(evaluations: pl.DataFrame) -> tuple[str, str] | None:
    """The benchmark and decoding to show where there is room for one.

    Sampled decoding before greedy, since its spread is smaller; then ``held_out``; then the most problems.
    """
    accuracies = evaluations.filter(pl.col("benchmark") != KL)
    kinds = accuracies.group_by("benchmark", "decoding").agg(pl.col("n").max()).sort("benchmark", "decoding").rows()
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
