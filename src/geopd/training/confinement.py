"""The Trainer's callbacks behind a projection: one keeps the steps inside the basis, one logs what left it."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from geopd.checkpoints import checkpoint_digest
from geopd.training.adapter_projection import ADAPTER, adapted_layers
from geopd.training.named_parameters import named_parameters
from geopd.training.optimiser_hooks import GradientMask, GradientProjection, ScaledSteps, lr_factor
from geopd.training.projection import Projection
from geopd.training.sharding import check_rows_whole, local_part

__all__ = ["Confinement", "LeakLog"]


class Confinement(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Registers the optimiser hooks of a projection when training begins, and checks that it may.

    Saved with the trainer's state, so that a resume can tell a run that was confined to this basis from another.

    Args:
        projection: a ``Projection``, or its settings, from which a trainer may restore this callback.
        start: the checkpoint training starts from, where the leak is counted from it.
    """

    def __init__(self, projection: Projection | dict[str, Any], start: Path | str | None = None) -> None:
        self.start = None if start is None else Path(start)
        self.projection = projection if isinstance(projection, Projection) else Projection(**projection)
        self._handles: list[Any] = []

    def state(self) -> dict[str, Any]:
        """What the trainer's checkpoint keeps."""
        args = {"projection": self.projection.as_settings(), "start": None if self.start is None else str(self.start)}
        return {"args": args, "attributes": {}, "identity": self._identity}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the optimiser and register the hooks.

        Raises:
            ValueError: the optimiser is not fresh, decays weights, does not hold the confined parameters or takes no
                hooks; or training resumes from a run that was not confined in the same way.
        """
        if state.global_step > 0:
            self._check_resumed(state)
        optimiser = _unwrapped(kwargs["optimizer"])
        confined = self._confined(kwargs["model"])
        _check_optimiser(optimiser, confined, self._frozen(kwargs["model"]), fresh=state.global_step == 0)
        pre, post = self._hooks(confined)
        self.on_train_end(args, state, control)
        self._handles = [optimiser.register_step_pre_hook(hook) for hook in pre]
        self._handles += [optimiser.register_step_post_hook(hook) for hook in post]

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Take the hooks away again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @cached_property
    def _identity(self) -> dict[str, Any]:
        chosen = self.projection
        return {
            "basis": checkpoint_digest(chosen.basis),
            "mode": chosen.mode,
            "lr_scale": chosen.lr_scale,
            "train_rest": chosen.train_rest,
            "start": None if self.start is None else checkpoint_digest(self.start),
        }

    def _check_resumed(self, state: Any) -> None:
        saved = state.stateful_callbacks.get(type(self).__name__)
        before = saved.get("identity") if isinstance(saved, dict) else None
        if before != self._identity:
            changed = "it was not confined" if before is None else f"it was confined to {before}"
            raise ValueError(
                f"cannot resume at step {state.global_step} inside {self.projection.basis}: {changed}, and Adam's "
                "moments would carry that over; start a new run from its weights instead"
            )

    def _confined(self, model: Any) -> dict[str, Any]:
        """The parameter that is trained for every matrix of the basis: B, or the weight itself."""
        basis = self.projection.read
        if self.projection.mode == "adapter":
            return {name: layer.lora_B[ADAPTER].weight for name, layer in adapted_layers(model, basis).items()}
        parameters = named_parameters(model)
        for name in basis.names:
            check_rows_whole(name, parameters[name].parameter)
        return {name: parameters[name].parameter for name in basis.names}

    def _frozen(self, model: Any) -> dict[str, Any]:
        """The parameters that must not be in the optimiser: every A."""
        if self.projection.mode != "adapter":
            return {}
        layers = adapted_layers(model, self.projection.read)
        return {name: layer.lora_A[ADAPTER].weight for name, layer in layers.items()}

    def _hooks(self, confined: dict[str, Any]) -> tuple[list[Any], list[Any]]:
        basis = self.projection.read
        if self.projection.mode == "gradient":
            return [GradientProjection([(weight, basis.vectors[name]) for name, weight in confined.items()])], []
        if self.projection.mode == "mask":
            masks = [(weight, local_part(basis.mask(name), weight)) for name, weight in confined.items()]
            return [GradientMask(masks)], []
        if self.projection.lr_scale == "none":
            return [], []
        steps = ScaledSteps([(B, lr_factor(*basis.vectors[name].shape)) for name, B in confined.items()])
        return [steps.before], [steps.after]


class LeakLog(TrainerCallback):  # type: ignore[misc]
    """Logs ``projection/leak`` every ``leak_every`` steps and at the end, through the trainer's loggers.

    Args:
        projection: whose leak.
        trainer: who logs.
    """

    def __init__(self, projection: Projection, trainer: Any) -> None:
        self.projection = projection
        self.trainer = trainer
        self.start = None if projection.mode == "adapter" else projection.start_weights(trainer.model)
        self._logged_at: int | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Check that the leak will be counted from the weights training starts from.

        Raises:
            ValueError: the start on disk is not what the model holds.
        """
        if state.global_step > 0 or self.start is None:
            return
        moved = {name for name, energy in self._leak(kwargs["model"]).total.items() if energy != 0}
        if moved:
            raise ValueError(
                f"{self.start.checkpoint.path}: {min(moved)} is not the model's ({len(moved)} matrices differ): "
                "give the checkpoint that training starts from as the projection's `start`"
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Log the leak when it is due."""
        if state.global_step % self.projection.leak_every == 0:
            self._log(state, control, kwargs["model"])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Log the leak of the whole increment."""
        if self._logged_at != state.global_step:
            self._log(state, control, kwargs["model"])

    def _leak(self, model: Any) -> Any:
        return self.projection.leak(model, start=self.start)

    def _log(self, state: Any, control: Any, model: Any) -> None:
        leak = self._leak(model)
        self._logged_at = state.global_step
        if leak.share is None or leak.worst is None:
            return
        due = control.should_log  # a log in between would count as the trainer's own, which is then left out
        # the base class's: GRPO's own log would average and clear what it has buffered so far
        logs = {"projection/leak": leak.share, "projection/leak_worst": leak.worst[1]}
        if self.projection.mode == "adapter":
            logs["projection/base_moved"] = float(self.projection.base_moved(model))
        Trainer.log(self.trainer, logs)
        control.should_log = due


def _unwrapped(optimiser: Any) -> Any:
    from accelerate.optimizer import AcceleratedOptimizer

    while isinstance(optimiser, AcceleratedOptimizer):
        optimiser = optimiser.optimizer
    return optimiser


def _check_optimiser(optimiser: Any, confined: dict[str, Any], frozen: dict[str, Any], *, fresh: bool) -> None:
    if not hasattr(optimiser, "register_step_pre_hook"):
        raise ValueError(
            f"{type(optimiser).__name__} takes no hooks before its step, which a projection needs: use one of torch"
        )
    held = {id(parameter) for group in optimiser.param_groups for parameter in group["params"]}
    if lacking := [name for name, parameter in confined.items() if id(parameter) not in held]:
        raise ValueError(
            f"{lacking[0]}: the optimiser does not hold it: build the trainer around Projection.prepare(model)"
        )
    if moving := [name for name, parameter in frozen.items() if id(parameter) in held]:
        raise ValueError(
            f"{moving[0]}: the optimiser holds its A, the frozen directions: build the trainer around "
            "Projection.prepare(model), and train without a KL term (beta 0)"
        )
    if decays := {group["weight_decay"] for group in optimiser.param_groups if group.get("weight_decay")}:
        raise ValueError(f"the optimiser decays weights (weight_decay={max(decays)}): a projection needs 0")
    if fresh and any(optimiser.state.values()):
        raise ValueError("the optimiser carries moments from before: a projection starts with a fresh one")
