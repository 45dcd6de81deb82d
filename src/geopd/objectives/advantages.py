"""Token and sequence advantages: the coefficient a_t of the one score-weighted gradient.

Every on-policy paradigm here follows g = sum_t a_t grad log p(y_t | x, y_<t); only a_t differs.

Shapes: B sequences, G samples of one prompt (B is a multiple of G and groups are contiguous), T response tokens.
Log-probabilities are natural logarithms, so token advantages of distillation are in nats. Source: arXiv 2606.07082,
Section 2 (the score-weighted form) and its appendix of settings; the group normalisation is that of GRPO as TRL 1.16
computes it.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "GROUP_STD_OFFSET",
    "check_alpha",
    "group_normalised_advantages",
    "mixed_advantages",
    "normalised_mixture",
    "reverse_kl_advantages",
    "signal_energy",
]

GROUP_STD_OFFSET = 1e-4
"""Added to a group's standard deviation by TRL's GRPO; kept so that the two agree to the last bit."""


def group_normalised_advantages(rewards: Tensor, group_size: int) -> Tensor:
    """GRPO's sequence advantage, one scalar a sequence.

    ``A_i = (R_i - mean_g) / (std_g + 1e-4)`` with the mean and the unbiased standard deviation (divisor G - 1) of the
    sequence's own group of ``group_size`` consecutive rewards. A group of equal 0/1 rewards gets 0 everywhere.

    Args:
        rewards: (B,), finite.
        group_size: G >= 2, a divisor of B.

    Returns:
        (B,) in units of a group's standard deviation.

    Raises:
        ValueError: rewards are not a vector, are not finite, or do not divide into groups of at least two.
    """
    if rewards.dim() != 1:
        raise ValueError(f"rewards have shape {tuple(rewards.shape)}: pass one reward a sequence, shape (B,)")
    if group_size < 2 or rewards.numel() == 0 or rewards.numel() % group_size:
        raise ValueError(
            f"group_size={group_size} does not divide {rewards.numel()} rewards into groups of two or more: "
            "pass a group size G >= 2 and B*G rewards"
        )
    if not bool(torch.isfinite(rewards).all()):
        raise ValueError("rewards contain NaN or infinity: drop unscored responses before normalising")
    groups = rewards.view(-1, group_size)
    mean = groups.mean(dim=1, keepdim=True)
    # The same operations in the same order as TRL's nanstd, so the result is bit-equal to its advantages.
    variance = ((groups - mean) ** 2).mean(dim=1) * torch.tensor(group_size / (group_size - 1), dtype=groups.dtype)
    std = variance.sqrt().repeat_interleave(group_size)
    return (rewards - mean.squeeze(1).repeat_interleave(group_size)) / (std + GROUP_STD_OFFSET)


def reverse_kl_advantages(student_logps: Tensor, teacher_logps: Tensor, mask: Tensor) -> Tensor:
    """On-policy distillation's token advantage: minus the sampled-token reverse KL.

    ``A_t = -r_t``, ``r_t = log p_student(y_t | s_t) - log p_teacher(y_t | s_t)``, and 0 where the mask is 0. Over
    responses sampled from the student E[r_t] is the reverse KL of the next-token distributions at s_t. The result
    carries no gradient: it is a coefficient.

    Args:
        student_logps: (B, T), log-probability of the sampled token under the student, nats.
        teacher_logps: (B, T), the same tokens under the teacher, nats.
        mask: (B, T), nonzero at response tokens.

    Returns:
        (B, T), nats, detached.

    Raises:
        ValueError: the shapes differ, or an unmasked log-probability is not finite.
    """
    if not student_logps.shape == teacher_logps.shape == mask.shape or mask.dim() != 2:
        raise ValueError(
            f"student {tuple(student_logps.shape)}, teacher {tuple(teacher_logps.shape)} and mask "
            f"{tuple(mask.shape)} must share one shape (B, T)"
        )
    kept = mask.bool()
    advantages = (teacher_logps - student_logps).detach().masked_fill(~kept, 0.0)
    if not bool(torch.isfinite(advantages).all()):
        raise ValueError(
            "a response token has a log-probability that is not finite under the student or the teacher: "
            "check that both models share the vocabulary and are not in a state of overflow"
        )
    return advantages


def check_alpha(alpha: float) -> None:
    """Require a weight of distillation in [0, 1].

    Raises:
        ValueError: it is outside.
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha={alpha} is outside [0, 1]: 1 is pure distillation, 0 pure verifiable reward")


