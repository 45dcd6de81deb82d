"""Checkpoints at chosen steps of any Trainer: full weights, config and tokenizer, written atomically.

Sharded weights are gathered on the main process; a LoRA adapter is merged into the weights it adapts, since the
geometry is about full matrices, and is kept beside them.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from geopd.training.sharding import whole
from geopd.training.weight_files import writing

__all__ = ["CheckpointSchedule", "StepReport", "check_mergeable", "full_weights", "merged_weights", "save_checkpoint"]

_ADAPTER = "adapter"
_LORA = ("base_layer", "lora_A", "lora_B")


def save_checkpoint(
    model: Any,
    tokenizer: Any,
    run: Path,
    step: int,
    weights: dict[str, Tensor] | None = None,
    *,
    replace: bool = False,
) -> Path:
    """Write ``run/checkpoint-<step>`` with safetensors, config and tokenizer, and return its path.

    The weights keep the dtype they are trained in. The folder appears in one rename, so a reader sees either the whole
    checkpoint or none.

    Args:
        model: a transformers model, or a PEFT model around one; the latter's adapter is also saved, in ``adapter/``.
        tokenizer: saved beside the weights.
        run: the run folder.
        step: optimiser steps behind the weights.
        weights: the full state of ``model`` where its own is sharded.
        replace: the folder may be there already, and is replaced once the new one is whole.

    Raises:
        ValueError: the adapter is of a kind that cannot be merged, or the folder is there and ``replace`` is off.
        OSError: it cannot be written; what was half written is removed.
    """
    target = run / f"checkpoint-{step}"
    partial = run / f".checkpoint-{step}.partial"
    if target.exists() and not replace:
        raise ValueError(f"{target} is there already: move it away, or save into another folder")
    shutil.rmtree(partial, ignore_errors=True)
    with writing(partial, target):
        partial.mkdir(parents=True)
        if hasattr(model, "peft_config"):
            state = weights if weights is not None else model.state_dict()
            model.save_pretrained(partial / _ADAPTER, state_dict=state)
            model.get_base_model().save_pretrained(partial, state_dict=merged_weights(model, state))
        else:
            model.save_pretrained(partial, state_dict=weights)
        tokenizer.save_pretrained(partial)
        shutil.rmtree(target, ignore_errors=True)
        partial.replace(target)
    return target


def full_weights(trainer: Any) -> dict[str, Tensor] | None:
    """The trainer's full weights by name, whole on the main process; None where the model itself holds them.

    Every process must call it: FSDP and ZeRO gather. FSDP2's parts are gathered one tensor at a time. ZeRO-3 hands out
    16-bit weights.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    state = model.state_dict()
    gathered: dict[str, Tensor] | None = None
    if any(isinstance(value, DTensor) for value in state.values()):
        gathered = {}
        tied = {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
        seen: dict[int, Tensor] = {}  # tied weights stay one tensor, which is saved once
        for name, value in state.items():
            key = tied.get(name, id(value))
            full = seen[key] if key in seen else whole(value)
            if trainer.accelerator.is_main_process:
                gathered[name.replace("_checkpoint_wrapped_module.", "")] = seen[key] = full.cpu()
            elif name in tied:
                seen[key] = full.new_empty(0)
    elif trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        gathered = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    return gathered


def merged_weights(model: Any, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """W + s B A for every weight a LoRA adapter adapts, summed in fp32 and returned in W's dtype, by its own name.

    Args:
        model: a PEFT model.
        weights: its full state.

    Raises:
        ValueError: a weight belongs to an adapter that is not plain LoRA on a linear layer.
    """
    scaling = {
        name: (module.scaling[model.active_adapter], bool(getattr(module, "fan_in_fan_out", False)))
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and model.active_adapter in module.lora_A
    }
    check_mergeable(model, weights)
    inside = f".{model.active_adapter}.weight"
    merged: dict[str, Tensor] = {}
    for name, value in weights.items():
        layer, adapted, rest = name.partition(".base_layer.")
        if ".lora_A." in name or ".lora_B." in name or ".original_module." in name:
            continue
        if adapted and rest == "weight" and layer in scaling:
            factor, transposed = scaling[layer]
            update = factor * (weights[f"{layer}.lora_B{inside}"].float() @ weights[f"{layer}.lora_A{inside}"].float())
            update = update.T if transposed else update
            value = (value.float() + update.to(value.device)).to(value.dtype)
        plain = f"{layer}.{rest}" if adapted else name.replace(f".modules_to_save.{model.active_adapter}", "")
        merged[plain.removeprefix("base_model.model.")] = value
    return merged


def check_mergeable(model: Any, weights: dict[str, Tensor] | None = None) -> None:
    """Require that a PEFT model's adapters are plain LoRA on linear layers; its weights may be on the meta device.

    Args:
        model: a PEFT model.
        weights: its full state; read from the model when None.

    Raises:
        ValueError: one is of another kind, such as DoRA, and could not be merged into a checkpoint.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    names = list(weights if weights is not None else model.state_dict())
    tuned = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    for layer in tuned:
        for name in names:
            part = name.removeprefix(f"{layer}.").split(".")
            if name.startswith(f"{layer}.") and (part[0] not in _LORA or (part[0] == "base_layer" and len(part) > 2)):
                raise ValueError(f"{name} is no plain LoRA weight of a linear layer, so it cannot be merged: use LoRA")


class CheckpointSchedule(TrainerCallback):  # type: ignore[misc]
    """Saves a checkpoint after the given optimiser steps.

    Args:
        run: the run folder.
        steps: optimiser steps to save at; 0 saves the initial weights.
        tokenizer: saved beside the weights.
        replace: checkpoints in the folder are this run's own from an earlier start, and may be written anew.
    """

    def __init__(self, run: Path, steps: Iterable[int], tokenizer: Any, *, replace: bool = False) -> None:
        self.replace = replace
        self.run = run
        self.steps = frozenset(steps)
        self.tokenizer = tokenizer
        self.trainer: Any = None

    def attach(self, trainer: Any) -> None:
        """Follow a trainer; needed where its weights may be sharded."""
        self.trainer = trainer
        trainer.add_callback(self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Refuse checkpoints that are in the way now, not once they are due; save the start when step 0 is scheduled.

        Raises:
            ValueError: a scheduled checkpoint is there already.
        """
        taken = [step for step in sorted(self.steps) if (self.run / f"checkpoint-{step}").exists()]
        if taken and not self.replace:
            raise ValueError(f"{self.run / f'checkpoint-{taken[0]}'} is there already: choose another folder")
        if state.global_step == 0:
            self._save_if_due(state, kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Save when the step that just ended is scheduled."""
        self._save_if_due(state, kwargs["model"])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Save the end of a run that something ended before its last scheduled step."""
        if self.steps and state.global_step < max(self.steps) and state.global_step not in self.steps:
            self._save(state, kwargs["model"])

    def _save_if_due(self, state: Any, model: Any) -> None:
        if state.global_step in self.steps:
            self._save(state, model)

    def _save(self, state: Any, model: Any) -> None:
        weights = full_weights(self.trainer) if self.trainer is not None else None
        if state.is_world_process_zero:
            unwrapped = self.trainer.accelerator.unwrap_model(model) if self.trainer is not None else model
            with torch.no_grad():
                save_checkpoint(unwrapped, self.tokenizer, self.run, state.global_step, weights, replace=self.replace)


class StepReport(TrainerCallback):  # type: ignore[misc]
    """Calls ``report(step)`` after every optimiser step."""

    def __init__(self, report: Callable[[int], None]) -> None:
        self.report = report

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Report the step that just ended."""
        self.report(state.global_step)
