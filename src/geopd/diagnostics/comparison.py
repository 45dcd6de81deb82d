"""One matrix before and after, with everything several diagnostics share computed once, and only when asked.

The origin is decomposed once and lent to every checkpoint compared with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64
from numpy.typing import NDArray
from torch import Tensor

from geopd.diagnostics.bf16_grid import on_bf16_grid
from geopd.diagnostics.parameters import Parameters
from geopd.spectral import (
    Counts,
    Decomposition,
    Difference,
    Magnitudes,
    Mask,
    TieSplit,
    count_bins,
    decompose,
    frobenius,
    leading_triples,
    principal_angles,
    row_blocks,
    singular_values,
    smallest_magnitudes,
    split_at_share,
    visibly_changed,
)

if TYPE_CHECKING:
    from geopd.diagnostics.trajectory import Place

VIEWS = ("bf16", "native")
SIDES = ("left", "right")
ENDS = ("origin", "checkpoint")
"""Whose leading singular vectors a diagnostic needs."""


class OriginMatrix:
    """W0 as stored, with its decomposition, masks and magnitude histogram computed once.

    ``vectors``: of which ends (``origin``, ``checkpoint``) leading singular vectors will be asked for; values alone
    cost half.
    """

    def __init__(
        self, stored: Float[Tensor, "m n"], parameters: Parameters, vectors: frozenset[str] = frozenset(ENDS)
    ) -> None:
        self.stored = stored
        self.parameters = parameters
        self.vectors = vectors
        self.rows, self.cols = stored.shape
        self._low: dict[tuple[str, float], Mask] = {}
        self._principal: dict[float, TieSplit] = {}

    @property
    def p(self) -> int:
        """min(m, n)."""
        return min(self.rows, self.cols)

    @property
    def rotation_k(self) -> int:
        """The rotation's k for this shape, cut to p."""
        return min(self.parameters.rotation_k.of(self.rows, self.cols), self.p)

    @property
    def principal_rank(self) -> int:
        """The reconstruction's rank for this shape, cut to p."""
        return min(self.parameters.principal_rank.of(self.rows, self.cols), self.p)

    @cached_property
    def decomposition(self) -> Decomposition:
        """W0's singular values and as many leading vectors as the diagnostics asked for need."""
        return decompose(self.stored, max(self.rotation_k, self.principal_rank) if self.vectors else 0)

    @cached_property
    def exact_sigma(self) -> tuple[Float64[Tensor, " p"], float]:
        """W0's singular values without squaring, with their error: for shifts too small for the Gram matrix."""
        return singular_values(self.stored)

    @cached_property
    def norm(self) -> tuple[float, float]:
        """||W0||_F and its rounding bound."""
        return frobenius(self.stored)

    @cached_property
    def on_grid(self) -> bool:
        """Whether every entry of W0 is a bf16 number (``origin_grid``: on-grid or off-grid)."""
        return on_bf16_grid(self.stored)

    @property
    def bins(self) -> Magnitudes:
        """bf16 magnitude index of every entry, made where it is sliced."""
        return Magnitudes(self.stored)

    @cached_property
    def magnitude_counts(self) -> Counts:
        """How many entries each of the 32768 bf16 magnitudes holds."""
        return count_bins(self.bins)

    def low_mask(self, view: str, alpha: float) -> Mask:
        """The alpha share of entries of smallest magnitude, in the given view."""
        if (view, alpha) not in self._low:
            if view == "bf16":
                self._low[view, alpha] = smallest_magnitudes(self.magnitude_counts, alpha)
            else:
                self._low[view, alpha] = split_at_share(self._magnitudes, self.stored.shape, alpha, largest=False)
        return self._low[view, alpha]

    def _magnitudes(self) -> Iterator[Float64[Tensor, "b n"]]:
        """|W0| in row blocks."""
        return (self.stored[rows].double().abs() for rows in row_blocks(self.stored.shape))

    def reconstruction_blocks(self) -> Iterator[Float64[Tensor, "b n"]]:
        """|U_r S_r V_r^T| in row blocks: the rank-r part of W0, entrywise; W0's own where r reaches min(m, n)."""
        d, r = self.decomposition, self.principal_rank
        if r == self.p:  # rounding of a full reconstruction would break the ties that bf16 weights are full of
            yield from self._magnitudes()
            return
        for rows in row_blocks(self.stored.shape):
            yield ((d.left[rows, :r] * d.sigma[:r]) @ d.right[:, :r].T).abs_()

    def principal_mask(self, alpha: float) -> TieSplit:
        """The alpha share of entries where the rank-r reconstruction of W0 is largest in magnitude."""
        if alpha not in self._principal:
            margin = (
                0.0 if self.principal_rank == self.p else 2 * self.decomposition.leading_part_error(self.principal_rank)
            )
            self._principal[alpha] = split_at_share(
                self.reconstruction_blocks, self.stored.shape, alpha, largest=True, margin=margin
            )
        return self._principal[alpha]


