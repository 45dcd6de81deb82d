"""A run: ordered steps, what made them, and every way in which that can be wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from checkpoints_on_disk import save_run, save_tensors, small_weights, write_run_json
from geopd.checkpoints import (
    CheckpointError,
    Origin,
    RunManifest,
    open_run,
    read_run_manifest,
    step_of,
    write_run_manifest,
)

EVALUATION = {"step": 2, "benchmark": "sums", "decoding": "greedy", "n": 10, "value": 0.5, "se": 0.1}


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("checkpoint-63", 63),
        ("global_step_255", 255),
        ("iter_0005375", 5375),
        ("step0", 0),
        ("step-10", 10),
        ("checkpoint-63-merged", None),
        ("checkpoint", None),
        ("final", None),
        ("my-step-3", None),
    ],
)
def test_steps_in_folder_names(name: str, step: int | None) -> None:
    assert step_of(name) == step


def test_steps_are_ordered_by_number(tmp_path: Path) -> None:
    run = open_run(save_run(tmp_path / "opd", small_weights(), [200, 9, 63]))
    assert run.label == "opd"
    assert [step for step, _ in run.checkpoints] == [9, 63, 200]
    assert [path.name for _, path in run.checkpoints] == ["checkpoint-9", "checkpoint-63", "checkpoint-200"]
    assert open_run(tmp_path / "opd", "mine").label == "mine"


def test_one_checkpoint_is_a_run(tmp_path: Path) -> None:
    alone = open_run(save_tensors(tmp_path / "tuned", small_weights()))
    assert (alone.label, alone.checkpoints) == ("tuned", ((None, tmp_path / "tuned"),))
    save_run(tmp_path / "opd", small_weights(), [5, 7])
    write_run_json(tmp_path / "opd", seed=4)
    one = open_run(tmp_path / "opd" / "checkpoint-7")
    assert (one.label, one.checkpoints[0][0]) == ("opd", 7)
    assert one.manifest is not None
    assert one.manifest.seed == 4


def test_empty_step_folders_are_left_out_with_a_warning(tmp_path: Path) -> None:
    path = save_run(tmp_path / "opd", small_weights(), [1])
    (path / "checkpoint-2").mkdir()
    (path / "checkpoint-3").mkdir()
    (path / "checkpoint-3" / "trainer_state.json").write_text("{}")
    run = open_run(path)
    assert [step for step, _ in run.checkpoints] == [1]
    assert len(run.warnings) == 2
    assert "checkpoint-2: no weights in it (a save cut short?): left out" in run.warnings[0]


def test_only_empty_step_folders(tmp_path: Path) -> None:
    (tmp_path / "opd" / "checkpoint-2").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="none of its 1 step folders holds weights"):
        open_run(tmp_path / "opd")


def test_two_folders_of_one_step(tmp_path: Path) -> None:
    path = save_run(tmp_path / "opd", small_weights(), [5])
    save_tensors(path / "global_step_5", small_weights())
    with pytest.raises(CheckpointError, match=r"checkpoint-5 and global_step_5 both carry step 5; remove one"):
        open_run(path)


def test_weights_beside_step_folders_are_told(tmp_path: Path) -> None:
    path = save_run(tmp_path / "opd", small_weights(), [5])
    save_tensors(path, small_weights())
    run = open_run(path)
    assert [step for step, _ in run.checkpoints] == [5]
    assert "the step folders are the run" in run.warnings[0]


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file or folder"):
        open_run(tmp_path / "absent")


def test_manifest_round_trip(tmp_path: Path) -> None:
    manifest = RunManifest("rlvr", 3, Origin("../anchor", "abc"), {"lr": 1e-6}, {"size": "tiny"})
    write_run_manifest(tmp_path, manifest)
    assert read_run_manifest(tmp_path) == manifest
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_origin_is_relative_to_the_run(tmp_path: Path) -> None:
    path = save_run(tmp_path / "runs" / "opd", small_weights(), [5])
    write_run_json(path, origin={"path": "../../anchor", "digest": None})
    assert open_run(path).origin_path() == tmp_path / "anchor"
    assert open_run(path / "checkpoint-5").origin_path() == tmp_path / "anchor"
    write_run_json(path, origin={"path": str(tmp_path / "elsewhere")})
    assert open_run(path).origin_path() == tmp_path / "elsewhere"


@pytest.mark.parametrize("written", [False, True])
def test_a_run_that_does_not_say_its_origin(tmp_path: Path, written: bool) -> None:
    path = save_run(tmp_path / "opd", small_weights(), [5])
    if written:
        write_run_json(path)
    with pytest.raises(CheckpointError, match=r"no origin in run\.json; name the base checkpoint instead"):
        open_run(path).origin_path()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schema_version": 2}, "schema_version 2, this version reads 1"),
        ({"schema_version": ...}, "schema_version None"),
        ({"paradigm": 3}, "wrong type"),
        ({"paradigm": ...}, "paradigm"),
        ({"seed": "one"}, "wrong type"),
        ({"seed": 1.5}, "wrong type"),
        ({"tags": []}, "wrong type"),
        ({"settings": "fast"}, "wrong type"),
        ({"origin": "base"}, "RunManifest for the fields"),
        ({"origin": {"path": 3}}, "wrong type"),
        ({"origin": {"digest": "abc"}}, "RunManifest for the fields"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_run_json_that_does_not_follow_the_schema(tmp_path: Path, fields: dict[str, object], message: str) -> None:
    write_run_json(tmp_path, **fields)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_run_manifest(tmp_path)
    assert str(tmp_path / "run.json") in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[1]", '"opd"', "\udcff"])
def test_run_json_that_is_no_object(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=r"run\.json: (not readable as JSON|holds (list|str), not a JSON object)"):
        read_run_manifest(tmp_path)


def test_evaluations(tmp_path: Path) -> None:
    path = save_run(tmp_path / "opd", small_weights(), [2])
    (path / "evaluations.json").write_text(json.dumps([EVALUATION]))
    assert open_run(path).evaluations == (EVALUATION,)


@pytest.mark.parametrize(
    "value",
    [
        "{",
        {"step": 2},
        3,
        None,
        [3],
        [{k: v for k, v in EVALUATION.items() if k != "se"}],
        [EVALUATION | {"extra": 1}],
        [EVALUATION | {"step": "last"}],
        [EVALUATION | {"value": None}],
        [EVALUATION | {"value": float("nan")}],
    ],
)
def test_evaluations_that_do_not_follow_the_schema(tmp_path: Path, value: object) -> None:
    path = save_run(tmp_path / "opd", small_weights(), [2])
    (path / "evaluations.json").write_text(value if isinstance(value, str) else json.dumps(value))
    with pytest.raises(
        CheckpointError, match=r"evaluations\.json: not (a list of evaluations with step, benchmark|readable as JSON)"
    ):
        open_run(path)
