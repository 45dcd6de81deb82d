"""Shards: disjoint, complete and even shares; merged they are bit for bit the unsharded folder; misfits are refused."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from checkpoints_on_disk import moved, q_name, save_run, save_tensors, small_weights, write_run_json
from geopd.checkpoints import checkpoint_digest
from geopd.engine import MeasureOptions, make_plan, measure, task_cost
from geopd.engine.merging import merge
from geopd.engine.shards import Shard
from geopd.results import read_results
from geopd.results.task_log import read_log

OPTIONS = MeasureOptions(rotation_k="p/4", principal_rank="p/4", similarity_k=(2,), hill_k=(4,))
TABLES = ("measurements", "nulls", "runs", "evaluations")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs from an anchor, one from the base before it, and an evaluation."""
    root = tmp_path_factory.mktemp("world")
    anchor = moved(small_weights(), 2e-3, seed=5)
    save_tensors(root / "base", small_weights())
    save_tensors(root / "anchor", anchor)
    for name, seed, steps in (("opd", 1, [1, 2]), ("rlvr", 9, [1])):
        run = save_run(root / name, anchor, steps, seed=seed)
        write_run_json(run, paradigm=name, origin={"path": "../anchor", "digest": checkpoint_digest(root / "anchor")})
    evaluation = {"step": 2, "benchmark": "sums", "decoding": "greedy", "n": 40, "value": 0.5, "se": 0.08}
    (root / "opd" / "evaluations.json").write_text(json.dumps([evaluation]))
    write_run_json(root / "sft", paradigm="sft", origin={"path": "../base"})
    save_tensors(root / "sft" / "checkpoint-10", anchor)
    return root


def runs(world: Path) -> list[Path]:
    return [world / name for name in ("opd", "rlvr", "sft")]


@pytest.fixture(scope="module")
def whole(world: Path) -> Path:
    """Measured at once."""
    measure("origin", runs(world), world / "whole", options=OPTIONS)
    return world / "whole"


@pytest.fixture(scope="module")
def halves(world: Path) -> Path:
    """Measured in two shards under one folder; copy it, do not write into it."""
    for number in (1, 2):
        measure("origin", runs(world), world / "halves", options=OPTIONS, shard=Shard(number, 2))
    return world / "halves"


@pytest.fixture
def spread(halves: Path, tmp_path: Path) -> Path:
    return shutil.copytree(halves, tmp_path / "spread")


def same_folders(here: Path, there: Path) -> None:
    for name in TABLES:
        assert (here / f"{name}.parquet").read_bytes() == (there / f"{name}.parquet").read_bytes(), name
    vectors = sorted(path.name for path in (here / "vectors").iterdir())
    assert vectors == sorted(path.name for path in (there / "vectors").iterdir())
    assert vectors
    for name in vectors:
        assert (here / "vectors" / name).read_bytes() == (there / "vectors" / name).read_bytes()
    parts = [sorted(path.name for path in (folder / "parts").iterdir()) for folder in (here, there)]
    assert parts[0] == parts[1]
    manifests = [json.loads((folder / "manifest.json").read_text()) for folder in (here, there)]
    timings = [manifest.pop("timing") for manifest in manifests]
    for manifest in manifests:
        del manifest["estimate"]
    assert manifests[0] == manifests[1]
    one, other = ({(label, name) for label, names in timing.items() for name in names} for timing in timings)
    assert one == other


@pytest.mark.parametrize("of", [1, 2, 3, 5, 40])
def test_shares_are_disjoint_complete_and_even(world: Path, of: int) -> None:
    plan = make_plan("origin", runs(world), OPTIONS)
    shares = [Shard(number, of).share_of(plan) for number in range(1, of + 1)]
    again = [Shard(number, of).share_of(make_plan("origin", runs(world)[::-1], OPTIONS)) for number in range(1, of + 1)]
    items = [{(run.run.label, name) for run in share.runs for name in run.pairs} for share in shares]
    assert items == [{(run.run.label, name) for run in share.runs for name in run.pairs} for share in again]
    assert all(not one & other for one, other in combinations(items, 2))
    assert set().union(*items) == {(run.run.label, name) for run in plan.runs for name in run.pairs}
    assert set().union(*(share.tensors() for share in shares)) == set(plan.tensors())
    costs = [sum(map(task_cost, share.all_tasks())) for share in shares]
    assert max(costs) - min(costs) <= max(map(task_cost, plan.all_tasks()))
    assert [run.run.label for share in shares for run in share.runs] == [run.run.label for run in plan.runs] * of


def test_runs_that_are_compared_stay_in_one_shard(world: Path) -> None:
    plan = make_plan("origin", runs(world), OPTIONS)
    shares = [Shard(number, 3).share_of(plan) for number in (1, 2, 3)]
    pairs = sorted(task.weight.name for share in shares for task in share.all_tasks() for _ in task.pairs)
    assert pairs == sorted(task.weight.name for task in plan.all_tasks() for _ in task.pairs)
    assert pairs


