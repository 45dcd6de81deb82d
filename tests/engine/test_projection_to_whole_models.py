"""The arithmetic of `benchmarks/scale.py`: from seconds of a few shapes to core-hours of a whole model."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from large_checkpoints import MODELS, Model, write
from scale import by_shape, core_hours, cost_of, projected

from geopd.checkpoints import open_checkpoint

TINY = Model(layers=3, hidden=16, intermediate=48, queries=32, keys=8)


def test_the_public_shapes_have_the_published_numbers_of_parameters() -> None:
    """Of the layers' matrices: the model cards' totals without embeddings; biases and norms are next to nothing."""
    published = {"Qwen3-8B": 6.95e9, "Qwen3-32B": 31.2e9, "Qwen3-235B-A22B": 234e9}
    for name, model in MODELS.items():
        assert sum(rows * cols * count for (rows, cols), count in model.shapes().items()) == pytest.approx(
            published[name], rel=0.01
        )
    assert sum(MODELS["Qwen3-8B"].shapes().values()) == 252


def test_a_measured_shape_counts_what_it_took_and_another_is_scaled_from_the_nearest_in_cost() -> None:
    cost = {(2, 2): 1.0, (4, 4): 10.0, (3, 3): 8.0, (9, 9): 1000.0}.__getitem__
    seconds = {(2, 2): 5.0, (4, 4): 20.0}
    assert projected({(2, 2): 3}, seconds, cost) == 15.0
    assert projected({(3, 3): 2}, seconds, cost) == pytest.approx(2 * 20.0 * 8.0 / 10.0)
    assert projected({(9, 9): 1, (2, 2): 1}, seconds, cost) == pytest.approx(20.0 * 100.0 + 5.0)


def test_of_seconds_that_follow_the_cost_model_the_projection_is_the_cost_model_itself() -> None:
    one, two = cost_of(1), cost_of(2)
    first = {shape: 3 * one(shape) for shape in ((32, 16), (8, 16))}
    further = {shape: 3 * (two(shape) - one(shape)) for shape in first}
    hours = core_hours(TINY, first, further)
    shapes = TINY.shapes()
    assert hours["first"] * 3600 == pytest.approx(3 * sum(count * one(shape) for shape, count in shapes.items()))
    assert hours["further"] * 3600 == pytest.approx(
        3 * sum(count * (two(shape) - one(shape)) for shape, count in shapes.items())
    )
    assert core_hours(TINY, first, {}).keys() == {"first"}


def test_seconds_by_shape_are_means() -> None:
    lines = [{"rows": 2, "cols": 3, "cpu_seconds": 1.0}, {"rows": 2, "cols": 3, "cpu_seconds": 2.0}]
    assert by_shape({"lines": [*lines, {"rows": 1, "cols": 1, "cpu_seconds": 7.0}]}) == {(2, 3): 1.5, (1, 1): 7.0}


def test_what_is_written_has_every_matrix_once_and_moves_step_by_step(tmp_path: Path) -> None:
    base, run = write(tmp_path, TINY, layers=2, checkpoints=2)
    steps = [open_checkpoint(path) for path in (base, run / "checkpoint-100", run / "checkpoint-200")]
    shapes = [info.shape for info in steps[0].tensors.values()]
    assert {shape: shapes.count(shape) for shape in shapes} == {k: 2 * v // 3 for k, v in TINY.shapes().items()}
    for name in steps[0].tensors:
        origin, *tuned = (step.read(name) for step in steps)
        assert origin.dtype == torch.bfloat16
        moved = [float(torch.linalg.vector_norm(after.double() - origin.double())) for after in tuned]
        assert 0 < moved[0] < moved[1] < 0.1 * float(torch.linalg.vector_norm(origin.double()))
