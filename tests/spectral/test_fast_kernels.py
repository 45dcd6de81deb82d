"""The fast paths against float64 LAPACK: values, vectors and bounds, on spectra that provoke each path and fallback."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles

from geopd.spectral import decompose, leading_triples, singular_values, split_at_share, split_blocks
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


@pytest.mark.parametrize("k", [4, 16])
@pytest.mark.parametrize(
    "update",
    ["low rank", "low rank and noise", "power law", "rank below k", "noise"],
)
def test_leading_triples_without_the_rest(update: str, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leading_module, "_WHOLE", (0, 64))  # let the iteration run at a size that LAPACK checks quickly
    m, n = 500, 300
    low = normal(1, m, 24) @ normal(2, 24, n)
    W = {
        "low rank": low,
        "low rank and noise": 0.05 * low + normal(3, m, n),
        "power law": with_spectrum(list(np.arange(1, n + 1) ** -0.5), m, n),
        "rank below k": 1e-5 * normal(1, m, 3) @ normal(2, 3, n),
        "noise": normal(3, m, n),
    }[update]
    for matrix in (W, W.T.contiguous()):
        found = leading_triples(matrix, k)
        U, sigma, V = lapack(matrix)
        rank = min(k, 3) if update == "rank below k" else k
        held = found.sigma.numpy()
        assert len(held) > k
        assert bool(
            (np.abs(held[: k + 1] - sigma[: k + 1]) <= found.sigma_error.numpy()[: k + 1] + LAPACK * sigma[0]).all()
        )
        np.testing.assert_allclose(held[:rank], sigma[:rank], rtol=1e-12)
        assert (found.rank >= k) == (rank == k)
        if rank == k:
            slack = LAPACK * sigma[0] / (sigma[k - 1] - sigma[k])
            assert sine(found.right[:, :k], V[:, :k]) <= found.leading_sine(k) + slack
            assert sine(found.left[:, :k], U[:, :k]) <= found.leading_sine(k) + slack


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

    cut, share = split_blocks(blocks, score.numel(), alpha, largest)
    whole = split_at_share(score, alpha, largest)
    assert share == pytest.approx(whole.share, abs=1e-12)
    assert torch.equal(score == cut, whole.tied)
    assert torch.equal(score > cut if largest else score < cut, whole.inside)


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
