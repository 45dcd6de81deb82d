"""``--per-head``: every head of an attention matrix measured as the matrix it is."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest
import torch
from torch import Tensor

from checkpoints_on_disk import moved, save_tensors
from command_line import geopd

SMALL = ("--rotation-k", "p/4", "--principal-rank", "p/4", "--similarity-k", "2", "--hill-k", "4", "--workers", "1")
H, K, D, N = 4, 2, 6, 20
CONFIG = {"num_attention_heads": H, "num_key_value_heads": K}
HOME = "model.layers.0."


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"q": (H * D, N), "k": (K * D, N), "v": (K * D, N), "o": (N, H * D)}
    found = {f"{HOME}self_attn.{what}_proj.weight": torch.randn(*s, generator=generator) for what, s in shapes.items()}
    return found | {f"{HOME}mlp.down_proj.weight": torch.randn(N, 8, generator=generator)}


def cut(whole: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same with every head a tensor of its own."""
    found = {f"{HOME}mlp.down_proj.weight": whole[f"{HOME}mlp.down_proj.weight"]}
    for what, count in (("q", H), ("k", K), ("v", K), ("o", H)):
        stem = f"{HOME}self_attn.{what}_proj"
        parts = whole[f"{stem}.weight"].chunk(count, dim=1 if what == "o" else 0)
        found |= {f"{stem}.heads.{head}.weight": part for head, part in enumerate(parts)}
    return found


@pytest.fixture
def ends(tmp_path: Path) -> tuple[Path, Path]:
    after = weights()
    return save_tensors(tmp_path / "base", moved(after, 1e-3), CONFIG), save_tensors(tmp_path / "tuned", after, CONFIG)


def test_heads_give_the_tables_of_tensors_that_are_heads(ends: tuple[Path, Path], tmp_path: Path) -> None:
    base = save_tensors(tmp_path / "cut_base", cut(moved(weights(), 1e-3)))
    tuned = save_tensors(tmp_path / "cut_tuned", cut(weights()))
    assert geopd("measure", base, f"tuned={tuned}", "--out", tmp_path / "expected", *SMALL).code == 0
    assert geopd("measure", *ends, "--per-head", "--out", tmp_path / "out", *SMALL).code == 0
    for name in ("measurements", "nulls"):
        found = pl.read_parquet(tmp_path / "out" / f"{name}.parquet")
        assert found.equals(pl.read_parquet(tmp_path / "expected" / f"{name}.parquet"))
        assert found["matrix"].n_unique() == 2 * H + 2 * K + 1


def test_a_folder_holds_heads_or_whole_matrices_and_older_folders_hold_whole_ones(
    ends: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert geopd("measure", *ends, "--out", out, *SMALL).code == 0
    manifest = out / "manifest.json"
    written = json.loads(manifest.read_text())
    assert written["settings"].pop("per_head") is False
    manifest.write_text(json.dumps(written))  # as it was before there was the option
    again = geopd("measure", *ends, "--out", out, *SMALL, "--json")
    assert json.loads(again.out)["measured"] == 0
    complaint = geopd("measure", *ends, "--per-head", "--out", out, *SMALL).complaint()
    assert "was measured with per_head = False, not True; use the same settings, or another --out" in complaint


def test_without_head_counts_attention_stays_whole_and_that_is_told(tmp_path: Path) -> None:
    ends = [save_tensors(tmp_path / name, W) for name, W in (("base", moved(weights(), 1e-3)), ("tuned", weights()))]
    run = json.loads(geopd("plan", *ends, "--per-head", "--json").out)["runs"]["tuned"]
    assert run["matched"] == 5
    assert any("_proj.weight and 3 more: left whole: config.json says no head counts" in w for w in run["warnings"])
