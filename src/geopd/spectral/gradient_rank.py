"""Effective rank of a gradient covariance, from pairs of gradients of different prompts.

The participation ratio of the uncentred covariance C = E[g g^T] is ER = tr(C)^2 / tr(C^2). For independent g, g',
tr(C)^2 = E[|g|^2 |g'|^2] and tr(C^2) = E[(g.g')^2], so with p(i) the prompt of gradient i

    ER = sum_{p(i) != p(j)} |g_i|^2 |g_j|^2 / sum_{p(i) != p(j)} (g_i.g_j)^2.

Both sums are unbiased up to one factor. The plug-in with all pairs is far too small at N of the order of ER, since its
diagonal adds |g_i|^4 to the denominator; pairs of one prompt are dropped too, since group-normalised advantages tie
them together.

Shapes: N gradients of d entries, P prompts. Everything but the products needs only the Gram matrix (N, N), so the
gradients may be passed in pieces of their entries. Results are float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

__all__ = ["RankEstimate", "effective_rank", "gradient_gram", "log_rank_ratio", "unit_gram"]


@dataclass(frozen=True, slots=True)
class RankEstimate:
    """A value with its standard error; what is undefined is None, and ``note`` says why."""

    value: float | None
    se: float | None
    note: str | None


def gradient_gram(pieces: Iterable[Float[Tensor, "N _"]]) -> Float64[Tensor, "N N"]:
    """Inner products g_i.g_j of N gradients whose entries come in pieces.

    Args:
        pieces: (N, d_1), (N, d_2), ...; one is held at a time. Each is multiplied in its own precision, the sum of the
            products is float64.

    Returns:
        (N, N), in squared units of a gradient entry.

    Raises:
        ValueError: there is no piece, or one is not (N, d) with the first one's N.
    """
    total: Tensor | None = None
    for piece in pieces:
        if piece.dim() != 2 or (total is not None and len(piece) != len(total)):
            expected = "N" if total is None else len(total)
            raise ValueError(f"a piece of gradients has shape {tuple(piece.shape)}: pass ({expected}, d)")
        product = (piece @ piece.T).double()
        total = product if total is None else total + product
    if total is None:
        raise ValueError("no gradients: pass one piece (N, d) or more")
    return total


def unit_gram(gram: Float64[Tensor, "N N"]) -> Float64[Tensor, "N N"]:
    """The Gram matrix of the gradients divided by their norms; a zero gradient stays zero and so drops out of ER.

    Args:
        gram: (N, N).

    Returns:
        (N, N), cosines; the diagonal is 1 or 0.
    """
    norms = gram.diagonal().double().sqrt()
    scale = torch.where(norms > 0, 1 / norms, 0.0)
    return scale[:, None] * gram.double() * scale


def effective_rank(gram: Float64[Tensor, "N N"], prompts: Int64[Tensor, " N"]) -> RankEstimate:
    """ER by the pair estimator, with the standard error of a jackknife over prompts.

    ``se^2 = (P - 1)/P sum_p (ER_(p) - mean)^2`` with ER_(p) the estimate without prompt p.

    Args:
        gram: (N, N), inner products of the gradients.
        prompts: (N,), which prompt each gradient belongs to.

    Returns:
        Dimensions. Undefined where no two prompts have a gradient that is not zero, or all their products are zero.

    Raises:
        ValueError: the shapes do not fit or a number is not finite.
    """
    sums = _PairSums.of(gram, prompts)
    if sums.reason:
        return RankEstimate(None, None, sums.reason)
    return _jackknifed(math.exp(sums.log_rank()), sums.log_rank_without().exp())


def log_rank_ratio(
    gram: Float64[Tensor, "N N"], other: Float64[Tensor, "N N"], prompts: Int64[Tensor, " N"]
) -> RankEstimate:
    """log(ER / ER_other) of two signals on the same responses, with the standard error of a paired jackknife.

    Both estimates leave out the same prompt at a time, so what the responses have in common cancels.

    Args:
        gram: (N, N), inner products of the gradients of the first signal.
        other: (N, N), of the second, for the same responses in the same order.
        prompts: (N,), which prompt each response belongs to.

    Returns:
        The log ratio, without unit. Undefined where one of the two ranks is.

    Raises:
        ValueError: the shapes do not fit or a number is not finite.
    """
    first, second = _PairSums.of(gram, prompts), _PairSums.of(other, prompts)
    if reason := first.reason or second.reason:
        return RankEstimate(None, None, reason)
    return _jackknifed(first.log_rank() - second.log_rank(), first.log_rank_without() - second.log_rank_without())


@dataclass(frozen=True, slots=True)
class _PairSums:
    """Sums over pairs of responses by their two prompts, (P, P) with a zero diagonal."""

    norms: Float64[Tensor, "P P"]
    products: Float64[Tensor, "P P"]

    @classmethod
    def of(cls, gram: Float64[Tensor, "N N"], prompts: Int64[Tensor, " N"]) -> _PairSums:
        if gram.dim() != 2 or gram.shape[0] != gram.shape[1] or prompts.shape != gram.shape[:1]:
            raise ValueError(
                f"gram has shape {tuple(gram.shape)} and prompts {tuple(prompts.shape)}: pass (N, N) and (N,)"
            )
        if not bool(torch.isfinite(gram).all()):
            raise ValueError("the Gram matrix of the gradients has an entry that is not finite: check the advantages")
        places, belongs = torch.unique(prompts, return_inverse=True)
        member = torch.zeros(len(prompts), len(places), dtype=torch.float64, device=gram.device)
        member[torch.arange(len(prompts)), belongs] = 1.0
        # fourth powers of gradients leave the range of the numbers sooner than gradients do
        scaled = gram.double() / gram.diagonal().max().clamp(min=torch.finfo(torch.float64).tiny)
        energy = member.T @ scaled.diagonal()
        norms, products = torch.outer(energy, energy), member.T @ scaled.square() @ member
        return cls(norms.fill_diagonal_(0.0), products.fill_diagonal_(0.0))

    @property
    def reason(self) -> str | None:
        """Why there is no rank."""
        if not bool(self.norms.any()):
            return "fewer than two prompts have a gradient that is not zero"
        if not bool(self.products.any()):
            return "all gradients of different prompts are orthogonal: the rank has no finite estimate"
        return None

    def log_rank(self) -> float:
        return math.log(float(self.norms.sum()) / float(self.products.sum()))

    def log_rank_without(self) -> Float64[Tensor, " P"]:
        """The same without each prompt in turn; not finite where it is undefined."""
        # sums of what is left, since differences of sums would cancel where one prompt dominates
        left = 1.0 - torch.eye(len(self.norms), dtype=torch.float64, device=self.norms.device)
        norms, products = (((left @ pairs) * left).sum(dim=1) for pairs in (self.norms, self.products))
        return (norms / products).log()


def _jackknifed(value: float, without: Float64[Tensor, " P"]) -> RankEstimate:
    if not bool(torch.isfinite(without).all()):
        return RankEstimate(value, None, "no standard error: without one of the prompts the rank is undefined")
    count = len(without)
    return RankEstimate(value, math.sqrt((count - 1) / count * float((without - without.mean()).square().sum())), None)
