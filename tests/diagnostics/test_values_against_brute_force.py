"""Every metric of every prescribed pair agrees with its definition, and its stored error bounds the difference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from brute_force import Expected, overlap, round_to_bf16, share_of
from geopd.diagnostics import CATALOGUE, Comparison, OriginMatrix, Parameters, Rank, UpdateSubspace
from geopd.results import Measurement, Status
from geopd.spectral import decompose
from prescribed import PAIRS, normal, orthogonal, power_law

PARAMETERS = Parameters(Rank("4"), Rank("3"), (0.5, 0.3), 1e-3, (2,), (4,))
ALL_COVERED = Parameters(Rank("30"), Rank("64"), (0.5, 0.3), 1e-3, (2,), (4,))
ANGLE = 1e-7  # degrees
OF_A_RUN = ("subspace_similarity", "increment_similarity")  # a pair of matrices has none: see trajectories
MODELLED = ("rounding_noise_share", "stable_rank_denoised")  # no definition to compute again: see diagnostics_nulls
RELATIVE = 1e-9


def compare(name: str, parameters: Parameters = PARAMETERS) -> Comparison:
    pair = PAIRS[name]
    return Comparison(OriginMatrix(pair.before, parameters), pair.after)


def measured(comparison: Comparison) -> list[Measurement]:
    return [
        item
        for diagnostic in CATALOGUE
        for item in diagnostic.measure(comparison)
        if item.metric not in (*OF_A_RUN, *MODELLED)
    ]


def tolerance(item: Measurement, value: float) -> float:
    if item.metric.endswith("_deg"):
        return ANGLE
    if item.metric in ("update_sparsity", "low_magnitude_overlap", "principal_overlap"):
        return 1e-14
    if item.metric in ("spectral_shift", "decay_coefficient"):
        return max(RELATIVE * abs(value), 1e-14)  # a difference of singular values cannot be better than their rounding
    return RELATIVE * value


@pytest.mark.parametrize("parameters", [PARAMETERS, ALL_COVERED], ids=["k=4", "k=30"])
@pytest.mark.parametrize("name", PAIRS)
def test_values_agree_with_their_definitions(name: str, parameters: Parameters) -> None:
    pair = PAIRS[name]
    k, rank = parameters.rotation_k.of(*pair.before.shape), parameters.principal_rank.of(*pair.before.shape)
    expected = Expected(pair.before, pair.after, k, rank, parameters.hill_k[0])
    seen = 0
    for item in measured(compare(name, parameters)):
        value = expected.of(item.metric, item.setting)
        assert (item.value is None) == (value is None), (item, value)
        if item.value is None or value is None:
            assert item.status is Status.UNDEFINED
            continue
        assert item.error is not None
        # both sides are computed in float64, so the reference may be off by as much as the value
        assert abs(item.value - value) <= 2 * item.error + 8e-16 * abs(value), (item, value)
        if item.status is Status.OK:
            # values 1e-9 apart leave their vectors to rounding: there the stored error is all that can be promised
            loose = 2 * item.error if name == "clustered" else 0.0
            assert abs(item.value - value) <= max(tolerance(item, value), loose), (item, value)
            seen += 1
    assert seen >= 3


@pytest.mark.parametrize("name", ["decaying", "bf16", "float32", "wide", "tall", "massive ties", "tiny"])
def test_ordinary_matrices_are_resolved_in_every_metric(name: str) -> None:
    statuses = {item.metric: item.status for item in measured(compare(name))}
    narrow = PAIRS[name].after.dtype == torch.bfloat16
    masks = {metric for metric in statuses if metric.startswith("visible_mask") and (narrow or name == "tiny")}
    for metric in masks | ({"sub_ulp_share"} if narrow else set()):
        assert statuses.pop(metric) is Status.UNDEFINED, "bf16 ends do not tell what rounding took, nor zeros"
    assert set(statuses.values()) == {Status.OK}, statuses


def test_closed_gaps_are_unresolved_rather_than_wrong() -> None:
    repeated = {item.metric: item for item in measured(compare("repeated"))}
    for side in ("left", "right"):
        item = repeated[f"rotation_{side}_max_deg"]
        assert item.status is Status.UNRESOLVED
        assert item.value is not None
        assert item.error == pytest.approx(90.0)
        assert item.note is not None
        assert "error bound" in item.note


def test_a_principal_mask_cut_inside_equal_singular_values_is_unresolved() -> None:
    """Rank 3 of four equal values: the reconstruction, and so the mask, could be anything."""
    found = {item.setting: item for item in measured(compare("stepped")) if item.metric == "principal_overlap"}
    assert {item.status for item in found.values()} == {Status.UNRESOLVED}
    assert all(item.value is not None and item.error > 1e-3 for item in found.values() if item.error is not None)


def test_an_even_number_of_angles_has_the_mean_of_the_middle_two_as_median() -> None:
    comparison = compare("decaying")
    angles = sorted(comparison.angles("left"))
    (item,) = [item for item in measured(comparison) if item.metric == "rotation_left_median_deg"]
    assert item.value == pytest.approx((angles[1] + angles[2]) / 2, rel=1e-15)


def test_measuring_leaves_the_weights_as_they_were() -> None:
    """Float64 weights are used without a copy, and the native view must not write into them."""
    pair = PAIRS["decaying"]
    before, after = pair.before.clone(), pair.after.clone()
    comparison = Comparison(OriginMatrix(before, PARAMETERS), after)
    for diagnostic in CATALOGUE:
        diagnostic.measure(comparison)
        diagnostic.nulls(comparison)
    assert torch.equal(before, pair.before)
    assert torch.equal(after, pair.after)
    assert bool((before < 0).any())


def test_rounding_is_to_nearest_even() -> None:
    halfway = np.array([1 + 2.0**-8, 1 + 3 * 2.0**-8, -1 - 2.0**-8, 1 + 2.0**-8 + 2.0**-20])
    assert round_to_bf16(halfway).tolist() == [1.0, 1 + 2.0**-6, -1.0, 1 + 2.0**-7]
    stored = torch.tensor(halfway, dtype=torch.float32)
    assert stored.bfloat16().double().tolist() == round_to_bf16(halfway).tolist()


@pytest.mark.parametrize("alpha", [0.5, 0.3])
def test_overlaps_under_massive_ties(alpha: float) -> None:
    """Five distinct magnitudes over 480 entries: nearly every entry at the cut is tied."""
    pair = PAIRS["massive ties"]
    magnitudes = pair.before.double().abs().numpy()
    assert len(np.unique(magnitudes)) <= 5
    parameters = Parameters(principal_rank=Rank("64"), alphas=(alpha,))
    comparison = Comparison(OriginMatrix(pair.before, parameters), pair.after)
    mask = comparison.changed("bf16").numpy()
    for metric, largest in (("low_magnitude_overlap", False), ("principal_overlap", True)):
        (item,) = next(d for d in CATALOGUE if d.metrics == (metric,)).measure(comparison)
        assert item.value == pytest.approx(overlap(share_of(magnitudes, alpha, largest=largest), mask), abs=1e-14)


@pytest.mark.parametrize("degrees", [1e-6, 3e-5, 1e-2, 1.0, 40.0, 80.0])
def test_a_planted_rotation_is_found_at_its_angle(degrees: float) -> None:
    """The top three right vectors turn by a known angle towards three directions outside the span."""
    m, n, k = 40, 30, 3
    sigma = torch.tensor(power_law(12), dtype=torch.float64)
    U, V = orthogonal(1, m, 12), orthogonal(2, n)
    theta = np.radians(degrees) * torch.tensor([1.0, 0.5, 0.25], dtype=torch.float64)
    turned = V[:, :12].clone()
    turned[:, :k] = V[:, :k] * torch.cos(theta) + V[:, 20:23] * torch.sin(theta)
    before, after = (U * sigma) @ V[:, :12].T, (U * sigma) @ turned.T
    parameters = Parameters(rotation_k=Rank(str(k)))
    comparison = Comparison(OriginMatrix(before, parameters), after)
    np.testing.assert_allclose(
        comparison.angles("right"), [0.25 * degrees, 0.5 * degrees, degrees], rtol=0, atol=max(1e-12 * degrees, 2e-13)
    )
    # the left vectors stayed
    assert comparison.angles("left").max() < 1e-12


def test_similarity_of_update_subspaces() -> None:
    W0 = torch.zeros(30, 20, dtype=torch.float64)
    k = 3
    parameters = Parameters(similarity_k=(k, 2))
    now, end = (orthogonal(s, 30, 4) * torch.tensor([4.0, 3.0, 2.0, 0.1]) @ orthogonal(s + 1, 20, 4).T for s in (3, 5))
    final = UpdateSubspace(decompose(end, k))
    comparison = Comparison(OriginMatrix(W0, parameters), now, final)
    diagnostic = next(d for d in CATALOGUE if "subspace_similarity" in d.metrics)
    for item in diagnostic.measure(comparison):
        K = int(item.setting.split(";")[0].removeprefix("k="))
        V, V_end = (np.linalg.svd(W.numpy())[2][:K].T for W in (now, end))
        assert item.value == pytest.approx(((V.T @ V_end) ** 2).sum() / K, rel=1e-9)
        assert item.status is Status.OK
        assert item.is_default is (k == K)
    itself = Comparison(OriginMatrix(W0, parameters), end, UpdateSubspace(decompose(end, k), is_this=True))
    assert [item.value for item in diagnostic.measure(itself)] == pytest.approx([1.0, 1.0], abs=1e-14)


def test_the_bf16_view_looks_at_rounded_weights() -> None:
    """A change below half a unit is invisible in bf16 and visible as stored, once eta allows it."""
    before = torch.full((4, 4), 1.0)
    after = before + 2e-3  # half a bf16 unit at 1 is 2^-8
    comparison = Comparison(OriginMatrix(before, Parameters()), after)
    values = {item.setting: item.value for item in measured(comparison) if item.metric == "update_sparsity"}
    steps = {f"min_ulp={k};view=bf16": 1.0 for k in (1, 2, 4)}
    etas = {"eta=0.0001;view=native": 0.0, "eta=0.001;view=native": 0.0, "eta=0.01;view=native": 1.0}
    assert values == {"eta=0.001;view=bf16": 1.0} | steps | etas


def test_an_entry_changed_by_exactly_eta_is_unchanged() -> None:
    before = torch.tensor([[1.0, 1.0, -2.0, 0.0]], dtype=torch.float64)
    after = torch.tensor([[1.25, 1.25 + 1e-12, -2.5, 0.0]], dtype=torch.float64)
    comparison = Comparison(OriginMatrix(before, Parameters(eta=0.2)), after)
    assert comparison.changed("native").tolist() == [[False, True, False, False]]


def test_masks_do_not_depend_on_the_order_of_entries() -> None:
    pair = PAIRS["massive ties"]
    parameters = Parameters(principal_rank=Rank("64"))
    order = torch.randperm(pair.before.numel(), generator=torch.Generator().manual_seed(3))
    before, after = (W.reshape(-1)[order].reshape(W.shape) for W in (pair.before, pair.after))
    entrywise = [d for d in CATALOGUE if {"update_sparsity", "low_magnitude_overlap"} & set(d.metrics)]
    for diagnostic in entrywise:
        here = diagnostic.measure(Comparison(OriginMatrix(pair.before, parameters), pair.after))
        there = diagnostic.measure(Comparison(OriginMatrix(before, parameters), after))
        assert here == there


def test_masks_larger_than_one_chunk() -> None:
    before = normal(1, 1100, 1000).float()
    after = before.clone()
    after[::7, ::3] *= 1.5
    changed = Comparison(OriginMatrix(before, Parameters()), after).changed("bf16")
    assert torch.equal(changed, after != before)