def mixed_advantages(alpha: float, opd: Tensor, rlvr: Tensor) -> Tensor:
    """The convex mixture of both raw signals.

    ``A_t = alpha * A_OPD,t + (1 - alpha) * A_RLVR``: the sequence scalar is broadcast over tokens and the mixture is
    not normalised again. ``alpha=1`` is distillation, ``alpha=0`` is verifiable reward, both exactly.

    Args:
        alpha: weight of distillation, in [0, 1].
        opd: (B, T) token advantages, nats.
        rlvr: (B,) sequence advantages.

    Returns:
        (B, T).

    Raises:
        ValueError: alpha is outside [0, 1] or the batch sizes differ.
    """
    check_alpha(alpha)
    _check_fit(opd, rlvr)
    return alpha * opd + (1.0 - alpha) * rlvr.unsqueeze(1)


def signal_energy(opd: Tensor, rlvr: Tensor, mask: Tensor) -> Tensor:
    """Response tokens and the energy of both signals over them: ``[N, sum A_OPD,t^2, sum A_RLVR^2]``.

    The sums add up over the parts of a batch, so processes can reduce them; ``(energy / N).sqrt()`` is a root mean
    square over tokens.

    Args:
        opd: (B, T) token advantages, nats.
        rlvr: (B,) sequence advantages; each counts once for every token of its response.
        mask: (B, T), nonzero at response tokens.

    Returns:
        (3,), float32.

    Raises:
        ValueError: the shapes do not fit.
    """
    _check_fit(opd, rlvr)
    if mask.shape != opd.shape:
        raise ValueError(f"opd {tuple(opd.shape)} and mask {tuple(mask.shape)} must share one shape (B, T)")
    present = mask.bool()
    lengths = present.sum(dim=1)
    return torch.stack(
        [
            lengths.sum().float(),
            opd.float().masked_fill(~present, 0.0).square().sum(),
            (rlvr.float().square() * lengths).sum(),
        ]
    )


def normalised_mixture(alpha: float, opd: Tensor, rlvr: Tensor, mask: Tensor, energy: Tensor | None = None) -> Tensor:
    """The convex mixture of both signals at equal magnitude, which leaves their directions to differ.

    ``A_t = alpha * A_OPD,t / rms(A_OPD) + (1 - alpha) * A_RLVR / rms(A_RLVR)`` with root mean squares over all
    response tokens of the batch. A signal that is zero everywhere stays zero.

    Args:
        alpha: weight of distillation, in [0, 1].
        opd: (B, T) token advantages, nats.
        rlvr: (B,) sequence advantages.
        mask: (B, T), nonzero at response tokens.
        energy: :func:`signal_energy` of the whole batch, where these tensors are a part of it; theirs when None.

    Returns:
        (B, T), in units of a signal's root mean square.

    Raises:
        ValueError: alpha is outside [0, 1] or the shapes do not fit.
    """
    tokens, *energies = (signal_energy(opd, rlvr, mask) if energy is None else energy).unbind()
    opd_rms, rlvr_rms = ((each / tokens.clamp(min=1.0)).sqrt() for each in energies)
    return mixed_advantages(
        alpha,
        torch.where(opd_rms > 0, opd / opd_rms, 0.0),
        torch.where(rlvr_rms > 0, rlvr / rlvr_rms, 0.0),
    )


def _check_fit(opd: Tensor, rlvr: Tensor) -> None:
    if opd.dim() != 2 or rlvr.dim() != 1 or opd.shape[0] != rlvr.shape[0]:
        raise ValueError(
            f"opd {tuple(opd.shape)} and rlvr {tuple(rlvr.shape)} do not fit: pass (B, T) token and (B,) sequence "
            "advantages of the same B responses"
        )
