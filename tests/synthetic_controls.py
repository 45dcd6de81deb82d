"""Results folders of projection arms and controls with planted accuracies and stable ranks, made up in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from geopd.results import EVALUATIONS, MEASUREMENTS, NULLS, RUNS, Identity, Measurement, Results, Status, row

MATRICES = ("layers.0.mlp.up_proj", "layers.1.self_attn.q_proj")
START = 40
Evaluated = Mapping[tuple[int, str, str], float]
"""Accuracy by step, benchmark and decoding."""


@dataclass(frozen=True)
class Made:
    """A run as it shall come out; ``ranks`` is its stable rank by step, or one for all steps."""

    name: str
    paradigm: str
    seed: int = 0
    tags: Mapping[str, str] = field(default_factory=dict)
    steps: Sequence[int] = (40, 80, 120, 160)
    ranks: float | Mapping[int, float] = 4.0
    accuracy: Evaluated = field(default_factory=dict)
    origin: str | None = None
    unresolved: bool = False


def made_results(root: Path, runs: Sequence[Made], metric: str = "stable_rank_denoised") -> Results:
    """The tables of these runs; every seed has its own base and anchor unless a run names its origin."""
    return Results(root, _measurements(runs, metric), pl.DataFrame(schema=NULLS), _runs(runs), _evaluations(runs), {})


def _runs(runs: Sequence[Made]) -> pl.DataFrame:
    import json

    lines = []
    for run in runs:
        origin = run.origin or f"{'base' if run.paradigm == 'sft' else 'anchor'}-{run.seed}"
        lines.append(
            {
                "run": run.name,
                "paradigm": run.paradigm,
                "seed": run.seed,
                "origin": origin,
                "origin_digest": origin,
                "path": run.name,
                "steps": list(run.steps),
                "digests": [f"{run.name}-{step}" for step in run.steps],
                "tags": json.dumps(dict(run.tags)),
            }
        )
    return pl.DataFrame(lines, schema=RUNS)


def _measurements(runs: Sequence[Made], metric: str) -> pl.DataFrame:
    lines: list[dict[str, Any]] = []
    for run in runs:
        for step in run.steps:
            rank = run.ranks if isinstance(run.ranks, float | int) else run.ranks[step]
            for index, matrix in enumerate(MATRICES):
                at = Identity(run.name, step, matrix, index, matrix.split(".")[-1], 8, 8)
                shaky = run.unresolved and index == 0
                status, note = (Status.UNRESOLVED, "rounding noise dominates") if shaky else (Status.OK, None)
                # The mean over matrices is the planted rank.
                value = rank * (0.8 if index == 0 else 1.2)
                lines.append(row(at, Measurement(metric, "view=native", value, 0.0, status, "planted", note)))
                for other, number in (("update_norm", 0.1 * (index + 1)), ("hill_tail", 2.0 + index)):
                    lines.append(row(at, Measurement(other, "view=native", number, 0.0, Status.OK, "planted")))
    return pl.DataFrame(lines, schema=MEASUREMENTS)


def _evaluations(runs: Sequence[Made]) -> pl.DataFrame:
    lines = [
        (run.name, step, benchmark, decoding, 500, value, float(np.sqrt(value * (1 - value) / 2000)))
        for run in runs
        for (step, benchmark, decoding), value in run.accuracy.items()
    ]
    return pl.DataFrame(lines, schema=EVALUATIONS, orient="row")


def arm_tags(basis: str, k: int | None = None, mode: str = "gradient", **more: str) -> dict[str, str]:
    """The tags of a projection arm."""
    return {"projection": basis, "start": str(START), **({"k": str(k), "mode": mode} if k else {}), **more}


def arm(paradigm: str, seed: int, accuracy: float, basis: str, k: int | None = None, **options: str) -> Made:
    """An arm of three checkpoints with this held-out accuracy at its end, and four points more on long carries."""
    tags = arm_tags(basis, k, **options)
    name = "_".join([paradigm, *(v for key, v in tags.items() if key != "start"), f"s{seed}"])
    scores = {(120, "held_out", "avg@4"): accuracy, (120, "carries", "avg@4"): accuracy + 0.04}
    return Made(name, paradigm, seed, tags, (40, 80, 120), accuracy=scores)


def baseline(paradigm: str, seed: int, before: float) -> Made:
    """A run without tags that had this accuracy where the arms start."""
    accuracy = {(START, "selection", "avg@8"): before, (160, "selection", "avg@8"): before + 0.1}
    return Made(f"{paradigm}-s{seed}", paradigm, seed, ranks=4.0 + seed / 100, accuracy=accuracy)


def planted_arms(seeds: int = 3, *, before: float = 0.5, **ends: Sequence[float] | float) -> list[Made]:
    """Baselines and arms by seed: ``opd_update16=0.7`` or one number a seed, ``sft_free=...``; the rest is absent.

    Numbers given once get a small scatter over seeds that all arms share, and a smaller one of their own.
    """
    runs = [baseline(paradigm, s, before) for paradigm in sorted({n.split("_")[0] for n in ends}) for s in range(seeds)]
    rng = np.random.default_rng(5)
    shared = rng.normal(0, 0.02, seeds)
    for name, end in ends.items():
        paradigm, basis, *more = name.split("_")
        width = int("".join(c for c in basis if c.isdigit()) or 0)
        kind = {"free": "none"}.get(basis, basis.rstrip("0123456789"))
        own = rng.normal(0, 0.002, seeds)
        values = [end + shared[s] + own[s] for s in range(seeds)] if isinstance(end, float) else list(end)
        options = {"mode": "adapter"} if more else {}
        runs += [arm(paradigm, s, value, kind, width or None, **options) for s, value in enumerate(values)]
    return runs
