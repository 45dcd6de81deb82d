"""Sweeps of what counts as visible, and what saving in bf16 would lose, against plain loops and planted changes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from brute_force import bf16_steps
from geopd.diagnostics import Comparison, OriginMatrix, Parameters
from geopd.diagnostics.sparsity import measure, measure_lost, nulls_lost, steps_between
from geopd.results import Measurement, Status
from prescribed import normal

PARAMETERS = Parameters()
finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
bounded = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


def compare(before: Tensor, after: Tensor, parameters: Parameters = PARAMETERS) -> Comparison:
    return Comparison(OriginMatrix(before, parameters), after)


def values(before: Tensor, after: Tensor, parameters: Parameters = PARAMETERS) -> dict[str, float | None]:
    return {item.setting: item.value for item in measure(compare(before, after, parameters))}


@bounded
@given(a=finite, b=finite)
def test_steps_between_two_numbers(a: float, b: float) -> None:
    one, other = (torch.tensor([x], dtype=torch.float32).bfloat16() for x in (a, b))
    if torch.isfinite(one).all() and torch.isfinite(other).all():
        expected = bf16_steps(float(one), float(other)) * (1 if float(other) >= float(one) else -1)
        for found, steps in ((steps_between(one, other), expected), (steps_between(other, one), -expected)):
            assert (int(found) - steps) % 65536 == 0
            assert abs(steps) <= 32767 or abs(int(found)) >= 256, "never taken for a small step"


def test_steps_cross_zero_and_octaves() -> None:
    tiny = 2.0**-133  # the smallest bf16 number
    a = torch.tensor([0.0, tiny, 1.0, 1.0, -2.0, 3.3895313892515355e38], dtype=torch.bfloat16)
    b = torch.tensor(
        [-0.0, -tiny, 1 + 2.0**-7, 1 - 2.0**-8, -2 + 2.0**-7, -3.3895313892515355e38], dtype=torch.bfloat16
    )
    assert steps_between(a, b).tolist() == [0, -2, 1, -1, 1, 65536 - 2 * 0x7F7F]


def test_planted_steps_are_counted() -> None:
    before = torch.full((4, 5), 1.5).bfloat16()
    after = before.clone()
    for i, steps in enumerate((1, 1, 2, 3, 4, 7)):
        after.view(-1)[i] += steps * 2.0**-7
    found = values(before, after)
    assert found == {
        "eta=0.001;view=bf16": pytest.approx(14 / 20),
        "min_ulp=1;view=bf16": pytest.approx(14 / 20),
        "min_ulp=2;view=bf16": pytest.approx(16 / 20),
        "min_ulp=4;view=bf16": pytest.approx(18 / 20),
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_one_step_is_the_headline(dtype: torch.dtype) -> None:
    before = (0.02 * normal(1, 60, 50)).to(dtype)
    found = values(before, (before.double() + 1e-4 * normal(2, 60, 50)).to(dtype))
    assert found["min_ulp=1;view=bf16"] == found["eta=0.001;view=bf16"]
    assert 0 < (found["min_ulp=1;view=bf16"] or 0) < (found["min_ulp=2;view=bf16"] or 0) < 1


def test_sweeps_larger_than_one_block() -> None:
    before = (0.02 * normal(1, 300, 1000)).float()
    after = before + 1e-4 * normal(2, 300, 1000).float()
    found = values(before, after)
    ends = zip(before.bfloat16().view(-1).tolist(), after.bfloat16().view(-1).tolist(), strict=True)
    far = sum(bf16_steps(a, b) >= 4 for a, b in ends)
    assert found["min_ulp=4;view=bf16"] == 1 - far / before.numel()
    relative = (after.double() - before.double()).abs() / torch.maximum(before.abs(), after.abs()).double()
    assert found["eta=0.01;view=native"] == pytest.approx(float((relative <= 1e-2).double().mean()), abs=2e-6)


@pytest.mark.parametrize("eta", [1e-2, 1e-3, 0.05])
def test_the_eta_asked_is_given_once(eta: float) -> None:
    before = normal(1, 6, 5).float()
    rows = measure(compare(before, before * 1.005, Parameters(eta=eta)))
    names = [row.setting for row in rows]
    assert len(names) == len(set(names))
    assert {f"eta={x};view=native" for x in (1e-4, 1e-3, 1e-2, eta)} == {n for n in names if "native" in n}
    assert [row.setting for row in rows if row.is_default] == [f"eta={eta};view=bf16"]


def lost(before: Tensor, after: Tensor) -> Measurement:
    (item,) = measure_lost(compare(before, after))
    assert (item.metric, item.setting) == ("sub_ulp_share", "view=native")
    assert (item.value is None) == (not nulls_lost(compare(before, after)))
    return item


def test_planted_losses() -> None:
    """Half a step at 1.5 is 2^-8: below it is lost, at it and above is not, and what stayed does not count."""
    before = torch.full((2, 4), 1.5)
    after = before.clone()
    after[0] += torch.tensor([2.0**-9, -(2.0**-9), 2.0**-8, 2.0**-7])
    after[1, 0] += 2.0**-8 - 2.0**-20
    assert lost(before, after).value == pytest.approx(3 / 5)


def test_the_null_of_the_loss_is_a_gaussian_update() -> None:
    before = (0.02 * normal(1, 300, 200)).float()
    after = before + 6e-5 * normal(2, 300, 200).float()
    (null,) = nulls_lost(compare(before, after))
    value = lost(before, after).value
    assert null.sd is not None
    assert value == pytest.approx(null.mean, abs=5 * null.sd)
    assert 0.3 < null.mean < 0.95
    step = 2.0 ** (torch.floor(torch.log2(before.abs().double())) - 7)
    draws = 6e-5 * normal(3, 300, 200)
    assert null.mean == pytest.approx(float((draws.abs() < step / 2).double().mean()), abs=6 * null.sd)


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        (torch.bfloat16, torch.bfloat16, "the origin is stored as bfloat16"),
        (torch.bfloat16, torch.float32, "the origin is stored as bfloat16"),
        (torch.float32, torch.bfloat16, "the checkpoint is stored as bfloat16"),
        (torch.float16, torch.float32, "the origin is stored as float16"),
    ],
    ids=str,
)
def test_narrow_weights_do_not_tell_what_was_lost(before: torch.dtype, after: torch.dtype, reason: str) -> None:
    W = 0.02 * normal(1, 8, 8)
    item = lost(W.to(before), (W + 1e-3).to(after))
    assert item.status is Status.UNDEFINED
    assert item.note is not None
    assert item.note.startswith(reason)


def test_bf16_numbers_stored_wide_do_not_either() -> None:
    W = (0.02 * normal(1, 8, 8)).bfloat16().float()
    assert "holds bf16 numbers only" in (lost(W, (W + 1e-2).bfloat16().float()).note or "")
    assert lost(W, W.clone()).note == "the update is exactly zero"
    assert math.isclose(lost(W, W + W.abs() * 1e-5).value or 0, 1.0)
