"""Names on disk or in memory -> canonical weight matrices: naming, splitting, pairing of two checkpoints, selection."""

from geopd.matrices.canonical import CanonicalCheckpoint, canonical_view
from geopd.matrices.cuts import Cut, Expert, Piece
from geopd.matrices.layouts import Layout, layout_of
from geopd.matrices.naming import Role, WeightName, canonical_names
from geopd.matrices.pairing import Pair, Pairing, Skip, pair_checkpoints
from geopd.matrices.selection import Selection

__all__ = [
    "CanonicalCheckpoint",
    "Cut",
    "Expert",
    "Layout",
    "Pair",
    "Pairing",
    "Piece",
    "Role",
    "Selection",
    "Skip",
    "WeightName",
    "canonical_names",
    "canonical_view",
    "layout_of",
    "pair_checkpoints",
]
