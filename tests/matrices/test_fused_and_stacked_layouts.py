"""Every layout of the same weights, as transformers holds and saves it, gives the bit-identical canonical matrices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from checkpoints_on_disk import save_tensors
from geopd.checkpoints import checkpoint_digest, open_checkpoint
from geopd.matrices import CanonicalCheckpoint, canonical_names, canonical_view, layout_of, pair_checkpoints

H, K, D, HIDDEN, INNER, EXPERTS = 4, 2, 8, 32, 48, 3
DENSE = {"num_attention_heads": H, "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": 2}
MOE = DENSE | {"num_key_value_heads": K, "head_dim": D}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": HIDDEN, "n_layer": 2, "n_head": H, "n_positions": 16, "bos_token_id": 0, "eos_token_id": 0},
    "gpt_neox": DENSE,
    "phi3": DENSE | {"num_key_value_heads": K, "pad_token_id": 0, "eos_token_id": 0},
    "falcon": DENSE | {"new_decoder_architecture": True, "num_kv_heads": K},
    "mixtral": DENSE | {"num_key_value_heads": K, "num_local_experts": EXPERTS},
    "qwen3_moe": MOE | {"num_experts": EXPERTS, "moe_intermediate_size": 16},
    "gpt_oss": MOE | {"num_local_experts": EXPERTS, "eos_token_id": 0, "pad_token_id": 0},
    "llama4_text": MOE | {"num_local_experts": EXPERTS, "intermediate_size_mlp": 64, "pad_token_id": 0},
}


def made(family: str, **settings: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        settings = {"vocab_size": 40} | (settings or FAMILIES[family])
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings))
        with torch.no_grad():
            for parameter in model.parameters():  # biases and norms too, which start alike
                parameter.normal_()
        return model


def saved(model: Any, path: Path) -> CanonicalCheckpoint:
    model.save_pretrained(path)
    return canonical_view(open_checkpoint(path))


def by_name(view: CanonicalCheckpoint) -> dict[str, Tensor]:
    names = canonical_names({name: info.shape for name, info in view.tensors.items()})
    return {names[name].name: view.read(name) for name in view.tensors}


def qkv_as_read(family: str, model: Any, path: str, what: str) -> Tensor:
    """q, k or v of a layer as the model itself computes it, from unit inputs: the columns of its matrix."""
    attention = model.get_submodule(path)
    eye = torch.eye(HIDDEN)
    if family == "gpt2":
        return attention.c_attn(eye).split(HIDDEN, dim=-1)["qkv".index(what)].T
    if family == "gpt_neox":
        fused = attention.query_key_value(eye).view(HIDDEN, H, 3 * D)
        return fused.split(D, dim=-1)["qkv".index(what)].reshape(HIDDEN, -1).T
    if family == "phi3":
        return attention.qkv_proj(eye).split((H * D, K * D, K * D), dim=-1)["qkv".index(what)].T
    split = attention._split_heads(attention.query_key_value(eye)[None])["qkv".index(what)]
    if what != "q":  # transformers repeats keys and values for the queries that share them
        split = split.view(HIDDEN, -1, D)[:, :: H // key_value_heads(attention)]
    return split.reshape(HIDDEN, -1).T


def key_value_heads(attention: Any) -> int:
    if attention.new_decoder_architecture:
        return int(attention.num_kv_heads)
    return 1 if attention.multi_query else H


ATTENTION = {
    "gpt2": "transformer.h.1.attn",
    "gpt_neox": "gpt_neox.layers.1.attention",
    "phi3": "model.layers.1.self_attn",
    "falcon": "transformer.h.1.self_attention",
}


@pytest.mark.parametrize("family", ATTENTION)
def test_q_k_and_v_are_what_the_model_computes(family: str, tmp_path: Path) -> None:
    model = made(family)
    with torch.no_grad():  # so that what it computes of unit inputs is the matrix to the last bit
        for name, parameter in model.named_parameters():
            parameter.mul_(not name.endswith("bias"))
    held = by_name(saved(model, tmp_path))
    for what in "qkv":
        assert torch.equal(held[f"layers.1.self_attn.{what}_proj"], qkv_as_read(family, model, ATTENTION[family], what))


@pytest.mark.parametrize("multi_query", [True, False])
def test_both_older_falcon_layouts(multi_query: bool, tmp_path: Path) -> None:
    model = made("falcon", vocab_size=40, **DENSE, new_decoder_architecture=False, multi_query=multi_query)
    held = by_name(saved(model, tmp_path))
    attention = model.transformer.h[0].self_attention
    fused = attention.query_key_value.weight
    if multi_query:
        expected = fused.split((H * D, D, D))
    else:
        expected = tuple(fused.view(H, 3, D, HIDDEN)[:, i].reshape(-1, HIDDEN) for i in range(3))
    for what, matrix in zip("qkv", expected, strict=True):
        assert torch.equal(held[f"layers.0.self_attn.{what}_proj"], matrix)


def test_gpt2_is_transposed_and_renamed(tmp_path: Path) -> None:
    model = made("gpt2")
    held, block = by_name(saved(model, tmp_path)), model.transformer.h[0]
    assert torch.equal(held["layers.0.self_attn.o_proj"], block.attn.c_proj.weight.T)
    assert torch.equal(held["layers.0.mlp.up_proj"], block.mlp.c_fc.weight.T)
    assert torch.equal(held["layers.0.mlp.down_proj"], block.mlp.c_proj.weight.T)
    assert torch.equal(held["layers.0.self_attn.k_proj.bias"], block.attn.c_attn.bias[HIDDEN : 2 * HIDDEN])
    assert torch.equal(held["embed_tokens"], model.transformer.wte.weight)


def test_gate_and_up_are_apart(tmp_path: Path) -> None:
    model = made("phi3")
    held, fused = by_name(saved(model, tmp_path)), model.model.layers[0].mlp.gate_up_proj.weight
    assert torch.equal(held["layers.0.mlp.gate_proj"], fused[:INNER])
    assert torch.equal(held["layers.0.mlp.up_proj"], fused[INNER:])


@pytest.mark.parametrize("family", FAMILIES)
def test_memory_and_disk_have_the_same_canonical_matrices(family: str, tmp_path: Path) -> None:
    model = made(family)
    on_disk = by_name(saved(model, tmp_path))
    parameters = dict(model.named_parameters())
    layout = layout_of({name: tuple(value.shape) for name, value in parameters.items()}, model.config.to_dict())
    names = canonical_names({name: piece.shape for name, piece in layout.pieces.items()})
    in_memory = {names[name].name: piece.cut(parameters[piece.stored]) for name, piece in layout.pieces.items()}
    assert set(on_disk) == set(in_memory)
    assert all(torch.equal(on_disk[name], in_memory[name]) for name in on_disk)
    assert all(value.ndim <= 2 for value in on_disk.values())


def expert_outputs(model: Any, x: Tensor) -> dict[str, Tensor]:
    """What an expert's gate and up do to x, from the stack as GPT-OSS and Llama 4 multiply it (x @ W)."""
    layer = model.model.layers[1]
    experts = (layer.mlp if hasattr(layer, "mlp") else layer.feed_forward).experts
    both = x @ experts.gate_up_proj[2]
    if hasattr(experts, "gate_up_proj_bias"):
        return {"gate_proj": both[..., ::2], "up_proj": both[..., 1::2]}
    gate, up = both.chunk(2, dim=-1)
    return {"gate_proj": gate, "up_proj": up}


