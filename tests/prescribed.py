"""Matrices with prescribed spectra, and pairs of them before and after an update of known size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def orthogonal(seed: int, n: int, k: int | None = None) -> Tensor:
    """k orthonormal columns of length n (a square orthogonal matrix without k)."""
    return torch.linalg.qr(normal(seed, n, n if k is None else k)).Q


def with_spectrum(sigma: Sequence[float], m: int, n: int, seed: int = 0) -> Tensor:
    """An m x n float64 matrix with these singular values between random orthonormal bases."""
    values = torch.tensor(sigma, dtype=torch.float64)
    k = len(sigma)
    return (orthogonal(seed, m, k) * values) @ orthogonal(seed + 1, n, k).T


def power_law(p: int, exponent: float = 1.0) -> list[float]:
    return [(i + 1.0) ** -exponent for i in range(p)]


@dataclass(frozen=True)
class PairOfMatrices:
    """Weights before and after, as stored."""

    before: Tensor
    after: Tensor


def _moved(before: Tensor, size: float, seed: int = 7) -> Tensor:
    scale = float(before.abs().max()) or 1.0
    return before + size * scale * normal(seed, *before.shape)


def _pairs() -> dict[str, PairOfMatrices]:
    decaying = with_spectrum(power_law(20), 24, 20)
    stepped = with_spectrum([1.0] * 4 + [0.01] * 16, 24, 20, seed=10)
    clustered = with_spectrum([1 + 1e-9 * i for i in range(20)][::-1], 24, 20, seed=20)
    repeated = with_spectrum([3.0] * 5 + [2.0] * 5 + [1.0] * 10, 24, 20, seed=30)
    deficient = with_spectrum([2.0, 1.0, 0.5], 24, 20, seed=40)
    levels = torch.tensor([0.0, 0.5, 1.0, 1.0078125, 2.0], dtype=torch.float64)
    ties = levels[torch.randint(0, 5, (24, 20), generator=generator(50))] * normal(51, 24, 20).sign()
    narrow = (0.02 * normal(60, 24, 20)).bfloat16()
    single = (0.02 * normal(61, 24, 20)).float()
    half = (0.02 * normal(62, 24, 20)).half()
    rank_two = with_spectrum([0.03, 0.02], 24, 20, seed=70)
    flipped = ties.bfloat16()
    flipped = torch.where(torch.rand(24, 20, generator=generator(52)) < 0.4, -flipped - 0.25, flipped)
    wide = with_spectrum(power_law(12, 0.5), 12, 40, seed=80)
    return {
        "decaying": PairOfMatrices(decaying, _moved(decaying, 1e-2)),
        "barely moved": PairOfMatrices(decaying, _moved(decaying, 1e-9)),
        "moved far": PairOfMatrices(decaying, _moved(decaying, 3.0)),
        "stepped": PairOfMatrices(stepped, _moved(stepped, 1e-3)),
        "clustered": PairOfMatrices(clustered, _moved(clustered, 1e-3)),
        "repeated": PairOfMatrices(repeated, _moved(repeated, 1e-3)),
        "rank-deficient": PairOfMatrices(deficient, _moved(deficient, 1e-2)),
        "zero origin": PairOfMatrices(torch.zeros_like(decaying), 1e-2 * decaying),
        "zero checkpoint": PairOfMatrices(decaying, torch.zeros_like(decaying)),
        "zero update": PairOfMatrices(narrow, narrow.clone()),
        "rank-two update": PairOfMatrices(decaying, decaying + rank_two),
        "tiny": PairOfMatrices(1e-150 * decaying, 1e-150 * _moved(decaying, 1e-2)),
        "huge": PairOfMatrices(1e30 * decaying, 1e30 * _moved(decaying, 1e-2)),
        "bf16": PairOfMatrices(narrow, _moved(narrow.double(), 2e-3).bfloat16()),
        "bf16 invisible": PairOfMatrices(narrow.float(), narrow.float() * (1 + 1e-5)),
        "massive ties": PairOfMatrices(ties.bfloat16(), flipped),
        "float32": PairOfMatrices(single, _moved(single.double(), 2e-3).float()),
        "float16": PairOfMatrices(half, _moved(half.double(), 2e-3).half()),
        "float32 to bf16": PairOfMatrices(single, _moved(single.double(), 2e-3).bfloat16()),
        "wide": PairOfMatrices(wide, _moved(wide, 1e-2)),
        "tall": PairOfMatrices(wide.T.contiguous(), _moved(wide, 1e-2).T.contiguous()),
        "row": PairOfMatrices(narrow[:1], _moved(narrow[:1].double(), 1e-2).bfloat16()),
        "column": PairOfMatrices(narrow[:, :1].contiguous(), _moved(narrow[:, :1].double(), 1e-2).bfloat16()),
        "one entry": PairOfMatrices(narrow[:1, :1].contiguous(), 2 * narrow[:1, :1].contiguous()),
    }


PAIRS = _pairs()
