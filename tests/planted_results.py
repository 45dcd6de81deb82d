"""Results in memory with planted numbers: what a run's metric is at each checkpoint is what the test wrote down.

Two matrices of one layer, equally large, carry 0.9 and 1.1 times the number, so every mean is the number itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from geopd.results import EVALUATIONS, MEASUREMENTS, NULLS, RUNS, Results

SETTINGS = {
    "update_sparsity": "eta=0.001;view=bf16",
    "principal_overlap": "alpha=0.3;eta=0.001;rank=2;view=bf16",
    "low_magnitude_overlap": "alpha=0.3;eta=0.001;view=bf16",
    "hill_tail": "k=16;view=native",
}
STEPS = (20, 40, 60, 80)
PROBLEMS = 500

Values = Mapping[str, Sequence[float | None]]


@dataclass(frozen=True)
class Planted:
    """A run: per metric a number for each step (None is undefined), per metric a null's, and accuracies by step."""

    name: str
    paradigm: str
    metrics: Values
    seed: int | None = 0
    origin: str = "anchor"
    steps: Sequence[int | None] = STEPS
    nulls: Values = field(default_factory=dict)
    null: str = "gaussian"
    accuracy: Sequence[float] = ()
    se: float = 0.01
    tags: Mapping[str, str] = field(default_factory=dict)
    unresolved: frozenset[tuple[str, int]] = frozenset()


def results_of(*runs: Planted) -> Results:
    """The tables of these runs; each seed has origins of its own, ``base`` apart from ``anchor``."""
    return Results(
        root=Path("planted"),
        measurements=pl.DataFrame([row for run in runs for row in _measurements(run)], schema=MEASUREMENTS),
        nulls=pl.DataFrame([row for run in runs for row in _nulls(run)], schema=NULLS),
        runs=pl.DataFrame([_run(run) for run in runs], schema=RUNS),
        evaluations=pl.DataFrame([row for run in runs for row in _evaluations(run)], schema=EVALUATIONS),
        manifest={"parts": {}},
    )


def _run(run: Planted) -> dict[str, Any]:
    return {
        "run": run.name,
        "paradigm": run.paradigm,
        "seed": run.seed,
        "origin": f"models/{run.origin}",
        "origin_digest": f"{run.origin} of seed {run.seed}",
        "path": f"models/{run.name}",
        "steps": [step for step in run.steps if step is not None],
        "digests": [],
        "tags": json.dumps(dict(run.tags)),
    }


def _rows(run: Planted, values: Values) -> list[tuple[dict[str, Any], float | None]]:
    return [
        (
            {
                "run": run.name,
                "step": step,
                "other_run": None,
                "matrix": f"layers.0.{module}",
                "layer": 0,
                "module": module,
                "rows": 8,
                "cols": 8,
                "metric": metric,
                "setting": SETTINGS.get(metric, "view=native"),
                "is_default": True,
            },
            None if value is None else value * factor,
        )
        for metric, line in values.items()
        for step, value in zip(run.steps, line, strict=True)
        for module, factor in (("q_proj", 0.9), ("o_proj", 1.1))
    ]


def _measurements(run: Planted) -> list[dict[str, Any]]:
    found = []
    for row, value in _rows(run, run.metrics):
        shaky = (row["metric"], row["step"]) in run.unresolved
        status = "undefined" if value is None else "unresolved" if shaky else "ok"
        note = None if status == "ok" else "planted"
        found.append(row | {"value": value, "error": 0.0, "status": status, "method": "planted", "note": note})
    return found


def _nulls(run: Planted) -> list[dict[str, Any]]:
    about = {"null": run.null, "sd": None, "draws": 0, "method": "planted"}
    return [row | about | {"mean": value} for row, value in _rows(run, run.nulls) if value is not None]


def _evaluations(run: Planted) -> list[dict[str, Any]]:
    about = {"run": run.name, "benchmark": "selection", "decoding": "avg@8", "n": PROBLEMS, "se": run.se}
    return [
        about | {"step": step, "value": value}
        for step, value in zip(run.steps, run.accuracy or [None] * len(run.steps), strict=True)
        if value is not None
    ]