@pytest.mark.parametrize(("family", "home"), [("gpt_oss", "mlp"), ("llama4_text", "feed_forward")])
def test_stacks_that_multiply_from_the_right_are_turned(family: str, home: str, tmp_path: Path) -> None:
    model = made(family)
    held = by_name(saved(model, tmp_path))
    for name, output in expert_outputs(model, torch.eye(HIDDEN)).items():
        assert torch.equal(held[f"layers.1.{home}.experts.2.{name}"], output.T)


def test_a_stack_pairs_with_experts_one_by_one(tmp_path: Path) -> None:
    model = made("qwen3_moe")
    one_by_one = saved(model, tmp_path / "disk")
    stacks = {name: value.detach() for name, value in model.named_parameters()}
    assert any(value.ndim == 3 for value in stacks.values())
    stacked = open_checkpoint(save_tensors(tmp_path / "memory", stacks, model.config.to_dict()))
    pairing = pair_checkpoints(one_by_one, stacked)
    assert pairing.skipped == ()
    view = canonical_view(stacked)
    assert "layers.1.mlp.experts.2.up_proj" in pairing.matched
    for pair in pairing.matched.values():
        assert one_by_one.tensor_digest(pair.origin_tensor) == view.tensor_digest(pair.tuned_tensor)


def test_fused_pairs_with_split(tmp_path: Path) -> None:
    model = made("phi3")
    fused = saved(model, tmp_path / "fused")
    split = {f"model.{name}.weight": value.contiguous() for name, value in by_name(fused).items()}
    pairing = pair_checkpoints(fused, open_checkpoint(save_tensors(tmp_path / "split", split)))
    assert pairing.skipped == ()
    assert {name.rsplit(".", 1)[-1] for name in pairing.matched} >= {"q_proj", "k_proj", "v_proj", "gate_proj"}
    digests = {canonical_view(fused).tensor_digest(p.origin_tensor) for p in pairing.matched.values()}
    assert digests == {open_checkpoint(tmp_path / "split").tensor_digest(name) for name in split}


