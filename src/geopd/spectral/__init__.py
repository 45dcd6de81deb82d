"""Pure linear algebra on tensors: no names, no files.

Shapes: W is (m, n), p = min(m, n); singular values (p,), descending; left vectors (m, k), right vectors (n, k).
Everything is float64 on the tensor's own device.
"""

from geopd.spectral.angles import angle_error, principal_angles
from geopd.spectral.decomposition import Decomposition, decompose, leading_part_error
from geopd.spectral.norms import frobenius
from geopd.spectral.selection import (
    Counts,
    MagnitudeMask,
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
    "MagnitudeMask",
    "Mask",
    "TieSplit",
    "angle_error",
    "count_bins",
    "decompose",
    "frobenius",
    "leading_part_error",
    "magnitude_bins",
    "principal_angles",
    "smallest_magnitudes",
    "split_at_share",
    "visibly_changed",
]
