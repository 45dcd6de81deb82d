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
from geopd.matrices.naming import canonical_names

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


def deepseek(query_rank: int | None) -> Any:
    """A tiny DeepSeek-V3 of transformers: layer 0 dense, layer 1 with three routed experts and a shared one."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 20, "moe_intermediate_size": 6, "vocab_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": query_rank, "kv_lora_rank": 8}
    heads |= {"qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 6}
    routing = {"n_routed_experts": 3, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}
    config = DeepseekV3Config(num_hidden_layers=2, first_k_dense_replace=1, **sizes, **heads, **routing)
    return DeepseekV3ForCausalLM(config)


ATTENTION = {
    "q_proj": "wq",
    "q_a_proj": "wq_a",
    "q_a_layernorm": "q_norm",
    "q_b_proj": "wq_b",
    "kv_a_proj_with_mqa": "wkv_a",
    "kv_a_layernorm": "kv_norm",
    "kv_b_proj": "wkv_b",
    "o_proj": "wo",
}


def in_titans_names(stored: dict[str, Tensor], experts: str) -> dict[str, Tensor]:
    """What torchtitan's state dict holds of a model whose tensors transformers stored one by one."""
    titan = {}
    left = {name.removeprefix("model."): value for name, value in stored.items()}
    for ours, theirs in ATTENTION.items():
        for name in [name for name in left if f".self_attn.{ours}." in name]:
            titan[name.replace(f"self_attn.{ours}", f"attention.{theirs}")] = left.pop(name)
    for layer in range(2):
        titan[f"layers.{layer}.attention_norm.weight"] = left.pop(f"layers.{layer}.input_layernorm.weight")
        titan[f"layers.{layer}.ffn_norm.weight"] = left.pop(f"layers.{layer}.post_attention_layernorm.weight")
    for ours, theirs in {"layers.0.mlp": "layers.0.feed_forward", "layers.1.mlp.shared_experts": SHARED}.items():
        gate, down, up = (left.pop(f"{ours}.{part}_proj.weight") for part in ("gate", "down", "up"))
        if experts == "routed_experts.w13":
            titan |= {f"{theirs}.w13.weight": torch.stack([gate, up]), f"{theirs}.w2.weight": down}
        else:
            titan |= {
                f"{theirs}.{w}.weight": value for w, value in zip(("w1", "w2", "w3"), (gate, down, up), strict=True)
            }
    gate, down, up = (
        torch.stack([left.pop(f"layers.1.mlp.experts.{e}.{part}_proj.weight") for e in range(3)])
        for part in ("gate", "down", "up")
    )
    home = "layers.1.moe.routed_experts" if experts.startswith("routed") else "layers.1.moe.experts"
    match experts.rpartition(".")[2]:
        case "w13":
            titan |= {f"{home}.w13.weight": torch.stack([gate, up], dim=1), f"{home}.w2.weight": down}
        case "w1_EFD":
            titan |= {f"{home}.w1_EFD": gate, f"{home}.w2_EDF": down, f"{home}.w3_EFD": up}
        case "w1":
            titan |= {f"{home}.w1": gate, f"{home}.w2": down, f"{home}.w3": up}
    titan["layers.1.moe.router.gate.weight"] = left.pop("layers.1.mlp.gate.weight")
    left.pop("layers.1.mlp.gate.e_score_correction_bias")  # a buffer of the router's, under another name there
    return titan | {"tok_embeddings.weight": left.pop("embed_tokens.weight")} | left


SHARED = "layers.1.moe.shared_experts"


@pytest.mark.parametrize("experts", ["experts.w1", "experts.w1_EFD", "routed_experts.w1_EFD", "routed_experts.w13"])
@pytest.mark.parametrize("query_rank", [None, 5])
def test_deepseeks_attention_and_experts_are_those_of_transformers(
    query_rank: int | None, experts: str, tmp_path: Path
) -> None:
    model = deepseek(query_rank)
    model.save_pretrained(tmp_path / "transformers")
    stored = open_checkpoint(tmp_path / "transformers")
    titan = in_titans_names({name: stored.read(name).clone() for name in stored.tensors}, experts)
    held = canonical_view(open_checkpoint(save_tensors(tmp_path / "titan", titan, {"model_type": "deepseek_v3"})))
    expected = canonical_view(stored)
    ours = {weight.name: held.read(name) for name, weight in canonical_names(shapes(held)).items()}
    theirs = {weight.name: expected.read(name) for name, weight in canonical_names(shapes(expected)).items()}
    theirs.pop("layers.1.mlp.gate.e_score_correction_bias")
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert held.warnings == ()


def shapes(checkpoint: CanonicalCheckpoint) -> dict[str, tuple[int, ...]]:
    return {name: info.shape for name, info in checkpoint.tensors.items()}


def test_biases_of_gate_and_up_that_are_stacked(tmp_path: Path) -> None:
    both = torch.arange(12.0).view(2, 6)
    routed = torch.arange(36.0).view(3, 2, 6)
    stored = {"layers.0.feed_forward.w13.bias": both, "layers.1.moe.routed_experts.w13.bias": routed}
    held = view(tmp_path, stored, "llama")
    assert torch.equal(held.read("layers.0.mlp.up_proj.bias"), both[1])
    assert torch.equal(held.read("layers.1.mlp.experts.2.gate_proj.bias"), routed[2, 0])


@pytest.mark.parametrize("shape", [(10, 3), (3, 5, 3)])
def test_gate_and_up_that_are_no_stack_of_two_are_left_whole_and_told(shape: tuple[int, ...], tmp_path: Path) -> None:
    """Other projects lay them one after the other, or row by row in turn: the shape does not tell which."""
    held = view(tmp_path, {"layers.0.feed_forward.w13.weight": torch.ones(shape)}, "llama")
    assert set(held.tensors) == {"layers.0.feed_forward.w13.weight"}
    assert "w13.weight: left fused: gate and up are read where they are stacked" in held.warnings[0]
