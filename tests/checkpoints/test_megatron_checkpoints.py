"""Megatron's own checkpoints give the weights of the transformers model they were made from, bit for bit."""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from geopd.checkpoints import CheckpointError, open_checkpoint
from geopd.checkpoints.megatron_format import open_megatron, recognises_megatron
from geopd.checkpoints.megatron_names import Attention, Part, Rows, parts_of
from hostile import Touches

GOLDEN = Path(__file__).parent / "golden"
KINDS = ("dense", "experts", "layers")
QKV = "decoder.layers.self_attention.linear_qkv.weight"


def folder(kind: str, tmp_path: Path) -> Path:
    """A copy of a golden checkpoint, to be damaged."""
    return Path(shutil.copytree(GOLDEN / f"megatron_{kind}" / "iter_0000007", tmp_path / "iter_0000007"))


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_is_the_transformers_models(kind: str) -> None:
    home = GOLDEN / f"megatron_{kind}"
    path = home / "iter_0000007"
    assert recognises_megatron(path)
    found, plain = open_megatron(path), open_checkpoint(home / "transformers")
    assert found.unreadable == {}
    assert found.format == "Megatron torch_dist"
    assert found.tensors == plain.tensors
    for name in plain.tensors:
        assert torch.equal(found.read(name), plain.read(name)), name
    assert found.digest() == plain.digest()


def test_padding_of_the_vocabulary_is_cut_with_a_note() -> None:
    path = GOLDEN / "megatron_dense" / "iter_0000007"
    found = open_megatron(path)
    assert found.tensors["model.embed_tokens.weight"].shape[0] == 22
    assert found.warnings == (
        f"{path}: embedding and head cut from 24 rows to the vocabulary's 22: the others are padding",
    )


def test_a_config_beside_it_goes_before_the_args(tmp_path: Path) -> None:
    path = folder("dense", tmp_path)
    config = json.loads((GOLDEN / "megatron_dense" / "transformers" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 20}))
    found = open_megatron(path)
    assert found.tensors["lm_head.weight"].shape[0] == 20
    assert found.config["model_type"] == "qwen3"


@pytest.mark.parametrize("common", ["no args", "unreadable", "malicious"])
def test_without_head_counts_q_k_and_v_are_unreadable_and_the_rest_is_read(common: str, tmp_path: Path) -> None:
    path, canary = folder("dense", tmp_path), tmp_path / "canary"
    if common == "unreadable":
        (path / "common.pt").write_bytes(b"nothing")
    else:
        value = {"args": Touches(canary)} if common == "malicious" else {"iteration": 7}
        torch.save(value, path / "common.pt")
    found = open_megatron(path)
    lost = {f"model.layers.{i}.self_attn.{what}_proj.weight" for i in range(2) for what in "qkv"}
    assert set(found.unreadable) == lost
    assert "model.layers.1.mlp.gate_proj.weight" in found.tensors
    with pytest.raises(
        CheckpointError,
        match=r"linear_qkv\.weight holds q, k and v interleaved.*say num_attention_heads, num_key_value_heads.*config",
    ):
        found.read("model.layers.0.self_attn.q_proj.weight")
    assert "say the vocab_size: the 24 rows" in found.warnings[-1]
    told = [warning for warning in found.warnings if warning.startswith(f"{path / 'common.pt'}: ")]
    assert len(told) == (common != "no args")
    assert not canary.exists()


def test_head_counts_that_do_not_fit(tmp_path: Path) -> None:
    path = folder("dense", tmp_path)
    torch.save({"args": Namespace(num_attention_heads=3, num_query_groups=3)}, path / "common.pt")
    reason = open_megatron(path).unreadable["model.layers.0.self_attn.k_proj.weight"]
    assert reason == f"{QKV} has 32 rows, which are no 3 query and 2 x 3 key and value heads of one size"


def test_a_missing_file_loses_its_own_tensors(tmp_path: Path) -> None:
    path = folder("dense", tmp_path)
    (path / "__1_0.distcp").unlink()
    found = open_megatron(path)
    assert found.tensors
    assert all("__1_0.distcp: .metadata names it and it is absent" in reason for reason in found.unreadable.values())
    assert set(found.tensors) | set(found.unreadable) == set(
        open_megatron(GOLDEN / "megatron_dense" / path.name).tensors
    )


def test_without_its_listing(tmp_path: Path) -> None:
    path = folder("dense", tmp_path)
    (path / ".metadata").unlink()
    assert recognises_megatron(path)
    with pytest.raises(CheckpointError, match=r"no \.metadata"):
        open_megatron(path)


def test_other_formats_of_megatron_are_refused_by_name(tmp_path: Path) -> None:
    old = tmp_path / "iter_0000001"
    (old / "mp_rank_00").mkdir(parents=True)
    assert recognises_megatron(old)
    with pytest.raises(CheckpointError, match=r"Megatron's format torch \(mp_rank_\*\).*--ckpt-format torch_dist"):
        open_megatron(old)
    path = folder("dense", tmp_path)
    (path / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    with pytest.raises(CheckpointError, match="Megatron's format zarr"):
        open_megatron(path)


def test_a_release_is_found_by_the_folder_above_it(tmp_path: Path) -> None:
    folder("dense", tmp_path).rename(tmp_path / "release")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("release")
    assert recognises_megatron(tmp_path)
    assert open_megatron(tmp_path).path == tmp_path / "release"


def test_a_run_of_iterations_is_no_checkpoint() -> None:
    assert not recognises_megatron(GOLDEN / "megatron_dense")
    assert not recognises_megatron(GOLDEN / "megatron_dense" / "transformers")


ATTENTION = Attention(4, 2, 8)


def names(stored: str, shape: tuple[int, ...], *, gated: bool = True) -> list[tuple[str, tuple[int, ...], Rows | None]]:
    place = {"mlp.linear_fc1": gated, "mlp.shared_experts.linear_fc1": gated}
    parts = list(parts_of(stored, shape, ATTENTION, place))
    assert all(isinstance(part, Part) for part in parts)
    return [(part.name, part.index, part.rows) for part in parts if isinstance(part, Part)]


def test_layouts_that_the_fixtures_lack() -> None:
    layer = "decoder.layers.3."
    assert names(f"{layer}self_attention.linear_qkv.layer_norm_weight", (16,)) == [
        ("model.layers.3.input_layernorm.weight", (), None)
    ]
    assert names("decoder.layers.mlp.linear_fc1.layer_norm_weight", (1, 16)) == [
        ("model.layers.0.post_attention_layernorm.weight", (0,), None)
    ]
    # gate and up written as two tensors, experts one by one
    assert names(f"{layer}mlp.experts.experts.5.linear_fc1.weight_v", (6, 4)) == [
        ("model.layers.3.mlp.experts.5.up_proj.weight", (), None)
    ]
    assert names(f"{layer}mlp.shared_experts.linear_fc1.weight", (6, 4)) == [
        ("model.layers.3.mlp.shared_experts.gate_proj.weight", (), Rows(0, 3)),
        ("model.layers.3.mlp.shared_experts.up_proj.weight", (), Rows(3, 6)),
    ]
    assert names(f"{layer}mlp.linear_fc1.weight", (6, 4), gated=False) == [
        ("model.layers.3.mlp.up_proj.weight", (), None)
    ]
    # what has no counterpart keeps its name within the layer
    assert names(f"{layer}self_attention.linear_q_down_proj.weight", (6, 4)) == [
        ("model.layers.3.self_attention.linear_q_down_proj.weight", (), None)
    ]
