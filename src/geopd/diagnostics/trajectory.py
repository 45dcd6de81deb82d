"""A run as one matrix sees it: what its successive increments W_t - W_{t-1} leave behind, in order.

An increment is kept as its leading singular triples and its norm, never as a matrix, so that a run of any length fits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from torch import Tensor

from geopd.diagnostics.bf16_grid import UNITS, exponent_counts, on_bf16_grid
from geopd.diagnostics.comparison import OriginMatrix
from geopd.spectral import Decomposition, Difference, frobenius, leading_triples


@dataclass(frozen=True)
class Increment:
    """W_t - W_{t-1} of the stored values.

    ``norm``: Frobenius, weight units. ``noise``: share of its energy, at most 1, that rounding the ends to bf16
    explains if the weights were trained wider: u^2/12 per entry and rounded end (one where the increment starts at an
    origin on the bf16 grid, two between checkpoints), u the bf16 steps of W0; 0 where the ends are as trained.
    """

    decomposition: Decomposition
    norm: float
    noise: float

    @property
    def stable_rank(self) -> float | None:
        """||D||_F^2 / ||D||_op^2; None for no movement."""
        top = float(self.decomposition.sigma[0]) if self.norm else 0.0
        return (self.norm / top) ** 2 if top else None


class Trajectory:
    """The increments of one matrix over one run, the first from the origin; None where an end could not be read.

    ``seed`` feeds whatever is drawn for this matrix, so that draws depend neither on order nor on the process.
    """

    def __init__(self, increments: Sequence[Increment | None], seed: int) -> None:
        self.increments = tuple(increments)
        self.seed = seed


@dataclass(frozen=True)
class Place:
    """Where on its trajectory a checkpoint stands: ``trajectory.increments[position]`` leads to it."""

    trajectory: Trajectory
    position: int


def increment_of(origin: OriginMatrix, before: Float[Tensor, "m n"] | None, after: Float[Tensor, "m n"]) -> Increment:
    """The increment from ``before`` (the origin itself where None) to ``after``, with as many triples as Sim_K needs.

    Cost: the leading triples of one difference in float64; the first increment's serve the first checkpoint's update.
    """
    start = origin.stored if before is None else before
    k = max(origin.parameters.similarity_k + origin.parameters.hill_k)
    increment = Difference(after, start)
    found, norm = leading_triples(increment, k), frobenius(increment)[0]
    rounded = on_bf16_grid(after) + (before is not None and on_bf16_grid(before))
    return Increment(found, norm, _noise(origin, norm, int(rounded)))


def _noise(origin: OriginMatrix, norm: float, rounded_ends: int) -> float:
    if norm == 0.0 or rounded_ends == 0:
        return 0.0
    counts = exponent_counts(origin.magnitude_counts)
    relative = np.minimum(UNITS, 1e6 * norm) / norm  # a vanishing norm would overflow where the share is 1 anyway
    return min(1.0, rounded_ends / 12 * float(counts @ relative**2))
