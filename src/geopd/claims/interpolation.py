"""A run's read-out between its checkpoints, over the same matrices at both ends of each stretch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np
import polars as pl

from geopd.claims.endpoints import Endpoint, Numbers, only
from geopd.results import Results

_KEY = ["run", "matrix", "metric", "setting"]

Ends = tuple[float, float]


@dataclass(frozen=True)
class Curve:
    """A read-out of one run along its checkpoints.

    Attributes:
        steps: the checkpoints, ascending.
        values: per stretch between neighbouring checkpoints the number at both of its ends, over the matrices that are
            ``ok`` at both; a stretch without such matrices is missing. A matrix that leaves between two stretches
            makes them disagree where they meet, but never bends one.
        nulls: the same of the null.
        end: number and null of the last checkpoint over all its matrices, each None where it is not known.
        unresolved: stretches with a matrix left out because its value is not reliable.
    """

    steps: tuple[int, ...]
    values: dict[int, Ends] = field(default_factory=dict)
    nulls: dict[int, Ends] = field(default_factory=dict)
    end: tuple[float | None, float | None] = (None, None)
    unresolved: set[int] = field(default_factory=set)

    def stretch(self, step: float) -> int | None:
        """Index of the stretch that holds a step, the later one at a checkpoint; None outside the checkpoints."""
        if len(self.steps) < 2 or not self.steps[0] <= step <= self.steps[-1]:
            return None
        return min(int(np.searchsorted(self.steps, step, side="right")) - 1, len(self.steps) - 2)

    def at(self, step: float, *, null: bool = False) -> float | None:
        """The number at a step, linear within the stretch; None where it is not known."""
        if self.steps and step == self.steps[-1]:
            return self.end[int(null)]
        i = self.stretch(step)
        ends = None if i is None else (self.nulls if null else self.values).get(i)
        if i is None or ends is None:
            return None
        weight = (step - self.steps[i]) / (self.steps[i + 1] - self.steps[i])
        return ends[0] + weight * (ends[1] - ends[0])


def curves(results: Results, endpoint: Endpoint, runs: Iterable[str]) -> tuple[Numbers, dict[str, Curve]]:
    """The read-out at the end and along the checkpoints of the named runs.

    The read-out is linear in the metrics' values, so interpolating it over the same matrices is interpolating each of
    them. Every end of every stretch is given a name as if it were a run, so two read-outs do for all of them.
    """
    mine = only(results, runs, endpoint.metrics)
    steps: dict[str, list[int]] = {}
    known = mine.measurements.select("run", "step").unique().drop_nulls("step").sort("run", "step")
    for run, step in known.iter_rows():
        steps.setdefault(run, []).append(step)
    end, along = endpoint.read(mine), endpoint.read(_stretches(mine, steps))
    found = {run: Curve(tuple(own), end=(end.values.get(run), end.nulls.get(run))) for run, own in steps.items()}
    for run, curve in found.items():
        for i in range(len(curve.steps) - 1):
            ends = tuple(_name(run, i, side) for side in (0, 1))
            for known_values, target in ((along.values, curve.values), (along.nulls, curve.nulls)):
                if all(name in known_values for name in ends):
                    target[i] = (known_values[ends[0]], known_values[ends[1]])
            if not along.unresolved.isdisjoint(ends):
                curve.unresolved.add(i)
    return end, found


def _name(run: str, i: int, side: int) -> str:
    return f"{run}\x1f{i}\x1f{side}"


def _stretches(results: Results, steps: dict[str, list[int]]) -> Results:
    """A folder with a run for each end of each stretch; what is not ``ok`` at one end of a stretch is so at neither."""
    lines = [
        {"run": run, "step": own[i + side], "other": own[i + 1 - side], "name": _name(run, i, side)}
        for run, own in steps.items()
        for i in range(len(own) - 1)
        for side in (0, 1)
    ]
    schema = {"run": pl.String, "step": pl.Int64, "other": pl.Int64, "name": pl.String}
    ends = pl.DataFrame(lines, schema=schema)
    rows = results.measurements
    theirs = rows.select(*_KEY, pl.col("step").alias("other"), pl.col("status").alias("theirs"))
    status = pl.when(pl.col("status") != "ok").then("status").otherwise(pl.col("theirs").fill_null("undefined"))
    named = rows.join(ends, on=["run", "step"]).join(theirs, on=[*_KEY, "other"], how="left")
    nulls = results.nulls.join(ends, on=["run", "step"])
    return replace(
        results,
        measurements=named.with_columns(status=status, run="name").drop("name", "other", "theirs"),
        nulls=nulls.with_columns(run="name").drop("name", "other"),
    )
