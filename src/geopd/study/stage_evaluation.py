"""What is evaluated behind a stage: accuracies, the divergence from the origin, the gradients at the start."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geopd.checkpoints import write_whole
from geopd.problems import BENCHMARKS, Split, benchmark_task, distinct_string_problems, verify_string
from geopd.study.stages import Stage, stage_seed

if TYPE_CHECKING:
    from geopd.training import VerifiableTask

__all__ = ["DIVERGENCE", "GRADIENTS", "evaluate_stage"]

DIVERGENCE = "kl_to_origin"
"""Benchmark name of the KL divergence to the origin's policy, in nats a response."""
GRADIENTS = "gradients.json"
_SAMPLES = 4
_SHARE = 0.2  # of a stage's time, for the progress display only


def evaluate_stage(
    stage: Stage, folder: Path, parents: dict[str, Path], progress: Callable[[float, str], None]
) -> list[dict[str, Any]]:
    """Write ``evaluations.json`` (and ``gradients.json`` where the plan asks); the rows of the last step."""
    from geopd.training import Evaluation, evaluate_model, load_model, load_tokenizer, write_evaluations

    plan, rows = stage.evaluation, []
    jobs = [("selection", step, plan.selection, plan.decodings) for step in stage.saved]
    jobs.append(("held_out", stage.saved[-1], plan.held_out, plan.decodings))
    jobs += [
        (name, stage.saved[-1], plan.benchmarks, (f"avg@{_SAMPLES}",)) for name in BENCHMARKS if name != "selection"
    ]
    total, done = sum(count for _, _, count, _ in jobs), 0
    for benchmark, step, count, decodings in jobs:
        if count:
            progress(1 - _SHARE * (1 - done / total), f"evaluating step {step}")
            checkpoint = folder / f"checkpoint-{step}"
            # The problems are the same for every stage and seed, so differences between stages are paired.
            rows += evaluate_model(
                load_model(checkpoint),
                load_tokenizer(checkpoint),
                _task(benchmark, count, plan.problem),
                step=step,
                benchmark=benchmark,
                decodings=decodings,
                max_new_tokens=_max_new_tokens(),
                seed=0,
            )
            done += count
    if plan.divergence:
        for step in stage.saved:
            progress(0.99, f"divergence at step {step}")
            rows.append(Evaluation(step, DIVERGENCE, "sampled", *_divergence(stage, folder, parents, step)))
    write_evaluations(folder, rows)
    if plan.gradients:
        progress(0.99, "gradient covariance")
        found = _gradients(stage, parents)
        write_whole(folder / GRADIENTS, json.dumps(found, indent=1, allow_nan=False) + "\n")
    return [asdict(row) for row in rows if row.step == stage.saved[-1]]


def _max_new_tokens() -> int:
    from geopd.study.recipe import MAX_NEW_TOKENS

    return MAX_NEW_TOKENS


def _task(benchmark: str, count: int, problem: str) -> VerifiableTask[Any]:
    from geopd.training import VerifiableTask

    if problem == "strings" and benchmark in ("selection", "held_out"):
        split: Split = "held_out" if benchmark == "held_out" else "selection"
        return VerifiableTask(distinct_string_problems(split, count, 0), lambda asked: asked.prompt, verify_string)
    return VerifiableTask(*benchmark_task(benchmark, count, 0))


def _divergence(stage: Stage, folder: Path, parents: dict[str, Path], step: int) -> tuple[int, float, float]:
    """(responses, value, standard error) of the KL divergence of a checkpoint's policy from its origin's."""
    from geopd.training import load_model, load_tokenizer
    from geopd.training.policy_divergence import kl_to

    checkpoint, plan = folder / f"checkpoint-{step}", stage.evaluation
    value, se, n = kl_to(
        load_model(checkpoint),
        load_model(parents.get("origin", parents["start"])),
        load_tokenizer(checkpoint),
        _task("selection", plan.divergence, plan.problem),
        samples=_SAMPLES,
        max_new_tokens=_max_new_tokens(),
        seed=0,
    )
    return n, value, se


def _gradients(stage: Stage, parents: dict[str, Path]) -> list[dict[str, Any]]:
    """Rows of :func:`geopd.training.gradient_covariance.gradient_covariance` at the stage's start."""
    from geopd.training import load_model, load_tokenizer
    from geopd.training.gradient_covariance import gradient_covariance
    from geopd.training.teacher import ModelTeacher

    assert stage.on_policy is not None
    return gradient_covariance(
        load_model(parents["start"]),
        ModelTeacher(load_model(parents["teacher"])),
        load_tokenizer(parents["start"]),
        _task("selection", stage.evaluation.gradients, stage.evaluation.problem),
        samples=stage.on_policy.samples,
        max_new_tokens=_max_new_tokens(),
        seed=stage_seed(stage),
    )
