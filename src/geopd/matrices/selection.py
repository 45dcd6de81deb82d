"""Which matrices to measure: presets and globs over canonical names."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

from geopd.matrices.naming import Role, WeightName

_ATTENTION = frozenset({"q_proj", "k_proj", "v_proj", "o_proj"})
PRESETS = ("layers", "attention", "all")


@dataclass(frozen=True, slots=True)
class Selection:
    """Presets (``layers``, ``attention``, ``all``) and globs over canonical names; a tensor any of them takes is in.

    ``layers``: every matrix in full; embeddings, head and vectors entrywise. ``attention``: the four attention
    matrices of every layer. ``all``: as ``layers``, with embeddings and head in full.

    Raises:
        ValueError: if no pattern is given.
    """

    patterns: tuple[str, ...] = ("layers",)

    def __post_init__(self) -> None:
        if not self.patterns:
            raise ValueError("--matrices: name a preset (layers, attention, all) or a glob over matrix names")

    def full(self, weight: WeightName) -> bool:
        """Whether every diagnostic is asked for."""
        return any(self._full(pattern, weight) for pattern in self.patterns)

    def entrywise(self, weight: WeightName) -> bool:
        """Whether at least the entrywise metrics are asked for."""
        return (
            self.full(weight)
            or bool({"layers", "all"} & set(self.patterns))
            or any(fnmatchcase(weight.name, pattern) for pattern in self.patterns)
        )

    @staticmethod
    def _full(pattern: str, weight: WeightName) -> bool:
        if weight.role is Role.VECTOR:
            return False
        if pattern == "layers":
            return weight.role is Role.MATRIX
        if pattern == "attention":
            return weight.layer is not None and weight.module in _ATTENTION
        return pattern == "all" or fnmatchcase(weight.name, pattern)
