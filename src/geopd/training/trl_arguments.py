"""TRL's configs with the defaults of arXiv 2606.07082 where it gives them, and of the machine where it does not."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from trl import GRPOConfig, SFTConfig

__all__ = ["OnPolicyArguments", "SupervisedArguments"]


@dataclass
class _Defaults:
    """Defaults that both TRL configs get here; a mixin in front of them."""

    bf16: bool | None = field(
        default=None, metadata={"help": "bf16 autocast over the weights as loaded. Default: where the device has it."}
    )
    activation_checkpointing: bool | None = field(
        default=None, metadata={"help": "Recompute activations in the backward pass. Default: true."}
    )
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "Older name of activation_checkpointing."}
    )
    report_to: str = field(default="none", metadata={"help": "Loggers: none, wandb, tensorboard, trackio, all."})
    adam_beta2: float = field(default=0.98, metadata={"help": "Decay of Adam's second moment."})
    weight_decay: float = field(default=0.1, metadata={"help": "Decoupled weight decay."})

    def __post_init__(self) -> None:
        if getattr(self, "output_dir", None) is None:
            raise ValueError("output_dir is missing: name the run's folder")
        if not (self.use_cpu or torch.accelerator.is_available()):  # type: ignore[has-type]
            self.use_cpu = True
        if self.bf16 is None:
            fp16 = getattr(self, "fp16", False)
            self.bf16 = not fp16 and not self.use_cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        if self.activation_checkpointing is None:
            self.activation_checkpointing = self.gradient_checkpointing is not False
        self.gradient_checkpointing = None  # mirrored from the newer name; set, it would only warn
        super().__post_init__()  # type: ignore[misc]


@dataclass
class OnPolicyArguments(_Defaults, GRPOConfig):  # type: ignore[misc]
    """GRPO's arguments with the settings of arXiv 2606.07082 where it gives them."""

    learning_rate: float = field(default=1e-6, metadata={"help": "Peak learning rate."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Learning-rate schedule."})
    epsilon_high: float | None = field(default=0.28, metadata={"help": "Upper clipping range of the ratio."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta != 0.0:
            raise ValueError(f"beta={self.beta} adds a KL to a reference model: set beta=0 for these paradigms")


@dataclass
class SupervisedArguments(_Defaults, SFTConfig):  # type: ignore[misc]
    """SFT's arguments with the settings of arXiv 2606.07082 where it gives them."""

    learning_rate: float = field(default=1e-5, metadata={"help": "Peak learning rate."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning-rate schedule."})
    adam_beta2: float = field(default=0.95, metadata={"help": "Decay of Adam's second moment."})
