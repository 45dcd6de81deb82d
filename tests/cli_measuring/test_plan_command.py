"""``geopd plan``: coverage, number formats, warnings, cost; and what it leaves unread."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from checkpoints_on_disk import moved, q_name, save_run, save_tensors, small_weights
from command_line import geopd
from geopd.engine import Machine

EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(autouse=True)
def _short_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("geopd.engine.preflight.LONG", 0.03)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_tensors(tmp_path / "base", small_weights())


def planned(*arguments: object) -> dict[str, object]:
    result = geopd("plan", *arguments, "--json")
    assert (result.code, result.err) == (0, "")
    found: dict[str, object] = json.loads(result.out)
    return found


def test_number_formats_and_the_rounding_between_them_are_told(base: Path, tmp_path: Path) -> None:
    weights = moved(small_weights(), 1e-3)
    wide = {name: W.float() if "layers.0" in name else W for name, W in weights.items()}
    plan = planned(base, save_tensors(tmp_path / "run", wide))
    run = plan["runs"]["run"]
    assert run["dtypes"] == {"BF16 -> BF16": 4, "BF16 -> F32": 2}
    (warning,) = run["warnings"]
    assert warning.startswith("2 tensors are BF16 at the origin and F32 in")


def test_a_resized_vocabulary_is_left_out_and_told(base: Path, tmp_path: Path) -> None:
    weights = moved(small_weights(), 1e-3)
    weights[EMBEDDING] = torch.cat([weights[EMBEDDING], weights[EMBEDDING][:4]])
    run = planned(base, save_tensors(tmp_path / "run", weights))["runs"]["run"]
    assert run["warnings"] == ["the vocabulary was resized: 1 tensor(s) are not compared"]
    assert run["skipped"] == [
        {"name": "embed_tokens", "reason": "vocabulary resized from 40 to 44 rows: not compared"},
    ]


def test_nothing_changed_is_told_of_the_last_checkpoint(base: Path, tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", small_weights(), [1, 2])
    assert planned(base, run)["runs"]["run"]["warnings"] == []
    save_tensors(run / "checkpoint-2", small_weights())
    (warning,) = planned(base, run)["runs"]["run"]["warnings"]
    assert warning.startswith("nothing changed: 6 of 6 tensors were compared")


def test_what_is_not_selected_is_neither_read_nor_counted(base: Path, tmp_path: Path) -> None:
    run = save_tensors(tmp_path / "run", moved(small_weights(), 1e-3))
    plan = planned(base, run, "--matrices", "layers.0.self_attn.q_proj")
    assert plan["matrices"] == 1
    assert plan["bytes"] == 2 * small_weights()[q_name()].nbytes
    assert plan["runs"]["run"]["not_selected"] == 5


def test_the_cost_is_told_by_matrix_and_in_all(base: Path, tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", small_weights(rows=96, cols=64), [1, 2])
    base = save_tensors(tmp_path / "other base", small_weights(rows=96, cols=64))
    plan = planned(base, run, "--workers", "2")
    assert len(plan["costliest"]) == 5
    seconds = [item["seconds"] for item in plan["costliest"]]
    assert seconds == sorted(seconds, reverse=True)
    assert plan["costliest"][0]["shape"] in ([96, 64], [64, 96])
    assert sum(seconds) <= plan["seconds_one_worker"]
    assert plan["workers"] == 2
    assert plan["seconds"] == pytest.approx(max(plan["seconds_one_worker"] / 2, seconds[0]))
    assert plan["reading_seconds"] > 0
    assert plan["machine"]["flop"] > 0
    text = geopd("plan", base, run).out
    assert "run: 6 tensors matched" in text
    assert "6 tensors BF16 -> BF16" in text
    assert "of memory a worker" in text
    assert "layers.0.mlp.down_proj (64 x 96): " in text


def test_draws_of_nulls_are_in_the_price(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = save_tensors(tmp_path / "run", moved(small_weights(), 1e-3))
    monkeypatch.setattr("geopd.engine.preflight.probe", lambda *_: Machine(1e9, 1e9))
    plain, drawn = (planned(base, run, "--nulls", count)["seconds_one_worker"] for count in (0, 3))
    assert drawn == pytest.approx((1 + 2 * 3) * plain), "each draw is a Gaussian and a permuted update"
