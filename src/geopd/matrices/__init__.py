"""Names on disk -> canonical weight matrices: naming, pairing of two checkpoints, selection."""

from geopd.matrices.naming import Role, WeightName, canonical_names
from geopd.matrices.pairing import Pair, Pairing, Skip, pair_checkpoints
from geopd.matrices.selection import Selection

__all__ = ["Pair", "Pairing", "Role", "Selection", "Skip", "WeightName", "canonical_names", "pair_checkpoints"]