@dataclass(frozen=True)
class UpdateSubspace:
    """What trajectories keep of an update: its leading right vectors and how firmly they are held."""

    decomposition: Decomposition
    is_this: bool = False
    """Whether it belongs to the very checkpoint it is compared with (the last of its run)."""
    doubt: str | None = None
    """Why its subspace is not to be relied on, where rounding makes too much of it."""


class Comparison:
    """W0 -> W+ for one matrix: the later weights as stored, the update, its spectrum and the visible changes.

    ``final`` is the update of the run's last checkpoint, None where this run has only this one. ``place`` is where the
    checkpoint stands among the run's increments, None where no diagnostic needs them.
    """

    def __init__(
        self,
        origin: OriginMatrix,
        stored: Float[Tensor, "m n"],
        final: UpdateSubspace | None = None,
        place: Place | None = None,
    ) -> None:
        if stored.shape != origin.stored.shape:
            raise ValueError(f"shapes differ: {tuple(origin.stored.shape)} against {tuple(stored.shape)}")
        self.origin = origin
        self.stored = stored
        self.final = final
        self.place = place
        self.parameters = origin.parameters
        self._changed: dict[str, Bool[Tensor, "m n"]] = {}
        self._changed_counts: dict[str, Counts] = {}
        self._angles: dict[str, NDArray[np.float64]] = {}

    @property
    def views(self) -> tuple[str, ...]:
        """``bf16``, and ``native`` too where either side is stored wider."""
        exact = self.origin.stored.dtype == torch.bfloat16 and self.stored.dtype == torch.bfloat16
        return VIEWS[:1] if exact else VIEWS

    def changed(self, view: str) -> Bool[Tensor, "m n"]:
        """Visibly changed entries in a view (arXiv 2606.07082, section 3)."""
        if view not in self._changed:
            self._changed[view] = visibly_changed(
                self.origin.stored, self.stored, self.parameters.eta, bf16=view == "bf16"
            )
        return self._changed[view]

    def changed_counts(self, view: str) -> Counts:
        """How many entries of each bf16 magnitude of W0 changed visibly."""
        if view not in self._changed_counts:
            self._changed_counts[view] = count_bins(self.origin.bins, self.changed(view))
        return self._changed_counts[view]

    @cached_property
    def after(self) -> Decomposition:
        """W+'s singular values; its leading vectors serve the angles, where those are asked for, and are dropped."""
        if self.update_is_zero:
            return self.origin.decomposition
        if not self.has_angles:
            return decompose(self.stored, 0)
        k = self.origin.rotation_k
        found = decompose(self.stored, k)
        for side in SIDES:
            bases = getattr(self.origin.decomposition, side)[:, :k], getattr(found, side)
            self._angles[side] = principal_angles(*bases).cpu().numpy()
        return found.without_vectors()

    @property
    def has_angles(self) -> bool:
        """Whether the leading vectors of both ends are computed, as rotation needs them."""
        return "checkpoint" in self.origin.vectors

    def angles(self, side: str) -> NDArray[np.float64]:
        """Principal angles between the leading rotation subspaces of one side (``left``, ``right``), degrees."""
        if self.update_is_zero:
            return np.zeros(self.origin.rotation_k)
        _ = self.after  # makes them
        return self._angles[side]

    def difference(self, view: str = "native") -> Difference:
        """dW = W+ - W0 as stored, or between the ends rounded to bf16; made in float64 where it is sliced."""
        return Difference(self.stored, self.origin.stored, bf16=view == "bf16")

    def update(self) -> Float64[Tensor, "m n"]:
        """dW whole, in float64: made anew for the caller to keep or overwrite."""
        return self.difference()[:]

    @cached_property
    def update_is_zero(self) -> bool:
        """Whether no stored value moved at all."""
        pairs = ((self.origin.stored[rows], self.stored[rows]) for rows in row_blocks(self.stored.shape))
        return all(torch.equal(before.double(), after.double()) for before, after in pairs)

    @cached_property
    def update_norm(self) -> tuple[float, float]:
        """||dW||_F and its rounding bound."""
        return frobenius(self.difference())

    @property
    def has_update_decomposition(self) -> bool:
        """Whether dW's spectrum was asked for already."""
        return "update_decomposition" in self.__dict__

    @cached_property
    def update_decomposition(self) -> Decomposition:
        """dW's singular values and its leading vectors."""
        if self.final is not None and self.final.is_this:
            return self.final.decomposition
        if self.place is not None and self.place.position == 0 and (first := self.place.trajectory.increments[0]):
            return first.decomposition
        return leading_triples(self.difference(), max(self.parameters.similarity_k + self.parameters.hill_k))
