"""The fast paths against float64 LAPACK: values, vectors and bounds, on spectra that provoke each path and fallback."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles

from geopd.spectral import (
    Difference,
    Magnitudes,
    count_bins,
    decompose,
    frobenius,
    leading_triples,
    magnitude_bins,
    principal_angles,
    singular_values,
    split_at_share,
)
from geopd.spectral import angles as angles_module
from geopd.spectral import leading as leading_module
from prescribed import normal, with_spectrum

P = 160
INDEX = np.arange(1, P + 1)
SPECTRA: dict[str, np.ndarray] = {
    "power law": INDEX**-0.6,
    "stepped": np.where(INDEX <= 20, 1.0, 0.1) * (1 + 1e-3 * INDEX[::-1] / P),
    "steep": np.exp(-INDEX / 8),
    "rank-deficient": np.where(INDEX <= 40, INDEX**-0.5, 0.0),
    "repeated": np.where(INDEX <= 20, 1.0, 0.5),
    "clustered": 1 + 1e-9 * INDEX[::-1] / P,
    "tiny": 1e-150 * INDEX**-0.6,
    "huge": 1e150 * INDEX**-0.6,
}
SHAPES = {"square": (P, P), "tall": (3 * P, P), "wide": (P, 3 * P)}
LAPACK = 64 * 2.0**-52  # what LAPACK's own values may be off by, relative to sigma_1


def planted(spectrum: str, shape: str) -> torch.Tensor:
    return with_spectrum(list(SPECTRA[spectrum]), *SHAPES[shape])


def lapack(W: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    scale = float(W.abs().max())
    U, sigma, Vh = np.linalg.svd(W.numpy() / scale, full_matrices=False)
    return U, sigma * scale, Vh.T


def sine(A: torch.Tensor, B: np.ndarray) -> float:
    return math.sin(subspace_angles(A.numpy(), B).max())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("k", [0, 20, 100])
def test_values_and_subspaces_are_within_their_bounds(spectrum: str, shape: str, k: int) -> None:
    W = planted(spectrum, shape)
    found = decompose(W, k)
    U, sigma, V = lapack(W)
    assert found.left.shape == (W.shape[0], k)
    assert found.right.shape == (W.shape[1], k)
    assert bool((np.abs(found.sigma.numpy() - sigma) <= found.sigma_error.numpy() + LAPACK * sigma[0]).all())
    if k == 0 or found.rank < k:
        return
    bound = found.leading_sine(k)
    if bound < 1.0:
        # LAPACK's own subspace is as uncertain as its values, over the gap
        slack = LAPACK * sigma[0] / found.gap(k)
        assert sine(found.left, U[:, :k]) <= bound + slack
        assert sine(found.right, V[:, :k]) <= bound + slack


def test_each_path_is_taken_and_named() -> None:
    assert decompose(planted("power law", "tall")[:, :90], 8).method == "direct"
    assert decompose(planted("power law", "tall"), 20).method == "gram"
    assert decompose(planted("steep", "tall"), 100).method == "qr", "sigma_100 is 4e-6 of sigma_1: squares lose it"
    assert decompose(planted("rank-deficient", "wide"), 60).method == "qr"
    assert decompose(planted("steep", "tall"), 0).method == "gram"


def test_numerical_rank_is_seen_where_vectors_are_asked_beyond_it() -> None:
    for shape in SHAPES:
        assert decompose(planted("rank-deficient", shape), 60).rank == 40


def test_stored_bf16_gives_the_same_as_its_float64_copy() -> None:
    W = planted("power law", "tall").bfloat16()
    stored, copied = decompose(W, 20), decompose(W.double(), 20)
    assert torch.equal(stored.sigma, copied.sigma)
    assert torch.equal(stored.right, copied.right)


def test_values_without_squaring_keep_small_ones() -> None:
    W = planted("steep", "tall")
    sigma, error = singular_values(W)
    _, exact, _ = lapack(W)
    assert np.abs(sigma.numpy() - exact).max() <= error + LAPACK * exact[0]
    assert error < 1e-13 * exact[0]
    assert float(decompose(W, 0).sigma_error.max()) > error, "squaring costs the small values digits, and says so"
    assert singular_values(torch.zeros(3, 2))[0].tolist() == [0.0, 0.0]


def steep(m: int, n: int, *levels: float) -> torch.Tensor:
    """Three directions at each level, and a power law at the last."""
    W = sum(level * normal(10 + i, m, 3) @ normal(20 + i, 3, n) for i, level in enumerate(levels[:-1]))
    return W + levels[-1] * with_spectrum(list(np.arange(1, min(m, n) + 1) ** -0.8), m, n)


UPDATES: dict[str, Callable[[int, int], torch.Tensor]] = {
    "low rank": lambda m, n: normal(1, m, 24) @ normal(2, 24, n),
    "low rank and noise": lambda m, n: 0.5 * normal(1, m, 24) @ normal(2, 24, n) + normal(3, m, n),
    "power law": lambda m, n: with_spectrum(list(np.arange(1, min(m, n) + 1) ** -0.8), m, n),
    "rank below k": lambda m, n: 1e-5 * normal(1, m, 3) @ normal(2, 3, n),
    # what lies under 1e-3 of sigma_1 is beyond the squares of float32
    "steep": lambda m, n: steep(m, n, 1.0, 1e-5),
    "steeper": lambda m, n: steep(m, n, 1.0, 1e-4, 1e-9),
}


@pytest.mark.parametrize("k", [4, 16])
@pytest.mark.parametrize("update", UPDATES)
def test_leading_triples_without_the_rest(update: str, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leading_module, "_WHOLE", (0, 64))  # let the iteration run at a size that LAPACK checks quickly
    W = UPDATES[update](500, 400)
    for matrix in (W, W.T.contiguous()):
        found = leading_triples(matrix, k)
        U, sigma, V = lapack(matrix)
        rank = min(k, 3) if update == "rank below k" else k
        held = found.sigma.numpy()
        assert found.method == "krylov"
        assert len(held) > k
        errors = np.abs(held[: k + 1] - sigma[: k + 1])
        assert bool((errors <= found.sigma_error.numpy()[: k + 1] + LAPACK * sigma[0]).all())
        np.testing.assert_allclose(held[:rank], sigma[:rank], rtol=1e-11, atol=LAPACK * sigma[0])
        assert (found.rank >= k) == (rank == k)
        if rank == k:
            slack = LAPACK * sigma[0] / (sigma[k - 1] - sigma[k])
            assert sine(found.right[:, :k], V[:, :k]) <= found.leading_sine(k) + slack
            assert sine(found.left[:, :k], U[:, :k]) <= found.leading_sine(k) + slack


def test_flat_spectra_are_decomposed_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leading_module, "_WHOLE", (0, 64))
    W = normal(3, 500, 300)
    found = leading_triples(W, 16)
    assert found.method == "gram"
    np.testing.assert_allclose(found.sigma, lapack(W)[1], rtol=1e-12)


@pytest.mark.parametrize("seed", range(12))
def test_bounds_hold_for_clusters_across_the_cut(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leading_module, "_WHOLE", (0, 64))
    draw = np.random.default_rng(seed)
    m, n = ((300, 300), (500, 260), (260, 500))[seed % 3]
    p, k, cluster = min(m, n), int(draw.choice([1, 4, 8, 16])), int(draw.integers(2, 40))
    near = 1 + 10 ** -draw.uniform(2, 10) * draw.uniform(0, 1, cluster)
    rest = draw.uniform(0.1, 0.9) * np.arange(1, p - cluster + 1) ** -draw.uniform(0.3, 2)
    W = with_spectrum(list(np.sort(np.concatenate([near, rest]))[::-1]), m, n).float()
    found = leading_triples(W, k)
    _, sigma, V = lapack(W.double())
    errors = np.abs(found.sigma.numpy()[: k + 1] - sigma[: k + 1])
    assert bool((errors <= found.sigma_error.numpy()[: k + 1] + LAPACK).all())
    if (bound := found.leading_sine(k)) < 1.0:
        assert sine(found.right[:, :k], V[:, :k]) <= bound + LAPACK / (sigma[k - 1] - sigma[k])


@pytest.mark.slow
@pytest.mark.parametrize("k", [16, 18])
def test_sparse_steps_of_equal_size_are_all_counted(k: int) -> None:
    """Isolated entries that moved by whole bf16 steps repeat singular values exactly."""
    n = 2304
    values = np.concatenate([8 * np.ones(20), 7 * np.ones(10), 5 * np.ones(300), 4 * np.ones(1500)])
    draw = np.random.default_rng(5)
    W = torch.zeros(n, n)
    rows, cols = (torch.from_numpy(draw.permutation(n)[: len(values)]) for _ in range(2))
    W[rows, cols] = torch.from_numpy(values * draw.choice([-1.0, 1.0], len(values))).float()
    found = leading_triples(W.bfloat16(), k)
    assert bool(((found.sigma[: k + 1] - 8).abs() <= found.sigma_error[: k + 1] + 1e-12).all())
    assert found.leading_sine(k) == 1.0


def test_leading_triples_name_their_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leading_module, "_WHOLE", (0, 64))
    assert leading_triples(normal(1, 400, 24) @ normal(2, 24, 300), 8).method == "krylov"
    assert leading_triples(normal(1, 400, 300), 80).method != "krylov", "as many as a quarter: decomposed whole"
    with pytest.raises(ValueError, match="sigma_10"):
        leading_triples(normal(1, 400, 24) @ normal(2, 24, 300), 8).following(9)


@pytest.mark.parametrize("largest", [False, True])
@pytest.mark.parametrize("alpha", [0.05, 0.3, 0.5, 0.999])
@pytest.mark.parametrize("kind", ["continuous", "tied", "wide range", "zeros"])
def test_streamed_selection_cuts_where_sorting_does(kind: str, alpha: float, largest: bool) -> None:
    score = {
        "continuous": normal(1, 61, 37).abs(),
        "tied": (3 * normal(1, 61, 37)).round().abs(),
        "wide range": torch.exp(40 * normal(1, 61, 37)),
        "zeros": (normal(1, 61, 37).clamp(min=0)),
    }[kind]

    def blocks() -> Iterator[torch.Tensor]:
        return iter(score.split(10))

    split = split_at_share(blocks, tuple(score.shape), alpha, largest)
    quota, ordered = alpha * score.numel(), torch.sort(score.reshape(-1), descending=largest).values
    cut = ordered[min(int(quota), score.numel() - 1)]
    inside = score > cut if largest else score < cut
    assert torch.equal(split.inside, inside)
    assert torch.equal(split.tied, score == cut)
    assert split.share == pytest.approx((quota - int(inside.sum())) / int((score == cut).sum()), abs=1e-12)
    assert split.doubtful(torch.ones_like(score, dtype=torch.bool)) == 0
    near = split_at_share(blocks, tuple(score.shape), alpha, largest, margin=0.05)
    expected = int(((score - cut).abs() <= 0.05).sum())
    assert near.doubtful(torch.ones_like(score, dtype=torch.bool)) == (0 if expected == 1 else expected)
    assert torch.equal(near.inside, inside)


@pytest.mark.parametrize("spread", [0.0, 1e-9, 1e-5])
@pytest.mark.parametrize("copies", [17, 24, 40])
def test_values_repeated_more_often_than_the_block_are_not_missed(
    copies: int, spread: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leading_module, "_WHOLE", (0, 64))
    spectrum = np.concatenate([2.0 + spread * np.arange(copies)[::-1], 0.5 * np.arange(1, 261 - copies) ** -0.5])
    W = with_spectrum(list(spectrum), 300, 260)
    found = leading_triples(W, 16)
    assert found.following(16) == pytest.approx(spectrum[16], rel=1e-6)
    if spread == 0.0:
        assert found.leading_sine(16) == 1.0, "sixteen directions of more equal ones are not unique"


@pytest.mark.parametrize("shape", SHAPES)
def test_a_difference_is_decomposed_as_if_it_were_held(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leading_module, "_WHOLE", (0, 64))
    monkeypatch.setattr(leading_module, "_SHARE", 0.9)
    before = planted("power law", shape).bfloat16()
    after = (before.double() + planted("power law", shape).flip(0)).bfloat16()
    for decay in (0.0, 0.3):
        lazy = Difference(after, before, decay)
        held = lazy[:]
        expected = after.double() - before.double() - decay * before.double()
        torch.testing.assert_close(held, expected, rtol=1e-14, atol=1e-18)
        assert torch.equal(lazy[3:7, 2:5], held[3:7, 2:5])
        assert torch.equal(decompose(lazy, 8).sigma, decompose(held, 8).sigma)
        found = leading_triples(lazy, 8)
        assert found.method == "krylov"
        assert torch.equal(found.right, leading_triples(held, 8).right)
        assert frobenius(lazy) == frobenius(held)
    with pytest.raises(ValueError, match="not finite"):
        leading_triples(Difference(torch.full((90, 90), math.inf), torch.zeros(90, 90)), 2)


def test_large_matrices_are_converted_in_every_step_and_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leading_module, "_WHOLE", (0, 64))
    W = UPDATES["power law"](500, 300)
    held = leading_triples(W, 4)
    monkeypatch.setattr(leading_module, "_HELD", 0)
    streamed = leading_triples(W, 4)
    assert held.method == streamed.method == "krylov"
    np.testing.assert_allclose(streamed.sigma, held.sigma, rtol=1e-12)
    assert sine(streamed.right, held.right.numpy()) < held.leading_sine(4) + streamed.leading_sine(4)


def test_norms_of_tiny_and_huge_matrices_neither_vanish_nor_overflow() -> None:
    for size in (1e-200, 1e-3, 1e200):
        norm, error = frobenius(size * normal(5, 40, 30))
        assert norm == pytest.approx(size * float(torch.linalg.matrix_norm(normal(5, 40, 30))), rel=1e-13)
        assert 0 < error < 1e-13 * norm
    assert frobenius(torch.zeros(4, 3)) == (0.0, 0.0)


def test_angles_in_row_blocks_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    Q0 = torch.linalg.qr(normal(1, 400, 12)).Q
    for size in (1e-9, 1e-4, 3.0):
        Q1 = torch.linalg.qr(Q0 + size * normal(2, 400, 12)).Q
        whole = principal_angles(Q0, Q1)
        monkeypatch.setattr(angles_module, "_ENTRIES", 12 * 30)
        np.testing.assert_allclose(principal_angles(Q0, Q1), whole, rtol=1e-6, atol=1e-14)
        monkeypatch.undo()
        expected = np.rad2deg(np.sort(subspace_angles(Q0.numpy(), Q1.numpy())))
        np.testing.assert_allclose(whole, expected, rtol=1e-6, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_magnitudes_made_where_they_are_sliced(dtype: torch.dtype) -> None:
    W = normal(7, 41, 29).to(dtype)
    lazy, held = Magnitudes(W), magnitude_bins(W)
    assert torch.equal(lazy[:], held)
    assert torch.equal(lazy[5:9, 3:], held[5:9, 3:])
    where = W > 0.3
    for chosen in (None, where):
        assert (count_bins(lazy, chosen) == count_bins(held, chosen)).all()
