"""Advantages against closed forms, and their score-weighted gradients against exact ones on an enumerable policy."""

import itertools

import pytest
import torch

from geopd.objectives import (
    group_normalised_advantages,
    mixed_advantages,
    normalised_mixture,
    reverse_kl_advantages,
    signal_energy,
)

VOCABULARY, LENGTH = 3, 3


def test_group_normalisation_by_hand():
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0])
    std = (3 / 16 * 4 / 3) ** 0.5
    expected = [0.75 / (std + 1e-4), *[-0.25 / (std + 1e-4)] * 3]
    assert group_normalised_advantages(rewards, 4).tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_groups_without_variance_get_exactly_zero(value):
    assert torch.equal(group_normalised_advantages(torch.full((8,), value), 8), torch.zeros(8))


@pytest.mark.parametrize("group", [2, 4, 8])
def test_bit_equal_to_the_statements_of_trl(group):
    from trl.trainer.utils import nanstd

    generator = torch.Generator().manual_seed(0)
    rewards = torch.randint(0, 2, (64,), generator=generator).float()
    mean = torch.nanmean(rewards.view(-1, group), dim=1).repeat_interleave(group, dim=0)
    std = nanstd(rewards.view(-1, group), dim=1).repeat_interleave(group, dim=0)
    assert torch.equal(group_normalised_advantages(rewards, group), (rewards - mean) / (std + 1e-4))


def test_groups_are_independent_and_shift_invariant():
    rewards = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 0.0])
    together = group_normalised_advantages(rewards, 3)
    apart = torch.cat([group_normalised_advantages(part, 3) for part in rewards.split(3)])
    assert torch.equal(together, apart)
    assert torch.allclose(group_normalised_advantages(rewards + 5, 3), together, atol=1e-6)
    assert together.view(-1, 3).sum(dim=1).abs().max() < 1e-6


def test_reverse_kl_is_masked_and_carries_no_gradient():
    student = torch.tensor([[-1.0, -2.0, -3.0]], requires_grad=True)
    teacher = torch.tensor([[-0.5, -2.5, float("-inf")]])
    advantages = reverse_kl_advantages(student, teacher, torch.tensor([[1, 1, 0]]))
    assert torch.equal(advantages, torch.tensor([[0.5, -0.5, 0.0]]))
    assert not advantages.requires_grad


def test_mixture_ends_are_exact():
    opd, rlvr = torch.randn(4, 5), torch.randn(4)
    assert torch.equal(mixed_advantages(1.0, opd, rlvr), opd)
    assert torch.equal(mixed_advantages(0.0, opd, rlvr), rlvr.unsqueeze(1).expand(4, 5))
    expected = 0.25 * opd + 0.75 * rlvr[:, None]
    assert torch.equal(mixed_advantages(0.25, opd, rlvr), expected)


def ragged_signals():
    generator = torch.Generator().manual_seed(0)
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [0, 1, 1, 1]])
    return 7 * torch.randn(3, 4, generator=generator), torch.randn(3, generator=generator), mask


def test_signal_energy_counts_a_sequence_advantage_once_a_token_and_adds_up_over_parts():
    opd, rlvr, mask = ragged_signals()
    squares = [float(opd[i, t]) ** 2 for i in range(3) for t in range(4) if mask[i, t]]
    expected = [7.0, sum(squares), float(3 * rlvr[0] ** 2 + rlvr[1] ** 2 + 3 * rlvr[2] ** 2)]
    energy = signal_energy(opd, rlvr, mask)
    assert energy.tolist() == pytest.approx(expected, rel=1e-6)
    parts = signal_energy(opd[:1], rlvr[:1], mask[:1]) + signal_energy(opd[1:], rlvr[1:], mask[1:])
    assert torch.allclose(parts, energy)


@pytest.mark.parametrize("alpha", [1.0, 0.0])
def test_ends_of_the_normalised_mixture_have_unit_rms_over_response_tokens(alpha):
    opd, rlvr, mask = ragged_signals()
    mixed = normalised_mixture(alpha, opd, rlvr, mask)[mask.bool()]
    assert mixed.square().mean().item() == pytest.approx(1.0, rel=1e-6)


def test_normalised_mixture_ignores_either_signals_scale_and_the_padding():
    opd, rlvr, mask = ragged_signals()
    mixed = normalised_mixture(0.3, opd, rlvr, mask)
    other = normalised_mixture(0.3, 40 * opd.masked_fill(mask == 0, 9.0), rlvr / 30, mask)
    assert torch.allclose(mixed[mask.bool()], other[mask.bool()], rtol=1e-5)


def test_normalised_mixture_of_a_part_uses_the_energy_of_the_whole():
    opd, rlvr, mask = ragged_signals()
    energy = signal_energy(opd, rlvr, mask)
    part = normalised_mixture(0.3, opd[1:], rlvr[1:], mask[1:], energy=energy)
    assert torch.equal(part, normalised_mixture(0.3, opd, rlvr, mask)[1:])


