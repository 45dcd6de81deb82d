"""Where the canonical matrices lie in the tensors that a model family has, on disk or in memory.

Canonical are Llama's names, one matrix each: ``layers.3.self_attn.q_proj``, ``layers.3.mlp.experts.5.gate_proj``.
H query heads, K key-value heads, d numbers a head. The layouts, with the code of transformers that reads them:

- ``qkv_proj`` (Phi-3): rows of q, then k, then v. ``gate_up_proj``: rows of the gate, then of up.
- ``attention.query_key_value`` (GPT-NeoX): per head, d rows each of q, k, v.
- ``self_attention.query_key_value``: Falcon with the new decoder architecture has per key-value head H/K times d rows
  of q, then k, then v; with multi-query all of q, then k, then v; else, and in Bloom, as GPT-NeoX.
- GPT-2: Conv1D weights (inputs, outputs), transposed; ``c_attn`` is q, k, v along the outputs.
- stacks of experts ``experts.gate_up_proj`` (E, 2i, n) or, in Llama 4 and GPT-OSS, (E, n, 2i); GPT-OSS (the one with
  ``gate_up_proj_bias``) interleaves gate and up.
- Mixtral's ``block_sparse_moe`` on disk, which is ``mlp`` in memory.
- torchtitan and Meta's Llama: ``attention.wq`` (or ``attention.qkv_linear.wq``), ``feed_forward.w1``. Llama's and
  Mistral's q and k have the rows of a head in Meta's order; torchtitan holds those of Llama 4, Qwen3, GPT-OSS, DeepSeek
  (``attention.wkv_a``) and of all that normalise q and k per head as transformers does.
- ``attention.qkv_linear.wqkv`` (torchtitan): per key-value head H/K times d rows of q, then k, then v.
- ``feed_forward.w13`` (torchtitan): gate and up stacked (2, i, n); of routed experts (E, 2, i, n).
- ``attention.wq_a``, ``wq_b``, ``wkv_a`` and ``wkv_b`` (torchtitan): DeepSeek's compressed attention.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from geopd.checkpoints import holds_conv1d
from geopd.matrices.cuts import Cut, Expert, Piece, RotaryHalves, Rows, Transpose
from geopd.matrices.heads import QKV, Heads, Parts, by_head, qkv_parts
from geopd.matrices.naming import unwrapped
from geopd.matrices.titan import EXPERTS, GATE_AND_UP, gate_and_up, in_metas_order

_LAYER = re.compile(r"(?:transformer\.|gpt_neox\.)?(?:layers|h)\.(\d+)\.(.+)")
_TOP = {
    "transformer.wte": "embed_tokens",
    "wte": "embed_tokens",
    "transformer.word_embeddings": "embed_tokens",
    "word_embeddings": "embed_tokens",
    "gpt_neox.embed_in": "embed_tokens",
    "tok_embeddings": "embed_tokens",
    "transformer.wpe": "wpe",
    "embed_out": "lm_head",
    "output": "lm_head",
    "transformer.ln_f": "norm",
    "ln_f": "norm",
    "gpt_neox.final_layer_norm": "norm",
}
_RENAMED = {
    "attention.dense": "self_attn.o_proj",
    "self_attention.dense": "self_attn.o_proj",
    "mlp.dense_h_to_4h": "mlp.up_proj",
    "mlp.dense_4h_to_h": "mlp.down_proj",
    "ln_1": "input_layernorm",
    "ln_2": "post_attention_layernorm",
    "block_sparse_moe.gate": "mlp.gate",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "attention.wq_a": "self_attn.q_a_proj",
    "attention.wq_b": "self_attn.q_b_proj",
    "attention.wkv_a": "self_attn.kv_a_proj_with_mqa",
    "attention.wkv_b": "self_attn.kv_b_proj",
    "attention.kv_norm": "self_attn.kv_a_layernorm",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "moe.router.gate": "mlp.gate",
}
_CONV1D = {"attn.c_proj": "self_attn.o_proj", "mlp.c_fc": "mlp.up_proj", "mlp.c_proj": "mlp.down_proj"}
_GATED = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_EXPERT = re.compile(r"block_sparse_moe\.(experts\.\d+)\.(w[123])")
_FEED_FORWARD = re.compile(r"(?:feed_forward|(moe)\.(shared_experts?))\.(w[123])")
_STACK = re.compile(
    r"(.+\.(?:routed_)?experts)\.(gate_up_proj|gate_proj|up_proj|down_proj|w[123])(?:_EFD|_EDF)?(_bias)?"
)

_NO_HEADS = (
    "left whole: config.json says no head counts (num_attention_heads, num_key_value_heads) that fit; put the model's "
    "config.json beside it"
)
_NO_ORDER = "config.json names no model type of which it is known; put the model's config.json beside it"


@dataclass(frozen=True, slots=True)
class Layout:
    """Canonical tensors by the name they are presented under, and what could not be split, with the reason.

    A tensor that is canonical as it lies keeps the name it has; its canonical name is ``naming.canonical_names``'s.
    """

    pieces: dict[str, Piece]
    notes: tuple[str, ...] = ()


def layout_of(
    shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any] | None = None, *, per_head: bool = False
) -> Layout:
    """The canonical tensors in these, by the model's config; no weights are read.

    Args:
        shapes: of every tensor, by its name on disk or its path in memory.
        config: what ``config.json`` holds; head counts and the family are taken from it.
        per_head: whether attention matrices are cut into heads, ``layers.0.self_attn.q_proj.heads.3``: rows of q, k, v,
            columns of o.
    """
    config = dict(config or {})
    family = _Family(shapes, config, Heads.of(config))
    pieces: dict[str, Piece] = {}
    for name, shape in shapes.items():
        for presented, cuts in family.parts(name, tuple(shape)):
            pieces[presented] = Piece(name, tuple(shape)).then(*cuts)
    if whole_too := family.presented_twice():  # parts that are there whole as well: both are shown as they lie
        pieces = {name: piece for name, piece in pieces.items() if piece.stored not in whole_too}
        pieces |= {stored: Piece(stored, tuple(shapes[stored])) for stored in sorted(whole_too)}
    if per_head:
        pieces, whole = by_head(pieces, family.heads)
        for name in whole:
            family.note(name, _NO_HEADS)
    return Layout(pieces, family.grouped_notes())


class _Family:
    """What is known of the model while its tensors are gone through."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any], heads: Heads) -> None:
        self.heads = heads
        self._config = config
        bare = {unwrapped(name): tuple(shape) for name, shape in shapes.items()}
        self._conv1d = holds_conv1d(bare)
        marks = (".attention.w", ".attention.qkv_linear.w", "query_key_value", ".attn.c_attn.")
        self._foreign = any(mark in name for name in bare for mark in marks)
        kept = any(".attention.q_norm." in name or ".attention.wkv_a." in name for name in bare)
        self._compressed_query = any(".attention.wq_a." in name for name in bare)
        self._metas_order = False if kept else in_metas_order(str(config.get("model_type") or ""))
        self._stacks: dict[str, tuple[int, ...]] = {}  # of the first layer that has them, by their names inside it
        for name, shape in bare.items():
            if (match := _LAYER.fullmatch(name)) and _STACK.fullmatch(match[2]):
                self._stacks.setdefault(match[2], shape)
        self._notes: dict[str, list[str]] = {}
        self._origins: dict[str, list[str]] = {}

    def presented_twice(self) -> set[str]:
        """The stored tensors that are presented under a name that another is presented under too."""
        return {name for stored in self._origins.values() if len(stored) > 1 for name in stored}

    def note(self, name: str, reason: str) -> None:
        """Keep what is to be told of a tensor."""
        self._notes.setdefault(reason, []).append(name)

    def grouped_notes(self) -> tuple[str, ...]:
        """One line a reason."""
        return tuple(
            f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {reason}"
            for reason, names in self._notes.items()
        )

    def parts(self, name: str, shape: tuple[int, ...]) -> Parts:
        """What a stored tensor is presented as: names and cuts."""
        found = self._parts(unwrapped(name), shape)
        if isinstance(found, str):
            self.note(name, found)
            found = None
        parts: Parts = [(name, ())] if found is None else found
        for presented, _ in parts:
            self._origins.setdefault(presented, []).append(name)
        if self._metas_order is None and any(isinstance(cut, RotaryHalves) for _, cuts in parts for cut in cuts):
            self.note(name, f"its rows taken to be in Meta's order, as Llama 3's are: {_NO_ORDER}")
        return parts

    def _parts(self, bare: str, shape: tuple[int, ...]) -> Parts | str | None:
        stem, dot, kind = bare.rpartition(".")
        kind = f".{kind}" if dot and kind in ("weight", "bias") else ""
        stem = stem if kind else bare
        match = _LAYER.fullmatch(stem)
        if match is None:
            renamed = _TOP.get(stem) if self._foreign or stem == "embed_out" else None
            return None if renamed is None else [(f"{renamed}{kind}", ())]
        layer, inside = match.groups()
        found = self._inside(inside, shape, kind)
        if not isinstance(found, list):
            return found
        return [(f"layers.{layer}.{part}{kind or '.weight'}", cuts) for part, cuts in found]

    def _inside(self, inside: str, shape: tuple[int, ...], kind: str) -> Parts | str | None:
        if 0 in shape:
            return None
        fused = inside == "attention.qkv_linear.wqkv"
        inside = inside if fused else inside.replace("attention.qkv_linear.", "attention.", 1)
        if (stack := _STACK.fullmatch(inside)) and len(shape) == (2 if stack[3] else 3):
            return self._stack(stack[1], stack[2], stack[3] or "", shape, inside)
        if kind and (stacked := GATE_AND_UP.fullmatch(inside)):
            return gate_and_up(stacked[1] or "", shape, kind)
        if not kind or len(shape) > 2:
            return None
        if fused or inside in ("self_attn.qkv_proj", "attention.query_key_value", "self_attention.query_key_value"):
            return self._qkv(inside, shape[0])
        if inside.endswith(".gate_up_proj") and shape[0] % 2 == 0:
            home, half = inside.removesuffix(".gate_up_proj"), shape[0] // 2
            return [(f"{home}.gate_proj", (Rows(0, half),)), (f"{home}.up_proj", (Rows(half, 2 * half),))]
        if self._conv1d and (inside == "attn.c_attn" or inside in _CONV1D):
            return _conv1d(inside, shape)
        if expert := _EXPERT.fullmatch(inside):
            return [(f"mlp.{expert[1]}.{_GATED[expert[2]]}", ())]
        if dense := _FEED_FORWARD.fullmatch(inside):
            return [(f"mlp.{dense[2] + '.' if dense[1] else ''}{_GATED[dense[3]]}", ())]
        if inside in ("attention.wq", "attention.wk"):
            return self._rotated(inside, shape)
        if inside == "attention.q_norm" and self._compressed_query:
            return [("self_attn.q_a_layernorm", ())]
        return [(_RENAMED[inside], ())] if inside in _RENAMED else None

    def _qkv(self, inside: str, rows: int) -> Parts | str:
        heads, kind = self.heads, self._config.get("model_type")
        if inside == "attention.query_key_value" or kind == "bloom":
            heads = Heads(heads.query, heads.query)
        elif inside == "self_attention.query_key_value":
            if kind not in ("falcon", "RefinedWeb", "RefinedWebModel"):
                return f"left fused: no layout of it is known for the model type {kind}; name it in config.json"
            if not self._config.get("new_decoder_architecture", kind == "RefinedWeb"):
                heads = Heads(heads.query, 1 if self._config.get("multi_query", True) else heads.query)
        found = heads.q_k_v(rows)
        if found is None:
            return (
                "left fused: config.json says no head counts (num_attention_heads, num_key_value_heads) that fit its "
                f"{rows} rows; put the model's config.json beside it"
            )
        d, H, K = found
        parts = qkv_parts(d, H, K, groups=1 if inside == "self_attn.qkv_proj" else K)
        if inside != "attention.qkv_linear.wqkv" or self._metas_order is False:
            return parts
        if self._metas_order is None or d % 2:
            return f"left fused: the order of its rows is not known: {_NO_ORDER}"
        (q, q_rows), (k, k_rows), v = parts
        return [(q, (*q_rows, RotaryHalves(H))), (k, (*k_rows, RotaryHalves(K))), v]

    def _stack(self, home: str, module: str, bias: str, shape: tuple[int, ...], inside: str) -> Parts | str:
        home = "mlp.experts" if home in EXPERTS else home
        module = _GATED.get(module, module)
        experts = range(shape[0])
        if bias:
            halves = _split(module, shape[1], interleaved=True)
            return [(f"{home}.{e}.{part}.bias", (Expert(e), *cuts)) for e in experts for part, cuts in halves.items()]
        turned = self._turned(inside, shape)
        if isinstance(turned, str):
            return turned
        outputs = shape[2] if turned else shape[1]
        before: tuple[Cut, ...] = (Transpose(),) if turned else ()
        split = _split(module, outputs, interleaved=self._interleaved(inside))
        return [(f"{home}.{e}.{part}", (Expert(e), *before, *cuts)) for e in experts for part, cuts in split.items()]

    def _interleaved(self, inside: str) -> bool:
        return f"{inside}_bias" in self._stacks

    def _turned(self, inside: str, shape: tuple[int, ...]) -> bool | str:
        """Whether a stack is (E, inputs, outputs). The pair of a layer tells: up is (2i, n) against down's (n, i)."""
        home, _, module = inside.rpartition(".")
        if module in _GATED or module in ("gate_proj", "up_proj"):
            return False
        other = "down_proj" if module == "gate_up_proj" else "gate_up_proj"
        partner = self._stacks.get(f"{home}.{other}")
        if partner is None:
            return False
        up, down = (shape, partner) if module == "gate_up_proj" else (partner, shape)
        if len(up) == len(down) == 3 and (up[1], up[2]) == (2 * down[2], down[1]):
            return False
        if len(up) == len(down) == 3 and (up[2], up[1]) == (2 * down[1], down[2]):
            return True
        return f"left stacked: the shapes {up} and {down} of gate_up_proj and down_proj do not belong together"

    def _rotated(self, inside: str, shape: tuple[int, ...]) -> Parts | str:
        part, heads = (QKV[0], self.heads.query) if inside == "attention.wq" else (QKV[1], self.heads.key_value)
        if self._metas_order is False:
            return [(part, ())]
        if not heads or shape[0] % (2 * heads):
            return (
                "kept under its own name, its rows in Meta's order: config.json says no head counts "
                "(num_attention_heads, num_key_value_heads); put the model's config.json beside it"
            )
        return [(part, (RotaryHalves(heads),))]


def _split(module: str, outputs: int, *, interleaved: bool) -> dict[str, tuple[Cut, ...]]:
    if module != "gate_up_proj":
        return {module: ()}
    half = outputs // 2
    if interleaved:
        return {"gate_proj": (Rows(0, 1, half),), "up_proj": (Rows(1, 2, half),)}
    return {"gate_proj": (Rows(0, half),), "up_proj": (Rows(half, 2 * half),)}


def _conv1d(inside: str, shape: tuple[int, ...]) -> Parts:
    if inside != "attn.c_attn":
        return [(_CONV1D[inside], (Transpose(),))]
    third = shape[-1] // 3
    return [(part, (Transpose(), Rows(i * third, (i + 1) * third))) for i, part in enumerate(QKV)]
