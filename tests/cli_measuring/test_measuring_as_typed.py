"""``geopd plan`` and ``geopd measure`` as a user types them: what is written, resumed, accumulated and printed."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import polars as pl
import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints_on_disk import moved, save_model, save_run, save_tensors, small_weights, write_run_json
from command_line import geopd, start_geopd
from geopd.checkpoints import checkpoint_digest
from geopd.diagnostics import CATALOGUE
from geopd.results import read_results

SMALL = ("--rotation-k", "p/4", "--principal-rank", "p/4", "--similarity-k", "2", "--hill-k", "4", "--quiet")
TABLES = ("measurements", "nulls", "runs", "evaluations")
DOCUMENTED = {f"{name}.parquet" for name in TABLES} | {"manifest.json", "log.jsonl", ".lock", "parts", "vectors"}


@pytest.fixture(autouse=True)
def _short_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("geopd.engine.preflight.LONG", 0.03)


def same_tables(here: Path, there: Path) -> None:
    for name in TABLES:
        one, other = (pl.read_parquet(out / f"{name}.parquet") for out in (here, there))
        assert one.equals(other), name
        assert (here / f"{name}.parquet").read_bytes() == (there / f"{name}.parquet").read_bytes(), name


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An origin, a base before it, and a run of five steps that names the origin."""
    root = tmp_path_factory.mktemp("world")
    anchor = moved(small_weights(), 2e-3, seed=5)
    save_tensors(root / "base", small_weights())
    save_tensors(root / "anchor", anchor)
    opd = save_run(root / "opd", anchor, [63, 127, 191, 255, 299])
    write_run_json(opd, origin={"path": "../anchor", "digest": checkpoint_digest(root / "anchor")}, seed=3)
    evaluation = {"step": 299, "benchmark": "sums", "decoding": "greedy", "n": 40, "value": 0.5, "se": 0.08}
    (opd / "evaluations.json").write_text(json.dumps([evaluation]))
    write_run_json(root / "sft", paradigm="sft", origin={"path": "../base"}, tags={"size": "tiny"})
    save_tensors(root / "sft" / "checkpoint-10", anchor)
    return root


@pytest.fixture(scope="module")
def measured(world: Path) -> Path:
    out = world / "once"
    assert geopd("measure", "origin", world / "opd", "--out", out, "--workers", "1", *SMALL).code == 0
    return out


def test_two_shards_of_a_real_model(tmp_path: Path) -> None:
    base = save_model("qwen3", tmp_path / "base", max_shard_size="30KB")
    tuned = save_model("qwen3", tmp_path / "tuned", max_shard_size="30KB")
    shards = sorted(tuned.glob("*.safetensors"))
    assert len(shards) == 2
    for shard in shards:
        save_file(moved(load_file(shard), 1e-3), shard, metadata={"format": "pt"})
    result = geopd("measure", base, tuned, "--out", tmp_path / "out", *SMALL)
    assert result.code == 0
    assert result.err == ""
    frame = pl.read_parquet(tmp_path / "out" / "measurements.parquet")
    full = frame.filter((pl.col("metric") == "stable_rank") & pl.col("is_default"))
    assert full.height == 2 * 7, "seven matrices a layer"
    assert set(full["module"]) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    entrywise = {metric for diagnostic in CATALOGUE if diagnostic.group == "entrywise" for metric in diagnostic.metrics}
    assert {"update_sparsity", "low_magnitude_overlap", "update_norm", "relative_update_norm"} <= entrywise
    assert set(frame.filter(pl.col("module") == "embedding")["metric"]) == entrywise
    embedding = (pl.col("matrix") == "embed_tokens") & pl.col("is_default")
    sparsity = frame.filter((pl.col("metric") == "update_sparsity") & embedding)
    before, after = (
        {n: t for s in path.glob("*.safetensors") for n, t in load_file(s).items()}["model.embed_tokens.weight"]
        for path in (base, tuned)
    )
    assert sparsity["value"].item() == pytest.approx(float((before == after).double().mean()))
    assert sparsity["setting"].item() == "eta=0.001;view=bf16", "two bf16 checkpoints have one view"


def test_a_run_of_five_steps(measured: Path) -> None:
    results = read_results(measured)
    frame = results.measurements
    assert sorted(frame["step"].unique()) == [63, 127, 191, 255, 299]
    key = ["run", "step", "other_run", "matrix", "metric", "setting"]
    assert frame.select(key).is_duplicated().sum() == 0
    assert frame["value"].is_nan().sum() == 0
    assert (frame["value"].is_null() == frame["status"].is_in(["undefined", "failed"])).all()
    assert frame.filter(pl.col("status") != "ok")["note"].null_count() == 0
    similarity = frame.filter((pl.col("metric") == "subspace_similarity") & (pl.col("step") == 299))
    assert similarity["value"].to_list() == pytest.approx([1.0] * similarity.height)
    norms = frame.filter((pl.col("metric") == "update_norm") & (pl.col("matrix") == "layers.0.self_attn.q_proj"))
    assert norms.sort("step")["value"].is_sorted()
    assert results.evaluations["step"].to_list() == [299]
    assert results.runs.select("run", "paradigm", "seed", "steps").rows() == [
        ("opd", "opd", 3, [63, 127, 191, 255, 299])
    ]
    vectors = results.vectors("opd", "layers.1.self_attn.q_proj")
    assert {"sigma_origin", "63/sigma", "299/sigma", "299/angles_left", "299/angles_right"} <= set(vectors)
    assert len(vectors["sigma_origin"]) == 16


