"""Canonical names: ``model.layers.3.self_attn.q_proj.weight`` is the ``q_proj`` of layer 3, whatever wraps it.

Covers the names that Llama, Qwen2, Qwen3, Mistral, Gemma and OLMo checkpoints share (their mixture-of-experts forms
too). A 2-D weight of any other name is measured under its own name, as module ``other``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class Role(StrEnum):
    """What a tensor counts as."""

    MATRIX = "matrix"
    """A 2-D weight that every diagnostic measures and the headline figures cover."""
    EMBEDDING = "embedding"
    """Embeddings and head: entrywise metrics only, unless asked."""
    VECTOR = "vector"
    """Norms, biases and other 1-D tensors: entrywise, for the 'all parameters' line only."""
    UNSUPPORTED = "unsupported"
    """More than two dimensions, or empty."""


@dataclass(frozen=True, slots=True)
class WeightName:
    """A tensor's canonical name, its decoder layer (None outside the layers), its module and its role."""

    name: str
    layer: int | None
    module: str
    role: Role


_PREFIXES = ("module.", "_orig_mod.", "base_model.model.", "language_model.", "model.")
_INSERTED = re.compile(r"(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
_LAYER = re.compile(r"layers\.(\d+)\.")
_HEAD = re.compile(r"\.heads\.\d+$")
_PROJECTIONS = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"})
_ROUTERS = frozenset({"mlp.gate", "block_sparse_moe.gate", "mlp.router"})
_EMBEDDINGS = frozenset({"embed_tokens", "wte", "word_embeddings", "tok_embeddings", "embed_in", "embeddings"})
_HEADS = frozenset({"lm_head", "embed_out", "output"})


def unwrapped(name: str) -> str:
    """A tensor's name without what wrappers put before or into it."""
    stripped = _INSERTED.sub("", name)
    while prefix := next((p for p in _PREFIXES if stripped.startswith(p)), None):
        stripped = stripped.removeprefix(prefix)
    return stripped


def _describe(name: str, shape: tuple[int, ...]) -> WeightName:
    match = _LAYER.match(name)
    layer = int(match[1]) if match else None
    inside = name[match.end() :] if match else name
    leaf = _HEAD.sub("", inside).rsplit(".", 1)[-1]
    if len(shape) == 1 and shape[0]:
        module = "bias" if leaf == "bias" else "norm" if "norm" in name else "vector"
        return WeightName(name, layer, module, Role.VECTOR)
    if len(shape) != 2 or 0 in shape:
        return WeightName(name, layer, "other", Role.UNSUPPORTED)
    if layer is None and leaf in _EMBEDDINGS:
        return WeightName(name, layer, "embedding", Role.EMBEDDING)
    if layer is None and leaf in _HEADS:
        return WeightName(name, layer, "head", Role.EMBEDDING)
    if layer is not None and inside in _ROUTERS:
        return WeightName(name, layer, "router", Role.MATRIX)
    module = leaf if layer is not None and leaf in _PROJECTIONS else "other"
    return WeightName(name, layer, module, Role.MATRIX)


def canonical_names(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, WeightName]:
    """Canonical name of every tensor, by the name it has on disk.

    Wrapper prefixes (``module.``, ``_orig_mod.``, ``base_model.model.``, ``language_model.``, ``model.``) and the
    ``.weight`` suffix are removed, and what torch.compile, activation checkpointing and FSDP put into a path; where
    that would give two tensors one name, both keep their own.
    """
    stripped = {name: unwrapped(name).removesuffix(".weight") for name in shapes}
    taken = Counter(stripped.values())
    return {
        name: _describe(short if taken[short] == 1 else name, tuple(shapes[name])) for name, short in stripped.items()
    }
