"""How far did the spectrum move? Normalised spectral shift (arXiv 2606.07082, section 3).

NSS = ||sigma(W+) - sigma(W0)||_2 / ||sigma(W0)||_2 over all singular values in descending order.
"""

from __future__ import annotations

import math

import torch

from geopd.diagnostics.comparison import Comparison
from geopd.diagnostics.values import ok, undefined
from geopd.results import Measurement, setting

METRICS = ("spectral_shift",)


def measure(comparison: Comparison) -> list[Measurement]:
    """NSS; its error is sqrt(p) (e0 + e+) / ||sigma(W0)||_2 from the decompositions' bounds."""
    name = setting(view="native")
    before = comparison.origin.decomposition
    size = float(torch.linalg.vector_norm(before.sigma))
    if size == 0.0:
        return [undefined(METRICS[0], name, "the origin is the zero matrix: no scale to compare with")]
    if comparison.update_is_zero:
        return [ok(METRICS[0], name, 0.0, 0.0, before.method)]
    after = comparison.after
    shift = float(torch.linalg.vector_norm(after.sigma - before.sigma)) / size
    error = math.sqrt(before.sigma.numel()) * (before.backward_error + after.backward_error) / size
    return [ok(METRICS[0], name, shift, error, after.method)]
