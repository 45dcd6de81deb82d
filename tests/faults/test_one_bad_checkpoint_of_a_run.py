"""One damaged or misleading checkpoint of a run: its rows say why, with file and remedy, and the rest is measured."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints_on_disk import moved, save_shards, save_tensors
from command_line import geopd
from hostile import pickle_of, torch_zip
from seeded_checkpoints import lay

SMALL = ("--rotation-k", "p/4", "--principal-rank", "p/4", "--similarity-k", "2", "--hill-k", "4", "--workers", "1")
MODEL, INDEX = "model.safetensors", "model.safetensors.index.json"
RANKS, FACTORS = "model_world_size_2_rank_{}.pt", "adapter_model.safetensors"
SHARD = "model-00002-of-00002.safetensors"
Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A base, and a run of it with a first and a third step."""
    weights = load_file(lay("safetensors_file", tmp_path / "seed") / MODEL)
    save_tensors(tmp_path / "base", weights)
    for step in (1, 3):
        save_tensors(tmp_path / "opd" / f"checkpoint-{step}", moved(weights, 0.1 * step))
    return tmp_path / "opd"


def measured(run: Path) -> tuple[int, str, pl.DataFrame, list[str]]:
    """Exit code, what was said, the table, and the manifest's warnings of the run."""
    out = run.parent / "out"
    result = geopd("measure", run.parent / "base", run, "--out", out, *SMALL)
    assert "Traceback" not in result.err
    warnings = json.loads((out / "manifest.json").read_text())["coverage"]["opd"]["warnings"]
    return result.code, result.err, pl.read_parquet(out / "measurements.parquet"), warnings


def lay_shards(folder: Path) -> Path:
    """The seed's weights in two shards, q and k in the second."""
    weights = load_file(lay("safetensors_file", folder) / MODEL)
    (folder / MODEL).unlink()
    second = {name: W for name, W in weights.items() if name.endswith(("q_proj.weight", "k_proj.weight"))}
    return save_shards(folder, [{name: W for name, W in weights.items() if name not in second}, second])


