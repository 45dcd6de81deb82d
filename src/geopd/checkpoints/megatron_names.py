"""Megatron's names and layouts -> transformers': a layer of a stack, a matrix of a fused one, an expert of many.

H query heads in G query groups, d numbers a head. ``linear_qkv`` holds, per query group, H/G times d rows of q, then d
of k, then d of v; ``linear_fc1`` of a gated layer holds the gate's rows, then up's. Source: Megatron core 0.16,
``SelfAttention.get_query_key_value_tensors``, ``MLP.forward`` and ``TransformerBlock.sharded_state_dict``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_TOP = {
    "embedding.word_embeddings": "model.embed_tokens",
    "decoder.final_layernorm": "model.norm",
    "output_layer": "lm_head",
}
_LAYER = re.compile(r"decoder\.layers\.(?:(\d+)\.)?(.+)")
_EXPERT = re.compile(r"mlp\.experts\.experts\.(?:(\d+)\.)?(linear_fc[12])")
_RENAMED = {
    "input_layernorm": "input_layernorm",
    "pre_mlp_layernorm": "post_attention_layernorm",
    "self_attention.linear_proj": "self_attn.o_proj",
    "self_attention.q_layernorm": "self_attn.q_norm",
    "self_attention.k_layernorm": "self_attn.k_norm",
    "mlp.router": "mlp.gate",
}
_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm",
    "mlp.linear_fc1.layer_norm_": "post_attention_layernorm",
}
_MOST_LAYERS, _MOST_EXPERTS, _MOST_MATRICES = 4096, 65_536, 262_144  # of one stacked tensor
_HALVES = {"w": "gate_proj", "v": "up_proj"}


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows ``start`` to ``stop`` of each of ``groups`` equal groups of rows."""

    start: int
    stop: int
    groups: int = 1


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor of transformers' naming: where it lies in Megatron's (``stored[index]``, then rows), and its shape."""

    name: str
    stored: str
    index: tuple[int, ...]
    shape: tuple[int, ...]
    rows: Rows | None = None


@dataclass(frozen=True, slots=True)
class Attention:
    """Heads as the model's settings say: H, G and d; what they do not say is None."""

    heads: int | None
    groups: int | None
    size: int | None

    def missing(self) -> str:
        """The settings that are not known, as config.json and Megatron's args call them."""
        names = {
            "num_attention_heads": self.heads,
            "num_key_value_heads (num_query_groups)": self.groups,
        }
        return ", ".join(name for name, value in names.items() if not value)


def parts_of(
    stored: str, shape: tuple[int, ...], attention: Attention, gated: dict[str, bool]
) -> Iterator[Part | tuple[str, str]]:
    """What a Megatron tensor holds: parts, or a name and why it cannot be given.

    Args:
        stored: the tensor's name, such as ``decoder.layers.self_attention.linear_qkv.weight``.
        shape: its shape, with what is stacked first: layers, then experts.
        attention: for ``linear_qkv``.
        gated: whether the ``linear_fc1`` of a place (its name without the layer) is gate and up.
    """
    stem, _, kind = stored.rpartition(".")
    if stem in _TOP:
        yield Part(f"{_TOP[stem]}.{kind}", stored, (), shape)
        return
    match = _LAYER.fullmatch(stored)
    if match is None:
        yield Part(stored, stored, (), shape)
        return
    number, inside = match.groups()
    if refusal := _stacked_too_high(inside, shape, stacked=not number):
        yield stored, refusal
        return
    layers = [(int(number), ())] if number else [(layer, (layer,)) for layer in range(shape[0] if shape else 0)]
    for layer, index in layers:
        for part in _inside(inside, stored, index, shape[len(index) :], attention, gated):
            prefix = f"model.layers.{layer}."
            if isinstance(part, Part):
                yield Part(prefix + part.name, part.stored, part.index, part.shape, part.rows)
            else:
                yield prefix + part[0], part[1]


