"""Pure linear algebra on tensors: no names, no files.

Shapes: W is (m, n), p = min(m, n); singular values (p,), descending; left vectors (m, k), right vectors (n, k).
Everything is float64 on the tensor's own device.
"""

from geopd.spectral.angles import angle_error, principal_angles
from geopd.spectral.decomposition import Decomposition, decompose, leading_part_error
from geopd.spectral.norms import frobenius
from geopd.spectral.selection import TieSplit, fractional_overlap, magnitude_bins, split_at_share, visibly_changed

__all__ = [
    "Decomposition",
    "TieSplit",
    "angle_error",
    "decompose",
    "fractional_overlap",
    "frobenius",
    "leading_part_error",
    "magnitude_bins",
    "principal_angles",
    "split_at_share",
    "visibly_changed",
]
