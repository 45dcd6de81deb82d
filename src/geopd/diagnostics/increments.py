"""Does training keep to one channel, step after step? Similarity of successive increments, and how firm Sim_K is.

``increment_similarity`` = ||V_K(W_t - W_{t-1})^T V_K(W_{t-1} - W_{t-2})||_F^2 / K, V_K the top-K right singular
vectors, no unit, in [0, 1]; the origin is the first checkpoint's predecessor. Cumulative updates grow alike even on a
random walk, because the later one contains the earlier; increments of a walk do not. Undefined for the first checkpoint
and where an increment's numerical rank is below K. Null: K / n for independent isotropic subspaces. A checkpoint that
lacks the matrix is passed over.

Successive increments of weights stored in bf16 but trained wider share the rounding error of W_{t-1}, with opposite
signs; the similarity does not see signs, so rounding alone looks like a channel. Where it can make more than a tenth of
either increment's energy (u^2/12 per entry and rounded end) the value is ``unresolved`` and its note says so.

``subspace_gap`` = (sigma_K - sigma_{K+1}) / sigma_1 of the cumulative update, no unit: what holds its top-K subspace in
place. Sim_K moves by about noise / (gap sigma_1), so a Sim_K beside a small gap says little.

Source: geopd; subspaces as in arXiv 2606.07082, section 4.
"""

from __future__ import annotations

import torch

from geopd.diagnostics.comparison import Comparison
from geopd.diagnostics.parameters import Parameters
from geopd.diagnostics.rounding import TOO_NOISY
from geopd.diagnostics.subspace_similarity import isotropic_nulls
from geopd.diagnostics.trajectory import Increment
from geopd.diagnostics.update_size import ZERO
from geopd.diagnostics.values import ok, resolved_within, undefined
from geopd.results import Measurement, Null, Status, setting

SIMILARITY, GAP = METRICS = ("increment_similarity", "subspace_gap")
LIMIT = 1e-3  # absolute, on a scale from 0 to 1


def default_setting(parameters: Parameters) -> str:
    """The headline's setting, of both metrics."""
    return setting(k=parameters.similarity_k[0], view="native")


def measure_similarity(comparison: Comparison) -> list[Measurement]:
    """Similarity of this checkpoint's increment to the one before it, for every K asked."""
    ks = comparison.parameters.similarity_k
    return [_similarity(comparison, k, k == ks[0]) for k in ks]


def _pair(comparison: Comparison, k: int) -> tuple[Increment, Increment] | str:
    """This increment and the one before it, or why they cannot be compared."""
    place = comparison.place
    if place is None or place.position == 0:
        return "the first checkpoint's increment has none before it"
    now, before = (place.trajectory.increments[place.position - i] for i in (0, 1))
    if now is None or before is None:
        return "a checkpoint before this one could not be read"
    for which, item in (("this", now), ("the previous", before)):
        if item.decomposition.rank < k:
            return f"numerical rank of {which} increment is {item.decomposition.rank} < K = {k}"
    return now, before


def _similarity(comparison: Comparison, k: int, default: bool) -> Measurement:
    name = setting(k=k, view="native")
    pair = _pair(comparison, k)
    if isinstance(pair, str):
        return undefined(SIMILARITY, name, pair, default=default)
    now, before = (item.decomposition for item in pair)
    value = float(torch.linalg.matrix_norm(now.right[:, :k].T @ before.right[:, :k]) ** 2) / k
    # tr(P Q) / K moves by at most ||P - P'|| + ||Q - Q'||, and ||P - P'|| is the sine of the largest angle
    error = min(now.leading_sine(k) + before.leading_sine(k), 1.0)
    noise = max(item.noise for item in pair)
    if noise <= TOO_NOISY:
        return resolved_within(SIMILARITY, name, value, error, LIMIT, now.method, default=default)
    note = f"bf16 rounding, shared by both increments, can make {noise:.0%} of an increment's energy"
    return Measurement(SIMILARITY, name, value, error, Status.UNRESOLVED, now.method, note, default)


def nulls_similarity(comparison: Comparison) -> list[Null]:
    """K / n and its exact-order sd, as for the similarity of cumulative updates."""
    ks = comparison.parameters.similarity_k
    return isotropic_nulls(SIMILARITY, comparison, [k for k in ks if not isinstance(_pair(comparison, k), str)])


def measure_gap(comparison: Comparison) -> list[Measurement]:
    """The gap at K over sigma_1; undefined below numerical rank K."""
    ks = comparison.parameters.similarity_k
    return [_gap(comparison, k, k == ks[0]) for k in ks]


def _gap(comparison: Comparison, k: int, default: bool) -> Measurement:
    name = setting(k=k, view="native")
    if comparison.update_is_zero:
        return undefined(GAP, name, ZERO, default=default)
    d = comparison.update_decomposition
    if d.rank < k:
        return undefined(GAP, name, f"numerical rank of the update is {d.rank} < K = {k}", default=default)
    top = float(d.sigma[0])
    # that of sigma_K and sigma_{K+1}, and, as the gap is at most sigma_1, no more than sigma_1's own
    error = float(d.sigma_error[0] + d.sigma_error[k - 1 : k + 1].sum()) / top
    return ok(GAP, name, d.gap(k) / top, error, d.method, default=default)
