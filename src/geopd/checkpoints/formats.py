"""The formats that are read, in the order they are looked for: the first that recognises a path opens it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from geopd.checkpoints.adapter_format import open_adapter, recognises_adapter
from geopd.checkpoints.checkpoint import Checkpoint, CheckpointError, OpenBase
from geopd.checkpoints.dcp_format import open_dcp, recognises_dcp
from geopd.checkpoints.deepspeed_format import open_deepspeed, recognises_deepspeed
from geopd.checkpoints.megatron_format import open_megatron, recognises_megatron
from geopd.checkpoints.safetensors_format import open_safetensors, recognises_safetensors
from geopd.checkpoints.torch_zip_format import open_torch_zip, recognises_torch_zip
from geopd.checkpoints.verl_format import open_verl, recognises_verl


@dataclass(frozen=True, slots=True)
class Format:
    """One format: its name, whether a path (a file or a folder) is of it, and how such a path is opened.

    ``recognises`` looks at names and, where a name is shared, at first bytes; it raises nothing but OSError.
    """

    name: str
    recognises: Callable[[Path], bool]
    open: Callable[[Path, OpenBase], Checkpoint]


def _alone(opener: Callable[[Path], Checkpoint]) -> Callable[[Path, OpenBase], Checkpoint]:
    return lambda path, _: opener(path)


FORMATS: tuple[Format, ...] = (
    Format("safetensors", recognises_safetensors, _alone(open_safetensors)),
    Format("PEFT adapter", recognises_adapter, open_adapter),
    Format("DeepSpeed ZeRO", recognises_deepspeed, _alone(open_deepspeed)),
    Format("verl FSDP", recognises_verl, _alone(open_verl)),
    Format("Megatron torch_dist", recognises_megatron, _alone(open_megatron)),
    Format("torch distributed checkpoint", recognises_dcp, _alone(open_dcp)),
    Format("torch zip", recognises_torch_zip, _alone(open_torch_zip)),
)
"""Safetensors first: where a trainer leaves its own state beside them, they are the weights it means to be read.
Megatron's checkpoint is a torch distributed one with names of its own, so it is looked for before."""


def format_of(path: Path) -> Format | None:
    """The first format that recognises a path; None where none does.

    Raises:
        CheckpointError: if the path may not be looked into.
    """
    try:
        return next((form for form in FORMATS if form.recognises(path)), None)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}; check the path and its permissions") from error
