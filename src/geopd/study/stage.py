"""One stage in a process of its own: ``python -m geopd.study.stage FOLDER PARENT_PID``.

The folder holds ``stage.json`` (the settings, the seed and the paths of the parents' checkpoints) and receives the run:
checkpoints, ``run.json``, ``evaluations.json``, ``progress.json`` and, last, ``finished.json``.
"""

from __future__ import annotations

import json
import os
import random
import resource
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geopd.problems import (
    Demonstration,
    DemonstrationStyle,
    Problem,
    Split,
    base_mixture,
    demonstrations,
    distinct_problems,
    verify,
)
from geopd.study.stages import OnPolicy, Phase, Stage, stage_from_json, stage_seed

if TYPE_CHECKING:
    from geopd.training import VerifiableTask

__all__ = ["run_stage"]

_EVALUATION_SHARE = 0.2  # of a stage's time, for the progress display only


class Progress:
    """Writes the finished share of the stage to ``progress.json`` and ends the process when its parent is gone."""

    def __init__(self, folder: Path, parent: int | None) -> None:
        self.path = folder / "progress.json"
        self.parent = parent

    def __call__(self, share: float, doing: str) -> None:
        """Report ``share`` in [0, 1] and what is being done."""
        if self.parent is not None and os.getppid() != self.parent:
            raise SystemExit("the study that started this stage has ended; run it again to resume")
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps({"share": share, "doing": doing}), encoding="utf-8")
        partial.replace(self.path)


def texts_of(phases: tuple[Phase, ...], batch: int, seed: int) -> list[Demonstration]:
    """The curriculum of a supervised stage, in order: ``steps * batch`` texts a phase.

    Raises:
        ValueError: a phase names an unknown source.
    """
    rng = random.Random(f"texts {seed}")
    texts: list[Demonstration] = []
    for phase in phases:
        count = phase.steps * batch
        if phase.source == "mixture":
            texts += base_mixture(count, phase.worked, phase.slip, rng)
        elif phase.source == "arithmetic":
            texts += demonstrations(count, DemonstrationStyle(direct=phase.direct, slip=phase.slip), rng)
        else:
            raise ValueError(f"phase source {phase.source!r} is unknown: use 'mixture' or 'arithmetic'")
    return texts


