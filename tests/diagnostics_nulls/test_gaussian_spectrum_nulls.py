"""The Gaussian nulls of spectral shift and rotation against what Gaussian updates actually score."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from planted_updates import PARAMETERS, compare
from torch import Tensor

from geopd.diagnostics import Comparison, OriginMatrix, Parameters, Rank, comparison, gaussian_spectrum, rotation
from geopd.diagnostics.gaussian_spectrum import Coupling, gaussian_shift, nulls_rotation, nulls_shift
from geopd.results import Null
from prescribed import normal, power_law, with_spectrum

SPECTRA = ("gaussian", "power law", "half power")


def origin(kind: str, m: int, n: int) -> Tensor:
    if kind == "gaussian":
        return 0.02 * normal(1, m, n)
    W = with_spectrum(power_law(min(m, n), 1.0 if kind == "power law" else 0.5), m, n)
    return W * (0.02 / W.square().mean().sqrt())


def shift(before: Tensor, after: Tensor) -> float:
    sigma = torch.linalg.svdvals(before)
    return float(torch.linalg.vector_norm(torch.linalg.svdvals(after) - sigma) / torch.linalg.vector_norm(sigma))


def test_shift_of_gaussian_updates_at_every_size() -> None:
    """Within 10% plus the draws' own spread (p numbers make the first-order form: sd 1 / sqrt(2 p))."""
    forms = set()
    for kind in SPECTRA:
        for shape in ((160, 160), (256, 128)):
            W = origin(kind, *shape)
            for i, s in enumerate((1e-6, 3e-5, 3e-4, 1e-3, 3e-3, 2e-2)):
                scored = np.mean([shift(W, W + s * normal(700 + 10 * i + j, *shape)) for j in range(3)])
                sigma = torch.linalg.svdvals(W).numpy()
                mean, _, method = gaussian_shift(sigma, max(shape), s)
                assert mean == pytest.approx(scored, rel=0.10 + 3 / math.sqrt(6 * len(sigma))), (kind, shape, s)
                forms.add(method)
    assert forms == {"closed form, first order", "closed form, flow of 8 steps"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("shape", [(512, 512), (512, 256), (200, 400)], ids=str)
def test_shift_within_a_tenth_of_draws(kind: str, shape: tuple[int, int]) -> None:
    W = origin(kind, *shape)
    sigma = torch.linalg.svdvals(W).numpy()
    for i, s in enumerate((1e-6, 5e-5, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 2e-2)):
        scored = np.mean([shift(W, W + s * normal(700 + 10 * i + j, *shape)) for j in range(4)])
        assert gaussian_shift(sigma, max(shape), s)[0] == pytest.approx(scored, rel=0.10), s


def test_a_small_update_follows_the_first_order_form_and_its_spread() -> None:
    W = origin("power law", 120, 90)
    found = [compare(W, W + 1e-6 * normal(seed, 120, 90)) for seed in range(60)]
    scored = [shift(W, item.stored) for item in found]
    (null,) = nulls_shift(found[0])
    s = found[0].update_norm[0] / math.sqrt(120 * 90)
    assert null.mean == pytest.approx(s * math.sqrt(90) / float(torch.linalg.matrix_norm(W)))
    assert null.mean == pytest.approx(np.mean(scored), rel=0.03)
    assert null.sd == pytest.approx(np.std(scored, ddof=1), rel=0.35)
    assert (null.null, null.setting, null.draws) == ("gaussian", "view=native", 0)


def test_grouping_the_tail_of_a_long_spectrum_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    sigma = np.array(power_law(900, 0.5))
    sizes = (1e-4, 1e-3, 3e-3, 1e-2)  # NSS from .0025 to 3
    grouped = [gaussian_shift(sigma, 1200, s)[0] for s in sizes]
    monkeypatch.setattr(gaussian_spectrum, "_GROUPED", 10_000)
    assert grouped == pytest.approx([gaussian_shift(sigma, 1200, s)[0] for s in sizes], rel=0.04)


def test_one_step_instead_of_eight_would_not_do(monkeypatch: pytest.MonkeyPatch) -> None:
    W = origin("power law", 160, 160)
    sigma = torch.linalg.svdvals(W).numpy()
    scored = np.mean([shift(W, W + 1e-3 * normal(seed, 160, 160)) for seed in range(3)])
    assert gaussian_shift(sigma, 160, 1e-3)[0] == pytest.approx(scored, rel=0.1)
    monkeypatch.setattr(gaussian_spectrum, "STEPS", 1)
    assert gaussian_shift(sigma, 160, 1e-3)[0] != pytest.approx(scored, rel=0.1)


@pytest.mark.parametrize("size", [1e-200, 1e150])
def test_the_shift_null_has_no_scale(size: float) -> None:
    sigma = np.array(power_law(50))
    assert gaussian_shift(size * sigma, 60, size * 1e-2)[0] == pytest.approx(gaussian_shift(sigma, 60, 1e-2)[0])


def angles_scored(W: Tensor, s: float, parameters: Parameters, draws: int = 3) -> dict[str, float]:
    found = [rotation.measure(compare(W, W + s * normal(90 + i, *W.shape), parameters)) for i in range(draws)]
    return {
        item.metric: float(np.mean([rows[i].value for rows in found]))
        for i, item in enumerate(found[0])
        if item.value is not None
    }


def rotation_nulls(item: Comparison) -> dict[str, Null]:
    return {null.metric: null for null in nulls_rotation(item)}


@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize(
    ("shape", "k"), [((160, 160), "20"), ((160, 160), "80"), ((256, 96), "24"), ((120, 100), "40")]
)
def test_rotation_of_gaussian_updates(kind: str, shape: tuple[int, int], k: str) -> None:
    """Mean within 18%, median within 11%: two draws against three, at small matrices, on top of the model."""
    W, parameters = origin(kind, *shape), Parameters(Rank(k), Rank("16"))
    for s in (1e-6, 1e-4, 5e-4):
        scored = angles_scored(W, s, parameters)
        null = rotation_nulls(compare(W, W + s * normal(5, *shape), parameters))
        assert set(null) == {f"rotation_{side}_{what}_deg" for side in ("left", "right") for what in ("mean", "median")}
        for metric, item in null.items():
            assert item.mean == pytest.approx(scored[metric], rel=0.18 if "mean" in metric else 0.11), (metric, s)
            assert item.sd is not None
            assert item.draws == 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize(("shape", "k"), [((512, 512), "64"), ((512, 512), "256"), ((256, 400), "64")])
def test_rotation_within_the_stated_limits(kind: str, shape: tuple[int, int], k: str) -> None:
    W, parameters = origin(kind, *shape), Parameters(Rank(k), Rank("16"))
    for s in (1e-6, 1e-5, 1e-4, 5e-4):
        scored = angles_scored(W, s, parameters)
        if scored["rotation_right_mean_deg"] > 20:
            continue
        for metric, item in rotation_nulls(compare(W, W + s * normal(5, *shape), parameters)).items():
            assert item.mean == pytest.approx(scored[metric], rel=0.15 if "mean" in metric else 0.06), (metric, s)


def tangents(sigma: np.ndarray, dimension: int, k: int, draws: int) -> np.ndarray:
    coupling = Coupling.of(sigma, k)
    assert coupling is not None
    seeds = (np.random.default_rng(seed) for seed in range(draws))
    return np.array([coupling.tangents(dimension - len(sigma), draw) for draw in seeds]) / sigma[0]


def drawn_whole(sigma: np.ndarray, dimension: int, k: int, draws: int) -> np.ndarray:
    """Singular values of X drawn entry by entry, l_j = 0 beyond p."""
    levels = np.append(sigma, np.zeros(dimension - len(sigma))) ** 2
    scale = np.sqrt(levels[:k, None] + levels[k:]) / (levels[:k, None] - levels[k:])
    seeds = (np.random.default_rng(1000 + seed) for seed in range(draws))
    found = [np.linalg.svd(scale * draw.standard_normal(scale.shape), compute_uv=False)[::-1] for draw in seeds]
    return np.pad(np.array(found), ((0, 0), (max(0, 2 * k - dimension), 0)))


def test_columns_beyond_p_may_be_drawn_as_a_triangle() -> None:
    """Bartlett's factor has the law of the full draw."""
    sigma, k, dimension = np.array(power_law(30, 0.5)), 12, 43
    short = tangents(sigma, dimension, k, 300).mean(axis=0)
    assert short == pytest.approx(drawn_whole(sigma, dimension, k, 300).mean(axis=0), rel=0.05)


@pytest.mark.parametrize(("p", "dimension", "k"), [(600, 600, 260), (600, 900, 300), (300, 700, 300), (700, 700, 400)])
@pytest.mark.parametrize("exponent", [1.0, 0.5])
def test_directions_taken_together_turn_as_far(p: int, dimension: int, k: int, exponent: float) -> None:
    """X of half or a third of the rows: mean within 5%, median within 3% of whole draws at any size of the angles."""
    sigma = np.array(power_law(p, exponent))
    coupling = Coupling.of(sigma, k)
    assert coupling is not None
    assert coupling.width > 1
    coarse, whole = tangents(sigma, dimension, k, 8), drawn_whole(sigma, dimension, k, 2)
    for s in (1e-6, 1e-3):
        ours, theirs = (np.arctan(s * found) for found in (coarse, whole))
        assert ours.mean() == pytest.approx(theirs.mean(), rel=0.05), s
        assert np.median(ours) == pytest.approx(np.median(theirs), rel=0.03), s


def test_directions_that_two_large_subspaces_must_share_do_not_turn() -> None:
    (found,) = tangents(np.array(power_law(10, 0.5)), 10, 7, 1)
    assert (found == 0).sum() == 2 * 7 - 10
    assert found.shape == (7,)


def test_nulls_are_the_same_in_any_order_and_differ_between_matrices() -> None:
    W = origin("gaussian", 60, 50)
    first, again = (nulls_rotation(compare(W, W + 1e-4 * normal(5, 60, 50))) for _ in range(2))
    assert first == again
    rows = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    moved = nulls_rotation(compare(W[rows], (W + 1e-4 * normal(5, 60, 50))[rows]))
    assert [item.mean for item in moved] == pytest.approx([item.mean for item in first], rel=1e-6)
    other = nulls_rotation(compare(1.01 * W, 1.01 * (W + 1e-4 * normal(5, 60, 50))))
    assert other[0].mean != pytest.approx(first[0].mean, rel=1e-6)


def test_one_draw_serves_all_checkpoints_and_no_checkpoint_is_decomposed(monkeypatch: pytest.MonkeyPatch) -> None:
    W = origin("gaussian", 60, 50)
    before = OriginMatrix(W, PARAMETERS)
    early, late = (Comparison(before, W + s * normal(5, 60, 50)) for s in (1e-5, 2e-5))
    small = nulls_rotation(early)
    monkeypatch.setattr(Coupling, "tangents", lambda *_: pytest.fail("drawn again"))
    for one, two in zip(small, nulls_rotation(late), strict=True):
        assert two.mean == pytest.approx(2 * one.mean, rel=2e-3)
    fresh = Comparison(before, W + 3e-5 * normal(5, 60, 50))
    monkeypatch.setattr(comparison, "decompose", lambda *_: pytest.fail("decomposed again"))
    assert nulls_shift(fresh)


def test_no_null_without_something_to_compare_with() -> None:
    W = origin("gaussian", 24, 20)
    assert nulls_shift(compare(W, W.clone())) == nulls_rotation(compare(W, W.clone())) == []
    assert nulls_shift(compare(torch.zeros(24, 20), W)) == []
    repeated = torch.diag(torch.tensor([2.0, 1.0, 1.0, 1.0, 0.5, 0.25])).double()
    moved = repeated + 1e-3 * normal(2, 6, 6)
    assert nulls_rotation(compare(repeated, moved, Parameters(Rank("3"), Rank("2")))) == []
    assert len(nulls_rotation(compare(repeated, moved, Parameters(Rank("4"), Rank("2"))))) == 4


def test_a_turned_basis_alone_beats_the_shift_null_downwards() -> None:
    """A rotation of W0 moves no singular value: the shift must lie far below its null."""
    W = origin("gaussian", 80, 80)
    skew = 1e-3 * normal(3, 80, 80)
    turned = torch.linalg.matrix_exp(skew - skew.T) @ W
    item = compare(W, turned)
    assert shift(W, turned) < 1e-6 * nulls_shift(item)[0].mean
