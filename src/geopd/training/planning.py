"""What a run would do, before it does it: batch arithmetic, steps, checkpoints, memory. Nothing is trained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from geopd.training.config import TrainConfig
from geopd.training.resume import resume_interval, updates_per_rollout
from geopd.training.trl_arguments import OnPolicyArguments

__all__ = [
    "MemoryEstimate",
    "ModelSize",
    "TrainPlan",
    "checkpoint_steps",
    "ignored_settings",
    "make_plan",
    "memory_of",
    "total_updates",
]

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "auto": 4}
_LAYER_ACTIVATIONS = 17  # values of the residual width a layer keeps for its backward pass, for every token


@dataclass(frozen=True, slots=True)
class ModelSize:
    """A model's shape without its weights.

    Args:
        name: path or hub id.
        parameters: all of them.
        trained: those that get gradients.
        layers: decoder layers.
        width: of the residual stream.
        bytes_a_weight: 4 for fp32.
    """

    name: str
    parameters: int
    trained: int
    layers: int
    width: int
    bytes_a_weight: int


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes on one device, roughly: without attention workspaces, logits, key-value caches and fragmentation.

    Activations after Korthikanti et al. (arXiv 2205.05198): 17 values of the residual width for every token and layer,
    or one a layer and one layer's 17 where activations are recomputed.
    """

    weights: int
    gradients: int
    adam: int
    teacher: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.adam + self.teacher + self.activations

    def sharded(self, processes: int) -> MemoryEstimate:
        """With all but the activations divided over the processes, as FSDP2 and ZeRO-3 do."""
        parts = asdict(self)
        return MemoryEstimate(**{k: v if k == "activations" else -(-v // processes) for k, v in parts.items()})


@dataclass(frozen=True)
class TrainPlan:
    """A run before it starts.

    Args:
        paradigm: sft, opd, rlvr or mix.
        objective: what is descended, in words.
        model: the student.
        teacher: the teacher's shape, its address, or None.
        rows: of the data.
        processes: devices that the batch arithmetic counts.
        sequences: trained on in one update, over all processes.
        updates: optimiser steps in all.
        rollout: prompts, responses and updates between two samplings; None for sft.
        checkpoints: steps that are kept.
        resume_every: steps between resume points, 0 for none.
        memory: on one device, nothing sharded.
        extras: projection, monitor and evaluation, where set.
        notes: what deserves a second look.
    """

    paradigm: str
    objective: str
    model: ModelSize
    teacher: ModelSize | str | None
    rows: int
    processes: int
    sequences: int
    updates: int
    rollout: dict[str, int] | None
    checkpoints: tuple[int, ...]
    resume_every: int
    memory: MemoryEstimate
    extras: dict[str, Any]
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Everything as JSON types; memory also as totals, whole and sharded."""
        shards = self.memory.sharded(self.processes)
        totals = {"total": self.memory.total, "sharded_total": shards.total, "sharded": asdict(shards)}
        return asdict(self) | {"memory": asdict(self.memory) | totals}


def make_plan(
    config: TrainConfig,
    *,
    model: ModelSize,
    teacher: ModelSize | str | None,
    rows: int,
    sequence: int,
    processes: int,
) -> TrainPlan:
    """The plan of a run.

    Args:
        config: its settings.
        model: the student's shape.
        teacher: the teacher's shape or address.
        rows: of the data.
        sequence: tokens of the longest sequence expected.
        processes: devices.

    Raises:
        ValueError: the data make no whole step, or checkpoints and resume points do not fit the steps.
    """
    training = config.training
    sequences = training.per_device_train_batch_size * training.gradient_accumulation_steps * processes
    updates = total_updates(config, rows, processes)
    return TrainPlan(
        paradigm=config.paradigm,
        objective=_objective(config),
        model=model,
        teacher=teacher,
        rows=rows,
        processes=processes,
        sequences=sequences,
        updates=updates,
        rollout=_rollout(config, processes),
        checkpoints=checkpoint_steps(config, updates),
        resume_every=resume_interval(training, config.run.resume_every),
        memory=memory_of(config, model, teacher if isinstance(teacher, ModelSize) else None, sequence),
        extras={
            name: value
            for name in ("projection", "monitor", "evaluation")
            if (value := getattr(config.run, name)) is not None
        },
        notes=tuple(_notes(config, model)),
    )


def total_updates(config: TrainConfig, rows: int, processes: int) -> int:
    """Optimiser steps of the whole run, as the Trainer counts them.

    Raises:
        ValueError: the data are too few for one rollout or one batch.
    """
    training = config.training
    if training.max_steps > 0:
        return int(training.max_steps)
    if isinstance(training, OnPolicyArguments) and config.divergence == "sampled":
        prompts = _generation_batch(training, processes) // training.num_generations
        micro = rows // prompts * training.steps_per_generation * training.num_iterations
        if micro == 0:
            raise ValueError(f"{rows} prompts for rollouts of {prompts}: use more data or smaller rollouts")
    else:
        micro = math.ceil(rows / (training.per_device_train_batch_size * processes))
    an_epoch: int = max(math.ceil(micro / training.gradient_accumulation_steps), 1)
    epochs: float = training.num_train_epochs
    return math.ceil(epochs * an_epoch)


def checkpoint_steps(config: TrainConfig, updates: int) -> tuple[int, ...]:
    """The steps whose weights are kept; the last one always.

    Raises:
        ValueError: a step is beyond the end.
    """
    run = config.run
    if run.checkpoint_every is not None:
        return tuple(sorted({*range(run.checkpoint_every, updates + 1, run.checkpoint_every), updates}))
    steps = tuple(sorted({*(run.checkpoint_steps or ()), updates}))
    if steps[-1] > updates:
        raise ValueError(f"checkpoint_steps name step {steps[-1]} of a run of {updates} steps: leave it out")
    return steps


def ignored_settings(config: TrainConfig) -> list[str]:
    """What a configuration asks for and its loss does not use, one sentence each."""
    if config.divergence == "sampled" or config.reward is None or not config.reward.reward:
        return []
    named = ", ".join(config.reward.reward)
    return [
        f"reward [{named}] is not part of the loss: divergence={config.divergence} distils alone, and no reward is "
        "logged; train mix for both, or leave reward out"
    ]


def memory_of(config: TrainConfig, model: ModelSize, teacher: ModelSize | None, sequence: int) -> MemoryEstimate:
    """The memory estimate of one device that holds everything."""
    training = config.training
    size = 2 if training.bf16 or training.fp16 else model.bytes_a_weight
    values = sequence * training.per_device_train_batch_size * model.width * size
    kept = model.layers + _LAYER_ACTIVATIONS if training.activation_checkpointing else model.layers * _LAYER_ACTIVATIONS
    offloaded = config.teacher is not None and config.teacher.teacher_offload
    return MemoryEstimate(
        weights=model.parameters * model.bytes_a_weight,
        gradients=model.trained * model.bytes_a_weight,
        adam=2 * model.trained * model.bytes_a_weight,
        teacher=teacher.parameters * teacher.bytes_a_weight if teacher is not None and not offloaded else 0,
        activations=values * kept,
    )


def bytes_a_weight(dtype: str | None) -> int:
    """Bytes of one weight; ``auto`` counts as fp32 until the checkpoint says otherwise."""
    return _BYTES.get(dtype or "float32", 4)


def _generation_batch(training: OnPolicyArguments, processes: int) -> int:
    return int(training.per_device_train_batch_size * training.steps_per_generation * processes)


def _rollout(config: TrainConfig, processes: int) -> dict[str, int] | None:
    training = config.training
    if not isinstance(training, OnPolicyArguments):
        return None
    if config.divergence != "sampled":
        responses = training.per_device_train_batch_size * training.gradient_accumulation_steps * processes
        return {"prompts": responses, "responses": responses, "updates": 1, "tokens": training.max_completion_length}
    responses = _generation_batch(training, processes)
    return {
        "prompts": responses // training.num_generations,
        "responses": responses,
        "updates": updates_per_rollout(training),
        "tokens": training.max_completion_length,
    }


def _objective(config: TrainConfig) -> str:
    if config.paradigm == "sft":
        return "cross-entropy on demonstrations"
    if config.divergence != "sampled":
        return f"{config.divergence} over the whole vocabulary"
    objective = config.objective
    parts: Sequence[str] = {
        "opd": ["sampled-token reverse KL to the teacher"],
        "rlvr": ["group-normalised verified reward"],
        "mix": [f"{objective.alpha:g} of distillation, {1 - objective.alpha:g} of reward"],
    }[config.paradigm]
    extra = ["both at unit RMS"] * objective.normalise
    if objective.token_selection != "all":
        extra.append(f"{objective.rho:g} of the tokens ({objective.token_selection})")
    if objective.rollouts == "teacher":
        extra.append("responses by the teacher")
    return ", ".join([*parts, *extra])


def _notes(config: TrainConfig, model: ModelSize) -> list[str]:
    notes, training = ignored_settings(config), config.training
    if model.bytes_a_weight < 4:
        notes.append(
            "weights train in 16 bits: an update below half a unit in the last place is lost; dtype float32 with bf16 "
            "autocast keeps it"
        )
    if isinstance(training, OnPolicyArguments):
        if config.divergence != "sampled":
            notes.append("full-vocabulary divergences sample one response a prompt: num_generations is not used")
        elif (rollout := updates_per_rollout(training)) > 1:
            notes.append(f"{rollout} updates a rollout: only the first is on-policy to the letter")
    return notes
