"""Pickled weights: what ``torch.save`` wrote comes back bit for bit, one tensor at a time, and no pickle is run."""

from __future__ import annotations

import argparse
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from checkpoints_on_disk import q_name, save_tensors, small_weights
from geopd.checkpoints import CheckpointError, checkpoint_digest, holds_weights, open_checkpoint
from hostile import poisoned, rewritten

INDEX = "pytorch_model.bin.index.json"


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    return str(caught.value)


def save(value: Any, path: Path, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(value, path, **options)
    return path


def save_bin_shards(path: Path, shards: list[dict[str, Tensor]]) -> Path:
    weight_map = {}
    for i, tensors in enumerate(shards, 1):
        name = f"pytorch_model-{i:05d}-of-{len(shards):05d}.bin"
        save(tensors, path / name)
        weight_map |= dict.fromkeys(tensors, name)
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def bits(tensor: Tensor) -> list[int]:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist()


def varied() -> dict[str, Tensor]:
    """Views, shared storages, strides, and every dtype."""
    whole = torch.randn(10, 6)
    dtypes = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8)
    more = (torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2)
    return {
        "whole": whole,
        "rows": whole[2:5],
        "transposed": whole.t(),
        "column": whole[:, 3],
        "steps": whole[::3, ::2],
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 4),
        "parameter": nn.Parameter(torch.randn(3, 2)),
        **{str(dtype): (8 * torch.randn(5)).to(dtype) for dtype in dtypes + more},
    }


def test_every_tensor_is_bit_identical_to_what_torch_loads(tmp_path: Path) -> None:
    path = save(varied(), tmp_path / "weights.pt")
    checkpoint = open_checkpoint(path)
    loaded = torch.load(path, weights_only=True)
    assert (checkpoint.format, set(checkpoint.tensors), checkpoint.unreadable) == ("torch zip", set(loaded), {})
    for name, tensor in loaded.items():
        read, info = checkpoint.read(name), checkpoint.tensors[name]
        assert (read.dtype, read.shape, bits(read)) == (tensor.dtype, tensor.shape, bits(tensor))
        assert (info.shape, info.nbytes) == (tuple(tensor.shape), tensor.nbytes)
        assert read.is_contiguous()


def test_the_digest_is_that_of_the_safetensors_file(tmp_path: Path) -> None:
    weights = small_weights()
    digest = checkpoint_digest(save_tensors(tmp_path / "safetensors", weights))
    names = sorted(weights)
    halves = [{name: weights[name] for name in part} for part in (names[:3], names[3:])]
    for path in (
        save(weights, tmp_path / "w.bin"),
        save(weights, tmp_path / "w.pth"),
        save(weights, tmp_path / "hf" / "pytorch_model.bin").parent,
        save(weights, tmp_path / "fsdp" / "pytorch_model_fsdp.bin").parent,
        save_bin_shards(tmp_path / "shards", halves),
    ):
        assert checkpoint_digest(path) == digest
        assert not path.is_dir() or holds_weights(path)


def test_a_real_model_saved_by_accelerate_is_its_safetensors(tmp_path: Path) -> None:
    from accelerate import Accelerator

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4), nn.Linear(4, 3))
    accelerator = Accelerator(cpu=True)
    accelerator.save_model(model, tmp_path / "safetensors")
    accelerator.save_model(model, tmp_path / "bin", safe_serialization=False)
    accelerator.save_model(model, tmp_path / "shards", safe_serialization=False, max_shard_size=150)
    assert (tmp_path / "shards" / INDEX).is_file()
    assert len({checkpoint_digest(tmp_path / kind) for kind in ("safetensors", "bin", "shards")}) == 1


def test_a_nested_state_dict_is_unwrapped_with_a_note(tmp_path: Path) -> None:
    weights = small_weights()
    value = {"model": {"module": weights}, "step": 3, "args": argparse.Namespace(lr=1e-4), "optimizer": {"state": {}}}
    path = save(value, tmp_path / "w.pt")
    checkpoint = open_checkpoint(path)
    assert checkpoint.digest() == checkpoint_digest(save_tensors(tmp_path / "s", weights))
    assert checkpoint.warnings == (f"{path}: the weights are those under model.module; the rest is ignored",)


