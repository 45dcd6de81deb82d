"""Attention heads: how many the config says, which rows of a fused tensor are theirs, and matrices cut into heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from geopd.matrices.cuts import Columns, Cut, Piece, Rows

Parts = list[tuple[str, tuple[Cut, ...]]]
"""Names inside a layer (or in the model) and the cuts that make each of them."""

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


@dataclass(frozen=True, slots=True)
class Heads:
    """H query and K key-value heads as the model's config says; None where it does not."""

    query: int | None
    key_value: int | None

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Heads:
        """Head counts of a ``config.json``, whatever its family calls them."""
        inner = config.get("text_config")
        config = {**config, **inner} if isinstance(inner, dict) else config
        query = _count(config, "num_attention_heads", "n_head", "num_heads", "n_heads")
        key_value = _count(config, "num_key_value_heads", "num_kv_heads", "n_head_kv", "n_kv_heads")
        return cls(query, key_value or query)

    def q_k_v(self, rows: int) -> tuple[int, int, int] | None:
        """Heads' rows (d) with H and K in a tensor of (H + 2K) d rows; None where they do not fit."""
        if not self.query or not self.key_value or self.query % self.key_value:
            return None
        if rows % (self.query + 2 * self.key_value):
            return None
        return rows // (self.query + 2 * self.key_value), self.query, self.key_value


def _count(config: Mapping[str, Any], *names: str) -> int | None:
    found = next((config[name] for name in names if config.get(name)), None)
    return found if isinstance(found, int) and not isinstance(found, bool) and found > 0 else None


def qkv_parts(d: int, H: int, K: int, groups: int) -> Parts:
    """Rows of q, k and v in a tensor of ``groups`` groups, each with its share of q, then of k, then of v."""
    q, k = H // groups * d, K // groups * d
    bounds = ((0, q), (q, q + k), (q + k, q + 2 * k))
    return [(part, (Rows(start, stop, groups),)) for part, (start, stop) in zip(QKV, bounds, strict=True)]


def by_head(pieces: Mapping[str, Piece], heads: Heads) -> tuple[dict[str, Piece], list[str]]:
    """Attention matrices cut into heads: rows of q, k and v, columns of o.

    Where the counts do not fit they stay whole; the second value names them.
    """
    found: dict[str, Piece] = {}
    whole: list[str] = []
    for name, piece in pieces.items():
        stem, _, kind = name.rpartition(".")
        leaf = stem.rsplit(".", 1)[-1]
        count = heads.key_value if leaf in ("k_proj", "v_proj") else heads.query
        side = 1 if leaf == "o_proj" else 0
        attention = leaf in ("q_proj", "k_proj", "v_proj", "o_proj") and kind == "weight" and len(piece.shape) == 2
        if not attention or not count or piece.shape[side] % count:
            found[name] = piece
            whole += [name] if attention else []
            continue
        d = piece.shape[side] // count
        for head in range(count):
            cut = Columns(head * d, (head + 1) * d) if side else Rows(head * d, (head + 1) * d)
            found[f"{stem}.heads.{head}.{kind}"] = piece.then(cut)
    return found, whole