def test_what_is_canonical_as_it_lies_keeps_name_digest_and_source(tmp_path: Path) -> None:
    from checkpoints_on_disk import save_model

    stored = open_checkpoint(save_model("qwen3", tmp_path))
    view = canonical_view(stored)
    assert view.tensors == stored.tensors
    assert view.source is stored.source
    assert view.digest() == stored.digest()
    assert canonical_view(view) is view


def test_the_digest_is_the_stored_checkpoints(tmp_path: Path) -> None:
    view = saved(made("phi3"), tmp_path)
    assert view.digest() == checkpoint_digest(tmp_path)


def test_meta_and_torchtitan_names_in_the_order_of_transformers(tmp_path: Path) -> None:
    q = torch.arange(4 * 6 * 3).view(24, 3).float()  # 4 heads of 6 rows: pairs (0, 1), (2, 3), (4, 5) turn together
    names = {
        "layers.0.attention.wq.weight": q,
        "layers.0.attention.wv.weight": torch.ones(12, 3),
        "layers.0.feed_forward.w1.weight": torch.ones(5, 3),
        "layers.0.feed_forward.w2.weight": torch.ones(3, 5),
        "layers.0.attention_norm.weight": torch.ones(3),
        "layers.0.moe.experts.w3": torch.ones(2, 5, 3),
        "tok_embeddings.weight": torch.ones(9, 3),
        "output.weight": torch.zeros(9, 3),
    }
    config = {"num_attention_heads": 4, "num_key_value_heads": 2}
    held = by_name(canonical_view(open_checkpoint(save_tensors(tmp_path / "with", names, config))))
    assert set(held) == {
        "layers.0.self_attn.q_proj",
        "layers.0.self_attn.v_proj",
        "layers.0.mlp.gate_proj",
        "layers.0.mlp.down_proj",
        "layers.0.input_layernorm",
        "layers.0.mlp.experts.0.up_proj",
        "layers.0.mlp.experts.1.up_proj",
        "embed_tokens",
        "lm_head",
    }
    for head in range(4):
        rows = q[6 * head : 6 * head + 6]
        expected = torch.stack([rows[i] for i in (0, 2, 4, 1, 3, 5)])
        assert torch.equal(held["layers.0.self_attn.q_proj"][6 * head : 6 * head + 6], expected)
    without = canonical_view(open_checkpoint(save_tensors(tmp_path / "without", names)))
    assert any("attention.wq.weight: kept under its own name" in warning for warning in without.warnings)
    assert "layers.0.attention.wq.weight" in without.tensors
    # torchtitan holds models that normalise q and k per head as transformers does
    normed = names | {"layers.0.attention.q_norm.weight": torch.ones(6)}
    kept = by_name(canonical_view(open_checkpoint(save_tensors(tmp_path / "normed", normed))))
    assert torch.equal(kept["layers.0.self_attn.q_proj"], q)