def test_a_shard_reads_its_own_tensors_alone(world: Path) -> None:
    plan = make_plan("origin", runs(world), OPTIONS)
    sizes = [sum(Shard(number, 2).share_of(plan).tensors().values()) for number in (1, 2)]
    assert sum(sizes) == sum(plan.tensors().values())


@pytest.mark.parametrize("of", [1, 3, 20])
def test_merged_shards_are_bit_for_bit_the_unsharded_folder(world: Path, whole: Path, tmp_path: Path, of: int) -> None:
    for number in range(1, of + 1):
        measure("origin", runs(world), tmp_path / f"job{number}", options=OPTIONS, shard=Shard(number, of))
    outcome = merge(tmp_path / "out", [tmp_path / f"job{number}" for number in range(1, of + 1)])
    assert (outcome.shards, outcome.exit_code, outcome.notes) == (of, 0, ())
    assert outcome.matrices == 3 * 6
    same_folders(tmp_path / "out", whole)


def test_shards_of_one_folder_merge_in_place_and_again(spread: Path, whole: Path) -> None:
    for _ in range(2):
        assert merge(spread).matrices == 3 * 6
        same_folders(spread, whole)
        assert len(read_log(spread)) == len(read_log(whole))


def test_a_merged_folder_is_a_results_folder_like_any(world: Path, spread: Path) -> None:
    merge(spread)
    again = measure("origin", runs(world), spread, options=OPTIONS)
    assert (again.measured, again.resumed) == (0, 3 * 6)
    assert set(read_results(spread).measurements["run"]) == {"opd", "rlvr", "sft"}


def test_shards_are_merged_beside_what_a_folder_holds(world: Path, tmp_path: Path) -> None:
    measure("origin", [world / "sft"], tmp_path / "out", options=OPTIONS)
    for number in (1, 2):
        measure("origin", [world / "opd"], tmp_path / "out", options=OPTIONS, shard=Shard(number, 2))
    merge(tmp_path / "out")
    measure("origin", [world / "sft"], tmp_path / "two", options=OPTIONS)
    measure("origin", [world / "opd"], tmp_path / "two", options=OPTIONS)
    same_folders(tmp_path / "out", tmp_path / "two")


def test_a_shard_is_a_results_folder_of_its_own(halves: Path) -> None:
    found = [read_results(halves / "shards" / f"{number}-of-2").measurements for number in (1, 2)]
    names = [set(frame.select("run", "matrix").unique().rows()) for frame in found]
    assert names[0] & names[1] == set()
    assert len(names[0] | names[1]) == 3 * 6


def test_a_shard_resumes(world: Path, spread: Path) -> None:
    again = measure("origin", runs(world), spread, options=OPTIONS, shard=Shard(1, 2))
    assert again.measured == 0
    assert again.resumed > 0
    merge(spread)


def test_a_failed_matrix_is_told_of_by_its_shard_alone_and_by_the_merge(tmp_path: Path) -> None:
    broken = moved(small_weights(), 1e-3)
    broken[q_name()][0, 0] = float("nan")
    base, tuned = save_tensors(tmp_path / "base", small_weights()), save_tensors(tmp_path / "tuned", broken)
    codes = [
        measure(base, [tuned], tmp_path / "out", options=OPTIONS, shard=Shard(number, 2)).exit_code for number in (1, 2)
    ]
    assert sorted(codes) == [0, 1]
    outcome = merge(tmp_path / "out")
    expected = measure(base, [tuned], tmp_path / "whole", options=OPTIONS)
    assert (outcome.exit_code, outcome.failed) == (1, expected.failed)
    same_folders(tmp_path / "out", tmp_path / "whole")


def test_an_origin_that_is_not_the_recorded_one_is_refused_by_every_shard(world: Path, tmp_path: Path) -> None:
    run = save_run(tmp_path / "opd", small_weights(), [1])
    write_run_json(run, origin={"path": str(world / "anchor"), "digest": checkpoint_digest(world / "base")})
    for number in (1, 2):
        with pytest.raises(ValueError, match="not the checkpoint that opd started from"):
            measure("origin", [run], tmp_path / "out", options=OPTIONS, shard=Shard(number, 2))