def write(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return damage


def remove(pattern: str) -> Callable[[Path], None]:
    return lambda folder: next(folder.glob(pattern)).unlink()


def header_with(**fields: object) -> Callable[[Path], None]:
    def change(data: bytes) -> bytes:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        header[Q] |= fields
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + data[8 + length :]

    return write(MODEL, change)


def name_an_absent_key(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][Q] = "model-00001-of-00002.safetensors"
    (folder / INDEX).write_text(json.dumps(index))


def add_a_rank_of_four(folder: Path) -> None:
    (folder / "model_world_size_4_rank_0.pt").write_bytes((folder / RANKS.format(0)).read_bytes())


def poison(folder: Path) -> None:
    program = pickle_of("GLOBAL and REDUCE", folder.parent / "was-run")
    (folder / "pytorch_model.bin").write_bytes(torch_zip(program))


def widen_the_factors(folder: Path) -> None:
    factors = {name: torch.ones(2, 9) if "lora_A" in name else W for name, W in load_file(folder / FACTORS).items()}
    save_file(factors, folder / FACTORS)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
ALL, SECOND = ("layers.0", "norm", "embed_tokens"), ("layers.0.self_attn.q_proj", "layers.0.self_attn.k_proj")
# layout, damage, the file that is named, what is said of it, the remedy, the matrices that are lost
FAULTS: dict[str, tuple[str, Callable[[Path], None], str, str, str, tuple[str, ...]]] = {
    "empty file": ("safetensors_file", write(MODEL, lambda _: b""), MODEL, "truncated", "again", ALL),
    "truncated file": ("safetensors_file", write(MODEL, lambda d: d[:-9]), MODEL, "truncated", "again", ALL),
    "truncated shard": ("shards", write(SHARD, lambda d: d[:-9]), SHARD, "truncated", "again", SECOND),
    "trailing bytes": ("safetensors_file", write(MODEL, lambda d: d + b"0"), MODEL, "longer than its", "again", ALL),
    "LFS pointer": ("safetensors_file", write(MODEL, lambda _: LFS), MODEL, "git-LFS pointer", "git lfs pull", ALL),
    "web page": ("zip_pickle", write("pytorch_model.bin", lambda _: b"<html>"), ".bin", "a web page", "again", ALL),
    "2^60 header": (
        "safetensors_file",
        write(MODEL, lambda d: (2**60).to_bytes(8, "little") + d[8:]),
        MODEL,
        "not a safetensors file",
        "no header length",
        ALL,
    ),
    "bad offsets": ("safetensors_file", header_with(data_offsets=[8, 0]), MODEL, Q, "again", ALL),
    "bad dtype": ("safetensors_file", header_with(dtype="F31"), MODEL, Q, "again", ALL),
    "index of an absent shard": ("shards", remove(SHARD), SHARD, "it is absent", "download or write it again", SECOND),
    "index of an absent key": (
        "shards",
        name_an_absent_key,
        "model-00001-of-00002.safetensors",
        "the index says it is here and it is not",
        "again",
        SECOND[:1],
    ),
    ".distcp without .metadata": ("distributed", remove(".metadata"), "checkpoint-2", "no .metadata", "copy it", ALL),
    ".metadata of an absent file": ("distributed", remove("*.distcp"), ".distcp", "it is absent", "again", ALL),
    "malicious pickle": ("zip_pickle", poison, ".bin", "nothing was run", "Save the weights alone", ALL),
    "missing rank": ("verl", remove(RANKS.format(1)), RANKS.format(1), "is missing", "copy every rank's file", ALL),
    "mixed world sizes": ("verl", add_a_rank_of_four, "world_size_4", "2 world sizes", "remove the stale ones", ALL),
    "adapter without config": ("adapter", remove("*.json"), "checkpoint-2", "without its", "copy it there", ALL),
    "adapter of another base": (
        "adapter",
        widen_the_factors,
        FACTORS,
        "has factors of shapes",
        "is this the base it was trained over",
        ALL,
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_damaged_fails_and_the_other_steps_are_measured(fault: str, run: Path) -> None:
    layout, damage, file, said, remedy, lost = FAULTS[fault]
    folder = run / "checkpoint-2"
    lay_shards(folder) if layout == "shards" else lay(layout, folder)
    damage(folder)
    code, told, table, _ = measured(run)
    assert code == 1
    assert not (run / "was-run").exists()
    failed = table.filter(pl.col("status") == "failed")
    assert set(failed["step"]) == {2}
    assert failed["value"].null_count() == failed.height > 0
    assert set(failed["matrix"]) == {name for name in set(table["matrix"]) if name.startswith(lost)}
    for note in set(failed["note"]):
        assert str(folder) in note
        assert all(part in note for part in (file, said, remedy)), note
    line = next(line for line in told.splitlines() if line.startswith("failed: opd: layers.0.self_attn.q_proj: "))
    assert re.search(re.escape(said), line)
    for step in (1, 3):
        norms = table.filter((pl.col("step") == step) & (pl.col("metric") == "relative_update_norm"))
        assert set(norms["status"]) == {"ok"}


def test_once_repaired_the_tables_are_those_of_a_run_that_was_never_damaged(run: Path) -> None:
    file = lay("safetensors_file", run / "checkpoint-2") / MODEL
    whole = file.read_bytes()
    _, _, expected, _ = measured(run)
    (run.parent / "out").rename(run.parent / "expected")
    file.write_bytes(whole[:-9])
    assert measured(run)[0] == 1
    file.write_bytes(whole)
    code, _, table, warnings = measured(run)
    assert code == 0
    assert warnings == []
    assert table.equals(expected)


def test_a_run_of_which_no_step_can_be_opened_is_refused(run: Path) -> None:
    for step in (1, 3):
        (run / f"checkpoint-{step}" / MODEL).write_bytes(b"")
    complaint = geopd("measure", run.parent / "base", run, "--out", run.parent / "out", *SMALL).complaint()
    assert f"{run / 'checkpoint-1' / MODEL}: truncated (0 bytes)" in complaint


def double_a_key(folder: Path) -> None:
    file = lay_shards(folder) / SHARD
    held = load_file(file)
    save_file(held | {"model.norm.weight": torch.zeros(4)}, file)


def leave_a_stray_shard(folder: Path) -> None:
    save_file({"stray": torch.ones(2)}, lay_shards(folder) / "model-00003-of-00003.safetensors")


def wrap_the_keys(folder: Path) -> None:
    file = lay("safetensors_file", folder) / MODEL
    save_file({f"module._orig_mod.{name}": W for name, W in load_file(file).items()}, file)


def kill_the_adapter(folder: Path) -> None:
    file = lay("adapter", folder) / FACTORS
    save_file({name: W * ("lora_A" in name) for name, W in load_file(file).items()}, file)


def grow_the_vocabulary(folder: Path) -> None:
    file = lay("safetensors_file", folder) / MODEL
    held = load_file(file)
    embedding = held["model.embed_tokens.weight"]
    save_file(held | {"model.embed_tokens.weight": torch.cat([embedding, embedding])}, file)


def be_the_base(folder: Path) -> None:
    lay("safetensors_file", folder)


MISLEADING: dict[str, tuple[Callable[[Path], None], str]] = {
    "a key in two shards": (double_a_key, f"{SHARD}: also holds model.norm.weight, which the index takes from"),
    "a shard not in the index": (leave_a_stray_shard, "model-00003-of-00003.safetensors not in the index: ignored"),
    "keys with a wrapper's prefix": (wrap_the_keys, ""),
    "a dead adapter": (kill_the_adapter, "a dead adapter: every B is zero"),
    "a resized vocabulary": (grow_the_vocabulary, "embed_tokens: vocabulary resized from 6 to 12 rows: not compared"),
    "identical checkpoints": (be_the_base, "nothing changed at step 2: the same content as"),
}


@pytest.mark.parametrize("fault", MISLEADING)
def test_what_misleads_is_told_and_measured_for_what_it_is(fault: str, run: Path) -> None:
    make, said = MISLEADING[fault]
    make(run / "checkpoint-2")
    code, told, table, _ = measured(run)
    assert code == 0
    assert "failed" not in set(table["status"])
    assert said in told
    second = table.filter((pl.col("step") == 2) & (pl.col("metric") == "relative_update_norm"))
    lacking = {"embed_tokens"} if fault == "a resized vocabulary" else set()
    assert set(second["matrix"]) == set(table["matrix"]) - lacking
    # all but the wrapped and the doubled are the base's own weights: a result, not an error
    assert set(second["value"]) == {0.0}


@pytest.mark.parametrize("end", ["origin", "checkpoint"])
def test_a_zeroed_block_is_told(end: str, tmp_path: Path) -> None:
    before = {Q: torch.randn(64, 64), "model.norm.weight": torch.zeros(2048)}
    paths = {
        "origin": save_tensors(tmp_path / "base", before),
        "checkpoint": save_tensors(tmp_path / "opd" / "checkpoint-2", moved(before, 0.1)),
    }
    save_tensors(tmp_path / "opd" / "checkpoint-1", moved(before, 0.2))
    damaged = paths[end] / MODEL
    data = bytearray(damaged.read_bytes())
    at = data.rindex(load_file(damaged)[Q].numpy().tobytes())
    data[at + 5000 : at + 5000 + 4096] = bytes(4096)
    damaged.write_bytes(bytes(data))
    code, told, _, warnings = measured(tmp_path / "opd")
    assert code == 0
    assert len(warnings) == {"origin": 2, "checkpoint": 1}[end]
    for warning in warnings:
        assert warning.startswith(f"{paths[end]}: tensor {Q}: zeros from byte 5,120 on, where ")
        assert "Compare the file's checksum, or copy it again" in warning
        assert warning in told


def test_the_plan_tells_of_a_last_step_that_cannot_be_opened(run: Path) -> None:
    file = run / "checkpoint-3" / MODEL
    file.write_bytes(b"")
    result = geopd("plan", run.parent / "base", run, "--json")
    assert result.code == 0
    about = json.loads(result.out)["runs"]["opd"]
    assert (about["steps"], about["formats"], about["matched"]) == ([1, 3], {"safetensors": 1}, 6)
    assert about["warnings"] == [
        f"step 3 cannot be opened: {file}: truncated (0 bytes); write or download the file again"
    ]
