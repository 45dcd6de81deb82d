"""Every bad input is one line on stderr that names the file, the tensor or the option, and what to do; exit code 2."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
import torch

from checkpoints_on_disk import (
    down_name,
    moved,
    q_name,
    save_run,
    save_shards,
    save_tensors,
    small_weights,
    write_run_json,
)
from command_line import geopd
from geopd.checkpoints import checkpoint_digest

INDEX = "model.safetensors.index.json"
SMALL = ("--rotation-k", "p/4", "--principal-rank", "p/4", "--similarity-k", "2", "--hill-k", "4", "--workers", "1")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_tensors(tmp_path / "base", small_weights())


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    return save_tensors(tmp_path / "tuned", moved(small_weights(), 1e-3))


def sharded(path: Path) -> Path:
    """Layer 0 in the first shard, the rest in the second."""
    weights = moved(small_weights(), 1e-3)
    first = {name: tensor for name, tensor in weights.items() if ".layers.0." in name}
    return save_shards(path, [first, {name: tensor for name, tensor in weights.items() if name not in first}])


def shard(path: Path, i: int) -> Path:
    return path / f"model-{i:05d}-of-00002.safetensors"


def rewrite_index(path: Path, change: Callable[[dict[str, str]], None]) -> None:
    index = json.loads((path / INDEX).read_text())
    change(index["weight_map"])
    (path / INDEX).write_text(json.dumps(index))


def truncate(file: Path, keep: int) -> None:
    file.write_bytes(file.read_bytes()[:keep])


def set_header(file: Path, header: object) -> None:
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(64))


SINGLE_FILE = {
    "truncated": (lambda f: truncate(f, f.stat().st_size - 10), r"truncated \([\d,]+ bytes, header says [\d,]+\)"),
    "truncated in its header": (lambda f: truncate(f, 50), "truncated inside its header"),
    "empty": (lambda f: truncate(f, 0), r"truncated \(0 bytes\)"),
    "longer than its header says": (lambda f: f.write_bytes(f.read_bytes() + b"x"), "longer than its header says"),
    "git-LFS pointer": (
        lambda f: f.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        "a git-LFS pointer, not weights; run `git lfs pull`",
    ),
    "web page": (lambda f: f.write_bytes(b"<!DOCTYPE html><html>"), "a web page, not weights"),
    "no safetensors at all": (lambda f: f.write_bytes(b"GGUF" + bytes(4) + b"\1"), "not a safetensors file"),
    "garbage header": (lambda f: f.write_bytes(struct.pack("<Q", 6) + b"{{{{{{"), "not a safetensors header"),
    "header of bytes": (lambda f: f.write_bytes(struct.pack("<Q", 2) + b"\xff\xfe"), "not a safetensors header"),
    "list for a header": (lambda f: set_header(f, [1]), "not a safetensors header"),
    "tensor without a shape": (lambda f: set_header(f, {"a": {"data_offsets": [0, 8]}}), "not a safetensors header"),
    "three offsets": (
        lambda f: set_header(f, {"a": {"data_offsets": [0, 8, 9], "shape": [2], "dtype": "F32"}}),
        "not a safetensors header",
    ),
    "offsets of text": (
        lambda f: set_header(f, {"a": {"data_offsets": ["x", "y"], "shape": [2], "dtype": "F32"}}),
        "not a safetensors header",
    ),
}


@pytest.mark.parametrize("fault", SINGLE_FILE)
def test_a_damaged_file(fault: str, base: Path, tuned: Path, tmp_path: Path) -> None:
    break_it, message = SINGLE_FILE[fault]
    file = tuned / "model.safetensors"
    break_it(file)
    complaint = geopd("measure", base, tuned, "--out", tmp_path / "out", *SMALL).complaint()
    assert complaint.startswith(f"geopd: {file}: ")
    assert any(word in complaint for word in ("download", "git lfs pull", "not a safetensors file"))
    assert re.search(message, complaint), complaint
    assert not (tmp_path / "out").exists(), "nothing is written for input that cannot be used"


FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (Path.exists, "holds no weights that are read (safetensors, PEFT adapter,"),
    "adapter only": (lambda p: (p / "adapter_model.safetensors").touch(), "an adapter without its adapter_config.json"),
    "pickled": (lambda p: (p / "pytorch_model.bin").touch(), "an empty file; write or download it again"),
    "pickled shards": (lambda p: (p / "pytorch_model.bin.index.json").touch(), "not readable as JSON"),
    "distributed": (lambda p: (p / ".metadata").touch(), ".metadata: an empty file; write or download it again"),
    "shards without an index": (
        lambda p: (p / "model-00001-of-00002.safetensors").touch(),
        "holds model-00001-of-00002.safetensors but neither",
    ),
    "index of nothing": (lambda p: (p / INDEX).write_text("{}"), "has no weight_map"),
    "index that is no JSON": (lambda p: (p / INDEX).write_text("{"), "not readable as JSON"),
    "path traversal": (
        lambda p: (p / INDEX).write_text(json.dumps({"weight_map": {"a": "../base/model.safetensors"}})),
        "names '../base/model.safetensors', which is not a file of its own folder; refused",
    ),
    "absolute path": (
        lambda p: (p / INDEX).write_text(json.dumps({"weight_map": {"a": "/etc/passwd"}})),
        "not a file of its own folder; refused",
    ),
    "broken config": (
        lambda p: (save_tensors(p, small_weights()), (p / "config.json").write_text("{")),
        "config.json: not readable as JSON",
    ),
}


@pytest.mark.parametrize("fault", FOLDERS)
def test_a_folder_without_readable_weights(fault: str, base: Path, tmp_path: Path) -> None:
    make, message = FOLDERS[fault]
    path = tmp_path / "tuned"
    path.mkdir()
    make(path)
    complaint = geopd("measure", base, path, "--out", tmp_path / "out", *SMALL).complaint()
    assert str(path) in complaint
    assert message in complaint


def test_a_truncated_shard_leaves_the_others_measured(base: Path, tmp_path: Path) -> None:
    path = sharded(tmp_path / "tuned")
    truncate(shard(path, 1), shard(path, 1).stat().st_size - 10)
    result = geopd("measure", base, path, "--out", tmp_path / "out", *SMALL)
    assert result.code == 1
    assert "Traceback" not in result.err
    (line,) = [line for line in result.err.splitlines() if line.startswith("failed: tuned: layers.0.self_attn.q_proj")]
    assert f"{shard(path, 1)}: truncated" in line
    assert "write or download it again" in line
    frame = pl.read_parquet(tmp_path / "out" / "measurements.parquet")
    failed = frame.filter(pl.col("status") == "failed")
    assert set(failed["matrix"]) == {"layers.0.self_attn.q_proj", "layers.0.mlp.down_proj"}
    assert failed["value"].null_count() == len(failed)
    assert failed["note"].str.contains("truncated").all()
    whole = frame.filter(pl.col("matrix") == "layers.1.self_attn.q_proj")
    assert "failed" not in set(whole["status"])
    assert set(failed.filter(pl.col("matrix") == "layers.0.self_attn.q_proj")["metric"]) == set(whole["metric"])
    coverage = json.loads((tmp_path / "out" / "manifest.json").read_text())["coverage"]["tuned"]
    assert {item["matrix"] for item in coverage["failed"]} == set(failed["matrix"])
    assert coverage["matched"] == 4
    again = geopd("measure", base, path, "--out", tmp_path / "out", *SMALL)
    assert again.code == 1, "the failure is still there"
    assert "0 measured" in again.out


@pytest.mark.parametrize("which", ["shard", "tensor"])
def test_an_index_that_names_what_is_absent(which: str, base: Path, tmp_path: Path) -> None:
    path = sharded(tmp_path / "tuned")
    if which == "shard":
        shard(path, 2).unlink()
        message = "names it and it is absent"
    else:
        rewrite_index(path, lambda names: names.update({q_name(1): shard(path, 1).name}))
        message = "the index says it is here and it is not"
    result = geopd("measure", base, path, "--out", tmp_path / "out", *SMALL)
    assert result.code == 1
    (line,) = [line for line in result.err.splitlines() if line.startswith("failed: tuned: layers.1.self_attn.q_proj")]
    assert message in line
    assert "layers.0" not in result.err


def test_no_shard_can_be_read(base: Path, tmp_path: Path) -> None:
    path = sharded(tmp_path / "tuned")
    truncate(shard(path, 1), 20)
    truncate(shard(path, 2), 20)
    complaint = geopd("measure", base, path, "--out", tmp_path / "out", *SMALL).complaint()
    assert "(and 1 more shards)" in complaint


def test_only_damaged_tensors_selected_says_that_they_are_damaged(base: Path, tmp_path: Path) -> None:
    path = sharded(tmp_path / "tuned")
    truncate(shard(path, 1), shard(path, 1).stat().st_size - 10)
    complaint = geopd("measure", base, path, "--out", tmp_path / "out", "--matrices", "layers.0.*", *SMALL).complaint()
    assert "truncated" in complaint


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["origin", "checkpoint"])
def test_entries_that_are_not_finite(where: str, bad: float, tmp_path: Path) -> None:
    before = small_weights()
    after = moved(before, 1e-3)
    (before if where == "origin" else after)[q_name()][3, 2:4] = bad
    paths = [save_tensors(tmp_path / name, w) for name, w in (("base", before), ("tuned", after))]
    result = geopd("measure", *paths, "--out", tmp_path / "out", *SMALL)
    assert result.code == 1
    assert f"tensor {q_name()}: 2 of 384 entries are NaN or infinite; use an earlier checkpoint" in result.err
    frame = pl.read_parquet(tmp_path / "out" / "measurements.parquet")
    bad_rows = frame.filter(pl.col("matrix") == "layers.0.self_attn.q_proj")
    assert set(bad_rows["status"]) == {"failed"}
    assert bad_rows["value"].null_count() == len(bad_rows)
    assert "failed" not in set(frame.filter(pl.col("matrix") != "layers.0.self_attn.q_proj")["status"])
    assert not frame["value"].is_nan().any()


def test_one_damaged_step_of_several(base: Path, tmp_path: Path) -> None:
    weights = moved(small_weights(), 4e-3)
    run = save_run(tmp_path / "opd", small_weights(), [1, 2, 3])
    weights[q_name()][0, 0] = torch.nan
    save_tensors(run / "checkpoint-3", weights)
    result = geopd("measure", base, run, "--out", tmp_path / "out", *SMALL)
    assert result.code == 1
    frame = pl.read_parquet(tmp_path / "out" / "measurements.parquet").filter(
        pl.col("matrix").str.contains("0.*q_proj")
    )
    assert set(frame.filter(pl.col("step") == 3)["status"]) == {"failed"}
    # bf16 ends do not tell what rounding took, and a first increment has none before it
    without = ("subspace_similarity", "increment_similarity", "sub_ulp_share")
    masters = pl.col("metric").is_in(without) | pl.col("metric").str.starts_with("visible_mask")
    rest = frame.filter((pl.col("step") < 3) & ~masters)
    assert set(rest["status"]) == {"ok"}
    similarity = frame.filter((pl.col("step") < 3) & (pl.col("metric") == "subspace_similarity"))
    assert set(similarity["status"]) == {"undefined"}


def test_nothing_matches(base: Path, tmp_path: Path) -> None:
    other = save_tensors(tmp_path / "other", {"vision.proj.weight": torch.ones(3, 3)})
    complaint = geopd("measure", base, other, "--out", tmp_path / "out", *SMALL).complaint()
    assert f"nothing in it matches {base}" in complaint
    assert complaint.endswith("is this the run's base?")


def test_the_glob_selects_nothing(base: Path, tuned: Path, tmp_path: Path) -> None:
    complaint = geopd("measure", base, tuned, "--out", tmp_path / "o", "--matrices", "*.w_q", *SMALL).complaint()
    assert "--matrices selects none of its 6 tensors" in complaint


def test_a_base_folder_with_several_steps(base: Path, tuned: Path, tmp_path: Path) -> None:
    run = save_run(tmp_path / "sft", small_weights(), [1, 2])
    complaint = geopd("measure", run, tuned, "--out", tmp_path / "out", *SMALL).complaint()
    assert (
        f"{run}: a base is one checkpoint, and this folder holds checkpoint-1, checkpoint-2; name one of" in complaint
    )


def test_an_origin_that_changed_since_the_run(base: Path, tmp_path: Path) -> None:
    run = save_run(tmp_path / "opd", small_weights(), [1])
    write_run_json(run, origin={"path": "../base", "digest": "0" * 32})
    complaint = geopd("measure", "origin", run, "--out", tmp_path / "out", *SMALL).complaint()
    assert f"{base}: not the checkpoint that opd started from: its digest is {checkpoint_digest(base)}" in complaint
    assert "restore it, or name the base yourself" in complaint
    write_run_json(run, origin={"path": "../base", "digest": checkpoint_digest(base)})
    assert geopd("measure", "origin", run, "--out", tmp_path / "out", *SMALL).code == 0


def test_the_same_label_with_other_inputs(base: Path, tuned: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert geopd("measure", base, tuned, "--out", out, *SMALL).code == 0
    old = pl.read_parquet(out / "measurements.parquet")
    save_tensors(tuned, moved(small_weights(), 5e-3))
    complaint = geopd("measure", base, tuned, "--out", out, *SMALL).complaint()
    assert f"{out}: already holds a run labelled tuned with other inputs" in complaint
    assert "--replace" in complaint
    assert pl.read_parquet(out / "measurements.parquet").equals(old)
    assert geopd("measure", base, tuned, "--out", out, "--replace", *SMALL).code == 0
    new = pl.read_parquet(out / "measurements.parquet")
    assert not new.equals(old)
    assert new.height == old.height
    fresh = tmp_path / "fresh"
    geopd("measure", base, tuned, "--out", fresh, *SMALL)
    assert new.equals(pl.read_parquet(fresh / "measurements.parquet"))
    assert {f.name for f in (out / "parts").iterdir()} == {f.name for f in (fresh / "parts").iterdir()}


def test_other_settings_in_the_folder(base: Path, tuned: Path, tmp_path: Path) -> None:
    assert geopd("measure", base, tuned, "--out", tmp_path / "out", *SMALL).code == 0
    complaint = geopd("measure", base, tuned, "--out", tmp_path / "out", *SMALL, "--eta", "0.01").complaint()
    assert "was measured with eta = 0.001, not 0.01; use the same settings, or another --out" in complaint


def test_an_out_that_cannot_be_written(base: Path, tuned: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    complaint = geopd("measure", base, tuned, "--out", tmp_path / "file" / "out", *SMALL).complaint()
    assert f"--out {tmp_path / 'file' / 'out'}: cannot be written" in complaint
    complaint = geopd("measure", base, tuned, "--out", tmp_path / "file", *SMALL).complaint()
    assert "cannot be written" in complaint


def test_a_disk_that_fills_up(base: Path, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", str(tmp_path / "out" / "parts"))

    monkeypatch.setattr("geopd.results.store.Store.commit", full)
    result = geopd("measure", base, tuned, "--out", tmp_path / "out", *SMALL)
    assert result.code == 1
    assert result.err.splitlines()[-1].startswith("geopd: ")
    assert "No space left on device" in result.err


def test_a_manifest_that_is_no_manifest(base: Path, tuned: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.json").write_text("{")
    complaint = geopd("measure", base, tuned, "--out", tmp_path / "out", *SMALL).complaint()
    assert "manifest.json" in complaint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--alpha", "1.5"), "--alpha"),
        (("--eta", "1"), "--eta"),
        (("--rotation-k", "many"), "--rotation-k"),
        (("--principal-rank", "p/0"), "--principal-rank"),
        (("--metrics", "hill"), "--metrics: no metric or group hill"),
        (("--similarity-k", "0"), "--similarity-k"),
        (("--hill-k", "1"), "--hill-k"),
        (("--paradigm", "opd"), "--paradigm opd: give label="),
        (("--paradigm", "nobody=opd"), "--paradigm: no run labelled nobody; runs are tuned"),
        (("--paradigm", "tuned=ppo"), "paradigm 'ppo' is none of sft, opd, rlvr, mix, other"),
    ],
)
def test_options_out_of_range(options: tuple[str, str], message: str, base: Path, tuned: Path, tmp_path: Path) -> None:
    assert message in geopd("measure", base, tuned, "--out", tmp_path / "out", *options).complaint()


def test_two_runs_of_one_label(base: Path, tuned: Path, tmp_path: Path) -> None:
    complaint = geopd("measure", base, tuned, f"tuned={tuned}", "--out", tmp_path / "out").complaint()
    assert "two runs are labelled tuned: give each its own label, as in label=PATH" in complaint


def test_a_run_json_that_is_wrong(base: Path, tmp_path: Path) -> None:
    run = save_run(tmp_path / "opd", small_weights(), [1])
    write_run_json(run, schema_version=7)
    complaint = geopd("measure", base, run, "--out", tmp_path / "out").complaint()
    assert f"{run / 'run.json'}: schema_version 7" in complaint


def test_a_task_that_dies_is_tried_again(
    base: Path, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from geopd.diagnostics import comparison

    true_decompose = comparison.decompose

    def out_of_memory(W: torch.Tensor, k: int) -> object:
        if W.shape == (16, 24):
            raise MemoryError("no more")
        return true_decompose(W, k)

    with monkeypatch.context() as patched:
        patched.setattr(comparison, "decompose", out_of_memory)
        result = geopd("measure", base, tuned, "--out", tmp_path / "out", *SMALL)
    assert result.code == 1
    assert (
        f"failed: tuned: {down_name().removeprefix('model.').removesuffix('.weight')}: MemoryError: no more"
        in result.err
    )
    again = geopd("measure", base, tuned, "--out", tmp_path / "out", *SMALL, "--json")
    assert again.code == 0
    assert json.loads(again.out)["measured"] == 2
    assert "failed" not in set(pl.read_parquet(tmp_path / "out" / "measurements.parquet")["status"])
