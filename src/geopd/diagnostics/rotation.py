"""How far did the leading singular subspaces turn? Principal-angle rotation (arXiv 2606.07082, section 3).

cos theta_i = sigma_i(U0_k^T U+_k), likewise for V; mean, median and maximum in degrees, either side by itself. A side
whose own dimension is at most k is undefined (its angles are trivially 0); on the long side of a matrix with
min(m, n) < k the whole row or column space is compared, and the note says so.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from geopd.diagnostics.comparison import SIDES, Comparison
from geopd.diagnostics.parameters import Parameters
from geopd.diagnostics.values import resolved_within, undefined
from geopd.results import Measurement, setting
from geopd.spectral import angle_error

SUMMARIES = ("mean", "median", "max")
METRICS = tuple(f"rotation_{side}_{summary}_deg" for side in SIDES for summary in SUMMARIES)
RELATIVE_LIMIT = 1e-3  # of the largest angle: beyond it the bound says the angle is not known


def default_setting(parameters: Parameters) -> str:
    """The headline's setting."""
    return setting(k=parameters.rotation_k, view="native")


def angles(comparison: Comparison, side: str) -> NDArray[np.float64] | str:
    """Principal angles of one side in degrees, ascending, or the reason why there are none."""
    origin = comparison.origin
    k, asked = origin.rotation_k, comparison.parameters.rotation_k.of(origin.rows, origin.cols)
    dimension = origin.rows if side == "left" else origin.cols
    if dimension <= asked:
        return f"k = {asked} covers the whole {side} side of dimension {dimension}: every angle is trivially 0"
    for name, decomposition in (("origin", origin.decomposition), ("checkpoint", comparison.after)):
        if decomposition.rank < k:
            return f"numerical rank of the {name} is {decomposition.rank} < k = {k}: no unique top-k subspace"
    return comparison.angles(side)


def measure(comparison: Comparison) -> list[Measurement]:
    """Mean, median and maximum principal angle of either side, in degrees, with the bound of both decompositions."""
    origin = comparison.origin
    name = default_setting(comparison.parameters)
    k = origin.rotation_k
    found = []
    for side in SIDES:
        theta = angles(comparison, side)
        for summary in SUMMARIES:
            metric = f"rotation_{side}_{summary}_deg"
            if isinstance(theta, str):
                found.append(undefined(metric, name, theta))
                continue
            error = 0.0 if comparison.update_is_zero else angle_error((origin.decomposition, comparison.after), k)
            asked = comparison.parameters.rotation_k.of(origin.rows, origin.cols)
            found.append(
                resolved_within(
                    metric,
                    name,
                    float(getattr(np, summary)(theta)),
                    error,
                    RELATIVE_LIMIT * float(theta[-1]),
                    f"sines of {comparison.after.method}",
                    note=f"k cut to min(m, n) = {k}" if k < asked else None,
                )
            )
    return found
