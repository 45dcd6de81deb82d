"""Training inside a subspace or on a set of entries, with any Trainer of transformers or TRL.

    projection = Projection(basis="opd_63.safetensors", mode="adapter")
    projection.check(args)
    model = projection.prepare(model)
    trainer = SomeTrainer(model, args, ...)
    projection.attach(trainer)
    trainer.train()
    settings["projection"] = projection.record(trainer.model)

What holds in every mode, so that arms can be compared (docs/lock.md): the optimiser starts fresh, weight decay is 0,
matrices outside the basis do not move, and norms, biases, embeddings and head do not move either unless ``train_rest``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from geopd.checkpoints import checkpoint_digest
from geopd.training.adapter_projection import adapted_layers, adapter_for
from geopd.training.basis import Basis, read_basis
from geopd.training.basis_fit import check_fit
from geopd.training.leak import (
    Leak,
    StartWeights,
    base_checksums,
    leak_of_adapter,
    leak_of_checkpoint,
    leak_of_weights,
)
from geopd.training.named_parameters import named_parameters, rest_of
from geopd.training.sharding import check_rows_whole

__all__ = ["LR_SCALES", "MODES", "Projection"]

MODES = ("adapter", "gradient", "mask")
LR_SCALES = ("none", "sqrt")
_ELEMENTWISE = ("adamw", "sgd", "rmsprop", "adagrad", "lion", "paged_adamw", "paged_lion")


@dataclass(frozen=True)
class Projection:
    """Where training may move, and how that is enforced.

    Args:
        basis: a file of ``geopd basis``.
        mode: ``adapter`` (exact: a LoRA whose A is frozen to V^T, optimiser state m x K), ``gradient`` (the paper's
            g <- g V V^T before the optimiser's step and after clipping; Adam's elementwise step leaves the span again)
            or ``mask`` (only the entries that the basis, then of kind ``mask``, names).
        lr_scale: ``sqrt`` multiplies every adapter matrix's learning rate by sqrt(n / K), so that a step is as long as
            the full one's; ``none`` leaves it. The logged learning rate is the one without the factor.
        train_rest: train norms, biases, embeddings and head as well.
        start: the checkpoint training starts from, which the leak of ``gradient`` and ``mask`` is counted from; by
            default the folder the model was loaded from.
        leak_every: optimiser steps between two logged leaks.

    Raises:
        ValueError: a setting is unknown, out of range or of another type, or the mode has no such setting.
    """

    basis: Path
    mode: str = "adapter"
    lr_scale: str = "none"
    train_rest: bool = False
    start: Path | None = None
    leak_every: int = 50

    def __post_init__(self) -> None:
        for name, value in (("basis", self.basis), ("start", self.start)):
            if not isinstance(value, (str, Path)) and not (name == "start" and value is None):
                raise ValueError(f"projection {name}={value!r}: give a path")
        object.__setattr__(self, "basis", Path(self.basis))
        object.__setattr__(self, "start", None if self.start is None else Path(self.start))
        if not isinstance(self.train_rest, bool):
            raise ValueError(f"projection train_rest={self.train_rest!r}: give true or false")
        if self.mode not in MODES:
            raise ValueError(f"projection mode {self.mode!r} is unknown: use one of {', '.join(MODES)}")
        if self.lr_scale not in LR_SCALES:
            raise ValueError(f"projection lr_scale {self.lr_scale!r} is unknown: use one of {', '.join(LR_SCALES)}")
        if self.lr_scale != "none" and self.mode != "adapter":
            raise ValueError(
                f"projection lr_scale {self.lr_scale!r} is for mode 'adapter': in mode {self.mode!r} the optimiser "
                "works on all coordinates already; leave it at 'none'"
            )
        every = self.leak_every
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ValueError(f"projection leak_every={every!r}: give a whole number of steps, 1 or more")

    @cached_property
    def read(self) -> Basis:
        """The basis.

        Raises:
            ValueError: the file cannot be used, or is a mask where a subspace is needed, or the other way round.
        """
        basis = read_basis(self.basis)
        if basis.is_mask != (self.mode == "mask"):
            kind = "a coordinate mask" if basis.is_mask else "a subspace"
            remedy = "mode 'mask'" if basis.is_mask else "a basis of `geopd basis --kind mask`"
            raise ValueError(f"{self.basis}: holds {kind}, which mode {self.mode!r} cannot use: use {remedy}")
        return basis

    @cached_property
    def _loaded_as(self) -> dict[str, torch.dtype]:
        # fp32 masters of a model loaded in bf16 start from the rounded weights, whatever they become later
        return {}

    @cached_property
    def _checksums(self) -> dict[str, int]:
        return {}

    def check(self, args: Any) -> None:
        """Refuse training arguments under which the arms would not be comparable, or the mode cannot work.

        Raises:
            ValueError: weight decay is not 0; DeepSpeed or FSDP 1 with mode ``gradient`` or ``mask``, or DeepSpeed with
                ``lr_scale``; an optimiser that mode ``mask`` cannot confine; the basis cannot be read.
        """
        if args.weight_decay != 0:
            raise ValueError(
                f"weight_decay={args.weight_decay}: a projection needs 0, since decay acts on W in one mode and on B "
                "in another, and leaves the subspace"
            )
        if getattr(args, "deepspeed", None) or getattr(args, "deepspeed_plugin", None):
            self._refuse_deepspeed()
        if self.mode == "mask":
            name = str(getattr(args.optim, "value", args.optim))
            if not name.startswith(_ELEMENTWISE) or args.adam_epsilon <= 0:
                raise ValueError(
                    f"optim={name}, adam_epsilon={args.adam_epsilon}: mode 'mask' needs an elementwise optimiser whose "
                    "step is 0 where the gradient always was, such as adamw_torch with an epsilon above 0"
                )
        _ = self.read

    def prepare(self, model: Any) -> Any:
        """The model to give to the trainer: wrapped in the adapter, or with all but the basis's matrices frozen.

        Raises:
            ValueError: the model already carries an adapter, or lacks a matrix of the basis, or has it in another
                shape.
        """
        if hasattr(model, "peft_config"):
            raise ValueError("the model already carries a PEFT adapter: merge it first (`merge_and_unload()`)")
        parameters = named_parameters(model)
        self._loaded_as.update(
            {name: parameters[name].parameter.dtype for name in self.read.names if name in parameters}
        )
        if self.mode == "adapter":
            adapted = adapter_for(model, self.read, train_rest=self.train_rest)
            self._checksums.update(base_checksums(adapted, self.read))
            return adapted
        check_fit(model, parameters, self.read, adapter=False)
        for name in self.read.names:
            check_rows_whole(name, parameters[name].parameter)
        trained = {*self.read.names, *(rest_of(parameters, self.read.names) if self.train_rest else ())}
        for name, found in parameters.items():
            found.parameter.requires_grad_(name in trained)
        return model

    def attach(self, trainer: Any) -> None:
        """Confine a trainer that was built around the prepared model, and have it log ``projection/leak``.

        Raises:
            ValueError: as ``check``; the model was not prepared; the leak's start is not on disk; or FSDP is on and the
            adapter and the rest differ in dtype.
        """
        from geopd.training.confinement import Confinement, LeakLog

        self.check(trainer.args)
        if getattr(trainer, "is_deepspeed_enabled", False):
            self._refuse_deepspeed()
        plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
        start = None
        if self.mode == "adapter":
            adapted_layers(trainer.model, self.read)
            if plugin is not None:
                _check_one_dtype(trainer.model, trainer.accelerator.mixed_precision)
        else:
            start = self.start_weights(trainer.model).checkpoint.path
            if plugin is not None and getattr(plugin, "fsdp_version", 1) == 1:
                raise ValueError(
                    f"mode {self.mode!r} cannot work under FSDP 1, which flattens the matrices: set fsdp_version 2, "
                    "or use mode 'adapter'"
                )
            self._check_prepared(trainer.model)
        trainer.add_callback(Confinement(self, start))
        trainer.add_callback(LeakLog(self, trainer))

    def start_weights(self, model: Any) -> StartWeights:
        """The weights training starts from, on disk.

        Raises:
            ValueError: neither ``start`` nor the model names a folder that holds them.
        """
        path = self.start or Path(str(getattr(model, "name_or_path", "") or ""))
        if self.start is None and (path == Path() or not path.exists()):
            named = str(path) if path != Path() else "no name"
            raise ValueError(
                f"mode {self.mode!r} counts its leak from the checkpoint training starts from, and the model names "
                f"none on disk ({named}): give its folder as the projection's `start`"
            )
        return StartWeights(path)

    def leak(
        self,
        model: Any,
        *,
        dtype: torch.dtype | None = None,
        start: StartWeights | None = None,
    ) -> Leak:
        """The leak of a model in training; with ``dtype``, of what merging and saving in it would store.

        Under sharding every process must call it.

        Raises:
            ValueError: the adapter or the start is missing.
        """
        if self.mode == "adapter":
            return leak_of_adapter(model, self.read, dtype)
        weights = start or self.start_weights(model)
        return leak_of_weights(model, self.read, weights, loaded_as=self._loaded_as, dtype=dtype)

    def base_moved(self, model: Any) -> int:
        """How many weights under the adapter are no longer what ``prepare`` found, which ought to be none.

        Syncing an adapter to an inference server by merging and unmerging it in place rounds them each time.
        """
        now = base_checksums(model, self.read, self._loaded_as)
        return sum(now[name] != before for name, before in self._checksums.items())

    def record(self, model: Any, saved: Path | None = None) -> dict[str, Any]:
        """What ``run.json`` keeps of the projection: its settings, the basis's digest and origin, and the leaks.

        ``leak`` is None where nothing moved; ``leak_bf16`` is after rounding both ends to bf16, of the checkpoint
        ``saved`` at the end of training where one is given, else of what saving the model would store. Under sharding
        every process must call it.

        Raises:
            ValueError: as ``leak``; or the saved checkpoint cannot be read, or is of another model.
        """
        leak = self.leak(model)
        if saved is None:
            rounded = self.leak(model, dtype=torch.bfloat16)
        else:
            start = self.start_weights(model).checkpoint.path
            rounded = leak_of_checkpoint(start, saved, self.read, dtype=torch.bfloat16)
        provenance = self.read.provenance
        moved = {"base_moved": self.base_moved(model)} if self.mode == "adapter" else {}
        return (
            self.as_settings()
            | moved
            | {
                "basis_digest": checkpoint_digest(self.basis),
                "kind": provenance.kind,
                "k": provenance.k,
                "matrices": len(self.read.names),
                "leak": leak.share,
                "leak_bf16": rounded.share,
                "leak_worst": None if leak.worst is None else {"matrix": leak.worst[0], "leak": leak.worst[1]},
            }
        )

    def as_settings(self) -> dict[str, Any]:
        """The settings as JSON values; ``Projection(**settings)`` is the same projection."""
        paths = {"basis": str(self.basis), "start": None if self.start is None else str(self.start)}
        return asdict(self) | paths

    def _refuse_deepspeed(self) -> None:
        what = f"mode {self.mode!r}" if self.mode != "adapter" else "lr_scale 'sqrt'"
        if self.mode != "adapter" or self.lr_scale != "none":
            raise ValueError(
                f"{what} cannot work under DeepSpeed, whose optimiser steps on flattened fp32 copies: use FSDP 2, or "
                "mode 'adapter' with lr_scale 'none'"
            )

    def _check_prepared(self, model: Any) -> None:
        parameters = named_parameters(model)
        trained = {*self.read.names, *(rest_of(parameters, self.read.names) if self.train_rest else ())}
        wrong = [name for name, found in parameters.items() if found.parameter.requires_grad != (name in trained)]
        if wrong:
            raise ValueError(
                f"{wrong[0]}: is {'frozen' if wrong[0] in trained else 'trainable'} although the projection says "
                "otherwise: build the trainer around Projection.prepare(model)"
            )


def _check_one_dtype(model: Any, mixed_precision: str) -> None:
    # in mixed precision Accelerate makes all that is trained fp32 before it shards
    dtypes = sorted({str(value.dtype).removeprefix("torch.") for value in model.parameters() if value.requires_grad})
    if len(dtypes) > 1 and mixed_precision == "no":
        raise ValueError(
            f"train_rest under FSDP: the adapter is float32 and the rest {dtypes[0]}, and FSDP trains one dtype: train "
            "in mixed precision (`bf16: true`), load the model in float32, or leave train_rest off"
        )
