"""The denoised stable rank against planted updates: within 15% of the truth wherever it says it is resolved."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from planted_updates import REGIMES, compare, planted, stable_rank, stored, structure, weights

from geopd.diagnostics import stable_rank_denoised
from geopd.diagnostics.bf16_grid import ENERGY, exponents
from geopd.diagnostics.stable_rank_denoised import Denoised, _keep, denoise, measure
from geopd.diagnostics.update_size import measure_stable_rank
from geopd.results import Measurement, Status
from geopd.spectral import magnitude_bins

SIZES = (2e-6, 5e-6, 1e-5, 2e-5, 5e-5, 1e-4, 5e-4)
WITHIN = 0.15


def estimate(n: tuple[int, int], of: str, kind: str, form: str, size: float) -> tuple[float, Denoised]:
    W = weights(of, *n)
    d = structure(kind, W)
    before, after = stored(W, size * d, form)
    found = denoise(after.double() - before.double(), magnitude_bins(before), ENERGY[form])
    return stable_rank(d), found


def check(n: tuple[int, int], of: str, kind: str, form: str) -> set[float]:
    """No resolved value is off by more than 15%; gives the sizes that were resolved."""
    resolved = set()
    for size in SIZES:
        true, found = estimate(n, of, kind, form, size)
        if found.value is None:
            assert found.reason
        elif found.reason is None:
            assert found.value == pytest.approx(true, rel=WITHIN), size
            resolved.add(size)
    assert 5e-4 in resolved
    return resolved


KINDS = ("rank 16", "rank 4", "power law", "lognormal rows", "with |W0|", "signs")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", REGIMES)
def test_resolved_means_right(kind: str, form: str) -> None:
    check((256, 320), "plain", kind, form)


@pytest.mark.slow
@pytest.mark.parametrize(("of", "kind"), list(product(("plain", "columns", "rows"), KINDS)))
@pytest.mark.parametrize("n", [512, 1024])
@pytest.mark.parametrize("form", REGIMES)
def test_resolved_means_right_at_full_size(of: str, kind: str, n: int, form: str) -> None:
    check((n, n), of, kind, form)


@pytest.mark.parametrize("form", REGIMES)
def test_a_homogeneous_update_is_resolved_from_2e5_on(form: str) -> None:
    W = weights("plain", 1024, 1024)
    d = structure("rank 16", W)
    true = stable_rank(d)
    for size in (2e-5, 5e-5):
        before, after = stored(W, size * d, form)
        D = after.double() - before.double()
        found = denoise(D, magnitude_bins(before), ENERGY[form])
        assert found.reason is None
        assert found.value == pytest.approx(true, rel=0.06)
        assert stable_rank(D) > 1.3 * true, "nothing to remove: the case shows nothing"


@pytest.mark.parametrize("form", REGIMES)
def test_the_signal_energy_is_unbiased(form: str) -> None:
    """tau^2 within 1%; without the noise term c u^2 it would be 1 to 6% too large."""
    W = weights("plain", 512, 512)
    d = structure("white", W)
    for size in (1e-5, 2e-5, 1e-4):
        before, after = stored(W, size * d, form)
        D = after.double() - before.double()
        scale = float(D.abs().max())
        found = [_keep(D, magnitude_bins(before), c, scale) for c in (ENERGY[form], 0.0)]
        energies = [kept.energy * scale**2 / size**2 for kept in found if kept is not None]
        assert energies[0] == pytest.approx(1.0, abs=0.01)
        assert energies[1] > 1.0125


def test_the_estimate_is_not_the_raw_value_with_the_noise_energy_taken_off() -> None:
    """Plain subtraction of u^2/12 is the obvious shortcut; on the grid it fails where most entries do not move."""
    W = weights("plain", 512, 512)
    d = 2e-5 * structure("rank 16", W)
    item = planted(W, d, "on-grid")
    u = 2.0 ** (exponents(item.origin.bins[:]).double().clamp(min=1) - 134)
    plain = (
        float(item.update().square().sum() - (u * u).sum() / 12)
        / float(torch.linalg.matrix_norm(item.update(), 2)) ** 2
    )
    assert not 0.85 <= plain / stable_rank(d) <= 1.15
    (found,) = measure(item)
    assert found.status is Status.OK
    assert found.value == pytest.approx(stable_rank(d), rel=0.06)


@pytest.mark.parametrize(
    ("n", "kind", "form", "size", "reason"),
    [
        (256, "rank 16", "on-grid", 5e-6, "leading singular value is"),
        (512, "lognormal rows", "both ends", 5e-5, "leading vectors sit on few rows"),
        (512, "with |W0|", "on-grid", 2e-4, "energy depends on the step size"),
        (512, "with |W0|", "on-grid", 1e-4, "no energy above rounding"),
    ],
)
def test_each_way_of_not_being_resolved_is_named(n: int, kind: str, form: str, size: float, reason: str) -> None:
    _, found = estimate((n, n), "plain", kind, form, size)
    assert found.reason is not None
    assert found.reason.startswith(reason)
    assert (found.value is None) == reason.startswith("no energy")


def test_an_update_on_one_row_is_not_taken_for_a_channel() -> None:
    W = weights("plain", 512, 512)
    d = structure("white", W)
    d[7] *= 6
    _, found = stable_rank(d), denoise(1e-4 * d, magnitude_bins(W.bfloat16()), 1 / 12)
    assert found.value is not None
    assert found.reason is not None


def by_setting(rows: list[Measurement]) -> dict[str, Measurement]:
    return {row.setting: row for row in rows}


def test_wide_weights_keep_their_raw_value_and_the_bf16_view_recovers_it() -> None:
    W = weights("plain", 512, 512)
    item = compare(W.float(), (W + 5e-5 * structure("rank 4", W)).float())
    rows = by_setting(measure(item))
    raw = measure_stable_rank(item)[0]
    assert (rows["view=native"].value, rows["view=native"].error) == (raw.value, raw.error)
    assert rows["view=native"].note is not None
    assert rows["view=native"].note.startswith("stored wider than bf16")
    assert rows["view=native"].is_default
    assert not rows["view=bf16"].is_default
    assert rows["view=bf16"].status is Status.OK
    assert rows["view=bf16"].value == pytest.approx(raw.value, rel=0.06)
    rounded = item.stored.bfloat16().double() - item.origin.stored.bfloat16().double()
    assert stable_rank(rounded) > 1.2 * (raw.value or 0.0)


def test_scale_and_side_do_not_matter() -> None:
    W = weights("columns", 300, 200)
    before, after = stored(W, 1e-4 * structure("rank 4", W), "on-grid")
    (here,) = measure(compare(before, after))
    (there,) = measure(compare(2.0**-20 * before.T.contiguous(), 2.0**-20 * after.T.contiguous()))
    assert here.status == there.status
    assert here.value == pytest.approx(there.value, rel=1e-8)


def test_undefined_with_its_reason() -> None:
    W = weights("plain", 16, 16).bfloat16()
    assert measure(compare(W, W))[0].note == "the update is exactly zero"
    (half,) = measure(compare(W.half(), W.half() + 1e-2))
    assert half.status is Status.UNDEFINED
    assert half.note == "float16: its rounding is not modelled"


@pytest.mark.parametrize("shape", [(1, 1), (1, 3000), (3000, 1)], ids=str)
@pytest.mark.parametrize("form", REGIMES)
def test_a_single_row_or_column_is_of_rank_one(shape: tuple[int, int], form: str) -> None:
    W = weights("plain", *shape)
    (found,) = measure(planted(W, 1e-2 * torch.ones_like(W), form))
    assert (found.status, found.value, found.error) == (Status.OK, 1.0, 0.0)


def test_no_estimate_is_below_one() -> None:
    for shape in ((40, 50), (300, 2), (130, 130)):
        W = weights("plain", *shape).bfloat16()
        after = W.clone()
        after[0, 0] += 1
        (found,) = measure(compare(W, after))
        assert found.value is None or found.value >= 1.0


def test_the_error_bounds_what_the_iteration_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    W = weights("plain", 700, 600)
    before, after = stored(W, 1e-4 * structure("rank 16", W), "on-grid")
    D, bins = after.double() - before.double(), magnitude_bins(before)
    monkeypatch.setattr(stable_rank_denoised, "TOLERANCE", 0.02)
    loose = denoise(D, bins, ENERGY["on-grid"])
    monkeypatch.setattr(stable_rank_denoised, "TOLERANCE", 1e-11)
    tight = denoise(D, bins, ENERGY["on-grid"])
    assert loose.value is not None
    assert loose.error is not None
    assert tight.value is not None
    assert tight.error is not None
    assert 0 < tight.error <= loose.error
    assert abs(loose.value - tight.value) <= loose.error
    assert loose.error < 0.1 * loose.value
