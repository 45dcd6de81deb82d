"""The closed forms of the nulls against what draws of the same null model actually score."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from geopd.diagnostics import CATALOGUE, Comparison, OriginMatrix, Parameters, Rank, UpdateSubspace
from geopd.results import Null
from geopd.spectral import decompose
from prescribed import normal, orthogonal

SIZES = (2e-6, 1e-5, 8e-5, 5e-4)
SHAPE = (500, 400)
PARAMETERS = Parameters(Rank("32"), Rank("16"), (0.5, 0.3))
DIAGNOSTIC = {metric: diagnostic for diagnostic in CATALOGUE for metric in diagnostic.metrics}


def nulls(comparison: Comparison, metric: str) -> dict[tuple[str, str], Null]:
    return {(item.setting, item.null): item for item in DIAGNOSTIC[metric].nulls(comparison) if item.metric == metric}


def values(comparison: Comparison, metric: str) -> dict[str, float]:
    found = DIAGNOSTIC[metric].measure(comparison)
    return {item.setting: item.value for item in found if item.metric == metric and item.value is not None}


def weights(regime: str) -> Tensor:
    W0 = 0.02 * normal(1, *SHAPE)
    return {"on-grid": W0.bfloat16(), "on-grid, wide": W0.bfloat16().float()}.get(regime, W0.float())


def drawn(regime: str, size: float, seed: int) -> Comparison:
    """A Gaussian update of one of the two rounding regimes."""
    W0 = weights(regime)
    W1 = W0.double() + size * normal(seed, *SHAPE)
    stored = W1.bfloat16() if regime in ("on-grid", "off-grid, saved narrow") else W1.float()
    return Comparison(OriginMatrix(W0, PARAMETERS), stored)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("regime", ["on-grid", "on-grid, wide", "off-grid"])
def test_gaussian_sparsity(regime: str, size: float) -> None:
    comparison = drawn(regime, size, seed=2)
    value, (null,) = values(comparison, "update_sparsity"), nulls_of_view(comparison, "update_sparsity", "bf16")
    density = 1 - value["eta=0.001;view=bf16"]
    assert null.sd is not None
    # on the grid s is solved from the stored energy, whose formula is good to 3%, and density moves with s
    model = {"on-grid": 0.03 * density, "on-grid, wide": 2e-4, "off-grid": 0.013 * density}[regime]
    assert abs((1 - null.mean) - density) <= 4 * null.sd + model
    form = "both ends" if regime == "off-grid" else "on-grid"
    assert null.method == f"closed form, {form}, energy-matched"
    assert density > 0


def nulls_of_view(comparison: Comparison, metric: str, view: str) -> list[Null]:
    return [item for (setting, _), item in nulls(comparison, metric).items() if f"view={view}" in setting]


@pytest.mark.parametrize("size", SIZES)
def test_gaussian_sparsity_of_weights_as_stored(size: float) -> None:
    comparison = drawn("off-grid", size, seed=3)
    (null,) = nulls_of_view(comparison, "update_sparsity", "native")
    assert null.sd is not None
    assert abs(null.mean - values(comparison, "update_sparsity")["eta=0.001;view=native"]) <= 5 * null.sd + 2e-4


@pytest.mark.parametrize("size", [8e-5, 5e-4])
def test_gaussian_sparsity_of_a_wide_origin_saved_narrow(size: float) -> None:
    comparison = drawn("off-grid, saved narrow", size, seed=4)
    (null,) = nulls_of_view(comparison, "update_sparsity", "bf16")
    density = 1 - values(comparison, "update_sparsity")["eta=0.001;view=bf16"]
    assert abs(1 - null.mean - density) <= 0.06 * density


def test_standard_deviation_of_the_gaussian_sparsity() -> None:
    found = [drawn("on-grid, wide", 1e-5, seed) for seed in range(10, 30)]
    spread = np.std([values(c, "update_sparsity")["eta=0.001;view=bf16"] for c in found], ddof=1)
    (null,) = nulls_of_view(found[0], "update_sparsity", "bf16")
    assert spread == pytest.approx(null.sd, rel=4 / math.sqrt(2 * 19))


@pytest.mark.parametrize("magnitude", [2.0**-6, 1.5 * 2.0**-6])
def test_the_step_towards_zero_is_half_as_long_at_a_power_of_two(magnitude: float) -> None:
    W0 = magnitude * normal(30, *SHAPE).sign().float()
    comparison = Comparison(OriginMatrix(W0, PARAMETERS), (W0.double() + 2.0**-15 * normal(31, *SHAPE)).float())
    (null,) = nulls_of_view(comparison, "update_sparsity", "bf16")
    assert null.sd is not None
    assert abs(null.mean - values(comparison, "update_sparsity")["eta=0.001;view=bf16"]) <= 4 * null.sd


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("regime", ["on-grid", "off-grid"])
def test_gaussian_overlaps_are_density_matched(regime: str, size: float) -> None:
    comparison = drawn(regime, size, seed=5)
    for metric, model in (("low_magnitude_overlap", 0.004), ("principal_overlap", 0.002)):
        value, null = values(comparison, metric), nulls(comparison, metric)
        for setting in (name for name in value if "view=bf16" in name):
            gaussian = null[setting, "gaussian"]
            assert gaussian.sd is not None
            assert abs(gaussian.mean - value[setting]) <= 5 * gaussian.sd + model, (metric, setting)


def test_the_gaussian_null_is_far_from_alpha_for_small_updates() -> None:
    """Rounding alone gives a small update its bias towards low magnitudes."""
    comparison = drawn("on-grid", 2e-6, seed=6)
    low = nulls(comparison, "low_magnitude_overlap")["alpha=0.5;eta=0.001;view=bf16", "gaussian"]
    principal = nulls(comparison, "principal_overlap")["alpha=0.5;eta=0.001;rank=16;view=bf16", "gaussian"]
    assert low.mean > 0.95
    assert principal.sd is not None
    assert principal.mean < 0.5 - 4 * principal.sd


@pytest.mark.parametrize("alpha", [0.5, 0.3])
@pytest.mark.parametrize("metric", ["low_magnitude_overlap", "principal_overlap"])
def test_a_uniform_random_mask_scores_alpha_under_massive_ties(metric: str, alpha: float) -> None:
    generator = torch.Generator().manual_seed(8)
    levels = torch.tensor([0.25, 0.5, 0.5, 1.0, 2.0, 4.0])
    W0 = levels[torch.randint(0, 6, (60, 40), generator=generator)].bfloat16()
    origin = OriginMatrix(W0, Parameters(principal_rank=Rank("64"), alphas=(alpha,)))
    scored = []
    for _ in range(200):
        changed = torch.rand(W0.shape, generator=generator) < 0.1
        (value,) = values(Comparison(origin, torch.where(changed, -W0, W0)), metric).values()
        scored.append(value)
    error = np.std(scored, ddof=1) / math.sqrt(len(scored))
    assert abs(np.mean(scored) - alpha) <= 4 * error
    null = nulls(Comparison(origin, -W0), metric)
    assert {item.mean for (_, name), item in null.items() if name == "random_mask"} == {alpha}


def test_the_random_mask_has_the_hypergeometric_spread() -> None:
    generator = torch.Generator().manual_seed(9)
    W0 = normal(10, 60, 40).float()
    origin = OriginMatrix(W0, Parameters(alphas=(0.3,)))
    scored = []
    for _ in range(300):
        changed = torch.zeros(W0.numel(), dtype=torch.bool)
        changed[torch.randperm(W0.numel(), generator=generator)[:800]] = True
        comparison = Comparison(origin, torch.where(changed.reshape(W0.shape), -W0, W0))
        scored.append(values(comparison, "low_magnitude_overlap")["alpha=0.3;eta=0.001;view=native"])
    null = nulls(comparison, "low_magnitude_overlap")["alpha=0.3;eta=0.001;view=native", "random_mask"]
    assert abs(np.mean(scored) - null.mean) <= 4 * np.std(scored) / math.sqrt(300)
    assert np.std(scored, ddof=1) == pytest.approx(null.sd, rel=4 / math.sqrt(600))


def test_permuted_principal_overlap() -> None:
    """Against actual permutations of the changes among entries of equal bf16 magnitude."""
    rng = np.random.default_rng(11)
    W0 = (torch.round(40 * normal(12, 50, 40)) / 40).bfloat16()
    parameters = Parameters(principal_rank=Rank("4"), alphas=(0.3,))
    origin = OriginMatrix(W0, parameters)
    # changes that prefer the principal mask, so that the null has something to take away
    reconstruction = torch.cat(list(origin.reconstruction_blocks()))
    changed = (reconstruction > reconstruction.median()) & (normal(13, 50, 40) > 0)
    observed = Comparison(origin, torch.where(changed, -2 * W0 - 1, W0))
    name = "alpha=0.3;eta=0.001;rank=4;view=bf16"
    null = nulls(observed, "principal_overlap")[name, "permuted"]
    magnitude, flat = W0.double().abs().reshape(-1).numpy(), changed.reshape(-1).numpy()
    groups = [np.flatnonzero(magnitude == level) for level in np.unique(magnitude)]
    scored = []
    for _ in range(150):
        moved = flat.copy()
        for group in groups:
            moved[group] = rng.permutation(flat[group])
        mask = torch.from_numpy(moved).reshape(W0.shape)
        scored.append(values(Comparison(origin, torch.where(mask, -2 * W0 - 1, W0)), "principal_overlap")[name])
    assert null.sd is not None
    assert abs(np.mean(scored) - null.mean) <= 4 * null.sd / math.sqrt(150)
    assert np.std(scored, ddof=1) == pytest.approx(null.sd, rel=4 / math.sqrt(300))
    assert values(observed, "principal_overlap")[name] > null.mean + 10 * null.sd


@pytest.mark.parametrize("side", ["left", "right"])
def test_energy_in_the_leading_subspaces(side: str) -> None:
    origin = OriginMatrix(normal(14, 40, 24), Parameters(rotation_k=Rank("6")))
    metric = f"principal_energy_{side}"
    scored = []
    for seed in range(200):
        comparison = Comparison(origin, origin.stored + 1e-3 * normal(100 + seed, 40, 24))
        scored.append(values(comparison, metric)["k=6;view=native"])
    null = nulls(comparison, metric)["k=6;view=native", "gaussian"]
    assert null.mean == pytest.approx(6 / (40 if side == "left" else 24))
    assert abs(np.mean(scored) - null.mean) <= 4 * np.std(scored) / math.sqrt(200)
    assert np.std(scored, ddof=1) == pytest.approx(null.sd, rel=4 / math.sqrt(400))


def test_similarity_of_independent_subspaces() -> None:
    n, k = 24, 5
    parameters = Parameters(similarity_k=(k,))
    origin = OriginMatrix(torch.zeros(30, n, dtype=torch.float64), parameters)
    scored = []
    for seed in range(200):
        now, end = (normal(s, 30, n) for s in (2 * seed, 2 * seed + 1))
        comparison = Comparison(origin, now, UpdateSubspace(decompose(end, k)))
        scored.append(values(comparison, "subspace_similarity")[f"k={k};view=native"])
    null = nulls(comparison, "subspace_similarity")[f"k={k};view=native", "gaussian"]
    assert null.mean == k / n
    assert abs(np.mean(scored) - null.mean) <= 4 * np.std(scored) / math.sqrt(200)
    assert np.std(scored, ddof=1) == pytest.approx(null.sd, rel=4 / math.sqrt(400))


@pytest.mark.parametrize("shape", [(400, 300), (200, 600)])
def test_stable_rank_of_a_homogeneous_update(shape: tuple[int, int]) -> None:
    origin = OriginMatrix(torch.zeros(shape, dtype=torch.float64), Parameters())
    comparison = Comparison(origin, normal(15, *shape))
    null = nulls(comparison, "stable_rank")["view=native", "gaussian"]
    assert values(comparison, "stable_rank")["view=native"] == pytest.approx(null.mean, rel=0.04)
    low = Comparison(origin, orthogonal(1, shape[0], 3) @ orthogonal(2, shape[1], 3).T)
    assert values(low, "stable_rank")["view=native"] == pytest.approx(3.0)


@pytest.mark.parametrize("size", [1e-160, 1e-200, 1e-300])
def test_vanishing_updates_have_nulls_without_underflow(size: float) -> None:
    W0 = normal(16, 20, 10)
    comparison = Comparison(OriginMatrix(size * W0, Parameters(Rank("4"))), size * (W0 + 1e-3 * normal(17, 20, 10)))
    for diagnostic in CATALOGUE:
        diagnostic.measure(comparison)
        for null in diagnostic.nulls(comparison):
            assert math.isfinite(null.mean)


def test_weights_beyond_the_range_of_bf16_are_measured_without_a_closed_form() -> None:
    W0 = 1e200 * normal(18, 20, 10)
    comparison = Comparison(OriginMatrix(W0, Parameters(Rank("4"))), W0 * 1.5)
    assert values(comparison, "update_sparsity")["eta=0.001;view=native"] == 0.0
    for diagnostic in CATALOGUE:
        for null in diagnostic.nulls(comparison):
            assert math.isfinite(null.mean)


def test_float16_weights_are_not_rounded_to_bf16_when_they_are_stored() -> None:
    W0 = (0.02 * normal(19, *SHAPE)).half()
    comparison = Comparison(OriginMatrix(W0, PARAMETERS), (W0.double() + 3e-5 * normal(20, *SHAPE)).half())
    (null,) = nulls_of_view(comparison, "update_sparsity", "bf16")
    density = 1 - values(comparison, "update_sparsity")["eta=0.001;view=bf16"]
    assert abs(1 - null.mean - density) <= 0.03 * density


@pytest.mark.parametrize("size", [1e-5, 5e-5])
def test_bf16_numbers_stored_wider_have_the_null_of_bf16(size: float) -> None:
    narrow = drawn("on-grid", size, seed=2)
    wide = Comparison(OriginMatrix(narrow.origin.stored.float(), PARAMETERS), narrow.stored.float())
    (expected,) = nulls(narrow, "update_sparsity").values()
    found = {name: null.mean for (name, _), null in nulls(wide, "update_sparsity").items()}
    assert found == {f"eta=0.001;view={view}": expected.mean for view in ("bf16", "native")}
