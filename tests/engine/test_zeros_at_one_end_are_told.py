"""A tensor of zeros at one end of a pair alone is measured and told, at whichever end it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from checkpoints_on_disk import moved, q_name, save_tensors
from geopd.engine import MeasureOptions, measure
from geopd.engine.zeroed_blocks import WHOLE, zeroed_block

OPTIONS = MeasureOptions(metrics=("update_norm",))
K, NORM = q_name().replace("q_proj", "k_proj"), "model.norm.weight"
WEIGHTS = {
    q_name(): torch.randn(32, 32, generator=torch.Generator().manual_seed(0)),
    K: torch.randn(32, 32, generator=torch.Generator().manual_seed(1)),
    NORM: torch.ones(32),
}
UNFILLED = {name: torch.zeros_like(weight) for name, weight in WEIGHTS.items()}


def warnings_of(base: Path, run: Path, out: Path) -> list[str]:
    assert measure(base, [f"run={run}"], out, options=OPTIONS, workers=1).exit_code == 0
    told: list[str] = json.loads((out / "manifest.json").read_text())["coverage"]["run"]["warnings"]
    return told


@pytest.mark.parametrize("end", ["base", "tuned"])
def test_a_shard_that_was_never_filled_is_told_at_either_end(end: str, tmp_path: Path) -> None:
    ends = {"base": WEIGHTS, "tuned": moved(WEIGHTS, 0.1)} | {end: UNFILLED}
    paths = {name: save_tensors(tmp_path / name, tensors) for name, tensors in ends.items()}
    told = warnings_of(paths["base"], paths["tuned"], tmp_path / "out")
    other = paths["tuned" if end == "base" else "base"]
    # a norm or a bias may begin at zero
    expected = {q_name(), K} | ({NORM} if end == "tuned" else set())
    assert {warning.split(": ")[1].removeprefix("tensor ") for warning in told} == expected
    for warning in told:
        assert warning.startswith(f"{paths[end]}: tensor ")
        assert f"zeros throughout, where {other} has other values: a shard that was never filled?" in warning
        assert "Compare the file's checksum, or copy it again" in warning


def test_zeros_at_both_ends_are_told_of_nothing(tmp_path: Path) -> None:
    base, tuned = WEIGHTS | {K: UNFILLED[K]}, moved(WEIGHTS, 0.1) | {K: UNFILLED[K]}
    paths = save_tensors(tmp_path / "base", base), save_tensors(tmp_path / "tuned", tuned)
    assert warnings_of(*paths, tmp_path / "out") == []


def test_a_lost_block_at_one_end_does_not_hide_that_the_other_is_zero_throughout(tmp_path: Path) -> None:
    damaged = WEIGHTS[K].clone()
    damaged[8:16] = 0  # 1024 bytes
    paths = (
        save_tensors(tmp_path / "base", WEIGHTS | {K: damaged}),
        save_tensors(tmp_path / "tuned", moved(WEIGHTS, 0.1) | {K: UNFILLED[K]}),
    )
    (told,) = warnings_of(*paths, tmp_path / "out")
    assert told.startswith(f"{paths[1]}: tensor {K}: zeros throughout")


def test_what_a_tensor_holds_of_zeros() -> None:
    weight = torch.ones(4, 1024)
    assert zeroed_block(weight) is None
    assert zeroed_block(torch.zeros(4, 1024)) == zeroed_block(torch.zeros(3)) == WHOLE
    assert zeroed_block(torch.zeros(0)) is None
    weight[1] = 0
    assert zeroed_block(weight) == 4096
    weight[0], weight[3] = 0, 0
    assert zeroed_block(weight) is None, "made so"
