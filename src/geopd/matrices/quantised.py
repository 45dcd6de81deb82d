"""Quantised weights: which tensors are, with what they come, and what their values are where plain arithmetic says so.

fp8 weights are multiplied by their scales, one for the tensor, for a row or for a block of 128 x 128 entries
(``quantization_config.weight_block_size`` in config.json), in float32: W = Q * s. Codebooks (bitsandbytes, MXFP4) and
packed integers (GPTQ, AWQ, compressed-tensors) are refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from geopd.checkpoints import CheckpointError, TensorInfo

_REMEDY = "load the model with transformers, `model.dequantize()`, `save_pretrained`, and measure that"
_FP8 = frozenset({"F8_E4M3", "F8_E5M2"})
_SCALES = ("_scale_inv", "_scale")
_BLOCK = (128, 128)
_FOUR_BITS = "bitsandbytes (4 bits)"
_STATE = ".quant_state."
_BITSANDBYTES = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


@dataclass
class Quantised:
    """What a checkpoint's tensors say of quantisation, by their names.

    ``refused``: the weights that cannot be read as numbers, with the reason. ``scales``: fp8 weights and the tensor
    that holds their scales. ``companions``: scales, zeros and states, which are no weights.
    """

    refused: dict[str, str] = field(default_factory=dict)
    scales: dict[str, str] = field(default_factory=dict)
    companions: set[str] = field(default_factory=set)

    @classmethod
    def among(cls, tensors: Mapping[str, TensorInfo]) -> Quantised:
        """Recognise quantised weights by names and dtypes alone."""
        found = cls()
        states: dict[str, set[str]] = {}
        for name in tensors:
            weight, state, _ = name.partition(_STATE)
            if state:
                states.setdefault(weight, set()).add(name)
        for name, info in tensors.items():
            for kind, companions in _recognised(name, info, tensors):
                found.companions.update(other for other in companions if other in tensors)
                if kind == _FOUR_BITS:
                    found.companions |= states.get(name, set())
                if kind is not None:
                    found.refused[name] = f"quantised by {kind}: {_REMEDY}"
            if info.dtype in _FP8 and name not in found.refused:
                found._fp8(name, info, tensors)
        found.companions -= set(found.refused)
        return found

    def _fp8(self, name: str, info: TensorInfo, tensors: Mapping[str, TensorInfo]) -> None:
        scale = next((name + end for end in _SCALES if name + end in tensors), None)
        if scale is None:
            self.refused[name] = f"stored as {info.dtype} without scales ({name}_scale_inv or {name}_scale): {_REMEDY}"
        else:
            self.scales[name] = scale
            self.companions.add(scale)
        stem = name.removesuffix("weight")
        self.companions |= {f"{stem}{end}" for end in ("input_scale", "activation_scale") if f"{stem}{end}" in tensors}


def _recognised(
    name: str, info: TensorInfo, tensors: Mapping[str, TensorInfo]
) -> Iterator[tuple[str | None, set[str]]]:
    """Schemes that a tensor is a weight of (None where it is only what comes with one), and what may come with it."""
    stem = name.removesuffix("weight")
    if f"{name}.absmax" in tensors:
        yield _FOUR_BITS, {f"{name}.{end}" for end in _BITSANDBYTES}
    elif info.dtype == "I8" and f"{stem}SCB" in tensors:
        yield "bitsandbytes (8 bits)", {f"{stem}SCB", f"{stem}weight_format"}
    elif name.endswith(".qweight"):
        stem = name.removesuffix("qweight")
        kind = "GPTQ" if f"{stem}g_idx" in tensors else "GPTQ or AWQ"
        yield kind, {f"{stem}{end}" for end in ("qzeros", "scales", "g_idx")}
    elif name.endswith(".weight_packed"):
        stem = name.removesuffix("packed")
        ends = ("scale", "shape", "zero_point", "g_idx", "global_scale")
        yield "compressed-tensors (packed)", {f"{stem}{end}" for end in ends}
    elif name.endswith("_blocks") and name.removesuffix("_blocks") + "_scales" in tensors:
        yield "MXFP4", {name.removesuffix("_blocks") + "_scales"}


def weight_of(name: str) -> str:
    """The name that a quantised tensor's weight has when it is not quantised."""
    for end in (".qweight", ".weight_packed"):
        if name.endswith(end):
            return f"{name.removesuffix(end)}.weight"
    return name.removesuffix("_blocks")


def block_size(config: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns of a block that has one scale, as the config says; 128 x 128 where it does not.

    Raises:
        CheckpointError: the config says something that is no size.
    """
    settings = config.get("quantization_config")
    block = settings.get("weight_block_size") if isinstance(settings, dict) else None
    if block is None:
        return _BLOCK
    if not (isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)):
        raise CheckpointError(
            f"config.json: weight_block_size {str(block)[:80]} is not two whole numbers above zero; copy the model's "
            "config.json again"
        )
    return block[0], block[1]


def dequantised(name: str, Q: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """W = Q * s in float32, with one scale for all of Q, for each of its rows, or for each of its blocks.

    Args:
        name: of the weight, for errors.
        Q: (..., m, n), fp8.
        scales: one; (..., m, 1); or (..., ceil(m / b), ceil(n / c)), the last block of a side cut short.
        block: (b, c).

    Raises:
        CheckpointError: the scales have none of these shapes.
    """
    s, W = scales.to(torch.float32), Q.to(torch.float32)
    if s.numel() == 1:
        return W * s.reshape(())
    m, n = Q.shape[-2:]
    if s.shape == (*Q.shape[:-1], 1) or (s.shape == Q.shape[:-1] and Q.ndim == 2):
        return W * s.reshape(*Q.shape[:-1], 1)
    if s.shape == (*Q.shape[:-2], 1, 1):
        return W * s
    b, c = min(block[0], m), min(block[1], n)  # a block larger than the weight is the weight
    if s.shape != (*Q.shape[:-2], math.ceil(m / b), math.ceil(n / c)):
        raise CheckpointError(
            f"tensor {name}: its scales have the shape {tuple(s.shape)}, which is none of one, a row or a block of "
            f"{b} x {c} of {tuple(Q.shape)}; put the model's config.json beside it, or write the checkpoint again"
        )
    wide = s.repeat_interleave(b, dim=-2)[..., :m, :].repeat_interleave(c, dim=-1)[..., :n]
    return W * wide
