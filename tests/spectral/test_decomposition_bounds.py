"""Decompositions and angles against 40-digit arithmetic: every bound holds, and tiny angles keep their digits."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles

from geopd.spectral import (
    angle_error,
    count_bins,
    decompose,
    frobenius,
    magnitude_bins,
    principal_angles,
    smallest_magnitudes,
    split_at_share,
)
from prescribed import normal, orthogonal, power_law, with_spectrum

SPECTRA = {
    "decaying": power_law(6),
    "stepped": [1.0, 1.0, 1.0, 1e-3, 1e-3, 1e-3],
    "clustered": [1 + 1e-9 * i for i in range(5, -1, -1)],
    "repeated": [2.0, 2.0, 2.0, 1.0, 1.0, 1.0],
    "rank-deficient": [3.0, 1.0],
    "tiny": [1e-150 * x for x in power_law(6)],
    "huge": [1e150 * x for x in power_law(6)],
    "steep": [10.0 ** (-2.5 * i) for i in range(6)],
}
SHAPES = {"tall": (9, 6), "wide": (6, 9), "square": (6, 6)}


def exact_svd(W: torch.Tensor) -> tuple[mpmath.matrix, list[mpmath.mpf], mpmath.matrix]:
    with mpmath.workdps(40):
        U, sigma, Vh = mpmath.svd_r(mpmath.matrix(W.tolist()))
        return U, list(sigma), Vh


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_singular_values_are_within_their_bound(spectrum: str, shape: str) -> None:
    W = with_spectrum(SPECTRA[spectrum], *SHAPES[shape])
    found = decompose(W, 3)
    _, exact, _ = exact_svd(W)
    assert found.sigma.shape == (6,)
    assert bool((found.sigma.diff() <= 0).all())
    for value, wanted, error in zip(found.sigma.tolist(), exact, found.sigma_error.tolist(), strict=True):
        assert abs(mpmath.mpf(value) - wanted) <= error
    # a bound is of use only where it is small
    assert float(found.sigma_error.max()) <= 1e-13 * float(found.sigma[0])
    assert found.rank == len(SPECTRA[spectrum])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spectrum", ["decaying", "stepped", "rank-deficient", "tiny", "steep"])
def test_entries_of_the_leading_part_are_within_their_bound(spectrum: str, shape: str) -> None:
    W = with_spectrum(SPECTRA[spectrum], *SHAPES[shape])
    k = 3 if spectrum == "stepped" else 2
    found = decompose(W, k)
    part = (found.left * found.sigma[:k]) @ found.right.T
    U, sigma, Vh = exact_svd(W)
    m, n = W.shape
    with mpmath.workdps(40):
        worst = max(
            abs(sum(U[i, r] * sigma[r] * Vh[r, j] for r in range(k)) - mpmath.mpf(float(part[i, j])))
            for i in range(m)
            for j in range(n)
        )
    assert worst <= found.leading_part_error(k)
    assert found.leading_part_error(k) <= 1e-10 * float(found.sigma[0])


def test_a_closed_gap_is_known_as_one() -> None:
    found = decompose(with_spectrum(SPECTRA["repeated"], 9, 6), 3)
    assert found.gap(3) == pytest.approx(1.0)
    assert found.gap(6) == pytest.approx(1.0), "past the last singular value the next one is 0"
    assert angle_error((found,), 2) == 90.0
    assert angle_error((found,), 3) < 1e-12


@pytest.mark.parametrize("shape", SHAPES)
def test_angles_are_within_their_bound_of_exact_ones(shape: str) -> None:
    before = with_spectrum(SPECTRA["decaying"], *SHAPES[shape])
    k = 2
    for size in (1e-9, 1e-4, 1e-1):
        after = before + size * normal(4, *SHAPES[shape])
        decompositions = decompose(before, k), decompose(after, k)
        (U0, _, Vh0), (U1, _, Vh1) = exact_svd(before), exact_svd(after)
        with mpmath.workdps(40):
            for side, Q0, Q1 in (("left", U0[:, :k], U1[:, :k]), ("right", Vh0[:k, :].T, Vh1[:k, :].T)):
                if Q0.rows <= k:
                    continue
                cosines = mpmath.svd_r(Q0.T * Q1, compute_uv=False)
                exact = sorted(float(mpmath.degrees(mpmath.acos(min(c, mpmath.mpf(1))))) for c in cosines)
                found = principal_angles(*(getattr(d, side) for d in decompositions)).tolist()
                bound = angle_error(decompositions, k)
                assert max(abs(a - b) for a, b in zip(found, exact, strict=True)) <= bound
                assert bound < 1e-11


@pytest.mark.parametrize("degrees", [0.0, 1e-12, 1e-6, 0.3, 44.9, 45.1, 89.0, 90.0])
def test_planted_angles(degrees: float) -> None:
    Q = orthogonal(5, 20)
    theta = math.radians(degrees)
    Q1 = torch.stack([math.cos(theta) * Q[:, 0] + math.sin(theta) * Q[:, 5], Q[:, 1]], dim=1)
    angles = principal_angles(Q[:, :2], Q1)
    assert angles[0] < 1e-13
    assert float(angles[1]) == pytest.approx(degrees, rel=1e-12, abs=1e-13)


def test_angles_do_not_depend_on_the_bases() -> None:
    A, B = orthogonal(1, 30, 6), orthogonal(2, 30, 6)
    turned = principal_angles(A @ orthogonal(3, 6), B @ orthogonal(4, 6))
    np.testing.assert_allclose(turned, principal_angles(A, B), rtol=0, atol=1e-12)
    np.testing.assert_allclose(turned, np.degrees(subspace_angles(A.numpy(), B.numpy()))[::-1], rtol=0, atol=1e-10)
    np.testing.assert_allclose(principal_angles(B, A), principal_angles(A, B), rtol=0, atol=1e-12)


def test_subspaces_larger_than_half_the_space_share_directions() -> None:
    angles = principal_angles(orthogonal(1, 10, 8), orthogonal(2, 10, 8))
    assert angles.shape == (8,)
    assert bool((angles[:6] < 1e-5).all()), "two 8-dimensional subspaces of 10 dimensions share at least 6"
    assert angles[-1] > 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    W = torch.ones(3, 3, dtype=torch.float64)
    W[1, 1] = bad
    with pytest.raises(ValueError, match="not finite"):
        decompose(W, 1)
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        decompose(W[0], 1)


def test_zero_matrix_and_single_rows() -> None:
    zero = decompose(torch.zeros(4, 3, dtype=torch.float64), 2)
    assert zero.rank == 0
    assert zero.sigma.tolist() == [0.0, 0.0, 0.0]
    row = decompose(torch.tensor([[3.0, 4.0]], dtype=torch.float64), 5)
    assert row.sigma.tolist() == pytest.approx([5.0], rel=1e-15)
    assert row.left.shape == (1, 1)
    assert row.right.shape == (2, 1)


@pytest.mark.parametrize("scale", [1e-150, 1.0, 1e150])
def test_frobenius_norm_is_within_its_bound(scale: float) -> None:
    W = scale * normal(1, 13, 17)
    norm, error = frobenius(W)
    with mpmath.workdps(40):
        exact = mpmath.sqrt(sum(mpmath.mpf(x) ** 2 for x in W.reshape(-1).tolist()))
        assert abs(mpmath.mpf(norm) - exact) <= error
    assert error <= 1e-14 * norm
    assert frobenius(torch.zeros(2, 2, dtype=torch.float64)) == (0.0, 0.0)


def test_selection_takes_exactly_its_share() -> None:
    score = torch.tensor([3.0, 1.0, 1.0, 1.0, 2.0, 5.0, 1.0], dtype=torch.float64)
    split = split_at_share(lambda: iter([score]), (7,), 0.3, largest=False)
    assert not split.inside.any()
    assert split.tied.tolist() == [False, True, True, True, False, False, True]
    assert split.share == pytest.approx(0.3 * 7 / 4)
    top = split_at_share(lambda: iter([score]), (7,), 0.3, largest=True)
    assert top.inside.nonzero().flatten().tolist() == [0, 5]
    assert top.tied.nonzero().flatten().tolist() == [4]
    assert top.share == pytest.approx(0.1)
    for alpha in (0.1, 0.5, 0.77):
        for largest in (False, True):
            split = split_at_share(lambda: iter(score.split(2)), (7,), alpha, largest=largest)
            assert int(split.inside.sum()) + split.share * int(split.tied.sum()) == pytest.approx(alpha * 7)
            assert 0 <= split.share <= 1
            everything = torch.ones(7, dtype=torch.bool)
            bins = magnitude_bins(score)
            assert split.overlap(everything, count_bins(bins, everything)) == pytest.approx(alpha)
            assert split.overlap(~everything, count_bins(bins, ~everything)) is None


@pytest.mark.parametrize("alpha", [0.05, 0.3, 0.5, 0.97])
def test_the_histogram_selects_as_sorting_does(alpha: float) -> None:
    W = (0.02 * normal(3, 50, 40)).bfloat16()
    changed = normal(4, 50, 40) > 0.5
    bins = magnitude_bins(W)
    counts = count_bins(bins, changed)
    by_sorting, by_counting = (
        split_at_share(lambda: iter([W.double().abs()]), (50, 40), alpha, largest=False),
        smallest_magnitudes(count_bins(bins), alpha),
    )
    assert by_counting.overlap(changed, counts) == pytest.approx(by_sorting.overlap(changed, counts), abs=1e-14)
    np.testing.assert_allclose(by_counting.weight_by_bin(bins), by_sorting.weight_by_bin(bins), rtol=0, atol=1e-9)
    assert by_counting.weight_by_bin(bins).sum() == pytest.approx(alpha * 2000)


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.5, float("nan")])
def test_a_share_outside_its_range_is_refused(alpha: float) -> None:
    with pytest.raises(ValueError, match="alpha"):
        split_at_share(lambda: iter([torch.ones(3, dtype=torch.float64)]), (3,), alpha, largest=False)


def test_magnitude_bins_are_ordered_and_blind_to_sign() -> None:
    W = torch.tensor([0.0, -0.0, 1e-3, -1e-3, 1.0, 1.001, 1.02, -3.0])
    bins = magnitude_bins(W)
    assert bins[0] == bins[1] == 0
    assert bins[2] == bins[3]
    assert bins[4] == bins[5], "1.001 rounds to 1"
    assert bool((bins[torch.tensor([1, 3, 5, 6])].diff() > 0).all())
