"""``geopd basis`` as a user types it: what is written, printed and refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from checkpoints_on_disk import q_name, save_run, save_tensors, small_weights, write_run_json
from command_line import geopd
from geopd.training.basis import read_basis


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    save_tensors(root / "anchor", small_weights())
    write_run_json(save_run(root / "opd", small_weights(), [63, 127]), origin={"path": "../anchor"})
    return root


def test_the_basis_of_a_step_is_written_and_summed_up(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "opd_63.safetensors"
    result = geopd("basis", "origin", world / "opd", "--step", 63, "--k", 4, "--out", out)
    assert (result.code, result.err) == (0, "")
    assert f"update basis of 4 matrices at step 63, K = 4 -> {out}" in result.out
    assert "share of the update's energy inside: mean 0." in result.out
    basis = read_basis(out)
    assert {V.shape[1] for V in basis.vectors.values()} == {4}
    assert basis.provenance.tuned == str(world / "opd" / "checkpoint-63")


def test_json_names_every_matrix_and_what_was_left_out(world: Path, tmp_path: Path) -> None:
    weights = small_weights()
    weights[q_name()] += 0.5
    save_tensors(tmp_path / "tuned", weights)
    result = geopd("basis", world / "anchor", tmp_path / "tuned", "--out", tmp_path / "b.safetensors", "--json")
    assert (result.code, result.err) == (0, "")
    said = json.loads(result.out)
    assert set(said["matrices"]) == {"layers.0.self_attn.q_proj"}
    assert (said["kind"], said["k"], said["step"]) == ("update", 16, None)
    assert said["matrices"]["layers.0.self_attn.q_proj"]["energy_share"] == pytest.approx(1.0)
    assert said["left_out"]["layers.1.mlp.down_proj"] == "did not move"


def test_fewer_columns_and_what_was_left_out_are_said(world: Path, tmp_path: Path) -> None:
    weights = {name: tensor.double() for name, tensor in small_weights().items()}
    save_tensors(tmp_path / "base", weights)
    row = torch.zeros_like(weights[q_name()])
    row[0] = 1.0
    save_tensors(tmp_path / "tuned", weights | {q_name(): weights[q_name()] + row})
    result = geopd("basis", tmp_path / "base", tmp_path / "tuned", "--out", tmp_path / "b.safetensors", "--k", 2)
    assert "fewer columns: layers.0.self_attn.q_proj: 1, the rank of its update" in result.out
    assert "left out: layers.1.mlp.down_proj: did not move; training leaves it as it is" in result.out


def test_a_folder_for_a_file_is_refused_before_the_work(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import geopd.training.bases_of_runs as working

    def never(*_: object, **__: object) -> None:
        raise AssertionError("worked before it looked where to write")

    monkeypatch.setattr(working, "basis_of_run", never)
    assert "a folder; name the file" in geopd("basis", "origin", world / "opd", "--out", tmp_path).complaint()
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["random", "origin", "mask"])
def test_controls_and_masks(kind: str, world: Path, tmp_path: Path) -> None:
    out = tmp_path / "b.safetensors"
    assert geopd("basis", "origin", world / "opd", "--kind", kind, "--k", 4, "--out", out, "--seed", 7).code == 0
    basis = read_basis(out)
    assert basis.provenance.kind == kind
    assert basis.is_mask == (kind == "mask")
    assert basis.provenance.seed == (7 if kind == "random" else None)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("--step", 64), "--step 64"),
        (("--kind", "best"), "--kind best"),
        (("--matrices", "vision*"), "selects none"),
    ],
)
def test_unusable_options_are_one_line(arguments: tuple[object, ...], match: str, world: Path, tmp_path: Path) -> None:
    out = tmp_path / "b.safetensors"
    assert match in geopd("basis", "origin", world / "opd", "--out", out, *arguments).complaint()
    assert not out.exists()
