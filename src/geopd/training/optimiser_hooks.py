"""What is done to gradients and steps around an optimiser's step to keep training where a basis allows it.

The pre-step hooks run inside ``optimizer.step``, that is after gradients were accumulated, unscaled, reduced over
processes and clipped: the norm that is clipped and logged is that of the whole gradient.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from geopd.training.sharding import local

__all__ = ["GradientMask", "GradientProjection", "ScaledSteps", "lr_factor"]


def lr_factor(n: int, k: int) -> float:
    """sqrt(n / K): by how much a sign step of n coordinates is longer than its part in K of them.

    An elementwise optimiser in K coordinates moves a row by sqrt(K) lr where the full one moves it by sqrt(n) lr, so
    at the same learning rate an adapter's steps are sqrt(K / n) of the full ones; this factor makes up for it.
    """
    return math.sqrt(n / k)


class GradientProjection:
    """g <- g V V^T for every weight W (m, n) with its V (n, K): the paper's projection (arXiv 2606.07082, section 5).

    In float32 (the gradient's own precision where that is wider), on the rows a process holds. The optimiser's
    elementwise step then leaves the span again; how far is what the leak says.
    """

    def __init__(self, pairs: list[tuple[Tensor, Float[Tensor, "n k"]]]) -> None:
        self.pairs = [(weight, V.to(weight.device)) for weight, V in pairs]

    @torch.no_grad()
    def __call__(self, *_: Any) -> None:
        """Project the gradients in place."""
        for weight, V in self.pairs:
            if weight.grad is None:
                continue
            g = local(weight.grad)
            dtype = torch.promote_types(g.dtype, V.dtype)
            V = V.to(dtype)
            g.copy_((g.to(dtype) @ V) @ V.T)


class GradientMask:
    """g <- 0 outside the mask. With zero gradients and no weight decay from the start, Adam's step there is 0 exactly:
    both moments stay 0, and 0 / (sqrt(0) + eps) = 0 for eps > 0."""

    def __init__(self, pairs: list[tuple[Tensor, Bool[Tensor, "m n"]]]) -> None:
        self.pairs = [(weight, ~mask) for weight, mask in pairs]

    @torch.no_grad()
    def __call__(self, *_: Any) -> None:
        """Clear the gradients outside the masks in place."""
        for weight, still in self.pairs:
            if weight.grad is not None:
                local(weight.grad).masked_fill_(still, 0.0)


class ScaledSteps:
    """Makes every step of a parameter ``factor`` times as long: x <- x_before + factor (x_after - x_before).

    Without weight decay that is a learning rate of its own for every parameter, whatever the optimiser and schedule;
    the optimiser's parameter groups, and so its saved state, stay those of the trainer. Costs a copy of the parameters.
    """

    def __init__(self, factors: list[tuple[Tensor, float]]) -> None:
        self.factors = factors
        self._before: list[Tensor] = []

    @torch.no_grad()
    def before(self, *_: Any) -> None:
        """Remember the parameters; a pre-step hook."""
        self._before = [local(parameter).clone() for parameter, _ in self.factors]

    @torch.no_grad()
    def after(self, *_: Any) -> None:
        """Lengthen the step; a post-step hook."""
        for (parameter, factor), before in zip(self.factors, self._before, strict=True):
            x = local(parameter)
            x.copy_(torch.lerp(before, x, factor))
        self._before = []
