"""One run's path beside another's: log ratios at common checkpoints, and how far baselines lie apart between seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import log, sqrt
from statistics import stdev
from typing import Any

import polars as pl

from geopd.claims.tagged import TaggedRun, redrawn, tagged_runs
from geopd.results import Results
from geopd.results.summary import rows_of

RANKS = ("stable_rank_denoised", "stable_rank")
DESCRIBED = ("update_norm", "hill_tail")
_UNRESOLVED = "the stable rank without rounding noise is not resolved for every matrix and checkpoint"


@dataclass(frozen=True)
class Path:
    """Means over matrices by step and run, at the checkpoints that all runs share."""

    values: dict[int, dict[str, float]]

    @property
    def end(self) -> int:
        """The last common step."""
        return max(self.values)

    def log_ratio(self, step: int, run: TaggedRun, other: TaggedRun) -> float:
        """Of ``run`` over ``other`` at a step."""
        return log(self.values[step][run.name] / self.values[step][other.name])

    def furthest(self, run: TaggedRun, other: TaggedRun) -> int:
        """The step at which the two lie furthest apart."""
        return max(sorted(self.values), key=lambda step: abs(self.log_ratio(step, run, other)))


@dataclass(frozen=True)
class Readouts:
    """Path metrics of a results folder, and the baselines they are held against."""

    results: Results

    @cached_property
    def runs(self) -> list[TaggedRun]:
        """Every measured run of the folder."""
        measured = set(self.results.measurements["run"])
        return [run for run in tagged_runs(self.results) if run.name in measured]

    @cached_property
    def _rows(self) -> dict[str, pl.DataFrame]:
        return {name: rows_of(self.results, name, every_step=True) for name in (*RANKS, *DESCRIBED)}

    @cached_property
    def metric(self) -> str:
        """The stable rank without rounding noise where the folder has it, else the plain one."""
        return next((name for name in RANKS if not self._rows[name].is_empty()), RANKS[-1])

    def shaky(self, runs: Sequence[TaggedRun]) -> str | None:
        """Why stable ranks of these runs settle nothing, or None."""
        rows = self._rows[self.metric].filter(pl.col("run").is_in([run.name for run in runs]))
        return _UNRESOLVED if self.metric == RANKS[-1] or "unresolved" in set(rows["status"]) else None

    def path(self, metric: str, runs: Sequence[TaggedRun]) -> Path:
        """A metric's means over the matrices that are ``ok`` in all the runs at every checkpoint that they share."""
        names = {run.name for run in runs}
        rows = self._rows[metric].filter(pl.col("run").is_in(names) & pl.col("step").is_not_null())
        rows = rows.filter(pl.col("run").n_unique().over("step") == len(names))
        good = rows.filter(pl.col("status") == "ok")
        checkpoints = rows.select("run", "step").n_unique()
        good = good.filter(pl.len().over("matrix") == checkpoints)
        found: dict[int, dict[str, float]] = {}
        for run, step, value in good.group_by("run", "step").agg(pl.col("value").mean()).sort("step").iter_rows():
            if value > 0:
                found.setdefault(step, {})[run] = value
        return Path({step: values for step, values in found.items() if len(values) == len(names)})

    def spread(self, steps: Sequence[int], baselines: dict[int, TaggedRun]) -> tuple[float, int] | None:
        """What the log ratio of a control to its baseline may vary by between seeds, and its degrees of freedom.

        One control cannot show it. A control changes the signal, so taken is what changing the paradigm varies by: the
        largest sd over seeds of the log ratio between the baselines and those of another paradigm from the same
        origins, over paradigms and the steps they share. Without such, ``sqrt(2) * sd`` of the baselines' own logs, as
        if control and baseline had nothing in common.

        Returns:
            None with fewer than two baselines, or where they share origins or lack the steps.
        """
        alone = [self.path(self.metric, [run]).values for run in baselines.values()]
        if not steps or not redrawn(baselines) or not all(set(steps) <= set(path) for path in alone):
            return None
        spreads = [self._beside(steps, baselines, paradigm) for paradigm in sorted({run.paradigm for run in self.runs})]
        if known := [spread for spread in spreads if spread is not None]:
            return max(known)
        logs = [[log(next(iter(path[step].values()))) for path in alone] for step in steps]
        return sqrt(2) * max(stdev(values) for values in logs), len(alone) - 1

    def _beside(self, steps: Sequence[int], baselines: dict[int, TaggedRun], paradigm: str) -> tuple[float, int] | None:
        """The sd over seeds of another paradigm's baselines against these, where it is largest."""
        paths = []
        for run in baselines.values():
            place = paradigm, run.seed, run.origin
            same = (r for r in self.runs if not r.tags and r != run and (r.paradigm, r.seed, r.origin) == place)
            other = next(same, None)
            if other is not None:
                paths.append((self.path(self.metric, [run, other]), other, run))
        shared = set(steps).intersection(*(path.values for path, *_ in paths))
        if len(paths) < 2 or not shared:
            return None
        found = [stdev(path.log_ratio(step, *pair) for path, *pair in paths) for step in sorted(shared)]
        return max(found), len(paths) - 1

    def described(self, run: TaggedRun, step: int) -> dict[str, Any]:
        """Stable rank, update norm and Hill tail at a step, each over the run's own ``ok`` matrices."""
        found = {name: self.path(name, [run]).values.get(step, {}) for name in (self.metric, *DESCRIBED)}
        return {name: values[run.name] for name, values in found.items() if values}

    def signal_share(self, run: TaggedRun) -> float | None:
        """Distillation's share of a mixed signal over training, if the folder's ``costs.json`` has it.

        ``alpha rms(A_OPD) / (alpha rms(A_OPD) + (1 - alpha) rms(A_RLVR))`` of the signals as mixed, averaged over the
        trainer's log (``opd/signal_share``).
        """
        shares = (row.get("signal_share") for row in self.results.costs if row["stage"] == run.name)
        return next((float(share) for share in shares if share is not None), None)
