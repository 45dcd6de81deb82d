"""Where runs are read so that they are alike in something other than their metrics: steps, accuracy or update norm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import exp, log

import numpy as np
import polars as pl

from geopd.claims.endpoints import NAMES, mean_of
from geopd.claims.interpolation import curves
from geopd.claims.roles import Cast
from geopd.results import Results
from geopd.results.statistics import first_crossing, isotonic

MATCHING_BENCHMARK, MATCHING_DECODING = "selection", "avg@8"
"""Accuracy is matched on another split than the one that is reported."""
DRAWS = 400
UNDEFINED_DRAWS = 0.05
"""With more undefined draws than this share, those that are defined are a selection: no interval is given."""


@dataclass(frozen=True)
class Match:
    """The step at which each run is read, the level they share by seed, and why a run is missing.

    ``draws`` are other steps, one mapping per resampling of the problems; a run that is undefined in one is missing.
    """

    steps: dict[str, float] = field(default_factory=dict)
    levels: dict[int, float] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)
    draws: list[dict[str, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Scores:
    """A run's accuracy on the matching split: steps ascending, mean, standard error and number of problems of each."""

    steps: tuple[float, ...]
    values: tuple[float, ...]
    errors: tuple[float, ...]
    problems: tuple[int, ...]

    def fit(self, values: Sequence[float] | None = None) -> list[float]:
        """The isotonic fit, weighted by problems; of other values at the same steps where they are given."""
        return isotonic(self.values if values is None else values, self.problems)


Matching = Callable[[Results, Cast, Sequence[str]], Match]


def at_equal_steps(results: Results, cast: Cast, roles: Sequence[str]) -> Match:
    """Every run of a seed at the largest step that all of them reached; for runs of one origin."""
    steps = _steps(results, cast)
    match = Match()
    for seed, runs in _groups(cast, roles).items():
        known = {role: steps[run] for role, run in runs.items() if steps.get(run)}
        if len(known) < 2:
            match.reasons.append("a single checkpoint leaves nothing to interpolate")
            continue
        match.levels[seed] = min(own[-1] for own in known.values())
        for role, own in known.items():
            if own[0] > match.levels[seed]:
                match.reasons.append(f"{NAMES[role]} was first saved after the common step")
            else:
                match.steps[runs[role]] = float(match.levels[seed])
    return match


def at_equal_norm(results: Results, cast: Cast, roles: Sequence[str]) -> Match:
    """Every run of a seed where it first reaches the largest relative update norm that all reach, linear in log norm.

    Reading a metric linearly in step at the step found is then reading it linearly in log norm.
    """
    _, norms = curves(results, mean_of("relative_update_norm"), cast.everyone)
    logs: dict[str, tuple[list[float], list[float]]] = {}
    for run, curve in norms.items():
        sizes = {step: size for step in curve.steps if (size := curve.at(step)) is not None and size > 0}
        if sizes:
            logs[run] = ([float(s) for s in sizes], [log(size) for size in sizes.values()])
    match = _at_level(_groups(cast, roles), logs, lambda fitted: max(fitted), "update norm")
    return Match(match.steps, {seed: exp(level) for seed, level in match.levels.items()}, match.reasons)


def at_equal_accuracy(results: Results, cast: Cast, roles: Sequence[str]) -> Match:
    """Every run of a seed where its isotonic avg@8 first crosses the smallest of their final ones; one origin only.

    With a single seed the problems are resampled: every score is drawn anew from a normal with its own standard
    error, the fits, the common level and the crossings are found again, with a fixed generator.
    """
    scores = _scores(results, _steps(results, cast))
    groups = _groups(cast, roles)
    match = _at_accuracy(groups, scores, {run: own.values for run, own in scores.items()})
    if len(groups) != 1 or len(match.steps) < 2:
        return match
    rng = np.random.default_rng(0)
    chosen = {run: scores[run] for run in sorted(match.steps)}
    for _ in range(DRAWS):
        drawn = {run: tuple(rng.normal(own.values, own.errors)) for run, own in chosen.items()}
        match.draws.append(_at_accuracy(groups, chosen, drawn).steps)
    return match


def _at_accuracy(
    groups: dict[int, dict[str, str]], scores: dict[str, Scores], values: dict[str, tuple[float, ...]]
) -> Match:
    fits = {run: (list(own.steps), own.fit(values[run])) for run, own in scores.items()}
    return _at_level(groups, fits, lambda fitted: fitted[-1], f"{MATCHING_DECODING} on {MATCHING_BENCHMARK}")


def _at_level(
    groups: dict[int, dict[str, str]],
    lines: dict[str, tuple[list[float], list[float]]],
    reached: Callable[[list[float]], float],
    what: str,
) -> Match:
    """Where each run's line first crosses the least of what the runs of its seed reached."""
    match = Match()
    for seed, runs in groups.items():
        for role in (role for role, run in runs.items() if run not in lines):
            match.reasons.append(f"{NAMES[role]} has no {what}")
        known = {role: lines[run] for role, run in runs.items() if run in lines}
        if len(known) < 2:
            continue
        level = match.levels[seed] = min(reached(fitted) for _, fitted in known.values())
        for role, (steps, fitted) in known.items():
            crossing = first_crossing(steps, fitted, level)
            if crossing is not None:
                match.steps[runs[role]] = crossing
            else:
                match.reasons.append(f"{NAMES[role]} reaches the common {what} before its first checkpoint")
    return match


def _groups(cast: Cast, roles: Sequence[str]) -> dict[int, dict[str, str]]:
    """By seed the runs that are to be alike; seeds with one alone have nothing to be like."""
    groups = {seed: {role: runs[role] for role in roles if role in runs} for seed, runs in sorted(cast.seeds.items())}
    return {seed: runs for seed, runs in groups.items() if len(runs) > 1}


def _steps(results: Results, cast: Cast) -> dict[str, list[int]]:
    rows = results.measurements.filter(pl.col("run").is_in(cast.everyone) & pl.col("other_run").is_null())
    lines = rows.select("run", "step").unique().drop_nulls("step").sort("run", "step")
    found: dict[str, list[int]] = {}
    for run, step in lines.iter_rows():
        found.setdefault(run, []).append(step)
    return {run: own for run, own in found.items() if len(own) > 1}


def _scores(results: Results, steps: dict[str, list[int]]) -> dict[str, Scores]:
    """Accuracies at the measured checkpoints; earlier or later ones have no metric to be read beside them."""
    kind = (pl.col("benchmark") == MATCHING_BENCHMARK) & (pl.col("decoding") == MATCHING_DECODING)
    lines = results.evaluations.filter(kind & pl.col("value").is_not_null()).sort("step")
    found: dict[str, Scores] = {}
    for run, own in steps.items():
        mine = lines.filter((pl.col("run") == run) & pl.col("step").is_in(own))
        if mine.height > 1:
            found[run] = Scores(
                tuple(map(float, mine["step"])),
                tuple(mine["value"]),
                tuple(mine["se"].fill_null(0.0)),
                tuple(mine["n"].fill_null(1).clip(1)),
            )
    return found
