"""Where do the visible changes lie? Overlap of the update mask with two masks of the origin (arXiv 2511.08567).

M: visibly changed entries. M_princ: the alpha share of entries where the rank-r reconstruction of W0 is largest.
M_low: the alpha share where |W0| is smallest. Overlap(M*, M) = |M* and M| / |M|; entries tied at the cut share the
remaining quota equally, so a random M scores alpha. Undefined where nothing changed.

Nulls: a random mask (alpha), a Gaussian update rounded to the same density, and, for the principal mask, the observed
changes permuted among entries of equal magnitude.
"""

from __future__ import annotations

import math

from geopd.diagnostics.comparison import Comparison
from geopd.diagnostics.gaussian_update import gaussian_overlap, permuted_overlap
from geopd.diagnostics.parameters import Parameters
from geopd.diagnostics.values import COUNTED, ok, resolved_within, undefined
from geopd.results import Measurement, Null, setting

PRINCIPAL, LOW = METRICS = ("principal_overlap", "low_magnitude_overlap")
NOTHING = "no visible change: the overlap of nothing is undefined"
LIMIT = 1e-3  # share of the changed entries that may sit within rounding of the principal mask's cut


def _setting(parameters: Parameters, metric: str, alpha: float, view: str) -> str:
    rank = {"rank": parameters.principal_rank} if metric == PRINCIPAL else {}
    return setting(alpha=alpha, eta=parameters.eta, view=view, **rank)


def low_setting(parameters: Parameters) -> str:
    """The headline's setting."""
    return _setting(parameters, LOW, parameters.alphas[0], "bf16")


def principal_setting(parameters: Parameters) -> str:
    """The headline's setting."""
    return _setting(parameters, PRINCIPAL, parameters.alphas[0], "bf16")


def _cases(comparison: Comparison, metric: str) -> list[tuple[float, str, str, bool]]:
    alphas = comparison.parameters.alphas
    return [
        (alpha, view, _setting(comparison.parameters, metric, alpha, view), alpha == alphas[0] and view == "bf16")
        for view in comparison.views
        for alpha in alphas
    ]


def measure_low(comparison: Comparison) -> list[Measurement]:
    """Overlap of the visible changes with the origin's smallest weights; exact."""
    found = []
    for alpha, view, name, default in _cases(comparison, LOW):
        value = comparison.origin.low_mask(view, alpha).overlap(
            comparison.changed(view), comparison.changed_counts(view)
        )
        found.append(
            undefined(LOW, name, NOTHING, default=default)
            if value is None
            else ok(LOW, name, value, 0.0, COUNTED, default=default)
        )
    return found


def measure_principal(comparison: Comparison) -> list[Measurement]:
    """Overlap with the principal mask; its error counts changed entries within rounding of the mask's cut."""
    origin = comparison.origin
    found = []
    for alpha, view, name, default in _cases(comparison, PRINCIPAL):
        total = int(comparison.changed_counts(view).sum())
        if total == 0:
            found.append(undefined(PRINCIPAL, name, NOTHING, default=default))
            continue
        split = origin.principal_mask(alpha)
        value = split.overlap(comparison.changed(view), comparison.changed_counts(view))
        assert value is not None
        error = split.doubtful(comparison.changed(view)) / total
        found.append(
            resolved_within(PRINCIPAL, name, value, error, LIMIT, origin.decomposition.method, default=default)
        )
    return found


def nulls_low(comparison: Comparison) -> list[Null]:
    """The uniform mask and the density-matched Gaussian update."""
    return _nulls(comparison, LOW)


def nulls_principal(comparison: Comparison) -> list[Null]:
    """The uniform mask, the density-matched Gaussian update and the permuted mask."""
    return _nulls(comparison, PRINCIPAL)


def _nulls(comparison: Comparison, metric: str) -> list[Null]:
    found = []
    n = comparison.stored.numel()
    for alpha, view, name, default in _cases(comparison, metric):
        changed = int(comparison.changed_counts(view).sum())
        if changed == 0:
            continue
        sd = math.sqrt(alpha * (1 - alpha) / changed * (n - changed) / max(n - 1, 1))
        found.append(Null(metric, name, "random_mask", alpha, sd, 0, "hypergeometric", default))
        split = (
            comparison.origin.principal_mask(alpha) if metric == PRINCIPAL else comparison.origin.low_mask(view, alpha)
        )
        weight = split.weight_by_bin(comparison.origin.bins)
        gaussian = gaussian_overlap(comparison, view, weight)
        if gaussian is not None:
            mean, method = gaussian
            spread = math.sqrt(max(mean * (1 - mean), 0.0) / changed)
            found.append(Null(metric, name, "gaussian", mean, spread, 0, method, default))
        if metric == PRINCIPAL:
            mean, spread = permuted_overlap(comparison, view, weight)
            found.append(Null(metric, name, "permuted", mean, spread, 0, "closed form over |W0| bins", default))
    return found