def test_a_signal_that_is_zero_stays_zero_when_normalised():
    opd, rlvr, mask = ragged_signals()
    assert torch.equal(normalised_mixture(0.0, opd, torch.zeros(3), mask), torch.zeros(3, 4))
    mixed = normalised_mixture(0.5, torch.zeros(3, 4), rlvr, mask)
    assert torch.equal(mixed, 0.5 * normalised_mixture(0.0, opd, rlvr, mask))
    empty = normalised_mixture(0.5, torch.zeros(1, 2), torch.zeros(1), torch.zeros(1, 2))
    assert torch.equal(empty, torch.zeros(1, 2))


def policy(logits):
    """Log-probabilities (sequences, T) of every sequence under position-wise logits that see the previous token."""
    sequences = torch.tensor(list(itertools.product(range(VOCABULARY), repeat=LENGTH)))
    previous = torch.cat([torch.zeros(len(sequences), 1, dtype=torch.long), sequences[:, :-1] + 1], dim=1)
    log_probabilities = torch.log_softmax(logits, dim=-1)
    positions = torch.arange(LENGTH).expand_as(sequences)
    return sequences, log_probabilities[positions, previous, sequences]


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    shape = (LENGTH, VOCABULARY + 1, VOCABULARY)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2)]


def test_reward_gradient_is_the_expected_score_weighted_gradient(logits):
    """E[R grad log p] over all sequences is the gradient of the exact expected reward."""
    theta = logits[0].requires_grad_()
    sequences, logps = policy(theta)
    rewards = (sequences.sum(dim=1) % 2 == 0).double()
    (exact,) = torch.autograd.grad((logps.sum(dim=1).exp() * rewards).sum(), theta, retain_graph=True)
    weights = mixed_advantages(0.0, torch.zeros_like(logps).detach(), rewards)
    probabilities = logps.sum(dim=1).exp().detach()
    (scored,) = torch.autograd.grad((probabilities[:, None] * weights * logps).sum(), theta)
    assert torch.allclose(scored, exact, atol=1e-12)


def test_distillation_gradient_is_that_of_the_per_state_reverse_kl(logits):
    """E[A_t grad log p] over all sequences is minus the gradient of sum_t E_{s_t}[KL(p(.|s_t) || q(.|s_t))],
    with the state distribution held fixed: the sampled-token form discounts nothing to later tokens."""
    theta, teacher = logits[0].requires_grad_(), logits[1]
    _, logps = policy(theta)
    _, teacher_logps = policy(teacher)
    advantages = reverse_kl_advantages(logps, teacher_logps, torch.ones_like(logps))
    probabilities = logps.sum(dim=1).exp().detach()
    (scored,) = torch.autograd.grad((probabilities[:, None] * advantages * logps).sum(), theta, retain_graph=True)

    log_p, log_q = torch.log_softmax(theta, dim=-1), torch.log_softmax(teacher, dim=-1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(dim=-1)  # (position, previous token)
    visits = torch.zeros(LENGTH, VOCABULARY + 1, dtype=torch.float64)
    sequences, _ = policy(theta)
    for sequence, probability in zip(sequences.tolist(), probabilities.tolist(), strict=True):
        for place in range(LENGTH):
            visits[place, sequence[place - 1] + 1 if place else 0] += probability
    (exact,) = torch.autograd.grad((visits * divergence).sum(), theta)
    assert torch.allclose(scored, -exact, atol=1e-12)


def test_expected_sampled_divergence_is_the_sequence_reverse_kl(logits):
    _, logps = policy(logits[0])
    _, teacher_logps = policy(logits[1])
    probabilities = logps.sum(dim=1).exp()
    sampled = -(probabilities[:, None] * reverse_kl_advantages(logps, teacher_logps, torch.ones_like(logps))).sum()
    exact = torch.nn.functional.kl_div(teacher_logps.sum(1), logps.sum(1), log_target=True, reduction="sum")
    assert sampled.item() == pytest.approx(exact.item(), rel=1e-10)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: group_normalised_advantages(torch.zeros(6), 4), "group_size=4"),
        (lambda: group_normalised_advantages(torch.zeros(6), 1), "group_size=1"),
        (lambda: group_normalised_advantages(torch.zeros(2, 2), 2), "shape"),
        (lambda: group_normalised_advantages(torch.tensor([float("nan"), 1.0]), 2), "NaN"),
        (lambda: reverse_kl_advantages(torch.zeros(1, 2), torch.zeros(1, 3), torch.ones(1, 2)), "share one shape"),
        (
            lambda: reverse_kl_advantages(torch.zeros(1, 1), torch.full((1, 1), float("-inf")), torch.ones(1, 1)),
            "not finite",
        ),
        (lambda: mixed_advantages(1.5, torch.zeros(1, 1), torch.zeros(1)), "alpha=1.5"),
        (lambda: mixed_advantages(0.5, torch.zeros(2, 1), torch.zeros(1)), "do not fit"),
        (lambda: normalised_mixture(0.5, torch.zeros(2, 1), torch.zeros(1), torch.ones(2, 1)), "do not fit"),
        (lambda: normalised_mixture(-0.5, torch.zeros(1, 1), torch.zeros(1), torch.ones(1, 1)), "alpha=-0.5"),
        (lambda: signal_energy(torch.zeros(1, 2), torch.zeros(1), torch.ones(1, 3)), "share one shape"),
    ],
)
def test_unusable_input_is_named(call, match):
    with pytest.raises(ValueError, match=match):
        call()
