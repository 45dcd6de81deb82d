"""Does half a bf16 step decide which weights change visibly? (arXiv 2606.07082, Gate III)

Predicted from the masters: an entry is to become visible iff |dW| >= ULP_bf16(W0) / 2, dW as stored. Realised: the
entries that did change visibly between both ends rounded to bf16 (geopd.diagnostics.sparsity). With P and M the two
masks, ``visible_mask_jaccard`` = |P and M| / |P or M|, ``visible_mask_precision`` = |P and M| / |P|,
``visible_mask_recall`` = |P and M| / |M|. All counts are exact.

The checkpoint must be stored wider than bf16: predicting from the difference of bf16 numbers is circular. Where W0 is
bf16 itself the two masks differ only towards zero at powers of two, whose step inwards is half as wide. Where it is
not, an entry's place in its rounding cell decides too: P(visible) = min(1, |d| / u), u = ULP_bf16(W0).

Null: the same ratio of expectations for a Gaussian update of the stored rms, so high agreement alone says nothing of
the update. P(|d| >= u/2) = erfc(u / (2 sqrt 2 s)); both at once the same on the grid, and off it
(s/u) sqrt(2/pi) (exp(-u^2/8s^2) - exp(-u^2/2s^2)) + erfc(u / (sqrt 2 s)).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.special import erfc

from geopd.diagnostics.bf16_grid import OUTWARD, on_bf16_grid, units
from geopd.diagnostics.comparison import Comparison
from geopd.diagnostics.gaussian_update import closed_regime, visible_probability
from geopd.diagnostics.parameters import Parameters
from geopd.diagnostics.sparsity import WIDE
from geopd.diagnostics.update_size import ZERO
from geopd.diagnostics.values import COUNTED, ok, undefined
from geopd.results import Measurement, Null, setting
from geopd.spectral.norms import row_blocks

METRICS = ("visible_mask_jaccard", "visible_mask_precision", "visible_mask_recall")
_EMPTY = (
    "no entry moved by half a bf16 step and none changed visibly",
    "no entry moved by half a bf16 step",
    "no entry changed visibly",
)


def default_setting(parameters: Parameters) -> str:
    """The headline's setting."""
    return setting(eta=parameters.eta, view="bf16")


def measure(comparison: Comparison) -> list[Measurement]:
    """Agreement of the predicted with the realised mask; undefined where its denominator has no entry."""
    name = default_setting(comparison.parameters)
    if reason := _circular(comparison):
        return [undefined(metric, name, reason) for metric in METRICS]
    both, totals = _counts(comparison)
    return [
        ok(metric, name, both / total, 0.0, COUNTED) if total else undefined(metric, name, empty)
        for metric, total, empty in zip(METRICS, totals, _EMPTY, strict=True)
    ]


def _counts(comparison: Comparison) -> tuple[int, tuple[int, int, int]]:
    """Entries in both masks; in either, in the predicted one and in the realised one."""
    both = foreseen = realised = 0
    visible = comparison.changed("bf16")
    for rows in row_blocks(comparison.stored.shape):
        distance = comparison.difference()[rows].abs_()
        predicted = distance >= units(comparison.origin.bins[rows]) / 2
        both += int(torch.count_nonzero(predicted & visible[rows]))
        foreseen += int(torch.count_nonzero(predicted))
        realised += int(torch.count_nonzero(visible[rows]))
    return both, (foreseen + realised - both, foreseen, realised)


def _circular(comparison: Comparison) -> str | None:
    """Why nothing can be predicted."""
    after = comparison.stored
    if after.dtype not in WIDE:
        stored = str(after.dtype).removeprefix("torch.")
        return f"the checkpoint is stored as {stored}: predicting its mask from its own rounding is circular"
    if comparison.update_is_zero:
        return ZERO
    if on_bf16_grid(after):
        return "the checkpoint holds bf16 numbers only: predicting its mask from its own rounding is circular"
    return None


def nulls(comparison: Comparison) -> list[Null]:
    """Agreement expected of a Gaussian update of the same stored rms; none where visibility has no closed form."""
    form = closed_regime(comparison, "bf16")
    defined = {item.metric for item in measure(comparison) if item.value is not None}
    if form is None or not defined:
        return []
    s = comparison.update_norm[0] / math.sqrt(comparison.stored.numel())
    index = np.flatnonzero(comparison.origin.magnitude_counts)
    counts = comparison.origin.magnitude_counts[index]
    u = np.minimum(OUTWARD[index] / s, 1e3)  # beyond it nothing is left of the tails, and squares would overflow
    foreseen = erfc(u / math.sqrt(8))
    if form == "on-grid":
        both = foreseen
    else:
        tails = np.exp(-(u**2) / 8) - np.exp(-(u**2) / 2)
        both = math.sqrt(2 / math.pi) / u * tails + erfc(u / math.sqrt(2))
    shared, predicted, visible = (
        float(counts @ each)
        for each in (both, foreseen, visible_probability(index, s, form, comparison.parameters.eta))
    )
    name, method = default_setting(comparison.parameters), "ratio of expectations over the magnitude bins of W0"
    return [
        Null(metric, name, "gaussian", shared / total, None, 0, method, True)
        for metric, total in zip(METRICS, (predicted + visible - shared, predicted, visible), strict=True)
        if metric in defined and total > 0
    ]
