"""One stage, in a process that :mod:`geopd.study.stage_server` forks for it.

The folder holds ``stage.json`` (the settings, the seed and the paths of the parents' checkpoints) and receives the run:
checkpoints, ``run.json``, ``evaluations.json``, ``progress.json`` and, last, ``finished.json``.
"""

from __future__ import annotations

import json
import os
import random
import resource
import time
from pathlib import Path
from typing import Any

from geopd.checkpoints import write_whole
from geopd.problems import Demonstration, DemonstrationStyle, base_mixture, demonstrations, string_demonstrations
from geopd.study.stage_evaluation import evaluate_stage
from geopd.study.stages import OnPolicy, Phase, Stage, stage_from_json, stage_seed
from geopd.training.objective import Objective

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
        elif phase.source == "strings":
            texts += string_demonstrations(count, phase.slip, rng)
        else:
            raise ValueError(f"phase source {phase.source!r} is unknown: use 'mixture', 'arithmetic' or 'strings'")
    return texts


def run_stage(folder: Path, parent: int | None = None) -> None:
    """Train, save and evaluate the stage that ``folder/stage.json`` describes.

    Args:
        folder: the stage's folder, which holds ``stage.json``.
        parent: process id of the server; the stage ends when it is gone. None watches nobody.
    """
    from geopd.training import quiet_training_libraries

    quiet_training_libraries()
    begun, description = time.monotonic(), json.loads((folder / "stage.json").read_text(encoding="utf-8"))
    stage = stage_from_json(description["stage"])
    progress = Progress(folder, parent)
    progress(0.0, "loading")
    parents = {role: folder / path for role, path in description["parents"].items()}
    log = _train(stage, folder, parents, progress)
    trained = time.monotonic()
    _write_manifest(stage, description, folder)
    accuracy = evaluate_stage(stage, folder, parents, progress)
    usage = {
        "tokens": int(max(line.get("num_tokens", 0) for line in log)),
        "signal_share": _mean_of("opd/signal_share", log),
        "train_seconds": trained - begun,
        "evaluate_seconds": time.monotonic() - trained,
        "core_seconds": time.process_time(),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    _finish(stage, description, folder, accuracy, usage)


def _train(stage: Stage, folder: Path, parents: dict[str, Path], progress: Progress) -> list[dict[str, float]]:
    """Train as ``geopd train`` does, with the stage's settings in place of a file; the trainer's log."""
    from geopd.problems import character_tokenizer
    from geopd.training import StepReport, build_model, load_tokenizer, parse_config, supervised_dataset, train

    def report(step: int) -> None:
        progress((1 - _EVALUATION_SHARE) * step / stage.optimiser.steps, f"step {step} of {stage.optimiser.steps}")

    seed = stage_seed(stage)
    tokenizer = character_tokenizer() if stage.shape is not None else load_tokenizer(parents["start"])
    dataset = model = None
    if stage.on_policy is None:
        texts = texts_of(stage.phases, stage.batch, seed)
        mask_prompt = all(phase.source != "mixture" for phase in stage.phases)
        dataset = supervised_dataset(texts, tokenizer, mask_prompt=mask_prompt)
    if stage.shape is not None:
        model = build_model(stage.shape, tokenizer, seed)
    settings = training_settings(stage, folder, parents)
    if stage.locked is not None:
        model, projection = locked_model(stage, folder, parents)
        settings |= {"projection": projection} if projection else {}
    outcome = train(
        parse_config(training_paradigm(stage), settings=settings),
        model=model,
        tokenizer=tokenizer,
        dataset=dataset,
        callbacks=[StepReport(report)],
        quiet=True,
    )
    return outcome.history


def _mean_of(name: str, log: list[dict[str, float]]) -> float | None:
    values = [line[name] for line in log if name in line]
    return sum(values) / len(values) if values else None


def locked_model(stage: Stage, folder: Path, parents: dict[str, Path]) -> tuple[Any, dict[str, Any] | None]:
    """The model of an arm of the projection experiment, and the projection; None for the free arm.

    The free arm trains the matrices that a basis of the same update would cover, and nothing else.
    """
    from geopd.training import load_model
    from geopd.training.bases_of_runs import basis_of_run
    from geopd.training.basis import write_basis
    from geopd.training.named_parameters import named_parameters

    locked = stage.locked
    assert locked is not None
    free = locked.basis == "none"
    basis = basis_of_run(
        parents["origin"],
        parents["start"],
        k=1 if free else locked.k,
        kind="update" if free else locked.basis,
        seed=stage_seed(stage),
    )
    model = load_model(parents["start"])
    if free:
        for name, found in named_parameters(model).items():
            found.parameter.requires_grad_(name in basis.names)
        return model, None
    # beside the run's own files, not among its weights
    path = write_basis(folder / "basis" / "basis.safetensors", basis)
    settings = {"basis": str(path), "mode": locked.mode, "lr_scale": locked.lr_scale}
    return model, settings


def training_paradigm(stage: Stage) -> str:
    """Which of ``geopd train``'s paradigms trains a stage."""
    if stage.on_policy is None:
        return "sft"
    # a normalised signal is a mixture's, at its ends as well
    return "mix" if stage.on_policy.normalise else Objective(stage.on_policy.alpha).paradigm


def training_settings(stage: Stage, folder: Path, parents: dict[str, Path]) -> dict[str, Any]:
    """A stage in the keys of ``geopd train``.

    Args:
        stage: what to train.
        folder: of the run.
        parents: checkpoints by role.
    """
    from geopd.study.recipe import MAX_NEW_TOKENS
    from geopd.training import trainer_arguments

    rollouts, seed = stage.on_policy, stage_seed(stage)
    batch = stage.batch if rollouts is None else rollouts.prompts * rollouts.samples
    settings = trainer_arguments(stage.optimiser, folder, batch, seed) | {
        "checkpoint_steps": list(stage.saved),
        "resume_every": 0,  # a stage that was interrupted starts over
    }
    if "start" in parents:
        settings["model_name_or_path"] = str(parents["start"])
    if "origin" in parents:
        settings["origin"] = str(parents["origin"])
    if rollouts is None:
        prepared = {"max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}}
        return settings | prepared | {"train_sampling_strategy": "sequential"}
    settings |= {
        "dataset": f"problem:{rollouts.problem}",
        "dataset_limit": rollouts.pool,
        "dataset_seed": seed,
        "reward": [rollouts.problem],
        "num_generations": rollouts.samples,
        "steps_per_generation": 1,
        "max_completion_length": MAX_NEW_TOKENS,
    }
    if "teacher" in parents:
        settings |= {"teacher": str(parents["teacher"]), "teacher_dtype": "float32"}
    return settings | _signal(rollouts)


def _signal(rollouts: OnPolicy) -> dict[str, Any]:
    """What differs from the plain signal."""
    signal: dict[str, Any] = {}
    if 0.0 < rollouts.alpha < 1.0 or rollouts.normalise:
        signal |= {"alpha": rollouts.alpha, "normalise": rollouts.normalise}
    if rollouts.token_selection != "all":
        signal |= {"token_selection": rollouts.token_selection, "rho": rollouts.rho}
    return signal | ({"rollouts": rollouts.rollouts} if rollouts.rollouts != "student" else {})


def _write_manifest(stage: Stage, description: dict[str, Any], folder: Path) -> None:
    """``run.json`` as the study has it: the stage's own words, and parents relative to the folder."""
    from geopd.checkpoints import Origin, RunManifest, checkpoint_digest, read_run_manifest, write_run_manifest

    path = description["parents"].get("origin", description["parents"].get("start"))
    origin = Origin(path=path, digest=checkpoint_digest(folder / path)) if path is not None else None
    trained = read_run_manifest(folder)
    record = trained.settings.get("projection_record") if trained is not None else None
    settings = stage.settings() | ({"projection_record": record} if record else {})
    write_run_manifest(folder, RunManifest(stage.paradigm, stage.seed, origin, settings, stage.tags))


def _finish(
    stage: Stage, description: dict[str, Any], folder: Path, accuracy: Any, usage: dict[str, float | None]
) -> None:
    from geopd.checkpoints import checkpoint_digest

    marker = {
        "key": description["key"],
        "weights": {str(step): checkpoint_digest(folder / f"checkpoint-{step}") for step in stage.saved},
        "accuracy": accuracy,
        "usage": usage,
    }
    (folder / "progress.json").unlink(missing_ok=True)
    write_whole(folder / "finished.json", json.dumps(marker, indent=1) + "\n")
