"""A full study made up without training: seeds, projection arms, controls, mixtures, a learning-rate ladder, variants.

Tags, labels and benchmarks are those of the real one. What differs between runs is planted: the projected arms of
fine-tuning lose accuracy and those of distillation do not, teacher rollouts leave the baseline's rank path.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from math import log, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from geopd.results import EVALUATIONS, digest_of, write_json
from synthetic_results import STUDY, Folder, Run

SEEDS = (0, 1, 2)
STARTS = {"sft": 90, "opd": 32, "rlvr": 48}
STEPS = {
    "sft": (25, 90, 250, 450),
    "opd": (20, 32, 80, 160),
    "rlvr": (20, 48, 120, 240),
    "sft_continued": (20, 80, 160),
}
BASES: tuple[dict[str, str], ...] = (
    {"projection": "none"},
    {"projection": "update", "k": "16", "mode": "gradient"},
    {"projection": "random", "k": "16", "mode": "gradient"},
    {"projection": "origin", "k": "16", "mode": "gradient"},
    {"projection": "update", "k": "4", "mode": "gradient"},
    {"projection": "random", "k": "4", "mode": "gradient"},
    {"projection": "update", "k": "16", "mode": "adapter"},
    {"projection": "update", "k": "16", "mode": "adapter", "lr_scale": "sqrt"},
)
AT_THE_END = ("carries", "held_out", "no_working", "strings", "subtraction", "three_digits")


@dataclass(frozen=True)
class Tagged(Run):
    """A run with tags, as the study's run.json carries them."""

    tags: dict[str, str] = field(default_factory=dict)


def baseline(name: str, seed: int, *, suffix: bool = True) -> Tagged:
    """The baseline run of a paradigm for one seed; a seed moves its size and its ranks a little."""
    plain = next(run for run in STUDY if run.name == name)
    wobble = 1 + 0.06 * (seed - 1)
    low, high = plain.stable_rank
    return Tagged(
        name=f"{name}-s{seed}" if suffix else name,
        paradigm=plain.paradigm,
        size=plain.size * wobble,
        stable_rank=(low * wobble, high * wobble),
        hill=plain.hill,
        lock=plain.lock,
        steps=STEPS[name],
        origin=plain.origin,
        seed=seed,
        accuracy=(plain.accuracy[0], plain.accuracy[1] + 0.01 * (seed - 1)),
    )


