"""How a canonical matrix is cut out of the tensor that holds it: views only, nothing is copied until it has to be.

m rows (outputs), n columns (inputs), E experts, G groups. A cut acts on a tensor on disk, on a parameter in memory and
on a sum of low-rank factors alike, since all of them are linear.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Expert:
    """One of a stack: (E, ...) -> (...)."""

    index: int

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the cut, from the shape of what it is cut from."""
        return shape[1:]

    def apply(self, tensor: Tensor) -> Tensor:
        """The cut itself."""
        return tensor[self.index]


@dataclass(frozen=True, slots=True)
class Transpose:
    """(n, m) -> (m, n): weights that are applied from the right, as GPT-2's Conv1D holds them."""

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the cut, from the shape of what it is cut from."""
        return shape[::-1]

    def apply(self, tensor: Tensor) -> Tensor:
        """The cut itself."""
        return tensor.T if tensor.ndim == 2 else tensor


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows ``start`` to ``stop`` of each of G = ``groups`` equal groups: (m, ...) -> (G (stop - start), ...)."""

    start: int
    stop: int
    groups: int = 1

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the cut, from the shape of what it is cut from."""
        return (self.groups * (self.stop - self.start), *shape[1:])

    def apply(self, tensor: Tensor) -> Tensor:
        """The cut itself; a copy where the groups are more than one."""
        if self.groups == 1:
            return tensor[self.start : self.stop]
        grouped = tensor.reshape(self.groups, -1, *tensor.shape[1:])[:, self.start : self.stop]
        return grouped.reshape(-1, *tensor.shape[1:])


@dataclass(frozen=True, slots=True)
class Columns:
    """Columns ``start`` to ``stop``: (m, n) -> (m, stop - start)."""

    start: int
    stop: int

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the cut, from the shape of what it is cut from."""
        return (shape[0], self.stop - self.start)

    def apply(self, tensor: Tensor) -> Tensor:
        """The cut itself."""
        return tensor[:, self.start : self.stop]


@dataclass(frozen=True, slots=True)
class RotaryHalves:
    """Rows of a head from (pair, component) to (component, pair): the order that transformers' rotary embedding wants.

    Meta's Llama weights rotate neighbouring rows of a head, transformers' rotate row i with row i + d/2. Source: the
    conversion of Llama weights in transformers, ``w.view(H, d/2, 2, n).transpose(1, 2)``.
    """

    heads: int

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the cut, from the shape of what it is cut from."""
        return shape

    def apply(self, tensor: Tensor) -> Tensor:
        """The rows in the other order; a copy."""
        pairs = tensor.reshape(self.heads, -1, 2, *tensor.shape[1:])
        return pairs.transpose(1, 2).reshape(tensor.shape)


Cut = Expert | Transpose | Rows | Columns | RotaryHalves


@dataclass(frozen=True, slots=True)
class Piece:
    """A canonical tensor: the name of the tensor that holds it, its own shape, and the cuts in order."""

    stored: str
    shape: tuple[int, ...]
    cuts: tuple[Cut, ...] = ()

    @property
    def numel(self) -> int:
        """Entries."""
        return math.prod(self.shape)

    def then(self, *cuts: Cut) -> Piece:
        """A piece of this piece."""
        shape = self.shape
        for cut in cuts:
            shape = cut.shape(shape)
        return Piece(self.stored, shape, self.cuts + cuts)

    def cut(self, tensor: Tensor) -> Tensor:
        """The piece of the tensor that holds it."""
        for cut in self.cuts:
            tensor = cut.apply(tensor)
        return tensor
