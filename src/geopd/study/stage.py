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

from geopd.checkpoints import write_whole
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
from geopd.study.stages import Phase, Stage, stage_from_json, stage_seed
from geopd.training.objective import Objective

if TYPE_CHECKING:
    from geopd.training import VerifiableTask

__all__ = ["run_stage", "training_paradigm", "training_settings"]

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
        write_whole(self.path, json.dumps({"share": share, "doing": doing}))


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
    """Train as ``geopd train`` does, with the stage's settings in place of a file."""
    from geopd.problems import character_tokenizer
    from geopd.training import StepReport, build_model, load_tokenizer, parse_config, supervised_dataset, train

    def report(step: int) -> None:
        progress((1 - _EVALUATION_SHARE) * step / stage.optimiser.steps, f"step {step} of {stage.optimiser.steps}")

    paths = {role: str(folder / path) for role, path in parents.items()}
    tokenizer = character_tokenizer() if stage.shape is not None else load_tokenizer(paths["start"])
    dataset = None
    if stage.on_policy is None:
        texts = texts_of(stage.phases, stage.batch, seed)
        mask_prompt = all(phase.source == "arithmetic" for phase in stage.phases)
        dataset = supervised_dataset(texts, tokenizer, mask_prompt=mask_prompt)
    train(
        parse_config(training_paradigm(stage), settings=training_settings(stage, seed, folder, paths)),
        model=build_model(stage.shape, tokenizer, seed) if stage.shape is not None else None,
        tokenizer=tokenizer,
        dataset=dataset,
        callbacks=[StepReport(report)],
        quiet=True,
    )


def training_paradigm(stage: Stage) -> str:
    """Which of ``geopd train``'s paradigms trains a stage."""
    if stage.on_policy is None:
        return "sft"
    return Objective(stage.on_policy.alpha).paradigm


def training_settings(stage: Stage, seed: int, folder: Path, paths: dict[str, str]) -> dict[str, Any]:
    """A stage in the keys of ``geopd train``.

    Args:
        stage: what to train.
        seed: of the stage.
        folder: of the run.
        paths: checkpoints by role, ``start`` and ``teacher``.
    """
    from geopd.study.recipe import MAX_NEW_TOKENS
    from geopd.training import trainer_arguments

    rollouts = stage.on_policy
    batch = stage.batch if rollouts is None else rollouts.prompts * rollouts.samples
    settings = trainer_arguments(stage.optimiser, folder, batch, seed) | {
        "checkpoint_steps": list(stage.saved),
        "resume_every": 0,  # a stage that was interrupted starts over
    }
    if "start" in paths:
        settings["model_name_or_path"] = paths["start"]
    if rollouts is None:
        prepared = {"max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}}
        return settings | prepared | {"train_sampling_strategy": "sequential"}
    settings |= {
        "dataset": "problem:arithmetic",
        "dataset_limit": rollouts.pool,
        "dataset_seed": seed,
        "reward": ["arithmetic"],
        "num_generations": rollouts.samples,
        "steps_per_generation": 1,
        "max_completion_length": MAX_NEW_TOKENS,
    }
    if "teacher" in paths:
        settings |= {"teacher": paths["teacher"], "teacher_dtype": "float32"}
    return settings | ({"alpha": rollouts.alpha} if 0.0 < rollouts.alpha < 1.0 else {})


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
    write_whole(folder / "finished.json", json.dumps(marker, indent=1) + "\n")


if __name__ == "__main__":
    run_stage(Path(sys.argv[1]), int(sys.argv[2]))