def test_other_machines_are_noted(spread: Path) -> None:
    rewrite(spread / "shards" / "2-of-2" / "shard.json", lambda record: record["machine"].append("another"))
    assert "2 kinds of machine" in merge(spread).notes[0]


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def of_second(change: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda root: change(root / "shards" / "2-of-2")


def in_record(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    return of_second(lambda folder: rewrite(folder / "shard.json", change))


def in_manifest(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    return of_second(lambda folder: rewrite(folder / "manifest.json", change))


def first_file(record: dict[str, Any]) -> list[Any]:
    return next(iter(record["files"].values()))[0]


def take_over(root: Path) -> None:
    """The second shard claims a matrix of the first."""
    one, two = (root / "shards" / f"{number}-of-2" / "manifest.json" for number in (1, 2))
    name, key = next(iter(json.loads(one.read_text())["parts"]["opd"].items()))
    rewrite(two, lambda manifest: manifest["parts"]["opd"].update({name: key}))


def read_another(root: Path) -> None:
    """Both shards read one tensor, and it was another for the second."""
    one, two = (root / "shards" / f"{number}-of-2" / "shard.json" for number in (1, 2))
    path, tensors = next(iter(json.loads(one.read_text())["digests"].items()))
    rewrite(two, lambda record: record["digests"].setdefault(path, {}).update({next(iter(tensors)): "0" * 32}))


def lose_a_part(folder: Path) -> None:
    next(iter((folder / "parts").glob("*.parquet"))).unlink()


MISFITS = {
    "a missing shard": (of_second(shutil.rmtree), r"shard 2/2 missing: run the same `geopd measure` with --shard 2/2"),
    "an unfinished shard": (of_second(lambda f: (f / "shard.json").unlink()), r"2-of-2: this shard is not finished"),
    "a shard cut short": (of_second(lambda f: (f / "shard.json").write_text("{")), r"shard.json: not readable"),
    "twins": (lambda r: shutil.copytree(r / "shards" / "2-of-2", r / "shards" / "3-of-2"), "are both shard 2/2"),
    "another spread": (in_record(lambda r: r.update(of=3)), "one of 2 shards and one of 3; name those of one spread"),
    "another version": (in_record(lambda r: r.update(numerics=0)), "versions of geopd whose numbers differ"),
    "another schema": (in_record(lambda r: r.update(schema_version=9)), "schema_version 9, this version reads 1"),
    "other settings": (in_manifest(lambda m: m["settings"].update(eta=0.5)), r"other settings: eta = 0.001 and 0.5"),
    "other runs": (in_manifest(lambda m: m["inputs"].pop("sft")), "other inputs: runs opd, rlvr, sft and opd, rlvr"),
    "other steps": (in_manifest(lambda m: m["inputs"]["opd"].update(steps=[7])), r"steps of opd: \[1, 2\] and \[7\]"),
    "changed files": (in_record(lambda r: first_file(r).__setitem__(2, 1)), "differ in size or time"),
    "a changed tensor": (read_another, "changed between them; measure again"),
    "a matrix in both": (take_over, r"of opd is in both .*1-of-2 and .*2-of-2"),
    "a matrix in none": (in_manifest(lambda m: m["parts"]["opd"].popitem()), "the shards hold 5 of 6 matrices of opd"),
    "a tensor read by none": (in_record(lambda r: r["digests"].popitem()), r"the shards read \d+ of \d+ tensors"),
    "a part that is gone": (of_second(lose_a_part), r"2-of-2: part .*parquet is gone; run the shard's command again"),
}


@pytest.mark.parametrize("what", MISFITS)
def test_what_does_not_fit_together_is_refused_by_name(spread: Path, what: str) -> None:
    change, message = MISFITS[what]
    change(spread)
    with pytest.raises(ValueError, match=message):
        merge(spread)
    assert not (spread / "measurements.parquet").exists()


def test_shards_of_checkpoints_that_changed_between_them_are_refused(tmp_path: Path) -> None:
    base = save_tensors(tmp_path / "base", small_weights())
    tuned = save_tensors(tmp_path / "tuned", moved(small_weights(), 1e-3))
    measure(base, [tuned], tmp_path / "out", options=OPTIONS, shard=Shard(1, 2))
    save_tensors(tuned, moved(small_weights(), 2e-3))
    measure(base, [tuned], tmp_path / "out", options=OPTIONS, shard=Shard(2, 2))
    with pytest.raises(ValueError, match=r"the files of .*tuned.* differ in size or time"):
        merge(tmp_path / "out")


def test_an_interrupted_repeat_of_a_shard_is_not_taken_for_finished(
    world: Path, spread: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["geopd.engine.measure"], "_digest", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure("origin", runs(world), spread, options=OPTIONS, shard=Shard(2, 2))
    with pytest.raises(ValueError, match="2-of-2: this shard is not finished"):
        merge(spread)


def test_a_folder_of_other_settings_or_inputs_takes_no_shards(world: Path, spread: Path, tmp_path: Path) -> None:
    measure("origin", [world / "sft"], tmp_path / "out", options=MeasureOptions(eta=0.5))
    with pytest.raises(ValueError, match=r"was measured with .* = .*, the shards with"):
        merge(tmp_path / "out", [spread])
    other = save_run(tmp_path / "opd", small_weights(), [1, 2], seed=3)
    measure(world / "base", [other], tmp_path / "label", options=OPTIONS)
    with pytest.raises(ValueError, match="already holds a run labelled opd with other inputs"):
        merge(tmp_path / "label", [spread])


def test_a_folder_without_shards_is_named(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{whole}: holds no shard; name what `geopd measure --shard` was given"):
        merge(tmp_path, [whole])


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "1/", "/2", "-1/2", "1/2/3"])
def test_a_shard_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="give i/n with 1 <= i <= n"):
        Shard.parse(text)


def test_parts_are_copied_where_they_cannot_be_linked(
    spread: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    merge(tmp_path / "out", [spread])
    shutil.rmtree(spread)
    same_folders(tmp_path / "out", whole)
