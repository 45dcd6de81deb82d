"""Thresholds for pipelines: ``METRIC OP NUMBER`` against the default values of each run's last step."""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite

import polars as pl

from geopd.results.metrics import METRICS
from geopd.results.reading import Results
from geopd.results.summary import aggregate, rows_of

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_FORM = re.compile(r"\s*(\w+)\s*(>=|<=|>|<)\s*(\S+)\s*")


@dataclass(frozen=True, slots=True)
class Threshold:
    """A condition that a value must not meet."""

    metric: str
    operator: str
    bound: float

    def __str__(self) -> str:
        return f"{self.metric}{self.operator}{self.bound:g}"

    def crossed_by(self, value: float) -> bool:
        """Whether the value meets the condition."""
        return _OPERATORS[self.operator](value, self.bound)

    @property
    def worst_is_high(self) -> bool:
        """Whether larger values are worse."""
        return self.operator.startswith(">")


@dataclass(frozen=True, slots=True)
class Finding:
    """What one threshold found in one run: the offenders, worst first, and how much there was to decide on.

    ``decided`` is 0 where the run has no ``ok`` value of the metric: that is no pass. ``left_out`` counts undefined,
    unresolved and failed values.
    """

    threshold: Threshold
    run: str
    step: int | None
    crossed: list[tuple[str, float]]
    decided: int
    left_out: int

    @property
    def passed(self) -> bool:
        """Whether there was something to decide on and nothing crossed the threshold."""
        return self.decided > 0 and not self.crossed


def parse_threshold(text: str, known: Sequence[str] = ()) -> Threshold:
    """Read ``METRIC OP NUMBER`` with OP one of ``> >= < <=``.

    Args:
        text: such as ``update_sparsity>0.999``.
        known: metric names a folder has, beside the catalogue's.

    Raises:
        ValueError: if the form, the number or the metric's name is wrong; names the nearest metric.
    """
    match = _FORM.fullmatch(text)
    if match is None:
        raise ValueError(f"--fail-if {text!r}: not of the form 'METRIC OP NUMBER', such as 'update_sparsity>0.999'")
    metric, sign, number = match.groups()
    names = sorted({*METRICS, *known})
    if metric not in names:
        near = difflib.get_close_matches(metric, names, n=1, cutoff=0.0)[0]
        raise ValueError(f"--fail-if {text!r}: no metric {metric!r}; did you mean {near!r}?")
    try:
        bound = float(number)
    except ValueError:
        bound = float("nan")
    if not isfinite(bound):
        raise ValueError(f"--fail-if {text!r}: {number!r} is not a finite number")
    return Threshold(metric, sign, bound)


def check_thresholds(
    results: Results, thresholds: Sequence[Threshold], *, runs: Sequence[str] = (), over: str = "matrix"
) -> list[Finding]:
    """Hold every threshold against every run (or the named ones) at its last step, over the layers' 2-D weights.

    Args:
        results: a results folder, read.
        thresholds: the conditions that must not be met.
        runs: the runs to look at; none means all.
        over: ``matrix`` looks at each matrix, ``mean`` at the run's mean (sparsity weighted by parameters).

    Raises:
        ValueError: if the folder lacks a named run, has none at all, or ``over`` is unknown.
    """
    if over not in ("matrix", "mean"):
        raise ValueError(f"--over {over!r}: use 'matrix' or 'mean'")
    known = sorted(set(results.runs["run"]) | set(results.measurements["run"]))
    if not known:
        raise ValueError(f"{results.root}: holds no run; measure one with `geopd measure --out {results.root}`")
    if unknown := [run for run in runs if run not in known]:
        raise ValueError(f"--run {unknown[0]!r}: {results.root} has {', '.join(known)}")
    return [_find(results, threshold, run, over) for threshold in thresholds for run in (runs or known)]


def _find(results: Results, threshold: Threshold, run: str, over: str) -> Finding:
    rows = rows_of(results, threshold.metric).filter(pl.col("run") == run)
    good = rows.filter(pl.col("status") == "ok")
    step = rows["step"][0] if rows.height else None
    if over == "mean":
        means = aggregate(good)
        values = [(f"mean over {m} matrices", v) for m, v in means.select("matrices", "value").iter_rows()]
    else:
        values = list(good.select("matrix", "value").iter_rows())
    crossed = [(name, value) for name, value in values if threshold.crossed_by(value)]
    crossed.sort(key=lambda item: item[1], reverse=threshold.worst_is_high)
    return Finding(threshold, run, step, crossed, len(values), rows.height - good.height)
