"""Stable rank and Hill index of noise: the closed forms against the spectra of actual draws."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from planted_updates import PARAMETERS, compare, planted, stable_rank, structure, weights

from geopd.diagnostics import CATALOGUE, Comparison, OriginMatrix, Parameters, Rank, noise_nulls, noise_spectrum
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


def stable_rank_of(noise: NoiseSpectrum) -> float:
    first = first_square(noise)
    assert first is not None
    return 1 / first[0]


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
    assert stable_rank_of(noise) == pytest.approx(ranks.mean(), rel=0.02 if kind == "plain" else 0.1)
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
    assert stable_rank_of(noise) == pytest.approx((sigma**2).sum(axis=1).mean() / (sigma[:, 0] ** 2).mean(), rel=0.03)


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
    first = first_square(noise)
    assert first is not None
    square, sd = first
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
    # an origin off the grid by this part of every step, and one entry in ten by enough to change in bf16: uniform
    # rounding has the energy of .29 of a step
    grid = W.bfloat16().double()
    u = units(magnitude_bins(grid))
    for part, names in ((0.2, {"rounding"}), (0.4, {"gaussian", "rounding"})):
        moved = part * u
        moved[::10] = 0.55 * u[::10]
        item = compare(grid - moved * grid.sign(), grid.bfloat16())
        assert int(item.changed_counts("bf16").sum()) > 0.05 * W.numel()
        assert set(by_name(nulls_stable_rank(item))) == names, part
    assert nulls_stable_rank(compare(W, W.clone())) == nulls_hill(compare(W, W.clone())) == []
    column = weights("plain", 100, 1)
    assert nulls_stable_rank(compare(column, column + 1e-3)) == []


def test_no_hill_null_beyond_the_values_that_noise_has() -> None:
    W = weights("plain", 64, 48)
    item = compare(W, W + 1e-3 * structure("white", W), Parameters(Rank("4"), Rank("4"), hill_k=(8, 60)))
    assert [null.setting for null in nulls_hill(item)] == ["k=8;view=native"]
    flat = compare(W, W + 1e-3 * torch.eye(64, 48), Parameters(Rank("4"), Rank("4"), hill_k=(8,)))
    assert nulls_hill(flat) == [], "the update itself has no Hill index"


def test_the_rounding_null_is_made_once_for_all_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    W = weights("plain", 120, 100)
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


def rounded_down(W: torch.Tensor) -> Comparison:
    """A bf16 origin whose update is of two steps an entry: both nulls are asked for."""
    W = W.bfloat16()
    u = units(magnitude_bins(W))
    noise = torch.randn(W.shape, generator=generator(5), dtype=torch.float64)
    return compare(W, (W.double() + 2 * u * noise).bfloat16())


def scaled(rows: dict[int, float], cols: dict[int, float], n: int = 400) -> torch.Tensor:
    W = weights("plain", n, n)
    for i, factor in rows.items():
        W[i] *= factor
    for j, factor in cols.items():
        W[:, j] *= factor
    return W


def outlying_block(side: int, factor: float) -> torch.Tensor:
    W = weights("plain", 400, 400)
    W[:side, :side] *= factor
    return W


OUTSIDE = {
    "2x2": lambda: weights("plain", 2, 2),
    "4x4": lambda: weights("plain", 4, 4),
    "16x16": lambda: weights("plain", 16, 16),
    "one row of 100 times the rest": lambda: scaled({0: 100}, {}),
    "one row and one column": lambda: scaled({0: 100}, {0: 100}),
    "one entry": lambda: outlying_block(1, 2500),
    "5x5": lambda: outlying_block(5, 200),
    "20x20": lambda: outlying_block(20, 8),
    "diagonal": lambda: 5 * torch.eye(400, dtype=torch.float64) + 1e-2 * weights("plain", 400, 400),
}


@pytest.mark.parametrize("of", OUTSIDE)
def test_no_null_where_the_closed_form_does_not_hold(of: str) -> None:
    """Stored, they would be .74 of a stable rank, 101 for 131, Hill 21.7 for 57 or .62 for 1.49."""
    item = rounded_down(OUTSIDE[of]())
    assert [null for null in [*nulls_stable_rank(item), *nulls_hill(item)] if null.null == "rounding"] == []


def test_no_null_of_two_by_two_whatever_it_is_stored_in() -> None:
    W = weights("plain", 2, 2)
    assert nulls_stable_rank(compare(W, W + 1e-3 * structure("white", W))) == []


@pytest.mark.parametrize("of", ["8 rows", "blocks of equal sums", "a large block", "a faint diagonal", "heavy entries"])
def test_where_a_null_is_stored_it_is_near_draws(of: str) -> None:
    n = 300
    W = weights("plain", n, n)
    if of == "8 rows":
        W[:8] *= 10
    elif of == "blocks of equal sums":
        W *= torch.kron(torch.eye(3, dtype=torch.float64) * 9 + 1, torch.ones(100, 100, dtype=torch.float64))
    elif of == "a large block":
        W[:150, :150] *= 4
    elif of == "a faint diagonal":
        W.diagonal().mul_(3)
    else:
        W *= torch.exp(0.3 * torch.randn(n, n, generator=generator(8), dtype=torch.float64))
    item = rounded_down(W)
    u = units(magnitude_bins(item.origin.stored))
    spectra = [
        torch.linalg.svdvals(u * (torch.rand(n, n, generator=generator(60 + i)).double() - 0.5)).numpy()
        for i in range(8)
    ]
    rank, hill = (by_name(found)["rounding"] for found in (nulls_stable_rank(item), nulls_hill(item)))
    assert rank.mean == pytest.approx(np.mean([(sigma**2).sum() / sigma[0] ** 2 for sigma in spectra]), rel=0.1)
    assert hill.mean == pytest.approx(np.mean([hill_of(sigma, 16) for sigma in spectra]), rel=0.2)


def test_the_edge_of_blocks_is_that_of_draws() -> None:
    """80 of 400 rows and columns at 4 times the scale: the product of the sums puts the edge too low."""
    v = np.ones((400, 400))
    v[:80, :80] = 16
    sizes = np.array([80.0, 320.0])
    cells = np.array([[v[:80, :80].sum(), v[:80, 80:].sum()], [v[80:, :80].sum(), v[80:, 80:].sum()]])
    top = float((drawn(v, 8)[:, 0] ** 2).mean()) / v.sum()
    assert noise_spectrum._block_edge(cells / v.sum(), sizes, sizes) == pytest.approx(top, rel=0.08)
    assert noise_spectrum.departure(cells, (sizes, sizes)) > 0.1
    alike = np.outer(sizes, sizes)
    edge = noise_spectrum._block_edge(alike / alike.sum(), sizes, sizes)
    assert edge == pytest.approx(4 / 400, rel=1e-3)
    assert noise_spectrum.departure(alike, (sizes, sizes)) < 1e-12
    assert noise_spectrum.departure(np.pad(alike, 1), (np.pad(sizes, 1), np.pad(sizes, 1))) < 1e-12, "empty groups"


def test_one_value_asked_for_is_followed_far_enough_for_its_spread() -> None:
    one, many = (first_square(NoiseSpectrum(np.full(200, 150), np.full(150, 200), k)) for k in (1, 64))
    assert one is not None
    assert one == pytest.approx(many, rel=1e-3)


def test_no_null_of_a_storage_whose_rounding_is_not_modelled() -> None:
    W = weights("plain", 100, 80).half()
    half = compare(W, (W.double() + 1e-3).half())
    assert nulls_stable_rank(half) == nulls_hill(half) == []


def test_no_null_where_weights_have_no_bf16_step() -> None:
    W = weights("plain", 100, 80)
    W[0, 0] = 1e200
    item = compare(W, weights("plain", 100, 80, seed=1).bfloat16())
    assert nulls_stable_rank(item) == nulls_hill(item) == []


def test_a_null_that_is_none_is_not_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    W = weights("plain", 4, 4)
    item = compare(W, W + 1e-3 * structure("white", W))
    assert nulls_stable_rank(item) == []
    monkeypatch.setattr(noise_nulls, "NoiseSpectrum", lambda *_: pytest.fail("made again"))
    assert nulls_stable_rank(item) == []