def _stacked_too_high(inside: str, shape: tuple[int, ...], *, stacked: bool) -> str | None:
    """Why a stack of layers, of experts or of both is not taken apart: no model has so many."""
    layers = shape[0] if stacked and shape else 1
    expert = _EXPERT.fullmatch(inside.rpartition(".")[0])
    rest = shape[1:] if stacked else shape
    experts = rest[0] if expert and not expert[1] and rest else 1
    if layers > _MOST_LAYERS or experts > _MOST_EXPERTS or layers * experts > _MOST_MATRICES:
        return f"a stack of {layers:,} layers of {experts:,} experts, more than any model has; write it again"
    return None


def _inside(
    inside: str,
    stored: str,
    index: tuple[int, ...],
    shape: tuple[int, ...],
    attention: Attention,
    gated: dict[str, bool],
) -> Iterator[Part | tuple[str, str]]:
    stem, _, kind = inside.rpartition(".")
    fused_norm = next((norm for start, norm in _FUSED_NORMS.items() if inside.startswith(start)), None)
    if fused_norm is not None:
        yield Part(f"{fused_norm}.{inside.rpartition('_')[2]}", stored, index, shape)
    elif stem == "self_attention.linear_qkv":
        yield from _qkv(kind, stored, index, shape, attention)
    elif expert := _EXPERT.fullmatch(stem):
        number, linear = expert.groups()
        for e in [int(number)] if number else range(shape[0]):
            inner, at = (shape, index) if number else (shape[1:], (*index, e))
            yield from _linear(f"mlp.experts.{e}", linear, kind, stored, at, inner, gated_of(stem, gated))
    elif stem.startswith("mlp.") and stem.endswith(("linear_fc1", "linear_fc2")):
        home, _, linear = stem.rpartition(".")
        yield from _linear(home, linear, kind, stored, index, shape, gated_of(stem, gated))
    else:
        yield Part(f"{_RENAMED.get(stem, stem)}.{kind}", stored, index, shape)


def gated_of(stem: str, gated: dict[str, bool]) -> bool:
    """Whether the feed-forward layer that a tensor belongs to has a gate."""
    return gated.get(re.sub(r"\.\d+\.", ".", stem).replace("linear_fc2", "linear_fc1"), False)


def _qkv(
    kind: str, stored: str, index: tuple[int, ...], shape: tuple[int, ...], attention: Attention
) -> Iterator[Part | tuple[str, str]]:
    names = [f"self_attn.{part}_proj.{kind}" for part in "qkv"]
    H, G = attention.heads, attention.groups
    reason = None
    if not H or not G:
        reason = (
            f"{stored} holds q, k and v interleaved by query group, and neither config.json nor the args in common.pt "
            f"say {attention.missing()}; put the model's config.json beside it"
        )
    elif H % G or shape[0] % (H + 2 * G) or (attention.size or shape[0] // (H + 2 * G)) * (H + 2 * G) != shape[0]:
        reason = f"{stored} has {shape[0]} rows, which are no {H} query and 2 x {G} key and value heads of one size"
    if reason is not None:
        yield from ((name, reason) for name in names)
        return
    assert H is not None
    assert G is not None
    d, query = shape[0] // (H + 2 * G), H // G
    bounds = ((0, query * d), (query * d, (query + 1) * d), ((query + 1) * d, (query + 2) * d))
    for name, (start, stop) in zip(names, bounds, strict=True):
        yield Part(name, stored, index, (G * (stop - start), *shape[1:]), Rows(start, stop, G))


def _linear(
    home: str, linear: str, kind: str, stored: str, index: tuple[int, ...], shape: tuple[int, ...], gated: bool
) -> Iterator[Part]:
    kind, _, half = kind.partition("_")
    if linear == "linear_fc2":
        yield Part(f"{home}.down_proj.{kind}", stored, index, shape)
    elif half in _HALVES:  # written as two tensors
        yield Part(f"{home}.{_HALVES[half]}.{kind}", stored, index, shape)
    elif gated:
        rows = shape[0] // 2
        for name, start in (("gate_proj", 0), ("up_proj", rows)):
            yield Part(f"{home}.{name}.{kind}", stored, index, (rows, *shape[1:]), Rows(start, start + rows))
    else:
        yield Part(f"{home}.up_proj.{kind}", stored, index, shape)