def run_stage(folder: Path, parent: int | None = None) -> None:
    """Train, save and evaluate the stage that ``folder/stage.json`` describes.

    Args:
        folder: the stage's folder, which holds ``stage.json``.
        parent: process id of the study; the stage ends when it is gone. None watches nobody.
    """
    import torch

    from geopd.training import quiet_training_libraries

    quiet_training_libraries()
    # One thread: two stages run at once, and sums in a fixed order make a repeat bit-identical.
    torch.set_num_threads(1)
    begun, description = time.monotonic(), json.loads((folder / "stage.json").read_text(encoding="utf-8"))
    stage = stage_from_json(description["stage"])
    seed = stage_seed(stage, description["seed"])
    progress = Progress(folder, parent)
    progress(0.0, "loading")
    _train(stage, seed, folder, {name: Path(path) for name, path in description["parents"].items()}, progress)
    trained = time.monotonic()
    _write_manifest(stage, description, folder)
    accuracy = _evaluate(stage, folder, progress)
    usage = {
        "train_seconds": trained - begun,
        "evaluate_seconds": time.monotonic() - trained,
        "core_seconds": time.process_time(),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    _finish(stage, description, folder, accuracy, usage)


def _train(stage: Stage, seed: int, folder: Path, parents: dict[str, Path], progress: Progress) -> None:
    from geopd.problems import character_tokenizer
    from geopd.training import build_model, load_model, load_tokenizer

    def report(step: int) -> None:
        progress((1 - _EVALUATION_SHARE) * step / stage.optimiser.steps, f"step {step} of {stage.optimiser.steps}")

    if stage.shape is not None:
        tokenizer = character_tokenizer()
        model: Any = build_model(stage.shape, tokenizer, seed)
    else:
        tokenizer = load_tokenizer(folder / parents["start"])
        model = load_model(folder / parents["start"])
    common = {"run": folder, "save_at": stage.saved, "seed": seed, "report": report}
    if stage.on_policy is None:
        history = _supervised(stage, seed, model, tokenizer, common)
    else:
        teacher = load_model(folder / parents["teacher"]) if "teacher" in parents else None
        history = _on_policy(stage, stage.on_policy, seed, model, tokenizer, teacher, common)
    (folder / "training_log.json").write_text(json.dumps(history, indent=1) + "\n", encoding="utf-8")


def _supervised(stage: Stage, seed: int, model: Any, tokenizer: Any, common: dict[str, Any]) -> Any:
    from geopd.training import train_supervised

    return train_supervised(
        model,
        tokenizer,
        texts_of(stage.phases, stage.batch, seed),
        stage.optimiser,
        batch=stage.batch,
        mask_prompt=all(phase.source == "arithmetic" for phase in stage.phases),
        **common,
    )


def _on_policy(
    stage: Stage, rollouts: OnPolicy, seed: int, model: Any, tokenizer: Any, teacher: Any, common: dict[str, Any]
) -> Any:
    from geopd.study.recipe import MAX_NEW_TOKENS
    from geopd.training import Rollouts, train_on_policy

    return train_on_policy(
        model,
        tokenizer,
        _task("train", rollouts.pool, seed),
        stage.optimiser,
        Rollouts(rollouts.prompts, rollouts.samples, MAX_NEW_TOKENS),
        alpha=rollouts.alpha,
        teacher=teacher,
        **common,
    )


def _task(split: Split, count: int, seed: int) -> VerifiableTask[Problem]:
    from geopd.training import VerifiableTask

    return VerifiableTask(distinct_problems(split, count, seed), lambda problem: problem.prompt, verify)


def _write_manifest(stage: Stage, description: dict[str, Any], folder: Path) -> None:
    from geopd.checkpoints import Origin, RunManifest, checkpoint_digest, write_run_manifest

    origin = None
    if stage.start is not None:
        path = description["parents"]["start"]
        origin = Origin(path=path, digest=checkpoint_digest(folder / path))
    write_run_manifest(
        folder,
        RunManifest(
            paradigm=stage.paradigm,
            seed=description["seed"],
            origin=origin,
            settings=stage.settings(),
        ),
    )


def _evaluate(stage: Stage, folder: Path, progress: Progress) -> list[dict[str, Any]]:
    from dataclasses import asdict

    from geopd.study.recipe import MAX_NEW_TOKENS
    from geopd.training import evaluate_model, load_model, load_tokenizer, write_evaluations

    plan = stage.evaluation
    jobs: list[tuple[Split, int, int]] = [("selection", step, plan.selection) for step in stage.saved]
    jobs.append(("held_out", stage.saved[-1], plan.held_out))
    rows = []
    total = sum(count for _, _, count in jobs)
    done = 0
    for benchmark, step, count in jobs:
        if count:
            progress(1 - _EVALUATION_SHARE * (1 - done / total), f"evaluating step {step}")
            checkpoint = folder / f"checkpoint-{step}"
            # The problems are the same for every stage and seed, so differences between stages are paired.
            rows += evaluate_model(
                load_model(checkpoint),
                load_tokenizer(checkpoint),
                _task(benchmark, count, seed=0),
                step=step,
                benchmark=benchmark,
                decodings=plan.decodings,
                max_new_tokens=MAX_NEW_TOKENS,
                seed=0,
            )
            done += count
    write_evaluations(folder, rows)
    return [asdict(row) for row in rows if row.step == stage.saved[-1]]


def _finish(stage: Stage, description: dict[str, Any], folder: Path, accuracy: Any, usage: dict[str, float]) -> None:
    from geopd.checkpoints import checkpoint_digest

    marker = {
        "key": description["key"],
        "weights": {str(step): checkpoint_digest(folder / f"checkpoint-{step}") for step in stage.saved},
        "accuracy": accuracy,
        "usage": usage,
    }
    (folder / "progress.json").unlink(missing_ok=True)
    partial = folder / "finished.json.partial"
    partial.write_text(json.dumps(marker, indent=1) + "\n", encoding="utf-8")
    partial.replace(folder / "finished.json")


if __name__ == "__main__":
    run_stage(Path(sys.argv[1]), int(sys.argv[2]))
