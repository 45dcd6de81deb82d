"""Weights of several kinds, updates of known structure planted in them, and how each regime stores both."""

from __future__ import annotations

import torch
from torch import Tensor

from geopd.diagnostics import Comparison, OriginMatrix, Parameters, Rank
from prescribed import generator

REGIMES = ("on-grid", "one end", "both ends")
PARAMETERS = Parameters(Rank("p/8"), Rank("16"))


def weights(kind: str, m: int, n: int, seed: int = 0) -> Tensor:
    draw = generator(seed)
    W = 0.02 * torch.randn(m, n, generator=draw, dtype=torch.float64)
    if kind == "columns":
        W *= torch.exp(0.7 * torch.randn(n, generator=draw, dtype=torch.float64))
    if kind == "rows":
        W *= torch.exp(0.5 * torch.randn(m, 1, generator=draw, dtype=torch.float64))
    return W


def structure(kind: str, W: Tensor, seed: int = 1000) -> Tensor:
    """An update of rms 1."""
    (m, n), draw = W.shape, generator(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    p = min(m, n) // 2
    made = {
        "rank 16": lambda: normal(m, 16) @ normal(16, n),
        "rank 4": lambda: normal(m, 4) @ normal(4, n),
        "power law": lambda: (normal(m, p) / torch.arange(1, p + 1)) @ normal(p, n),
        "lognormal rows": lambda: torch.exp(normal(m, 1)) * (normal(m, 16) @ normal(16, n)),
        "with |W0|": lambda: (normal(m, 16) @ normal(16, n)) * W.abs(),
        "signs": lambda: sum((torch.sign(normal(m, 1) @ normal(1, n)) for _ in range(8)), torch.zeros(m, n)),
        "white": lambda: normal(m, n),
    }[kind]()
    return made.double() / made.double().square().mean().sqrt()


def stored(W: Tensor, d: Tensor, regime: str) -> tuple[Tensor, Tensor]:
    """Both ends as they lie on disk; ``both ends`` casts masters that are off the grid."""
    if regime == "on-grid":
        return W.bfloat16(), (W.bfloat16().double() + d).bfloat16()
    if regime == "one end":
        return W.float(), (W.float().double() + d).bfloat16()
    if regime == "both ends":
        return W.bfloat16(), (W + d).bfloat16()
    return W, W + d


def compare(before: Tensor, after: Tensor, parameters: Parameters = PARAMETERS) -> Comparison:
    return Comparison(OriginMatrix(before, parameters), after)


def planted(W: Tensor, d: Tensor, regime: str) -> Comparison:
    return compare(*stored(W, d, regime))


def stable_rank(W: Tensor) -> float:
    scaled = W / W.abs().max()
    return float(scaled.square().sum() / torch.linalg.matrix_norm(scaled, 2) ** 2)