def test_only_documented_files_are_left(measured: Path, world: Path) -> None:
    assert {path.name for path in measured.iterdir()} == DOCUMENTED
    parts = {path.stem for path in (measured / "parts").iterdir()}
    manifest = json.loads((measured / "manifest.json").read_text())
    assert parts == set(manifest["parts"]["opd"].values())
    assert all(path.suffix == ".parquet" for path in (measured / "parts").iterdir())
    assert {path.name for path in (measured / "vectors").iterdir()} <= {f"{name}.npz" for name in parts}
    assert {path.name for path in (world / "anchor").iterdir()} == {"model.safetensors"}, "inputs are left alone"


def test_provenance(measured: Path, world: Path) -> None:
    manifest = json.loads((measured / "manifest.json").read_text())
    entry = manifest["inputs"]["opd"]
    assert entry["origin_digest"] == checkpoint_digest(world / "anchor")
    assert entry["digests"] == [checkpoint_digest(world / "opd" / f"checkpoint-{s}") for s in entry["steps"]]
    assert manifest["settings"]["rotation_k"] == "p/4"
    assert manifest["settings"]["alpha"] == [0.5, 0.3]
    assert manifest["versions"]["torch"]
    assert manifest["geopd_version"]
    assert manifest["device"] == "cpu"
    assert manifest["threads"] == 1
    coverage = manifest["coverage"]["opd"]
    assert (coverage["matched"], coverage["skipped"], coverage["failed"]) == (6, [], [])
    for record in manifest["timing"]["opd"].values():
        assert record["seconds"] > 0
        assert record["threads"] == 1
        assert record["method"]


def test_a_second_call_does_nothing(measured: Path, world: Path) -> None:
    before = {path.name: path.read_bytes() for path in measured.glob("*.parquet")}
    stamps = {path: path.stat().st_mtime_ns for path in (measured / "parts").iterdir()}
    result = geopd("measure", "origin", world / "opd", "--out", measured, "--workers", "1", *SMALL, "--json")
    assert json.loads(result.out) == {"out": str(measured), "measured": 0, "resumed": 6, "failed": {"opd": {}}}
    assert {path.name: path.read_bytes() for path in measured.glob("*.parquet")} == before
    assert {path: path.stat().st_mtime_ns for path in (measured / "parts").iterdir()} == stamps


def test_repeats_are_bit_identical_whatever_the_workers(measured: Path, world: Path) -> None:
    again, spread = world / "again", world / "spread"
    geopd("measure", "origin", world / "opd", "--out", again, "--workers", "1", *SMALL)
    result = start_geopd("measure", "origin", world / "opd", "--out", spread, "--workers", "2", *SMALL)
    out, err = result.communicate(timeout=300)
    assert result.returncode == 0, err
    assert err == ""
    assert out.startswith("6 measured, 0 kept from before")
    same_tables(measured, again)
    same_tables(measured, spread)
    for name in ("parts", "vectors"):
        for file in (measured / name).iterdir():
            if name == "vectors":
                assert file.read_bytes() == (again / name / file.name).read_bytes()
            assert (spread / name / file.name).exists()


def test_killed_in_the_middle_and_taken_up_again(tmp_path: Path) -> None:
    weights = small_weights(layers=10, rows=160, cols=128)
    base, run = save_tensors(tmp_path / "base", weights), save_run(tmp_path / "opd", weights, [1, 2])
    command = ("measure", base, run, "--workers", "1", *SMALL)
    parts = tmp_path / "killed" / "parts"
    process = start_geopd(*command, "--out", tmp_path / "killed")
    deadline = time.monotonic() + 120
    while len(list(parts.glob("[!.]*.parquet"))) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    finished = {path: path.stat().st_mtime_ns for path in parts.glob("[!.]*.parquet")}
    assert process.returncode == -signal.SIGKILL
    assert 3 <= len(finished) < 22
    assert not (tmp_path / "killed" / "measurements.parquet").exists()
    result = json.loads(geopd(*command, "--out", tmp_path / "killed", "--json").out)
    assert (result["measured"], result["resumed"]) == (22 - len(finished), len(finished))
    assert {path: path.stat().st_mtime_ns for path in finished} == finished, "what had finished was left as it was"
    assert geopd(*command, "--out", tmp_path / "whole").code == 0
    same_tables(tmp_path / "killed", tmp_path / "whole")


