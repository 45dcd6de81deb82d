"""Pure linear algebra on tensors: no names, no files.

Shapes: W is (m, n), p = min(m, n); singular values (p,), descending; left vectors (m, k), right vectors (n, k).
Results are float64, on the tensor's own device.
"""

from geopd.spectral.angles import angle_error, principal_angles
from geopd.spectral.decomposition import Decomposition, decompose, singular_values
from geopd.spectral.gradient_rank import RankEstimate, effective_rank, gradient_gram, log_rank_ratio, unit_gram
from geopd.spectral.leading import leading_triples
from geopd.spectral.norms import frobenius, row_blocks
from geopd.spectral.operands import Difference, Operand, checked_scale
from geopd.spectral.selection import (
    Counts,
    MagnitudeMask,
    Magnitudes,
    Mask,
    TieSplit,
    count_bins,
    magnitude_bins,
    smallest_magnitudes,
    split_at_share,
    visibly_changed,
)

__all__ = [
    "Counts",
    "Decomposition",
    "Difference",
    "MagnitudeMask",
    "Magnitudes",
    "Mask",
    "Operand",
    "RankEstimate",
    "TieSplit",
    "angle_error",
    "checked_scale",
    "count_bins",
    "decompose",
    "effective_rank",
    "frobenius",
    "gradient_gram",
    "leading_triples",
    "log_rank_ratio",
    "magnitude_bins",
    "principal_angles",
    "row_blocks",
    "singular_values",
    "smallest_magnitudes",
    "split_at_share",
    "unit_gram",
    "visibly_changed",
]