def test_heads_one_by_one_when_asked(tmp_path: Path) -> None:
    model = made("phi3")
    whole = by_name(saved(model, tmp_path))
    heads = by_name(canonical_view(open_checkpoint(tmp_path), per_head=True))
    for what, count in (("q", H), ("k", K), ("v", K)):
        parts = [heads[f"layers.0.self_attn.{what}_proj.heads.{i}"] for i in range(count)]
        assert torch.equal(torch.cat(parts), whole[f"layers.0.self_attn.{what}_proj"])
    columns = [heads[f"layers.0.self_attn.o_proj.heads.{i}"] for i in range(H)]
    assert torch.equal(torch.cat(columns, dim=1), whole["layers.0.self_attn.o_proj"])
    assert torch.equal(heads["layers.0.mlp.down_proj"], whole["layers.0.mlp.down_proj"])
    pairing = pair_checkpoints(open_checkpoint(tmp_path), open_checkpoint(tmp_path), per_head=True)
    assert pairing.matched["layers.1.self_attn.q_proj.heads.3"].weight.module == "q_proj"


def fused(rows: int) -> dict[str, Tensor]:
    return {f"model.layers.{i}.self_attn.qkv_proj.weight": torch.ones(rows, 4) for i in range(2)}


def test_without_head_counts_a_fused_tensor_is_left_whole_and_told(tmp_path: Path) -> None:
    for number, (rows, config) in enumerate(((24, {}), (25, {"num_attention_heads": 4, "num_key_value_heads": 1}))):
        view = canonical_view(open_checkpoint(save_tensors(tmp_path / str(number), fused(rows), config)))
        assert set(view.tensors) == set(fused(rows))
        (warning,) = view.warnings
        assert "qkv_proj.weight and 1 more: left fused: config.json says no head counts" in warning


def test_an_unknown_family_with_falcons_names_is_left_fused(tmp_path: Path) -> None:
    weights = {"transformer.h.0.self_attention.query_key_value.weight": torch.ones(12, 4)}
    view = canonical_view(open_checkpoint(save_tensors(tmp_path, weights, {"model_type": "x", "n_head": 2})))
    assert set(view.tensors) == set(weights)
    assert "no layout of it is known for the model type x" in view.warnings[0]


def test_stacks_whose_shapes_do_not_belong_together_are_left(tmp_path: Path) -> None:
    weights = {
        "model.layers.0.mlp.experts.gate_up_proj": torch.ones(2, 6, 4),
        "model.layers.0.mlp.experts.down_proj": torch.ones(2, 5, 5),
    }
    view = canonical_view(open_checkpoint(save_tensors(tmp_path, weights)))
    assert set(view.tensors) == set(weights)
    assert "left stacked: the shapes (2, 6, 4) and (2, 5, 5)" in view.warnings[0]


def test_a_part_that_is_there_whole_as_well_is_left_as_it_lies(tmp_path: Path) -> None:
    weights = {
        "layers.0.mlp.gate_up_proj.weight": torch.ones(6, 4),
        "layers.0.mlp.gate_proj.weight": torch.ones(3, 4),
    }
    assert set(canonical_view(open_checkpoint(save_tensors(tmp_path, weights))).tensors) == set(weights)


def test_wrappers_inside_a_path_do_not_change_a_name() -> None:
    for wrapper in ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"):
        name = f"model.layers.3.{wrapper}.self_attn.q_proj.weight"
        assert canonical_names({name: (2, 2)})[name].name == "layers.3.self_attn.q_proj"


@pytest.mark.parametrize("family", ["gpt2", "falcon", "llama4_text"])
def test_what_is_read_lies_contiguous(family: str, tmp_path: Path) -> None:
    view = saved(made(family), tmp_path)
    assert all(view.read(name).is_contiguous() for name in view.tensors)
