"""Checkpoints on disk: what opens, what it holds, and the digest that does not depend on the file layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from checkpoints_on_disk import q_name, save_model, save_shards, save_tensors, small_weights
from geopd.checkpoints import CheckpointError, checkpoint_digest, holds_weights, open_checkpoint
from geopd.checkpoints.formats import FORMATS, format_of


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_tensors_come_back_as_saved(dtype: torch.dtype, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    path = save_model("qwen3", tmp_path / "model", dtype=dtype, max_shard_size="20KB")
    checkpoint = open_checkpoint(path)
    saved = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).state_dict()
    assert set(checkpoint.tensors) == set(saved)
    for name, tensor in saved.items():
        assert torch.equal(checkpoint.read(name), tensor)
        assert checkpoint.tensors[name].shape == tuple(tensor.shape)
        assert checkpoint.tensors[name].nbytes == tensor.nbytes
    assert checkpoint.config["model_type"] == "qwen3"


def test_the_digest_is_of_content_not_of_files(tmp_path: Path) -> None:
    weights = small_weights()
    one = save_tensors(tmp_path / "one", weights)
    names = sorted(weights)
    two = save_shards(tmp_path / "two", [{n: weights[n] for n in names[:3]}, {n: weights[n] for n in names[3:]}])
    assert holds_weights(one)
    assert holds_weights(two)
    digest = checkpoint_digest(one)
    assert checkpoint_digest(two) == digest
    assert checkpoint_digest(one / "model.safetensors") == digest
    assert len(digest) == 32
    renamed = dict(weights)
    renamed["model.layers.9.self_attn.q_proj.weight"] = renamed.pop(q_name())
    nudged = dict(weights)
    nudged[q_name()] = -nudged[q_name()]
    wider = {name: tensor.float() for name, tensor in weights.items()}
    reshaped = weights | {q_name(): weights[q_name()].reshape(16, 24)}
    others = [save_tensors(tmp_path / str(i), w) for i, w in enumerate((renamed, nudged, wider, reshaped))]
    assert len({digest, *map(checkpoint_digest, others)}) == 5


def test_an_absent_tensor_is_named(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save_tensors(tmp_path / "c", small_weights()))
    with pytest.raises(CheckpointError, match=r"no tensor named model\.x; it holds 6 others"):
        checkpoint.read("model.x")


def test_stray_shards_are_told(tmp_path: Path) -> None:
    path = save_shards(tmp_path / "c", [small_weights()])
    save_tensors(tmp_path / "other", small_weights())
    (tmp_path / "other" / "model.safetensors").rename(path / "leftover.safetensors")
    assert open_checkpoint(path).warnings == (f"{path}: leftover.safetensors not in the index: ignored",)


def test_opening_reads_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_shards(tmp_path / "c", [small_weights()])
    monkeypatch.setattr("geopd.checkpoints.safetensors_format.safe_open", None)
    assert len(open_checkpoint(path).tensors) == 6


def test_a_folder_that_may_not_be_looked_into_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Path) -> None:
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(CheckpointError, match=f"{tmp_path}: Permission denied; check the path and its permissions"):
        open_checkpoint(tmp_path)


def test_the_formats_are_told_apart_by_their_files(tmp_path: Path) -> None:
    """Of several in one folder the first of the list is read; optimiser states and the like are none."""
    assert [form.name for form in FORMATS] == [
        "safetensors",
        "PEFT adapter",
        "DeepSpeed ZeRO",
        "verl FSDP",
        "Megatron torch_dist",
        "torch distributed checkpoint",
        "torch zip",
    ]
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "data.pt", "trainer_state.json"):
        (tmp_path / name).touch()
    assert format_of(tmp_path) is None
    for name, expected in (
        ("pytorch_model.bin", "torch zip"),
        (".metadata", "torch distributed checkpoint"),
        ("model_world_size_2_rank_0.pt", "verl FSDP"),
        ("mp_rank_00_model_states.pt", "DeepSpeed ZeRO"),
        ("adapter_model.safetensors", "PEFT adapter"),
        ("model.safetensors", "safetensors"),
    ):
        (tmp_path / name).touch()
        found = format_of(tmp_path)
        assert found is not None
        assert found.name == expected
