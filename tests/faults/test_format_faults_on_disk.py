"""Damaged and misleading checkpoints of every format: what is said (file, tensor or key, remedy), and the rest kept.

The table in ``docs/formats.md`` maps the kinds of fault to the tests here and elsewhere.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
import torch
from safetensors.torch import save_file

from checkpoints_on_disk import moved, q_name, save_run, save_shards, save_tensors, small_weights, write_run_json
from command_line import geopd
from geopd.checkpoints import CheckpointError, checkpoint_digest, open_checkpoint
from seeded_checkpoints import lay

SMALL = ("--rotation-k", "p/4", "--principal-rank", "p/4", "--similarity-k", "2", "--hill-k", "4", "--workers", "1")
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
PAGE = b"<!DOCTYPE html><html><title>Sign in</title></html>"
WEIGHTS_FILES = {
    "safetensors_file": "model.safetensors",
    "zip_pickle": "pytorch_model.bin",
    "verl": "model_world_size_2_rank_1.pt",
    "deepspeed": "global_step1/zero_pp_rank_0_mp_rank_00_optim_states.pt",
    "distributed": ".metadata",
    "adapter": "adapter_model.safetensors",
}
Q = "model.layers.0.self_attn.q_proj.weight"


def opened(kind: str, folder: Path) -> str:
    """The complaint of opening a checkpoint and reading everything in it."""
    base = folder / "base" if kind == "adapter" else None
    with pytest.raises(CheckpointError) as caught:
        read_all(folder, base)
    return str(caught.value)


def read_all(folder: Path, base: Path | None = None) -> None:
    checkpoint = open_checkpoint(folder, base)
    for name in (*checkpoint.unreadable, *checkpoint.tensors):
        checkpoint.read(name)


@pytest.mark.parametrize("kind", WEIGHTS_FILES)
@pytest.mark.parametrize(
    ("content", "message", "remedy"),
    [
        (b"", r"empty|truncated", r"again"),
        (LFS, r"a git-LFS pointer, not weights", r"`git lfs pull`"),
        (PAGE, r"a web page, not weights", r"download it again"),
    ],
    ids=["empty", "LFS pointer", "web page"],
)
def test_a_file_that_is_something_else(kind: str, content: bytes, message: str, remedy: str, tmp_path: Path) -> None:
    file = lay(kind, tmp_path) / WEIGHTS_FILES[kind]
    file.write_bytes(content)
    complaint = opened(kind, tmp_path)
    assert complaint.startswith(f"{file}: ")
    assert re.search(message, complaint), complaint
    assert re.search(remedy, complaint), complaint


@pytest.mark.parametrize("kind", [kind for kind in WEIGHTS_FILES if kind != "distributed"])
@pytest.mark.parametrize("keep", [0.3, 0.99], ids=["to a third", "by a little"])
def test_a_truncated_file(kind: str, keep: float, tmp_path: Path) -> None:
    file = lay(kind, tmp_path) / WEIGHTS_FILES[kind]
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * keep)])
    complaint = opened(kind, tmp_path)
    assert str(file) in complaint
    assert "truncated" in complaint
    assert "again" in complaint


def test_a_truncated_distcp_loses_its_own_tensors(tmp_path: Path) -> None:
    (file,) = lay("distributed", tmp_path).glob("*.distcp")
    data = file.read_bytes()
    file.write_bytes(data[: len(data) - 100])
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.unreadable
    assert checkpoint.tensors
    assert all(f"{file}: truncated" in reason and "again" in reason for reason in checkpoint.unreadable.values())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("data_offsets", [0, 8]),
        ("data_offsets", [8, 0]),
        ("data_offsets", [-32, 0]),
        ("dtype", "F31"),
        ("dtype", "F64"),
        ("shape", [4, 5]),
        ("shape", [-4, -4]),
    ],
)
def test_an_offset_a_shape_or_a_dtype_that_does_not_fit(field: str, value: object, tmp_path: Path) -> None:
    file = lay("safetensors_file", tmp_path) / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header[Q][field] = value
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    complaint = opened("safetensors_file", tmp_path)
    assert f"{file}: " in complaint
    assert "again" in complaint


def test_a_key_in_two_shards_is_told_and_the_index_decides(tmp_path: Path) -> None:
    weights = small_weights()
    other = moved(weights, 1.0)
    path = save_shards(tmp_path / "c", [{q_name(): weights[q_name()]}, {q_name(1): weights[q_name(1)]}])
    second = path / "model-00002-of-00002.safetensors"
    save_file({q_name(1): weights[q_name(1)], q_name(): other[q_name()]}, second)
    checkpoint = open_checkpoint(path)
    assert torch.equal(checkpoint.read(q_name()), weights[q_name()])
    (warning,) = checkpoint.warnings
    assert f"{second}: also holds {q_name()}, which the index takes from model-00001-of-00002.safetensors" in warning


def test_a_missing_rank_file(tmp_path: Path) -> None:
    (lay("verl", tmp_path / "verl") / "model_world_size_2_rank_1.pt").unlink()
    complaint = opened("verl", tmp_path / "verl")
    assert "model_world_size_2_rank_1.pt is missing (1 of 2 ranks are); copy every rank's file here" in complaint
    (lay("deepspeed", tmp_path / "zero") / "global_step1" / "zero_pp_rank_0_mp_rank_00_optim_states.pt").rename(
        tmp_path / "zero" / "global_step1" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    )
    assert "the *_optim_states.pt of rank 0 is missing" in opened("deepspeed", tmp_path / "zero")


def test_a_world_size_that_the_config_contradicts(tmp_path: Path) -> None:
    (lay("verl", tmp_path) / "fsdp_config.json").write_text('{"FSDP_version": 2, "world_size": 8}')
    assert "fsdp_config.json: says world size 8, and the files here are of 2; copy them again" in opened(
        "verl", tmp_path
    )


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "base_model.model."])
def test_keys_with_a_wrappers_prefix_are_the_same_matrices(prefix: str, tmp_path: Path) -> None:
    weights = small_weights()
    base = save_tensors(tmp_path / "base", weights)
    tuned = moved(weights, 1e-3)
    wrapped = save_tensors(tmp_path / "wrapped", {prefix + name: tensor for name, tensor in tuned.items()})
    summary = json.loads(geopd("plan", base, wrapped, save_tensors(tmp_path / "plain", tuned), "--json").out)["runs"]
    assert summary["wrapped"]["matched"] == summary["plain"]["matched"] == 6
    assert summary["wrapped"]["skipped"] == []


def test_an_adapter_over_the_wrong_base(tmp_path: Path) -> None:
    lay("adapter", tmp_path)
    save_tensors(tmp_path / "base", {name.replace("layers.0", "layers.7"): W for name, W in small_weights().items()})
    complaint = opened("adapter", tmp_path)
    assert re.search(
        r"adapts model\.layers\.0\.self_attn\.[qk]_proj\.weight, which .* does not hold \(2 such\)", complaint
    )
    assert "is this the base it was trained over?" in complaint
    save_tensors(tmp_path / "base", {f"model.layers.0.self_attn.{name}_proj.weight": torch.ones(8, 8) for name in "qk"})
    assert "has factors of shapes (2, 4) and (4, 2), and is (8, 8) in" in opened("adapter", tmp_path)


def test_an_adapter_over_itself(tmp_path: Path) -> None:
    config = lay("adapter", tmp_path) / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": str(tmp_path)}))
    with pytest.raises(CheckpointError, match=r"the base of .* is an adapter too: merge it into its own base first"):
        open_checkpoint(tmp_path)


def test_a_dead_adapter_is_told(tmp_path: Path) -> None:
    lay("adapter", tmp_path)
    from safetensors.torch import load_file

    factors = load_file(tmp_path / "adapter_model.safetensors")
    dead = {name: torch.zeros_like(held) if "lora_B" in name else held for name, held in factors.items()}
    save_file(dead, tmp_path / "adapter_model.safetensors")
    checkpoint = open_checkpoint(tmp_path, tmp_path / "base")
    assert any("a dead adapter: every B is zero" in warning for warning in checkpoint.warnings)
    assert checkpoint.digest() == checkpoint_digest(tmp_path / "base")


def test_a_resized_vocabulary_leaves_the_layers_compared(tmp_path: Path) -> None:
    weights = small_weights()
    base = save_tensors(tmp_path / "base", weights)
    grown = moved(weights, 1e-3)
    grown["model.embed_tokens.weight"] = torch.cat([grown["model.embed_tokens.weight"], torch.zeros(8, 16).bfloat16()])
    summary = json.loads(geopd("plan", base, save_tensors(tmp_path / "tuned", grown), "--json").out)["runs"]["tuned"]
    assert summary["matched"] == 5
    assert [item["name"] for item in summary["skipped"]] == ["embed_tokens"]
    assert "vocabulary resized from 40 to 48 rows" in summary["skipped"][0]["reason"]


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(bytes(data))


def zero_a_block(file: Path) -> None:
    data = file.read_bytes()
    file.write_bytes(data[:-512] + bytes(512))


DAMAGE = pytest.mark.parametrize("damage", [flip_a_bit, zero_a_block])


@DAMAGE
def test_a_bit_flip_or_a_zeroed_block_in_the_origin_is_found_by_its_digest(
    damage: Callable[[Path], None], tmp_path: Path
) -> None:
    base = save_tensors(tmp_path / "base", small_weights())
    run = save_run(tmp_path / "opd", small_weights(), [1])
    write_run_json(run, origin={"path": "../base", "digest": checkpoint_digest(base)})
    assert geopd("plan", "origin", run).code == 0
    damage(base / "model.safetensors")
    complaint = geopd("measure", "origin", run, "--out", tmp_path / "out", *SMALL).complaint()
    assert f"{base}: not the checkpoint that opd started from" in complaint
    assert "restore it" in complaint


@DAMAGE
def test_a_bit_flip_or_a_zeroed_block_since_is_found_by_the_manifests_digests(
    damage: Callable[[Path], None], tmp_path: Path
) -> None:
    base = save_tensors(tmp_path / "base", small_weights())
    tuned = save_tensors(tmp_path / "tuned", moved(small_weights(), 1e-3))
    assert geopd("measure", base, tuned, "--out", tmp_path / "out", *SMALL).code == 0
    before = (tmp_path / "out" / "measurements.parquet").read_bytes()
    damage(tuned / "model.safetensors")
    complaint = geopd("measure", base, tuned, "--out", tmp_path / "out", *SMALL).complaint()
    assert f"{tmp_path / 'out'}: already holds a run labelled tuned with other inputs" in complaint
    assert (tmp_path / "out" / "measurements.parquet").read_bytes() == before


def test_a_damaged_rank_file_keeps_nothing_of_its_run_and_all_of_the_others(tmp_path: Path) -> None:
    base = lay("safetensors_file", tmp_path / "base")
    lay("verl", tmp_path / "verl")
    good = save_tensors(
        tmp_path / "good", moved({n: open_checkpoint(base).read(n) for n in open_checkpoint(base).tensors}, 1)
    )
    assert geopd("measure", base, good, "--out", tmp_path / "out", *SMALL).code == 0
    kept = pl.read_parquet(tmp_path / "out" / "measurements.parquet")
    (tmp_path / "verl" / "model_world_size_2_rank_1.pt").write_bytes(PAGE)
    assert "a web page" in geopd("measure", base, tmp_path / "verl", "--out", tmp_path / "out", *SMALL).complaint()
    assert pl.read_parquet(tmp_path / "out" / "measurements.parquet").equals(kept)


def test_every_fault_of_the_documents_table_has_the_tests_it_names() -> None:
    root = Path(__file__).parents[2]
    rows = re.findall(r"^\| (\d+) \|.*\| (`.+`) \|$", (root / "docs" / "formats.md").read_text(), re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 26))
    defined = {
        node.name
        for file in (root / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    for number, named in rows:
        assert set(re.findall(r"`(\w+)`", named)) <= defined, number