def test_extending_a_run_by_a_step(tmp_path: Path) -> None:
    base = save_tensors(tmp_path / "base", small_weights())
    run = save_run(tmp_path / "opd", small_weights(), [1, 2])
    command = ("measure", base, run, *SMALL)
    assert geopd(*command, "--out", tmp_path / "out").code == 0
    save_run(tmp_path / "opd", small_weights(), [1, 2, 3])
    assert geopd(*command, "--out", tmp_path / "out").code == 0
    assert geopd(*command, "--out", tmp_path / "fresh").code == 0
    same_tables(tmp_path / "out", tmp_path / "fresh")
    for name in ("parts", "vectors"):
        assert len(list((tmp_path / "out" / name).iterdir())) == len(list((tmp_path / "fresh" / name).iterdir()))


def test_runs_of_different_origins_accumulate(world: Path, measured: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one by one", tmp_path / "together"
    for run in ("sft", "opd"):
        assert geopd("measure", "origin", world / run, "--out", one, *SMALL).code == 0
    assert geopd("measure", "origin", world / "opd", world / "sft", "--out", two, *SMALL).code == 0
    same_tables(one, two)
    runs = pl.read_parquet(one / "runs.parquet")
    assert runs["run"].to_list() == ["opd", "sft"]
    assert runs["origin"].to_list() == [str(world / "anchor"), str(world / "base")]
    assert runs["paradigm"].to_list() == ["opd", "sft"]
    assert json.loads(runs["tags"][1]) == {"size": "tiny"}
    frame = pl.read_parquet(one / "measurements.parquet")
    assert frame.filter(pl.col("run") == "opd").equals(pl.read_parquet(measured / "measurements.parquet"))
    assert set(json.loads((one / "manifest.json").read_text())["coverage"]) == {"opd", "sft"}


def test_labels_and_paradigms(world: Path, tmp_path: Path) -> None:
    result = geopd(
        *("measure", world / "base", f"mine={world / 'anchor'}", "--paradigm", "mine=mix", "--out", tmp_path, *SMALL)
    )
    assert result.code == 0
    assert pl.read_parquet(tmp_path / "runs.parquet").select("run", "paradigm").rows() == [("mine", "mix")]
    frame = pl.read_parquet(tmp_path / "measurements.parquet")
    assert frame["step"].null_count() == frame.height
    assert set(frame.filter(pl.col("metric") == "subspace_similarity")["status"]) == {"undefined"}


def test_json_is_all_that_is_printed(world: Path, tmp_path: Path) -> None:
    made = geopd("measure", world / "base", world / "anchor", "--out", tmp_path / "o", "--json")
    assert (made.code, made.err) == (0, "")
    assert json.loads(made.out)["measured"] == 6
    planned = geopd("plan", "origin", world / "opd", "--json")
    assert (planned.code, planned.err) == (0, "")
    plan = json.loads(planned.out)
    assert plan["matrices"] == 6
    assert plan["runs"]["opd"]["steps"] == [63, 127, 191, 255, 299]
    assert plan["bytes"] == 6 * sum(t.nbytes for t in small_weights().values())
    assert plan["seconds_one_worker"] > 0


def test_plan_measures_nothing_and_says_what_is_left_out(world: Path, tmp_path: Path) -> None:
    weights = small_weights()
    weights["model.layers.0.stack"] = torch.zeros(2, 2, 2)
    odd = save_tensors(tmp_path / "odd [1]", weights)
    before = sorted(world.rglob("*"))
    result = geopd("plan", world / "base", odd)
    assert result.code == 0
    assert "left out: layers.0.stack: missing in" in result.out
    assert "odd [1]: 6 tensors matched" in result.out
    assert sorted(world.rglob("*")) == before


def test_names_with_brackets_are_printed_as_they_are(tmp_path: Path) -> None:
    base = save_tensors(tmp_path / "base", small_weights())
    weights = moved(small_weights(), 1e-3)
    del weights["model.norm.weight"]
    odd = save_tensors(tmp_path / "odd [x" / "y]", weights)
    result = geopd("measure", base, f"[/b]={odd}", "--out", tmp_path / "out", "--workers", "1")
    assert result.code == 0
    assert "[/b] (other): 5 tensors matched" in result.err
    assert f"norm: missing in {odd / 'model.safetensors'}" in result.err


@pytest.mark.parametrize("command", ["measure", "plan"])
def test_help_has_an_example(command: str) -> None:
    result = geopd(command, "--help")
    assert result.code == 0
    assert f"Example: geopd {command}" in result.out


def test_the_console_script_fails_in_one_line(tmp_path: Path) -> None:
    process = start_geopd("measure", tmp_path / "absent", tmp_path / "absent", "--out", tmp_path / "out")
    out, err = process.communicate(timeout=300)
    assert (process.returncode, out) == (2, "")
    assert err == f"geopd: {tmp_path / 'absent'}: no such file or folder\n"
