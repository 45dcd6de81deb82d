"""Stable rank and Hill index of noise: the closed forms against the spectra of actual draws."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from planted_updates import PARAMETERS, compare, planted, stable_rank, structure, weights

from geopd.diagnostics import CATALOGUE, Comparison, OriginMatrix, Parameters, Rank, noise_nulls
from geopd.diagnostics.bf16_grid import units
from geopd.diagnostics.noise_nulls import nulls_hill, nulls_stable_rank
from geopd.diagnostics.noise_spectrum import NoiseSpectrum, Scales, first_square, positions
from geopd.results import Null
from geopd.spectral import magnitude_bins
from prescribed import generator

N = 320
SHAPES = [(N, N), (400, 200), (150, 500)]


def profile(kind: str, m: int, n: int) -> np.ndarray:
    """Variances of the entries."""
    if kind == "two scales":  # four columns far above the rest: a gap in the spectrum
        scales = np.append(np.full(4, 400.0), np.ones(n - 4))
        return np.outer(np.random.default_rng(3).lognormal(0, 0.5, m), scales)
    W = weights("columns" if kind == "both" else kind, m, n)
    if kind == "both":
        W *= torch.exp(0.5 * torch.randn(m, 1, generator=generator(3), dtype=torch.float64))
    return units(magnitude_bins(W.bfloat16())).numpy() ** 2


def drawn(v: np.ndarray, draws: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.array([np.linalg.svd(np.sqrt(v) * rng.standard_normal(v.shape), compute_uv=False) for _ in range(draws)])


def hill_of(sigma: np.ndarray, k: int) -> float:
    return float((k - 1) / np.log(sigma[: k - 1] / sigma[k - 1]).sum())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("kind", "within"), [("plain", 0.03), ("columns", 0.1), ("rows", 0.1), ("both", 0.15), ("two scales", 0.1)]
)
def test_leading_singular_values_of_noise(kind: str, within: float, shape: tuple[int, int]) -> None:
    v = profile(kind, *shape)
    noise = NoiseSpectrum(v.sum(axis=1), v.sum(axis=0), 32)
    sigma = drawn(v, 6)
    squares = noise.leading(positions(32))
    assert squares is not None
    assert squares[0] * v.sum() == pytest.approx(float((sigma[:, 0] ** 2).mean()), rel=within)
    ours = np.sqrt(squares * v.sum())
    assert ours[1:] == pytest.approx(sigma.mean(axis=0)[1:32], rel=0.12)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "columns", "rows", "both"])
@pytest.mark.parametrize("shape", [(1024, 1024), (512, 1536)], ids=str)
def test_the_nulls_keep_to_their_limits_at_size(kind: str, shape: tuple[int, int]) -> None:
    """Stable rank within 2% (entries alike) and 10%, Hill within its spread and 5%, at every k of the sweep."""
    v = profile(kind, *shape)
    noise = NoiseSpectrum(v.sum(axis=1), v.sum(axis=0), 64)
    sigma = drawn(v, 4)
    ranks = (sigma**2).sum(axis=1) / sigma[:, 0] ** 2
    assert 1 / first_square(noise)[0] == pytest.approx(ranks.mean(), rel=0.02 if kind == "plain" else 0.1)
    for k in (8, 16, 32, 64):
        squares = noise.leading(positions(k))
        assert squares is not None
        found = np.array([hill_of(row, k) for row in sigma])
        assert hill_of(np.sqrt(squares), k) == pytest.approx(found.mean(), rel=0.05 + 1.5 / k), k


def test_the_edge_of_entries_alike_is_known() -> None:
    for m, n in ((300, 300), (1000, 50), (40, 700)):
        noise = NoiseSpectrum(np.full(m, n), np.full(n, m), 4)
        assert noise.edge * m * n == pytest.approx((math.sqrt(m) + math.sqrt(n)) ** 2, rel=1e-9)
    # constant row and column sums are enough
    v = np.kron(np.array([[64.0, 1.0], [1.0, 64.0]]), np.ones((200, 150)))
    noise = NoiseSpectrum(v.sum(axis=1), v.sum(axis=0), 4)
    sigma = drawn(v, 4)
    assert 1 / first_square(noise)[0] == pytest.approx(
        (sigma**2).sum(axis=1).mean() / (sigma[:, 0] ** 2).mean(), rel=0.03
    )


def test_counts_are_those_of_the_quarter_circle_law() -> None:
    """Square noise: sigma / sqrt n has density sqrt(4 - x^2) / pi on [0, 2]."""
    n = 1000
    noise = NoiseSpectrum(np.full(n, n), np.full(n, n), 400)
    count = np.array([1.0, 10.0, 100.0, 350.0])
    squares = noise.leading(count)
    assert squares is not None
    x = np.sqrt(squares * n)
    above = 1 - (x * np.sqrt(4 - x**2) / 2 + 2 * np.arcsin(x / 2)) / math.pi
    assert above * n == pytest.approx(count, rel=1e-3)


def test_spreads_are_those_of_draws() -> None:
    m, n = 200, 150
    sigma = drawn(np.ones((m, n)), 200)
    noise = NoiseSpectrum(np.full(m, n), np.full(n, m), 64)
    ranks = (sigma**2).sum(axis=1) / sigma[:, 0] ** 2
    square, sd = first_square(noise)
    assert 1 / square == pytest.approx(ranks.mean(), rel=0.01)
    assert sd == pytest.approx(ranks.std(ddof=1) / ranks.mean(), rel=0.2)
    W = weights("plain", m, n)
    item = compare(W, W + 1e-3 * structure("white", W), Parameters(Rank("p/8"), Rank("16"), hill_k=(4, 8, 16, 32)))
    for k, null in zip((4, 8, 16, 32), nulls_hill(item), strict=True):
        found = np.array([hill_of(row, k) for row in sigma])
        assert null.mean == pytest.approx(found.mean(), rel=0.05), k
        assert null.sd == pytest.approx(found.std(ddof=1), rel=0.25), k


def by_name(nulls: list[Null]) -> dict[str, Null]:
    return {null.null: null for null in nulls if null.is_default}


@pytest.mark.parametrize("of", ["plain", "columns"])
@pytest.mark.parametrize("shape", [(N, N), (400, 200)], ids=str)
def test_rounding_nulls_against_dense_draws(of: str, shape: tuple[int, int]) -> None:
    W = weights(of, *shape)
    item = planted(W, 1e-5 * structure("rank 16", W), "one end")
    u = units(magnitude_bins(item.origin.stored))
    spectra = [
        torch.linalg.svdvals(u * (torch.rand(shape, generator=generator(50 + i)).double() - 0.5)) for i in range(6)
    ]
    ranks = [float(sigma.square().sum() / sigma[0] ** 2) for sigma in spectra]
    rank, hill = (by_name(found)["rounding"] for found in (nulls_stable_rank(item), nulls_hill(item)))
    assert rank.mean == pytest.approx(np.mean(ranks), rel=0.03 if of == "plain" else 0.09)
    tails = [hill_of(sigma.numpy(), 16) for sigma in spectra]
    assert hill.mean == pytest.approx(np.mean(tails), rel=0.12)
    homogeneous = shape[0] * shape[1] / (math.sqrt(shape[0]) + math.sqrt(shape[1])) ** 2
    assert (rank.mean > 0.9 * homogeneous) == (of == "plain")


@pytest.mark.parametrize(("of", "within"), [("plain", 0.06), ("columns", 0.12)])  # few columns: draws differ more
def test_an_update_below_every_step_reads_as_the_rounding_null(of: str, within: float) -> None:
    W = weights(of, N, N)
    item = planted(W, 1e-6 * structure("rank 16", W), "one end")
    assert stable_rank(item.update()) == pytest.approx(by_name(nulls_stable_rank(item))["rounding"].mean, rel=within)


@pytest.mark.parametrize("of", ["plain", "columns", "rows"])
@pytest.mark.parametrize(
    ("form", "sizes"), [("on-grid", (5e-5, 2e-4)), ("one end", (1e-5, 5e-5, 2e-4)), ("wide", (1e-5,))]
)
def test_a_gaussian_update_scores_its_null_whatever_the_scales_of_the_weights(
    of: str, form: str, sizes: tuple[float, ...]
) -> None:
    """Column-scaled weights off the grid: mn/(sqrt m + sqrt n)^2 would be 3 to 6 times too large at 1e-5."""
    W = weights(of, N, N)
    for size in sizes:
        items = [planted(W, size * structure("white", W, seed), form) for seed in (1, 2, 3)]
        spectra = [torch.linalg.svdvals(item.update() / size).numpy() for item in items]
        rank, hill = (by_name(found)["gaussian"] for found in (nulls_stable_rank(items[0]), nulls_hill(items[0])))
        scored = np.mean([(sigma**2).sum() / sigma[0] ** 2 for sigma in spectra])
        assert rank.mean == pytest.approx(scored, rel=0.04 if of == "plain" else 0.13), size
        assert hill.mean == pytest.approx(np.mean([hill_of(sigma, 16) for sigma in spectra]), rel=0.15), size
        assert (rank.draws, hill.draws) == (0, 0)


def test_no_gaussian_null_for_a_few_entries_or_for_nothing_but_rounding() -> None:
    W = weights("plain", 100, 80)
    few = planted(W, 1e-6 * structure("white", W), "on-grid")
    assert not few.update_is_zero
    assert set(by_name(nulls_stable_rank(few))) == {"rounding"}
    below = planted(W, 1e-9 * structure("white", W), "one end")
    steps = float(units(magnitude_bins(W)).square().sum()) / 12
    assert (below.update_norm[0] ** 2 < steps) == (set(by_name(nulls_stable_rank(below))) == {"rounding"})
    assert nulls_stable_rank(compare(W, W.clone())) == nulls_hill(compare(W, W.clone())) == []
    column = weights("plain", 100, 1)
    assert nulls_stable_rank(compare(column, column + 1e-3)) == []


def test_no_hill_null_beyond_the_values_that_noise_has() -> None:
    W = weights("plain", 24, 20)
    item = compare(W, W + 1e-3 * structure("white", W), Parameters(Rank("4"), Rank("4"), hill_k=(8, 20)))
    assert next(null.setting for null in nulls_hill(item)) == "k=8;view=native"
    flat = compare(W, W + 1e-3 * torch.eye(24, 20), Parameters(Rank("4"), Rank("4"), hill_k=(8,)))
    assert nulls_hill(flat) == [], "the update itself has no Hill index"


def test_the_rounding_null_is_made_once_for_all_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    W = weights("columns", 60, 50)
    before = OriginMatrix(W.bfloat16(), PARAMETERS)
    first, second = (Comparison(before, (W.bfloat16().double() + s).bfloat16()) for s in (1e-3, 2e-3))
    one = by_name(nulls_stable_rank(first))["rounding"]
    monkeypatch.setattr(noise_nulls.StepCounts, "of", lambda *_: pytest.fail("counted again"))
    assert by_name(nulls_stable_rank(second))["rounding"] == one
    monkeypatch.undo()
    assert by_name(nulls_stable_rank(compare(W.bfloat16(), (W + 1e-3).bfloat16())))["rounding"] == one


def test_groups_keep_the_energy_and_the_largest_scales() -> None:
    v = np.random.default_rng(0).lognormal(0, 2, 500)
    found = Scales.of(v)
    assert len(found.value) == 48
    assert found.value @ found.count == pytest.approx(v.sum())
    assert found.count.sum() == 500
    assert found.value[:16].tolist() == np.sort(v)[::-1][:16].tolist()
    assert Scales.of(np.array([1.0, 0.0, 2.0])).value.tolist() == [2.0, 1.0]
    assert Scales.of(v[:50]).count.sum() == 50


def test_the_catalogue_stores_the_nulls_of_noise() -> None:
    W = weights("plain", 100, 80)
    item = planted(W, 1e-4 * structure("white", W), "on-grid")
    for metric in ("stable_rank", "hill_tail"):
        diagnostic = next(d for d in CATALOGUE if metric in d.metrics)
        assert {null.null for null in diagnostic.nulls(item)} == {"gaussian", "rounding"}
