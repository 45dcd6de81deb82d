"""How many weights did not visibly change? bf16-aware update sparsity (arXiv 2606.07082, section 3).

An entry is unchanged iff |w+ - w0| <= eta * max(|w0|, |w+|); sparsity = 1 - changed / n. Both ends are rounded to bf16
first (``view=bf16``); after that cast every eta below 2^-8 is the same mask. Null: a Gaussian update of the stored
energy (geopd.diagnostics.gaussian_update).

Sweeps, beside the headline: ``min_ulp=K;view=bf16`` counts as changed what lies at least K bf16 numbers apart, zero
being one number whatever its sign; K = 1 is exact inequality. ``eta=...;view=native`` where an end is stored wider, for
eta of 1e-4, 1e-3 and 1e-2. All counts are exact.

``sub_ulp_share`` (geopd): of the entries that moved at all as stored, the share with |dW| < ULP_bf16(W0)/2: what saving
in bf16 would lose (an origin off the grid would keep some of it by chance). It needs both ends stored wider than bf16
and is undefined otherwise: what is left in bf16 numbers says nothing of what rounding took, so that predicting from
them is circular. Null: a Gaussian of the stored rms s, mean over entries of erf(u / (2 sqrt 2 s)), u = ULP_bf16(W0).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import BFloat16, Int16
from scipy.special import erf
from torch import Tensor

from geopd.diagnostics.bf16_grid import UNITS, exponent_counts, on_bf16_grid, units
from geopd.diagnostics.comparison import Comparison
from geopd.diagnostics.gaussian_update import gaussian_sparsity
from geopd.diagnostics.parameters import Parameters
from geopd.diagnostics.update_size import ZERO
from geopd.diagnostics.values import COUNTED, ok, undefined
from geopd.results import Measurement, Null, setting
from geopd.spectral.norms import row_blocks

METRICS = ("update_sparsity",)
LOST = "sub_ulp_share"
MIN_ULPS = (1, 2, 4)
ETAS = (1e-4, 1e-3, 1e-2)
WIDE = (torch.float32, torch.float64)


def default_setting(parameters: Parameters) -> str:
    """The headline's setting."""
    return setting(eta=parameters.eta, view="bf16")


def lost_setting(_: Parameters) -> str:
    """The setting of ``sub_ulp_share``."""
    return setting(view="native")


def measure(comparison: Comparison) -> list[Measurement]:
    """Share of entries that did not visibly change, per view and along the sweeps; exact."""
    found = [
        _share(
            setting(eta=comparison.parameters.eta, view=view),
            int(comparison.changed_counts(view).sum()),
            comparison,
            default=view == "bf16",
        )
        for view in comparison.views
    ]
    return found + [_share(name, count, comparison, default=False) for name, count in _sweeps(comparison).items()]


def _share(name: str, changed: int, comparison: Comparison, *, default: bool) -> Measurement:
    return ok(METRICS[0], name, 1.0 - changed / comparison.stored.numel(), 0.0, COUNTED, default=default)


def _sweeps(comparison: Comparison) -> dict[str, int]:
    """Changed entries at every step of the sweeps, by setting: one pass in row blocks over both ends."""
    native = "native" in comparison.views
    etas = [eta for eta in ETAS if native and eta != comparison.parameters.eta]
    steps, relative = dict.fromkeys(MIN_ULPS, 0), dict.fromkeys(etas, 0)
    for rows in row_blocks(comparison.stored.shape):
        before, after = comparison.origin.stored[rows], comparison.stored[rows]
        moved = steps_between(before.bfloat16(), after.bfloat16())
        for least in steps:
            steps[least] += int(torch.count_nonzero((moved >= least) | (moved <= -least)))
        if etas:
            a, b = before.double(), after.double()
            size, distance = torch.maximum(a.abs(), b.abs()), (b - a).abs_()
            for eta in relative:
                relative[eta] += int(torch.count_nonzero(distance > size * eta))
    return {setting(min_ulp=least, view="bf16"): count for least, count in steps.items()} | {
        setting(eta=eta, view="native"): count for eta, count in relative.items()
    }


def steps_between(a: BFloat16[Tensor, "..."], b: BFloat16[Tensor, "..."]) -> Int16[Tensor, "..."]:
    """How many bf16 numbers lie from a up to b, both zeros being one number, modulo 65536.

    Finite numbers lie at most 65280 apart, so what has wrapped is still 256 or more from 0: far beyond any step asked
    for. 16-bit integers take a third of the time of 32-bit ones.
    """
    return _ordered(b).sub_(_ordered(a))


def _ordered(W: BFloat16[Tensor, "..."]) -> Int16[Tensor, "..."]:
    """Integers in the order of the bf16 numbers: the magnitude bits, with the sign."""
    bits = W.view(torch.int16)
    sign = bits >> 15
    return (bits & 0x7FFF).bitwise_xor_(sign).sub_(sign)  # -x is ~x + 1


def nulls(comparison: Comparison) -> list[Null]:
    """Sparsity of an isotropic Gaussian update of the same stored energy."""
    found = []
    for view in comparison.views:
        null = gaussian_sparsity(comparison, view)
        if null is not None:
            mean, sd, method = null
            name = setting(eta=comparison.parameters.eta, view=view)
            found.append(Null(METRICS[0], name, "gaussian", mean, sd, 0, method, view == "bf16"))
    return found


def measure_lost(comparison: Comparison) -> list[Measurement]:
    """Share of the moved entries that moved by less than half a bf16 step of W0; exact."""
    name = setting(view="native")
    if reason := _not_wide(comparison):
        return [undefined(LOST, name, reason)]
    moved = lost = 0
    for rows in row_blocks(comparison.stored.shape):
        distance = (comparison.stored[rows].double() - comparison.origin.stored[rows].double()).abs_()
        small = distance < units(comparison.origin.bins[rows]) / 2
        moved += int(torch.count_nonzero(distance))
        lost += int((small & (distance > 0)).sum())
    return [ok(LOST, name, lost / moved, 0.0, COUNTED)]


def _not_wide(comparison: Comparison) -> str | None:
    """Why there is no ``sub_ulp_share``."""
    for which, W in (("the origin", comparison.origin.stored), ("the checkpoint", comparison.stored)):
        if W.dtype not in WIDE:
            stored = str(W.dtype).removeprefix("torch.")
            return f"{which} is stored as {stored}: what rounding lost cannot be told from what is left"
    if comparison.update_is_zero:
        return ZERO
    if on_bf16_grid(comparison.stored):
        return "the checkpoint holds bf16 numbers only: what rounding lost cannot be told from what is left"
    return None


def nulls_lost(comparison: Comparison) -> list[Null]:
    """The share for an isotropic Gaussian of the stored rms."""
    if _not_wide(comparison):
        return []
    counts = exponent_counts(comparison.origin.magnitude_counts)
    n = comparison.stored.numel()
    s = comparison.update_norm[0] / math.sqrt(n)
    p = erf(np.minimum(UNITS, 1e3 * s) / s / math.sqrt(8.0))  # a vanishing s would overflow where it is 1 anyway
    sd = math.sqrt(float(counts @ (p * (1 - p)))) / n
    return [Null(LOST, setting(view="native"), "gaussian", float(counts @ p) / n, sd, 0, "closed form over ULP(W0)")]
