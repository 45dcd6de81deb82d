"""What torchtitan lays out in ways of its own: the order of rows, gate and up in one, and where experts are."""

from __future__ import annotations

import re

from geopd.matrices.cuts import Expert
from geopd.matrices.heads import Parts

EXPERTS = ("moe.experts", "moe.routed_experts")
"""Where a layer has its stacks of experts."""
GATE_AND_UP = re.compile(r"(?:feed_forward|moe\.(shared_experts?|routed_experts))\.w13")
"""What is fused so in a layer, and of which experts."""

_META_ORDER = ("llama", "mistral", "mixtral")
_ORDER_OF_TRANSFORMERS = ("llama4", "qwen", "gpt_oss", "deepseek")  # how the model types begin


def in_metas_order(model_type: str) -> bool | None:
    """Whether the rows of wq and wk want turning; None where the model type does not tell."""
    if model_type.startswith(_ORDER_OF_TRANSFORMERS):
        return False
    return True if model_type in _META_ORDER else None


def gate_and_up(experts: str, shape: tuple[int, ...], kind: str) -> Parts | str:
    """The two of torchtitan's ``w13``: (2, i, n), of routed experts (E, 2, i, n); biases are without the n."""
    stacked = shape[: -2 if kind == ".weight" else -1]
    routed = experts == "routed_experts"
    if len(stacked) != 1 + routed or stacked[-1] != 2:
        return f"left fused: gate and up are read where they are stacked, and {shape} is no stack of two"
    homes: Parts = [(f"mlp.{experts}" if experts else "mlp", ())]
    if routed:
        homes = [(f"mlp.experts.{e}", (Expert(e),)) for e in range(stacked[0])]
    halves = (("gate_proj", Expert(0)), ("up_proj", Expert(1)))
    return [(f"{home}.{part}", (*cuts, half)) for home, cuts in homes for part, half in halves]
