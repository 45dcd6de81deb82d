"""Token selection: which response tokens the score-weighted gradient sees, and how much each then weighs.

Shapes: B responses, T tokens. Source: arXiv 2606.07082, Section 6 (token sparsification).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["TOKEN_SELECTIONS", "check_token_selection", "token_weights"]

TOKEN_SELECTIONS = ("all", "top-gap", "random")
"""Every token; those where the student is most over-confident; as many drawn at random."""

_SEED_RANGE = 2**62


def check_token_selection(selection: str, rho: float) -> None:
    """Require a known selection and a share of tokens that it can keep.

    Args:
        selection: one of ``TOKEN_SELECTIONS``.
        rho: share of tokens kept, in (0, 1]; ``all`` takes 1.

    Raises:
        ValueError: the selection is unknown, or rho is out of range or set without a selection.
    """
    if selection not in TOKEN_SELECTIONS:
        raise ValueError(f"token_selection={selection!r} is unknown: use one of {', '.join(TOKEN_SELECTIONS)}")
    if not 0.0 < rho <= 1.0:
        raise ValueError(f"rho={rho} is outside (0, 1]: it is the share of tokens kept")
    if selection == "all" and rho != 1.0:
        raise ValueError(f"rho={rho} keeps no fewer tokens without token_selection: set top-gap or random")


def token_weights(
    gap: Tensor, mask: Tensor, selection: str, rho: float, generator: torch.Generator | None = None
) -> Tensor:
    """Weights that drop response tokens and make up for it, response by response.

    Of the ``T_i`` unmasked tokens of response i, ``kept_i = max(1, ceil(rho * T_i))`` stay: those with the largest gap
    (equal gaps: the earlier token), or as many drawn at random without replacement. A kept token weighs
    ``T_i / kept_i`` and a dropped one 0, so the weights of a response always sum to T_i and, under ``random``, the
    weighted sum of any signal is unbiased. ``all`` weighs every response token 1.

    Args:
        gap: (B, T), ``r_t = log p_student - log p_teacher`` of the sampled tokens, nats; only its order counts, and
            only for ``top-gap``.
        mask: (B, T), nonzero at response tokens. A response without any gets weight 0 everywhere.
        selection: one of ``TOKEN_SELECTIONS``.
        rho: share of tokens kept, in (0, 1]; ``all`` takes 1.
        generator: of the random draws, on the CPU; the global one when None. One seed is drawn from it for each
            response, so a response's tokens do not depend on how long the others of its batch are.

    Returns:
        (B, T) in float32, on the mask's device.

    Raises:
        ValueError: the selection is unknown, rho is out of range or set without a selection, or the shapes differ.
    """
    check_token_selection(selection, rho)
    if mask.dim() != 2 or gap.shape != mask.shape:
        raise ValueError(f"gap {tuple(gap.shape)} and mask {tuple(mask.shape)} must share one shape (B, T)")
    present = mask.bool()
    if selection == "all":
        return present.float()
    score = gap.detach() if selection == "top-gap" else _random_scores(gap, generator)
    # A stable sort puts the earlier of two equal gaps first; masked places go last whatever their gap.
    score = score.clamp(min=torch.finfo(score.dtype).min).masked_fill(~present, float("-inf"))
    order = score.argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(mask.shape[1], device=mask.device).expand_as(order))
    lengths = present.sum(dim=1, keepdim=True)
    # 0.7 * 10 is 7.000000000000001 in binary: without the slack its ceiling would be 8.
    kept = torch.ceil(rho * lengths.double() * (1.0 - 1e-12)).clamp(min=1.0)
    return torch.where((rank < kept) & present, lengths / kept, 0.0).float()


def _random_scores(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Uniform scores (B, T), each row from a seed of its own."""
    row = torch.Generator()
    scores = torch.empty(like.shape)
    for place, seed in enumerate(torch.randint(_SEED_RANGE, (like.shape[0],), generator=generator).tolist()):
        torch.rand(like.shape[1], generator=row.manual_seed(seed), out=scores[place])
    return scores.to(like.device)
