"""How heavy is the head of the update's spectrum? The Hill tail index (arXiv 2606.07082, section 4).

H_k = [1/(k-1) sum_{i<k} log(sigma_i / sigma_k)]^-1 over the k largest singular values of dW; depends on k, so k is
recorded. Undefined below numerical rank k and where the k values are equal. Its nulls are in ``noise_nulls``.
"""

from __future__ import annotations

import torch

from geopd.diagnostics.comparison import Comparison
from geopd.diagnostics.parameters import Parameters
from geopd.diagnostics.update_size import ZERO
from geopd.diagnostics.values import resolved_within, undefined
from geopd.results import Measurement, setting

METRICS = ("hill_tail",)
RELATIVE_LIMIT = 1e-3


def default_setting(parameters: Parameters) -> str:
    """The headline's setting."""
    return setting(k=parameters.hill_k[0], view="native")


def measure(comparison: Comparison) -> list[Measurement]:
    """Hill index for every k asked; its error is first order in the singular values' bounds."""
    return [_measure(comparison, k, k == comparison.parameters.hill_k[0]) for k in comparison.parameters.hill_k]


def _measure(comparison: Comparison, k: int, default: bool) -> Measurement:
    name = setting(k=k, view="native")
    if comparison.update_is_zero:
        return undefined("hill_tail", name, ZERO, default=default)
    d = comparison.update_decomposition
    if d.rank < k:
        return undefined("hill_tail", name, f"numerical rank of the update is {d.rank} < k = {k}", default=default)
    top = d.sigma[:k]
    total = float(torch.log(top[:-1] / top[-1]).sum())
    e = d.sigma_error[:k]
    # log(sigma_i / sigma_k) moves by at most e_i / (sigma_i - e_i) + e_k / (sigma_k - e_k); rank >= k keeps both finite
    relative = e / (top - e)
    slack = float(relative[:-1].sum() + (k - 1) * relative[-1])
    if total <= slack:
        return undefined("hill_tail", name, f"the {k} largest singular values are equal", default=default)
    value = (k - 1) / total
    error = value * slack / (total - slack)
    return resolved_within("hill_tail", name, value, error, RELATIVE_LIMIT * value, d.method, default=default)
