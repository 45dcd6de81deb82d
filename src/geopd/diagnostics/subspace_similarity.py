"""When does the update's channel settle? Similarity to the final subspace (arXiv 2606.07082, section 4).

Sim_K(t, t_end) = ||V_K(t)^T V_K(t_end)||_F^2 / K, V_K the top-K right singular vectors of the cumulative update.
Undefined below numerical rank K and for a run of one checkpoint. Null: K / n for isotropic subspaces.
"""

from __future__ import annotations

import math

import torch

from geopd.diagnostics.comparison import Comparison
from geopd.diagnostics.parameters import Parameters
from geopd.diagnostics.values import ok, resolved_within, undefined, unresolved
from geopd.results import Measurement, Null, setting

METRICS = ("subspace_similarity",)
LIMIT = 1e-3  # absolute, on a scale from 0 to 1


def default_setting(parameters: Parameters) -> str:
    """The headline's setting."""
    return setting(k=parameters.similarity_k[0], view="native")


def measure(comparison: Comparison) -> list[Measurement]:
    """Sim_K for every K asked; its error follows from the gaps that hold the two subspaces."""
    ks = comparison.parameters.similarity_k
    return [_measure(comparison, k, k == ks[0]) for k in ks]


def _measure(comparison: Comparison, k: int, default: bool) -> Measurement:
    name = setting(k=k, view="native")
    reason = _undefined(comparison, k)
    if reason is not None:
        return undefined("subspace_similarity", name, reason, default=default)
    assert comparison.final is not None
    now, end = comparison.update_decomposition, comparison.final.decomposition
    value = float(torch.linalg.matrix_norm(now.right[:, :k].T @ end.right[:, :k]) ** 2) / k
    # tr(P Q) / K moves by at most ||P - P'|| + ||Q - Q'||, and ||P - P'|| is the sine of the largest angle
    error = now.leading_sine(k) + end.leading_sine(k)
    if comparison.final.doubt and not comparison.final.is_this:
        error_free = ok("subspace_similarity", name, value, error, now.method, default=default)
        return unresolved(error_free, f"at the last checkpoint {comparison.final.doubt}")
    note = "the last checkpoint against itself" if comparison.final.is_this else None
    return resolved_within("subspace_similarity", name, value, error, LIMIT, now.method, default=default, note=note)


def _undefined(comparison: Comparison, k: int) -> str | None:
    if comparison.final is None:
        return "no other checkpoint of the run gives a final subspace to compare with"
    for which, d in (("this", comparison.update_decomposition), ("the final", comparison.final.decomposition)):
        if d.rank < k:
            return f"numerical rank of {which} update is {d.rank} < K = {k}"
    return None


def nulls(comparison: Comparison) -> list[Null]:
    """K / n, the expectation for two independent isotropic K-dimensional subspaces, with its exact-order sd."""
    ks = comparison.parameters.similarity_k
    return isotropic_nulls(METRICS[0], comparison, [k for k in ks if _undefined(comparison, k) is None])


def isotropic_nulls(metric: str, comparison: Comparison, ks: list[int]) -> list[Null]:
    """K / n with sd (1 - K/n) sqrt(2 / ((n-1)(n+2))) for each K; none where n = 1 leaves only one direction."""
    n, first = comparison.origin.cols, comparison.parameters.similarity_k[0]
    return [
        Null(
            metric,
            setting(k=k, view="native"),
            "gaussian",
            k / n,
            (1 - k / n) * math.sqrt(2 / ((n - 1) * (n + 2))),
            0,
            "K/n",
            k == first,
        )
        for k in ks
        if n > 1
    ]
