"""torchtitan's query, key and value as transformers holds them: which families' rows want turning, fused or apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from checkpoints_on_disk import save_tensors
from geopd.checkpoints import open_checkpoint
from geopd.matrices import CanonicalCheckpoint, canonical_view

H, K, D, HIDDEN = 4, 2, 6, 5
HEADS: dict[str, Any] = {"num_attention_heads": H, "num_key_value_heads": K, "head_dim": D}
Q, KEY, V = (f"layers.0.self_attn.{what}_proj.weight" for what in "qkv")


def projections() -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as transformers holds them."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(heads * D, HIDDEN, generator=generator) for heads in (H, K, K))  # type: ignore[return-value]


def in_metas_order(weight: Tensor, heads: int) -> Tensor:
    """Rows 0, d/2, 1, d/2 + 1, ... of each head: the two that one rotation turns are neighbours."""
    rows = [head * D + half * D // 2 + i for head in range(heads) for i in range(D // 2) for half in (0, 1)]
    return weight[rows]


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """For each key-value head: the queries that share it, then its key, then its value."""
    shared = H // K
    rows = []
    for group in range(K):
        rows += [q[(group * shared + i) * D : (group * shared + i + 1) * D] for i in range(shared)]
        rows += [k[group * D : (group + 1) * D], v[group * D : (group + 1) * D]]
    return torch.cat(rows)


def view(path: Path, tensors: dict[str, Tensor], model_type: str | None) -> CanonicalCheckpoint:
    config = HEADS | ({"model_type": model_type} if model_type else {})
    return canonical_view(open_checkpoint(save_tensors(path, tensors, config)))


@pytest.mark.parametrize("home", ["attention", "attention.qkv_linear"])
@pytest.mark.parametrize("model_type", ["llama4", "llama4_text", "gpt_oss", "qwen3", "deepseek_v3"])
def test_families_that_torchtitan_holds_as_transformers_does_are_not_turned(
    model_type: str, home: str, tmp_path: Path
) -> None:
    q, k, v = projections()
    stored = {f"layers.0.{home}.{w}.weight": value for w, value in zip(("wq", "wk", "wv"), (q, k, v), strict=True)}
    held = view(tmp_path, stored, model_type)
    assert [torch.equal(held.read(name), value) for name, value in zip((Q, KEY, V), (q, k, v), strict=True)] == [
        True
    ] * 3
    assert held.warnings == ()


def test_what_has_a_compressed_key_and_value_is_not_turned_whatever_its_config_says(tmp_path: Path) -> None:
    q, k, _ = projections()
    held = view(tmp_path, {"layers.0.attention.wq.weight": q, "layers.0.attention.wkv_a.weight": k}, None)
    assert torch.equal(held.read(Q), q)
    assert held.warnings == ()


@pytest.mark.parametrize("home", ["attention", "attention.qkv_linear"])
def test_llamas_rows_are_turned_under_the_old_and_the_new_names(home: str, tmp_path: Path) -> None:
    q, k, v = projections()
    stored = (in_metas_order(q, H), in_metas_order(k, K), v)
    tensors = {f"layers.0.{home}.{w}.weight": t for w, t in zip(("wq", "wk", "wv"), stored, strict=True)}
    held = view(tmp_path, tensors | {"tok_embeddings.weight": torch.ones(9, HIDDEN)}, "llama")
    assert set(held.tensors) == {Q, KEY, V, "embed_tokens.weight"}
    assert [torch.equal(held.read(name), value) for name, value in zip((Q, KEY, V), (q, k, v), strict=True)] == [
        True
    ] * 3
    assert held.warnings == ()


@pytest.mark.parametrize("model_type", [None, "something"])
def test_an_order_that_is_only_assumed_is_told(model_type: str | None, tmp_path: Path) -> None:
    q, _, _ = projections()
    stored = {f"layers.{i}.attention.wq.weight": in_metas_order(q, H) for i in range(2)}
    held = view(tmp_path, stored, model_type)
    assert torch.equal(held.read(Q), q)
    (warning,) = held.warnings
    assert "layers.0.attention.wq.weight and 1 more: its rows taken to be in Meta's order" in warning
    assert "put the model's config.json beside it" in warning


@pytest.mark.parametrize("model_type", ["llama", "gpt_oss"])
def test_fused_query_key_and_value_come_apart(model_type: str, tmp_path: Path) -> None:
    q, k, v = projections()
    turned = (in_metas_order(q, H), in_metas_order(k, K), v) if model_type == "llama" else (q, k, v)
    name = "layers.0.attention.qkv_linear.wqkv"
    held = view(tmp_path, {f"{name}.weight": fused(*turned), f"{name}.bias": fused(*turned)[:, 0].clone()}, model_type)
    for presented, value in zip((Q, KEY, V), (q, k, v), strict=True):
        assert torch.equal(held.read(presented), value)
        assert torch.equal(held.read(presented.replace("weight", "bias")), value[:, 0])


def test_a_fused_tensor_of_an_order_that_is_not_known_is_left_whole_and_told(tmp_path: Path) -> None:
    stored = {"layers.0.attention.qkv_linear.wqkv.weight": fused(*projections())}
    held = view(tmp_path / "unknown", stored, "something")
    assert set(held.tensors) == set(stored)
    assert "wqkv.weight: left fused: the order of its rows is not known" in held.warnings[0]
    headless = canonical_view(open_checkpoint(save_tensors(tmp_path / "headless", stored, {"model_type": "llama"})))
    assert set(headless.tensors) == set(stored)
    assert "left fused: config.json says no head counts" in headless.warnings[0]


def test_metas_order_is_that_of_neighbours_turned_as_complex_numbers(tmp_path: Path) -> None:
    """Scores of Llama's rotation over the rows as presented are those of Llama 4's over the rows as stored."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
    from transformers.models.llama4.modeling_llama4 import apply_rotary_emb

    q, k, _ = projections()
    stored = {"layers.0.attention.wq.weight": q, "layers.0.attention.wk.weight": k}
    held = view(tmp_path, stored, "llama")
    x = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(1))
    angles = torch.outer(torch.arange(3.0), torch.tensor([1.0, 0.3, 0.1]))
    as_stored = [(x @ w.T).view(1, 3, heads, D) for w, heads in ((q, H), (k, K))]
    as_presented = [(x @ held.read(name).T).view(1, 3, heads, D) for name, heads in ((Q, H), (KEY, K))]
    pairs = apply_rotary_emb(*as_stored, torch.polar(torch.ones_like(angles), angles)[None])
    both = torch.cat((angles, angles), dim=-1)[None]
    halves = apply_rotary_pos_emb(*as_presented, both.cos(), both.sin(), unsqueeze_dim=2)
    scores = [torch.einsum("bqhd,bkhd->bhqk", a, b.repeat_interleave(H // K, 2)) for a, b in (pairs, halves)]
    assert torch.allclose(*scores, atol=1e-5)
