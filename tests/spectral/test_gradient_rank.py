"""The pair estimator of effective rank against loops over pairs and against covariances of known rank."""

import math
import statistics

import pytest
import torch

from geopd.spectral import effective_rank, gradient_gram, log_rank_ratio, unit_gram
from gradients_by_hand import jackknife, rank_by_pairs
from prescribed import normal, orthogonal

COUNT, TRUE = 64, 120


def gram(gradients):
    return gradient_gram([gradients.double()])


def plug_in(products):
    """All pairs, as tr(C)^2 / tr(C^2) of the sample covariance has it."""
    return float(products.trace()) ** 2 / float(products.square().sum())


def grouped(seed, prompts=6, samples=3, dims=20):
    """Gradients that share something within a prompt, in no particular order."""
    scale = torch.linspace(1, 3, dims)
    own = normal(seed, prompts, 1, dims) + normal(seed + 1, prompts, samples, dims)
    order = torch.randperm(prompts * samples, generator=torch.Generator().manual_seed(seed))
    belongs = torch.arange(prompts).repeat_interleave(samples)[order]
    return (own * scale).flatten(0, 1)[order], belongs


def test_rank_and_error_are_those_of_a_loop_over_pairs():
    g, belongs = grouped(1)
    names = belongs.tolist()
    found = effective_rank(gram(g), belongs)
    assert found.value == pytest.approx(rank_by_pairs(g, names), rel=1e-12)

    def without(rows):
        return rank_by_pairs(g[rows], [names[i] for i in rows])

    assert found.se == pytest.approx(jackknife(without, names), rel=1e-9)
    assert found.note is None


def test_log_ratio_and_its_paired_error_are_those_of_a_loop_over_pairs():
    g, belongs = grouped(1)
    h, names = g * torch.linspace(3, 0.1, g.shape[1]), belongs.tolist()
    found = log_rank_ratio(gram(g), gram(h), belongs)

    def ratio(rows):
        kept = [names[i] for i in rows]
        return math.log(rank_by_pairs(g[rows], kept) / rank_by_pairs(h[rows], kept))

    assert found.value == pytest.approx(ratio(range(len(names))), rel=1e-12)
    assert found.se == pytest.approx(jackknife(ratio, names), rel=1e-9)


def test_log_ratio_of_a_signal_with_itself_is_zero_whatever_its_scale():
    g, belongs = grouped(2)
    found = log_rank_ratio(gram(g), gram(-7 * g), belongs)
    assert found.value == pytest.approx(0, abs=1e-12)
    assert found.se == pytest.approx(0, abs=1e-12)


def planted(seed, scales):
    """64 gradients over 120 equal directions of a 150-dimensional space, one a prompt."""
    directions = orthogonal(3, 150)[:TRUE]
    return gram(scales[:, None] * normal(seed, COUNT, TRUE) @ directions)


@pytest.mark.parametrize(
    ("kind", "naive", "tolerance"), [("equal", 42, 0.02), ("half zero", 25, 0.03), ("lognormal", 9, 0.15)]
)
def test_a_planted_rank_is_found_where_the_plug_in_is_far_too_low(kind, naive, tolerance):
    found, plugged = [], []
    for draw in range(60):
        scales = torch.ones(COUNT, dtype=torch.float64)
        if kind == "half zero":
            scales[::2] = 0
        if kind == "lognormal":
            scales = (0.9 * normal(900 + draw, COUNT)).exp()
        products = planted(100 + draw, scales)
        found.append(math.log(effective_rank(products, torch.arange(COUNT)).value))
        plugged.append(plug_in(products))
    assert math.exp(statistics.mean(found)) == pytest.approx(TRUE, rel=tolerance)
    assert statistics.mean(plugged) == pytest.approx(naive, rel=0.2)