def test_only_the_tensor_asked_for_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A contiguous tensor is a view of the mapped file: its pages are all that is read."""
    path = save({"small": torch.ones(2), "large": torch.zeros(1 << 20)}, tmp_path / "w.pt")
    checkpoint = open_checkpoint(path)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", None)
        patch.setattr(Tensor, "clone", None)
        small = checkpoint.read("small")
    assert small.untyped_storage().nbytes() == 8
    small.fill_(7)  # copy on write
    assert torch.load(path, weights_only=True)["small"].tolist() == [1, 1]


def test_a_pickle_that_would_create_a_file_is_refused_in_every_place(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    poisoned(tmp_path / "w.pt", canary)
    poisoned(tmp_path / "pytorch_model.bin", canary)
    shards = save_bin_shards(tmp_path / "shards", [{"a": torch.ones(1)}, {"weight": torch.ones(2, 2)}])
    poisoned(shards / "pytorch_model-00002-of-00002.bin", canary)
    for path in (tmp_path / "w.pt", tmp_path / "pytorch_model.bin", tmp_path):
        assert "open', which is not among the classes that weights are made of; refused, nothing was run" in refusal(
            path
        )
    checkpoint = open_checkpoint(shards)
    assert set(checkpoint.tensors) == {"a"}
    assert "nothing was run" in checkpoint.unreadable["weight"]
    assert not canary.exists()
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "w.pt", weights_only=True)
    torch.load(tmp_path / "w.pt", weights_only=False)["weight"].close()
    assert canary.exists(), "the attack is one: torch without weights_only runs it"


WHOLE_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda f: f.write_bytes(b""), "an empty file"),
    "git-LFS pointer": (lambda f: f.write_text("version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    "web page": (lambda f: f.write_text("\n<!DOCTYPE html><html>"), "a web page, not weights"),
    "bare pickle": (lambda f: f.write_bytes(pickle.dumps({"a": 1})), "not a file that torch.save writes"),
    "before torch 1.6": (
        lambda f: save({"a": torch.ones(1)}, f, _use_new_zipfile_serialization=False),
        "torch's format before 1.6",
    ),
    "truncated": (lambda f: f.write_bytes(f.read_bytes()[:-30]), "a damaged or truncated zip"),
    "compressed": (
        lambda f: rewritten(f, lambda _: None, zipfile.ZIP_DEFLATED),
        "is compressed, which torch.save never does (a decompression bomb?): refused",
    ),
    "no pickle": (lambda f: rewritten(f, lambda e: e.pop("data.pkl")), "a zip without torch's data.pkl"),
    "big-endian": (lambda f: rewritten(f, lambda e: e.update(byteorder=b"big")), "written big-endian"),
    "TorchScript": (
        lambda f: rewritten(f, lambda e: e.update({"code/__torch__.py": b"import os"})),
        "a TorchScript archive, which holds code; refused",
    ),
    "a list": (lambda f: save([torch.ones(1)], f), "holds list, not a state dict"),
    "no tensors": (lambda f: save({"a": 1, "b": 2}, f), "holds no tensors by name (a dict of 'a', 'b')"),
}


@pytest.mark.parametrize("fault", WHOLE_FILES)
def test_a_file_that_is_not_read_says_why(fault: str, tmp_path: Path) -> None:
    file = save(small_weights(), tmp_path / "pytorch_model.bin")
    WHOLE_FILES[fault][0](file)
    message = refusal(tmp_path)
    assert message.startswith(f"{file}: ")
    assert WHOLE_FILES[fault][1] in message


def test_a_real_torchscript_archive_is_refused(tmp_path: Path) -> None:
    module = nn.Linear(2, 2)
    with pytest.warns(DeprecationWarning, match="deprecated"):
        torch.jit.save(torch.jit.script(module), str(tmp_path / "m.pt"))
    assert "a TorchScript archive, which holds code; refused" in refusal(tmp_path / "m.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda entries: entries.pop("data/0"), "its storage w/data/0 is not in the file"),
        (lambda entries: entries.update({"data/0": entries["data/0"][:-2]}), "w/data/0 has"),
    ],
    ids=["absent", "short"],
)
def test_a_storage_that_is_not_as_the_pickle_says_loses_its_own_tensors(
    change: Callable[[dict[str, bytes]], object], message: str, tmp_path: Path
) -> None:
    weights = small_weights()
    checkpoint = open_checkpoint(rewritten(save(weights, tmp_path / "w.pt"), change))
    (lost,) = checkpoint.unreadable
    assert message in checkpoint.unreadable[lost]
    with pytest.raises(CheckpointError, match=f"tensor {lost}"):
        checkpoint.read(lost)
    for name in set(weights) - {lost}:
        assert torch.equal(checkpoint.read(name), weights[name])


def test_a_shape_that_claims_more_than_its_storage_is_refused(tmp_path: Path) -> None:
    path = save({"a": torch.ones(1).expand(1 << 20, 1 << 20)}, tmp_path / "w.pt")
    assert "over a storage of 1 entries" in refusal(path)


def test_an_index_cannot_lead_out_of_its_folder(tmp_path: Path) -> None:
    path = save_bin_shards(tmp_path / "c", [small_weights()])
    outside = save(small_weights(), tmp_path / "outside.bin")
    index = json.loads((path / INDEX).read_text())
    for name in ("../outside.bin", str(outside), ".."):
        (path / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(index["weight_map"], name)}))
        assert "is not a file of its own folder; refused" in refusal(path)
    (path / "link.bin").symlink_to(outside)
    (path / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(index["weight_map"], "link.bin")}))
    assert "outside its folder; refused" in refusal(path)


def test_a_missing_shard_loses_its_own_tensors_and_a_stray_one_is_told(tmp_path: Path) -> None:
    weights = small_weights()
    rest = {name: tensor for name, tensor in weights.items() if name != q_name()}
    path = save_bin_shards(tmp_path / "c", [{q_name(): weights[q_name()]}, rest])
    (path / "pytorch_model-00001-of-00002.bin").rename(path / "stray.bin")
    checkpoint = open_checkpoint(path)
    assert set(checkpoint.tensors) == set(rest)
    assert f"{INDEX} names it and it is absent" in checkpoint.unreadable[q_name()]
    assert checkpoint.warnings == (f"{path}: stray.bin not in the index: ignored",)
