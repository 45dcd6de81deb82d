"""The share of an update that rounding explains, against updates whose intended part is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from planted_updates import compare, planted, stable_rank, stored, structure, weights
from scipy.special import erf
from torch import Tensor

from geopd.diagnostics import Comparison, bf16_grid, gaussian_update, stable_rank_denoised
from geopd.diagnostics.bf16_grid import UNITS, StepCounts, exponent_counts, exponents, regime, units
from geopd.diagnostics.noise_nulls import nulls_hill, nulls_stable_rank
from geopd.diagnostics.rounding import TOO_NOISY, measure, noise_verdict, on_grid_share
from geopd.results import Measurement, Status
from geopd.spectral import count_bins, magnitude_bins

N = 320
SIZES = (2e-6, 5e-6, 1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4)


def exact_share(item: Comparison, d: Tensor) -> float:
    D = item.update()
    return 1 - float((D * d).sum() ** 2 / (D.square().sum() * d.square().sum()))


def native(item: Comparison) -> Measurement:
    return measure(item)[0]


@pytest.mark.parametrize("form", ["on-grid", "one end"])
@pytest.mark.parametrize("kind", ["rank 16", "white", "signs"])
@pytest.mark.parametrize("of", ["plain", "columns"])
def test_share_of_known_updates(form: str, kind: str, of: str) -> None:
    W = weights(of, N, N)
    d = structure(kind, W)
    for size in SIZES:
        if kind == "signs" and form == "on-grid" and size < 5e-5:
            continue  # all entries alike: no Gaussian, and on the grid they cross their steps all at once
        item = planted(W, size * d, form)
        row = native(item)
        assert row.status is Status.OK
        limit = 0.06 if kind == "signs" else 0.025
        assert row.value == pytest.approx(exact_share(item, size * d), abs=limit), size


def test_unequal_rows_are_overstated_never_understated() -> None:
    W = weights("plain", N, N)
    d = structure("lognormal rows", W)
    for size in SIZES:
        item = planted(W, size * d, "on-grid")
        excess = (native(item).value or 0.0) - exact_share(item, size * d)
        assert -0.01 <= excess <= 0.3, size


def test_the_share_falls_to_the_white_noise_model() -> None:
    steps, counts = UNITS[112:122], np.array([1, 2, 4, 8, 16, 32, 64, 128, 200, 100.0])
    shares = []
    for s in np.geomspace(1e-2, 100, 30) * steps[-1]:
        energy = float(counts @ np.array([grid_energy(u, s) for u in steps]))
        share, found = on_grid_share(counts, steps, math.sqrt(energy))
        assert found == pytest.approx(s, rel=1e-6)
        shares.append(share)
        if s >= 0.7 * steps[-1]:
            assert share == pytest.approx(float(counts @ steps**2) / 12 / energy, rel=0.03)
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.9
    assert shares[-1] < 1e-4


def grid_energy(u: float, s: float) -> float:
    """E[(u round(d/u))^2], summed over the multiples of u."""
    k = np.arange(1, int(12 * s / u) + 3)
    inside = erf((k + 0.5) * u / s / math.sqrt(2)) - erf((k - 0.5) * u / s / math.sqrt(2))
    return float((inside * (k * u) ** 2).sum())


@pytest.mark.parametrize("on_grid", [True, False])
def test_the_bf16_view_of_wide_weights_is_measured_not_modelled(on_grid: bool) -> None:
    W = weights("plain", 64, 48).float()
    W = W.bfloat16().float() if on_grid else W
    item = compare(W, (W.double() + 3e-5 * structure("rank 4", W.double())).float())
    wide, seen = measure(item)
    assert (wide.value, wide.error, wide.setting, wide.is_default) == (0.0, 0.0, "view=native", True)
    assert wide.note is not None
    assert "wider than bf16" in wide.note
    D = (item.stored.bfloat16().double() - W.bfloat16().double()).numpy()
    d = item.update().numpy()
    expected = 1 - (D * d).sum() ** 2 / ((D**2).sum() * (d**2).sum())
    assert seen.value == pytest.approx(expected, abs=1e-12)
    assert (seen.setting, seen.is_default) == ("view=bf16", False)
    assert noise_verdict(item) is None
    assert {null.null for null in [*nulls_stable_rank(item), *nulls_hill(item)]} == {"gaussian"}


def test_bf16_numbers_in_a_wide_file_are_still_rounded() -> None:
    W = weights("plain", 64, 48)
    before, after = stored(W, 3e-5 * structure("rank 4", W), "on-grid")
    narrow, wide = compare(before, after), compare(before.float(), after.float())
    assert regime(wide) == regime(narrow) == "on-grid"
    assert native(wide).value == native(narrow).value
    assert len(measure(wide)) == 1


def test_undefined_where_rounding_is_not_modelled() -> None:
    W = weights("plain", 8, 8)
    half = measure(compare(W.half(), (W + 1e-3).half()))
    assert [row.status for row in half] == [Status.UNDEFINED]
    assert half[0].note is not None
    assert half[0].note.startswith("float16")
    assert measure(compare(W.bfloat16(), W.bfloat16()))[0].note == "the update is exactly zero"
    unseen = measure(compare(W.bfloat16().float(), (W.bfloat16().double() * (1 + 1e-6)).float()))
    assert [row.value for row in unseen] == [0.0, None]
    assert unseen[1].note == "no entry changed in this view"


@pytest.mark.parametrize("form", ["on-grid", "one end"])
@pytest.mark.parametrize("of", ["plain", "columns"])
def test_the_verdict_parts_faithful_stable_ranks_from_inflated_ones(form: str, of: str) -> None:
    W = weights(of, N, N)
    d = structure("rank 16", W)
    verdicts = []
    for size in SIZES:
        item = planted(W, size * d, form)
        verdict = noise_verdict(item)
        ratio = stable_rank(item.update()) / stable_rank(d)
        assert (verdict is None) == ((native(item).value or 0.0) <= TOO_NOISY)
        if verdict is None:
            assert 0.97 <= ratio <= 1.13, size
        else:
            assert ratio > 1.1, size
            assert verdict.startswith("bf16 rounding makes ")
        verdicts.append(verdict is None)
    assert verdicts == sorted(verdicts)
    assert not verdicts[0]
    assert verdicts[-1]


def test_steps_are_the_distances_between_bf16_neighbours() -> None:
    W = torch.tensor([[1.0, 1.9921875, 2.0, 0.0, 3e-39, 0.1, 3.0e38]]).bfloat16()
    upward = (W.view(torch.int16) + 1).view(torch.bfloat16)
    assert torch.equal(units(magnitude_bins(W))[0, :6], (upward.double() - W.double())[0, :6])
    assert exponents(magnitude_bins(-W)).tolist() == exponents(magnitude_bins(W)).tolist()


def test_steps_are_counted_by_row_and_column(monkeypatch: pytest.MonkeyPatch) -> None:
    W = weights("columns", 37, 23)
    W[3], W[5, 2], W[6, 1] = 0.0, 1e-30, -40.0
    bins = magnitude_bins(W.bfloat16())
    monkeypatch.setattr(bf16_grid, "row_blocks", lambda shape: (slice(i, i + 5) for i in range(0, shape[0], 5)))
    counted, u = StepCounts.of(bins, count_bins(bins)), units(bins).numpy()
    assert counted.step[-1] == 0.25
    for counts, axis in ((counted.rows, 1), (counted.cols, 0)):
        assert counts.sum() == W.numel()
        assert counts @ counted.step**2 == pytest.approx((u**2).sum(axis=axis), rel=1e-12, abs=1e-16)
    whole = exponent_counts(count_bins(bins))
    assert (counted.rows.sum(axis=0)[1:] == whole[exponents(bins).max() - 30 : exponents(bins).max() + 1]).all()


@pytest.mark.parametrize("scale", [0.0, 1e-9])
def test_a_root_that_is_the_start_up_to_rounding_is_found(scale: float) -> None:
    """Updates far above every step of W0: a zero origin, or one that is next to nothing."""
    for shape in ((64, 64), (500, 40), (33, 77)):
        for seed in range(20):
            W = weights("plain", *shape, seed=seed)
            before = (scale * weights("plain", *shape, seed=seed + 100)).bfloat16()
            share = native(compare(before, W.bfloat16()))
            assert share.status is Status.OK
            assert share.value == pytest.approx(0.0, abs=1e-9)


def test_a_bracket_whose_end_is_the_root_up_to_rounding_is_widened() -> None:
    for power in (1.0, 2.0, 0.5):
        for i in range(200):
            root = 8.0 * math.exp(i / 7)  # reached from root / 8 by the first step outwards
            found = gaussian_update._solve(lambda x, power=power: x**power, root**power, root / 8)
            assert found == pytest.approx(root, rel=1e-9)


@pytest.mark.parametrize("end", ["both", "origin", "checkpoint"])
def test_undefined_where_weights_are_beyond_the_range_of_bf16(end: str) -> None:
    W = weights("plain", 16, 12)
    before, after = W.clone(), W + 1e-3
    if end != "checkpoint":
        before[0, 0] = 1e200
    if end != "origin":
        after[0, 0] = -2e200
    item = compare(before, after)
    for rows in (measure(item), stable_rank_denoised.measure(item)):
        wide, seen = rows
        assert wide.status is Status.OK
        assert seen.status is Status.UNDEFINED
        assert seen.note is not None
        assert "beyond the range of bf16" in seen.note
    if end == "origin":
        narrow = compare(before, after.bfloat16())
        for (row,) in (measure(narrow), stable_rank_denoised.measure(narrow)):
            assert row.status is Status.UNDEFINED
            assert row.note is not None
            assert "beyond the range of bf16" in row.note


def test_cells_count_steps_between_groups_of_like_rows_and_columns() -> None:
    W = weights("columns", 37, 23)
    W[:10, :5] *= 16
    bins = magnitude_bins(W.bfloat16())
    counted, u = StepCounts.of(bins, count_bins(bins)), units(bins).numpy()
    energy = u**2
    sides = []
    for axis in (0, 1):
        size = energy.shape[axis]
        group = np.empty(size, dtype=int)
        group[np.argsort(-energy.sum(axis=1 - axis), kind="stable")] = np.arange(size) * 12 // size
        sides.append(group)
        assert counted.sizes[axis].tolist() == np.bincount(group, minlength=12).tolist()
    expected = np.zeros((12, 12))
    np.add.at(expected, (sides[0][:, None], sides[1][None, :]), energy)
    assert counted.cells @ counted.step**2 == pytest.approx(expected, rel=1e-12)
