"""Token selection against enumeration, and the unbiasedness of its compensation."""

import itertools

import pytest
import torch

from geopd.objectives import TOKEN_SELECTIONS, token_weights


def ragged(lengths, width, seed=0):
    mask = torch.tensor([[int(t < length) for t in range(width)] for length in lengths])
    return torch.randn(mask.shape, generator=torch.Generator().manual_seed(seed)), mask


def test_top_gap_keeps_the_largest_gaps_of_each_response_by_hand():
    gap = torch.tensor([[0.1, 3.0, -2.0, 1.0, 9.0], [5.0, 9.0, 9.0, 9.0, 9.0]])
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 0, 0, 0, 0]])
    expected = torch.tensor([[0.0, 2.0, 0.0, 2.0, 0.0], [1.0, 0.0, 0.0, 0.0, 0.0]])
    assert torch.equal(token_weights(gap, mask, "top-gap", 0.5), expected)


def test_equal_gaps_keep_the_earlier_tokens():
    weights = token_weights(torch.ones(1, 6), torch.ones(1, 6), "top-gap", 0.5)
    assert weights.tolist() == [[2.0, 2.0, 2.0, 0.0, 0.0, 0.0]]


def test_gaps_of_minus_infinity_still_go_before_padding():
    weights = token_weights(torch.full((1, 4), float("-inf")), torch.tensor([[0, 1, 1, 0]]), "top-gap", 0.5)
    assert weights.tolist() == [[0.0, 2.0, 0.0, 0.0]]


@pytest.mark.parametrize("selection", ["top-gap", "random"])
@pytest.mark.parametrize(("rho", "tenths"), [(0.1, 1), (0.25, 2.5), (0.3, 3), (0.7, 7), (0.9, 9), (1.0, 10)])
def test_kept_counts_are_ceilings_and_weights_sum_to_the_length(selection, rho, tenths):
    """Exact integer ceilings of rho*T: 0.7*10 is 7.000000000000001 in binary and must still give 7."""
    lengths = [*range(13), 1000]
    gap, mask = ragged(lengths, 1000)
    weights = token_weights(gap, mask, selection, rho)
    quarters = round(tenths * 4)  # rho in fortieths, to count in integers
    for row, length in enumerate(lengths):
        kept = max(1, -(-quarters * length // 40)) if length else 0
        assert int(weights[row].count_nonzero()) == kept
        assert weights[row].sum().item() == pytest.approx(length, rel=1e-6)
    assert torch.equal(weights * (1 - mask), torch.zeros_like(weights))


def test_all_is_the_mask():
    gap, mask = ragged([3, 0, 5], 5)
    assert torch.equal(token_weights(gap, mask, "all", 1.0), mask.float())


def test_random_weights_leave_any_signal_unbiased():
    """Each of the C(4, 2) choices comes equally often, so the mean weight of every token is 1."""
    draws = 6000
    generator = torch.Generator().manual_seed(0)
    weights = token_weights(torch.zeros(draws, 4), torch.ones(draws, 4), "random", 0.5, generator)
    counts = {}
    for row in weights.bool().tolist():
        counts[tuple(row)] = counts.get(tuple(row), 0) + 1
    assert len(counts) == len(list(itertools.combinations(range(4), 2)))
    assert max(abs(count - draws / 6) for count in counts.values()) < 5 * (draws * 5 / 36) ** 0.5
    assert torch.allclose(weights.mean(dim=0), torch.ones(4), atol=0.07)


def test_random_choice_depends_on_the_generator_alone_and_not_on_padding():
    _, mask = ragged([5, 9, 2], 9)
    wide = torch.cat([mask, torch.zeros(3, 40, dtype=mask.dtype)], dim=1)
    narrow, padded, again, other = (
        token_weights(torch.zeros_like(m, dtype=torch.float), m, "random", 0.4, torch.Generator().manual_seed(seed))
        for m, seed in ((mask, 1), (wide, 1), (mask, 1), (mask, 2))
    )
    assert torch.equal(narrow, padded[:, :9])
    assert torch.equal(narrow, again)
    assert not torch.equal(narrow, other)


def test_later_responses_can_be_drawn_without_the_earlier_ones():
    """One seed a response: a process passes over those of the processes before it."""
    _, mask = ragged([7] * 8, 7)
    whole = token_weights(torch.zeros(8, 7), mask, "random", 0.3, torch.Generator().manual_seed(4))
    generator = torch.Generator().manual_seed(4)
    torch.randint(2**62, (5,), generator=generator)
    assert torch.equal(token_weights(torch.zeros(3, 7), mask[5:], "random", 0.3, generator), whole[5:])


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("top", 0.5), "unknown: use one of all, top-gap, random"),
        (("random", 0.0), "rho=0.0"),
        (("random", 1.5), "rho=1.5"),
        (("random", float("nan")), "rho=nan"),
        (("all", 0.5), "set top-gap or random"),
    ],
)
def test_unusable_settings_are_named(arguments, match):
    with pytest.raises(ValueError, match=match):
        token_weights(torch.zeros(1, 2), torch.ones(1, 2), *arguments)


def test_unfit_shapes_are_named():
    for selection in TOKEN_SELECTIONS:
        with pytest.raises(ValueError, match="share one shape"):
            token_weights(torch.zeros(1, 3), torch.ones(1, 2), selection, 1.0)