def arms(seed: int) -> list[Tagged]:
    """The projection arms of one seed."""
    found = []
    for paradigm, start in STARTS.items():
        origin = baseline(paradigm, seed)
        for tags in BASES if paradigm != "rlvr" else BASES[:3]:
            loss = 0.0 if tags["projection"] == "none" or paradigm == "opd" else 0.03 if tags["k"] == "16" else 0.08
            label = "-".join([paradigm, *tags.values()])
            end = origin.steps[-1] - start  # type: ignore[operator]
            found.append(
                replace(
                    origin,
                    name=f"{label}-s{seed}",
                    tags=tags | {"start": str(start)},
                    steps=(end // 4, end // 2, end),
                    size=origin.size * 0.9,
                    accuracy=(origin.accuracy[0] + 0.05, origin.accuracy[1] - loss),
                )
            )
    return found


def controls() -> list[Tagged]:
    """Token sparsification, teacher rollouts, the mixture, the ladder and the variants of seed 0."""
    opd, rlvr = baseline("opd", 0), baseline("rlvr", 0)
    runs = [
        replace(opd, name=f"opd-{kind}-{rho}-s0", tags={"token_selection": kind, "rho": rho}, size=opd.size * 0.95)
        for kind in ("top-gap", "random")
        for rho in ("0.25", "0.5")
    ]
    runs.append(replace(opd, name="opd-teacher-s0", tags={"rollouts": "teacher"}, stable_rank=(4.2, 6.5)))
    for alpha in ("1", "0.75", "0.5", "0.25", "0.05", "0.01", "0"):
        a = float(alpha)
        for normalised in (False, True):
            if not normalised and alpha in "10":
                continue
            tags = {"alpha": alpha} | ({"normalise": "true"} if normalised else {})
            paradigm = {"1": "opd", "0": "rlvr"}.get(alpha, "mix")
            name = f"mix-{alpha}{'-norm' if normalised else ''}-s0"
            rank = (5.0, 4.2 + 1.5 * (1 - a) ** 3)
            size = rlvr.size + a * (opd.size - rlvr.size)
            runs.append(replace(opd, name=name, paradigm=paradigm, tags=tags, stable_rank=rank, size=size))
    for run in (opd, rlvr):
        for rate in ("1e-05", "0.0001", "0.0003"):
            name, tags = f"{run.paradigm}-lr{rate}-s0", {"learning_rate": rate}
            runs.append(replace(run, name=name, tags=tags, size=run.size * float(rate) / 3e-5))
    runs += [
        replace(opd, name=f"opd-{variant}-s0", tags={"variant": variant}, size=opd.size * 1.1)
        for variant in ("teacher_small", "student_small", "strings", "moe_teacher")
    ]
    return runs


def full_runs(seeds: tuple[int, ...] = SEEDS) -> tuple[Tagged, ...]:
    """Every run of the made-up study, about a hundred with three seeds."""
    baselines = [baseline(name, seed) for name in STEPS for seed in seeds]
    return (*baselines, *(arm for seed in seeds for arm in arms(seed)), *controls())


def some_runs() -> tuple[Tagged, ...]:
    """One of everything: the baselines with three seeds, few arms, few controls."""
    wanted = ("sft-none", "sft-update-16-gradient-", "opd-none", "opd-update-16-gradient-", "opd-random-4")
    wanted = (*wanted, "opd-update-16-adapter-s", "rlvr-none")
    some = ("opd-top-gap-0.25", "opd-random-0.5", "opd-teacher-s", "mix-0.5", "mix-1-", "opd-lr", "opd-strings")
    return tuple(run for run in full_runs() if not run.tags or run.name.startswith((*wanted, *some)))


@dataclass
class FullStudy(Folder):
    """A results folder of the full study, with costs and gradient covariances beside the tables."""

    runs: tuple[Run, ...] = field(default_factory=full_runs)
    layers: int = 1

    def write(self) -> Path:
        root = super().write()
        write_json(root / "gradients.json", gradients())
        write_json(root / "costs.json", [cost(run) for run in self.runs])
        return root

    def _runs(self) -> pl.DataFrame:
        tags = {run.name: json.dumps(run.tags) for run in self.runs if isinstance(run, Tagged)}
        return super()._runs().with_columns(pl.col("run").replace_strict(tags, default="{}").alias("tags"))

    def _evaluations(self) -> pl.DataFrame:
        rows = [row for run in self.runs if isinstance(run, Tagged) for row in evaluations(run)]
        return pl.DataFrame(rows, schema=EVALUATIONS, orient="row")


def evaluations(run: Tagged) -> list[tuple[Any, ...]]:
    """Selection at every checkpoint, the rest at the end, and the divergence from the origin."""
    rng = np.random.default_rng(int(digest_of([run.name, run.seed])[:8], 16))
    rows: list[tuple[Any, ...]] = []

    def add(step: int | None, benchmark: str, decoding: str, n: int, value: float) -> None:
        value = min(max(value + float(rng.normal(0, 0.008)), 0.01), 0.99)
        rows.append((run.name, step, benchmark, decoding, n, value, sqrt(value * (1 - value) / n)))

    for i, step in enumerate(run.steps):
        reached = run.accuracy[0] + (run.accuracy[1] - run.accuracy[0]) * ((i + 1) / len(run.steps)) ** 0.7
        add(step, "selection", "greedy", 500, reached + 0.3)
        add(step, "selection", "avg@8", 500, reached)
        nats = 300 * run.size**2 * (i + 1) / len(run.steps)
        rows.append((run.name, step, "kl_to_origin", "sampled", 400, nats, 0.04 * nats))
    add(run.steps[-1], "held_out", "greedy", 2000, run.accuracy[1] + 0.3)
    add(run.steps[-1], "held_out", "avg@8", 2000, run.accuracy[1])
    if not run.tags or "projection" in run.tags:
        for i, benchmark in enumerate(AT_THE_END):
            add(run.steps[-1], benchmark, "avg@4", 500, run.accuracy[1] - 0.05 * i)
    return rows


def gradients(seeds: tuple[int, ...] = SEEDS) -> list[dict[str, Any]]:
    """Effective ranks in which distillation's is one and a half times RLVR's."""
    rows = []
    for seed in seeds:
        for module in ("q_proj", "o_proj", "down_proj"):
            rng = np.random.default_rng([seed, len(module)])
            ratio = log(1.5) + float(rng.normal(0, 0.1))
            rlvr = float(rng.uniform(8, 30))
            rows.append(
                {
                    "seed": seed, "matrix": f"layers.0.{module}", "layer": 0, "module": module, "prompts": 64,
                    "samples": 8, "opd": rlvr * np.exp(ratio), "rlvr": rlvr, "log_ratio": ratio, "se": 0.12,
                    "opd_unit": rlvr * 1.2, "rlvr_unit": rlvr, "log_ratio_unit": log(1.2), "se_unit": 0.1, "note": None,
                }
            )  # fmt: skip
    rows[-1] |= {"rlvr": None, "log_ratio": None, "se": None, "note": "every reward of a prompt was the same"}
    return rows


def cost(run: Run) -> dict[str, Any]:
    """What a stage cost."""
    steps = int(run.steps[-1] or 0)
    return {
        "stage": run.name, "paradigm": run.paradigm, "seed": run.seed, "tags": getattr(run, "tags", {}),
        "steps": steps, "train_seconds": 0.4 * steps, "evaluate_seconds": 12.0, "core_seconds": 0.4 * steps + 12,
        "peak_memory_bytes": 900_000_000, "tokens": 1500 * steps,
    }  # fmt: skip