def test_the_rank_of_unequal_directions_is_their_participation_ratio():
    spread = 0.8 ** torch.arange(40.0)  # standard deviations
    true = float(spread.square().sum() ** 2 / spread.pow(4).sum())
    found = [
        math.log(effective_rank(gram(normal(draw, 200, 40) * spread), torch.arange(200)).value) for draw in range(20)
    ]
    assert math.exp(statistics.mean(found)) == pytest.approx(true, rel=0.03)


def test_the_standard_error_is_the_spread_over_draws():
    belongs, ratios, errors = torch.arange(48).repeat_interleave(2), [], []
    for draw in range(150):
        g = (normal(draw, 48, 1, 60) + normal(draw + 500, 48, 2, 60)).flatten(0, 1)
        other = g * (1 + torch.arange(60.0) / 20)
        estimate = log_rank_ratio(gram(g), gram(other), belongs)
        ratios.append(estimate.value)
        errors.append(estimate.se)
    assert statistics.mean(errors) == pytest.approx(statistics.stdev(ratios), rel=0.25)


def test_copies_within_a_prompt_add_nothing():
    g = normal(5, 10, 30)
    once = effective_rank(gram(g), torch.arange(10))
    four = effective_rank(gram(g.repeat_interleave(4, dim=0)), torch.arange(10).repeat_interleave(4))
    assert four.value == pytest.approx(once.value, rel=1e-12)
    assert four.se == pytest.approx(once.se, rel=1e-9)


def test_unit_norm_takes_the_lengths_away_and_zero_gradients_out():
    g, belongs = grouped(7)
    lengths = (2 * normal(8, len(g))).exp()
    lengths[3] = 0.0
    kept = [i for i in range(len(g)) if i != 3]
    found = effective_rank(unit_gram(gram(g * lengths[:, None])), belongs)
    unit = g[kept] / g[kept].norm(dim=1, keepdim=True)
    assert found.value == pytest.approx(rank_by_pairs(unit, belongs[kept].tolist()), rel=1e-9)


def test_pieces_add_up_to_the_whole():
    g = normal(4, 7, 50)
    torch.testing.assert_close(gradient_gram(g.split(13, dim=1)), g @ g.T, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("scale", [1e-60, 1e60])
def test_the_rank_has_no_unit(scale):
    g, belongs = grouped(9)
    assert effective_rank(gram(g * scale), belongs).value == pytest.approx(
        effective_rank(gram(g), belongs).value, rel=1e-12
    )


def test_what_is_undefined_is_none_and_says_why():
    belongs = torch.tensor([0, 0, 1, 1, 2, 2])
    nothing, one, two = (torch.zeros(6, 4) for _ in range(3))
    one[:2] = normal(1, 2, 4)
    two[:4] = normal(2, 4, 4)
    apart = torch.eye(6)
    for g in (nothing, one):
        assert effective_rank(gram(g), belongs).value is None
        assert "fewer than two prompts" in effective_rank(gram(g), belongs).note
    assert "orthogonal" in effective_rank(gram(apart), belongs).note
    assert "fewer than two prompts" in log_rank_ratio(gram(two), gram(one), belongs).note
    assert log_rank_ratio(gram(one), gram(two), belongs).value is None
    barely = effective_rank(gram(two), belongs)
    assert barely.value == pytest.approx(rank_by_pairs(two, belongs.tolist()))
    assert barely.se is None
    assert "no standard error" in barely.note


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"gram has shape \(3, 2\) and prompts \(3,\)"):
        effective_rank(torch.ones(3, 2), torch.arange(3))
    with pytest.raises(ValueError, match="prompts"):
        effective_rank(torch.ones(3, 3), torch.arange(2))
    with pytest.raises(ValueError, match="not finite: check the advantages"):
        log_rank_ratio(torch.eye(3), torch.full((3, 3), float("nan")), torch.arange(3))
    with pytest.raises(ValueError, match="no gradients"):
        gradient_gram([])
    with pytest.raises(ValueError, match=r"shape \(2, 3\): pass \(4, d\)"):
        gradient_gram([torch.ones(4, 3), torch.ones(2, 3)])
