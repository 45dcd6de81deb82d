"""Every 2-D weight of the covered families gets its module and layer; the rest is named, not dropped."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from checkpoints_on_disk import ATTENTION, EXPERTS, FAMILIES, FEED_FORWARD, LAYERS, save_model
from geopd.checkpoints import open_checkpoint
from geopd.matrices import Role, Selection, canonical_names


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_models(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save_model(family, tmp_path / family, dtype=dtype, max_shard_size="20KB"))
    assert checkpoint.format == "safetensors shards"
    assert {info.dtype for info in checkpoint.tensors.values()} == {"BF16" if dtype == torch.bfloat16 else "F32"}
    names = canonical_names({name: info.shape for name, info in checkpoint.tensors.items()})
    matrices = [weight for weight in names.values() if weight.role is Role.MATRIX]
    found = Counter((weight.layer, weight.module) for weight in matrices)
    experts = EXPERTS if family == "qwen3_moe" else 1
    expected = Counter({(layer, module): 1 for layer in range(LAYERS) for module in ATTENTION})
    expected.update({(layer, module): experts for layer in range(LAYERS) for module in FEED_FORWARD})
    if family == "qwen3_moe":
        expected.update({(layer, "router"): 1 for layer in range(LAYERS)})
    assert found == expected
    assert {weight.name for weight in names.values() if weight.role is Role.EMBEDDING} == {"embed_tokens", "lm_head"}
    assert len({weight.name for weight in names.values()}) == len(checkpoint.tensors)
    for name, weight in names.items():
        assert (weight.role is Role.VECTOR) == (len(checkpoint.tensors[name].shape) == 1)
        if weight.role is Role.VECTOR:
            assert weight.module == ("bias" if name.endswith("bias") else "norm")
    if family == "qwen3_moe":
        assert sum("experts.3.down_proj" in weight.name for weight in matrices) == LAYERS
    attention = [weight.module for weight in names.values() if Selection(("attention",)).full(weight)]
    assert Counter(attention) == dict.fromkeys(ATTENTION, LAYERS)


def name_of(name: str, *shape: int) -> tuple[str, int | None, str, Role]:
    weight = canonical_names({name: shape})[name]
    return weight.name, weight.layer, weight.module, weight.role


@pytest.mark.parametrize(
    "prefix",
    [
        "",
        "model.",
        "module.model.",
        "_orig_mod.model.",
        "base_model.model.model.",
        "model.language_model.",
        "language_model.model.",
    ],
)
def test_wrappers_do_not_change_a_name(prefix: str) -> None:
    assert name_of(f"{prefix}layers.13.self_attn.q_proj.weight", 4, 4) == (
        "layers.13.self_attn.q_proj",
        13,
        "q_proj",
        Role.MATRIX,
    )


def test_unknown_matrices_keep_their_name() -> None:
    assert name_of("model.layers.0.mixer.in_proj.weight", 4, 4) == ("layers.0.mixer.in_proj", 0, "other", Role.MATRIX)
    assert name_of("transformer.h.0.attn.c_attn.weight", 4, 12) == (
        "transformer.h.0.attn.c_attn",
        None,
        "other",
        Role.MATRIX,
    )
    # a gate projection outside the layers is not the module of that name
    assert name_of("vision.gate_proj.weight", 4, 4)[2] == "other"


@pytest.mark.parametrize("shape", [(2, 3, 4), (), (0, 4), (4, 0), (0,)])
def test_what_is_no_matrix(shape: tuple[int, ...]) -> None:
    assert name_of("model.layers.0.mlp.experts", *shape)[3] is Role.UNSUPPORTED


def test_routers_biases_and_embeddings() -> None:
    assert name_of("model.layers.2.block_sparse_moe.gate.weight", 8, 4)[1:] == (2, "router", Role.MATRIX)
    assert name_of("model.layers.2.mlp.gate.weight", 8, 4)[1:] == (2, "router", Role.MATRIX)
    assert name_of("model.layers.2.self_attn.q_proj.bias", 4)[1:] == (2, "bias", Role.VECTOR)
    assert name_of("model.norm.weight", 4)[1:] == (None, "norm", Role.VECTOR)
    assert name_of("model.embed_tokens.weight", 9, 4)[1:] == (None, "embedding", Role.EMBEDDING)
    assert name_of("lm_head.weight", 9, 4)[1:] == (None, "head", Role.EMBEDDING)


def test_two_tensors_that_would_share_a_name_keep_their_own() -> None:
    names = canonical_names({"model.a.weight": (2, 2), "module.a.weight": (2, 2), "model.b.weight": (2, 2)})
    assert {disk: weight.name for disk, weight in names.items()} == {
        "model.a.weight": "model.a.weight",
        "module.a.weight": "module.a.weight",
        "model.b.weight": "b",
    }


def test_selection() -> None:
    names = canonical_names(
        {
            "model.layers.0.self_attn.q_proj.weight": (4, 4),
            "model.layers.0.mlp.up_proj.weight": (4, 4),
            "model.embed_tokens.weight": (9, 4),
            "model.norm.weight": (4,),
        }
    )

    def selected(*patterns: str) -> tuple[set[str], set[str]]:
        selection = Selection(patterns)
        full = {weight.name for weight in names.values() if selection.full(weight)}
        return full, {weight.name for weight in names.values() if selection.entrywise(weight)} - full

    q, up = "layers.0.self_attn.q_proj", "layers.0.mlp.up_proj"
    assert selected("layers") == ({q, up}, {"embed_tokens", "norm"})
    assert selected("all") == ({q, up, "embed_tokens"}, {"norm"})
    assert selected("attention") == ({q}, set())
    assert selected("*.up_proj") == ({up}, set())
    assert selected("*.up_proj", "attention") == ({q, up}, set())
    assert selected("embed_tokens") == ({"embed_tokens"}, set())
    with pytest.raises(ValueError, match="--matrices"):
        Selection(())
