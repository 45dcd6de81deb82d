"""How much of the stored update is bf16 rounding, and what would rounding alone have scored?

``rounding_noise_share`` is the share of ||dW||^2 that is not along the intended update d: 1 - cos^2(dW, d). In [0, 1]
and without a unit. By regime (geopd.diagnostics.bf16_grid):

- ``none``: 0, the update is as stored. The bf16 view is stored beside it, where d is known and nothing is modelled.
- ``on-grid``: d taken as Gaussian, its scale s solved from the stored energy. Per entry
  E[D^2] = u^2 sum_k (2k-1) erfc((k - 1/2) u/(s sqrt 2)) and E[D d] = u s sqrt(2/pi) sum_k exp(-((k - 1/2) u/s)^2 / 2),
  both s^2 (+ u^2/12) beyond s = 2u; the share is 1 - (sum E[D d])^2 / (sum E[D^2] sum s^2). It tends to the white-noise
  share sum(u^2/12)/||dW||^2 from s of about .65 median u on, and to 1 below, where the mask decides what is seen.
- ``one end``: sum(u^2/12)/||dW||^2 at every size (the error of W+ alone, uniform), at most 1.

Source: geopd, validated in docs/log.md. Nulls ``rounding`` of stable rank and Hill index: two draws of u U(-1/2, 1/2),
white noise on W0's own steps, whose leading singular values are found by Lanczos; they serve every checkpoint.
"""

from __future__ import annotations

import math
from weakref import WeakKeyDictionary

import numpy as np
import torch
from jaxtyping import Float64
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import erfc
from torch import Tensor

from geopd.diagnostics import hill
from geopd.diagnostics.bf16_grid import EXPONENTS, UNITS, regime, rounded_views, units
from geopd.diagnostics.comparison import Comparison, OriginMatrix
from geopd.diagnostics.gaussian_spectrum import seed_of
from geopd.diagnostics.parameters import Parameters
from geopd.diagnostics.update_size import ZERO
from geopd.diagnostics.values import ok, undefined
from geopd.results import Measurement, Null, setting
from geopd.spectral import leading_triples, row_blocks

Array = NDArray[np.float64]
METRICS = ("rounding_noise_share",)
TOO_NOISY = 0.1
"""Noise share above which stable rank, Hill index and Sim_K read the rounding and not the update (docs/log.md)."""
SOLVED = 1e-9
"""Numerical error of the closed forms; how far the model is off is in docs/log.md, not in the error column."""
DRAWS = 2
_TERMS = np.arange(1, 25, dtype=np.float64) - 0.5
_DRAWS: WeakKeyDictionary[OriginMatrix, list[tuple[float, Array]]] = WeakKeyDictionary()
_VERDICTS: WeakKeyDictionary[Comparison, Measurement] = WeakKeyDictionary()


def default_setting(_: Parameters) -> str:
    """The headline's setting."""
    return setting(view="native")


def measure(comparison: Comparison) -> list[Measurement]:
    """The share in the native view, and in the bf16 view too where the native one has no rounding."""
    return [_native(comparison), *(_seen(comparison, view) for view in rounded_views(comparison)[1:])]


def noise_verdict(comparison: Comparison) -> str | None:
    """Why stable rank, Hill index and Sim_K of this update are not to be relied on; None where rounding is minor."""
    share = _native(comparison).value
    if share is None or share <= TOO_NOISY:
        return None
    return f"bf16 rounding makes {share:.0%} of the stored update's energy, over {TOO_NOISY:.0%}"


def _native(comparison: Comparison) -> Measurement:
    if comparison not in _VERDICTS:
        _VERDICTS[comparison] = _measure_native(comparison)
    return _VERDICTS[comparison]


def _measure_native(comparison: Comparison) -> Measurement:
    name = setting(view="native")
    if comparison.update_is_zero:
        return undefined(METRICS[0], name, ZERO)
    rounding = regime(comparison)
    if rounding is None:
        return undefined(METRICS[0], name, "float16: its rounding is not modelled")
    if rounding == "none":
        return ok(METRICS[0], name, 0.0, 0.0, "as stored", note="stored wider than bf16: no rounding")
    counts, step = _steps(comparison)
    energy = comparison.update_norm[0] ** 2
    if rounding == "one end":
        return ok(METRICS[0], name, min(1.0, float(counts @ step**2) / 12 / energy), SOLVED, "u^2/12, one end")
    share, s = on_grid_share(counts, step, energy)
    return ok(METRICS[0], name, share, SOLVED, f"closed form, on-grid, intended rms {s:.3g}")


def _steps(comparison: Comparison) -> tuple[Array, Array]:
    """How many entries of W0 have each step, and the steps, in weight units."""
    counts = comparison.origin.magnitude_counts.reshape(EXPONENTS, -1).sum(axis=1).astype(np.float64)
    present = counts > 0
    return counts[present], UNITS[present]


def on_grid_share(counts: Array, step: Array, energy: float) -> tuple[float, float]:
    """Share of a stored update's energy that on-grid rounding explains, and the rms of the intended update.

    ``counts``, ``step``: entries per step size u and the sizes; ``energy``: ||dW||_F^2 > 0. Steps in weight units.
    """
    total = counts.sum()
    start = 0.5 * math.log(energy / total)
    low = high = start

    def excess(log_s: float) -> float:
        return math.log(max(float(counts @ _energy(step, math.exp(log_s))), 1e-300)) - math.log(energy)

    while excess(low) > 0:
        low -= 2
    while excess(high) < 0:
        high += 2
    s = math.exp(start if low == high else brentq(excess, low, high, xtol=1e-12))
    along = float(counts @ _product(step, s))
    share = 1 - along**2 / (float(counts @ _energy(step, s)) * total * s * s)
    return float(min(max(share, 0.0), 1.0)), s


def _energy(step: Array, s: float) -> Array:
    """E[D^2] per entry for each step size, D = u round(d/u), d of scale s."""
    series = (2 * _TERMS * erfc(_TERMS * step[:, None] / (s * math.sqrt(2.0)))).sum(axis=1)
    return np.where(s <= 2 * step, step**2 * series, s * s + step**2 / 12)


def _product(step: Array, s: float) -> Array:
    """E[D d] per entry for each step size."""
    series = np.exp(-((_TERMS * step[:, None] / s) ** 2) / 2).sum(axis=1)
    return np.where(s <= 2 * step, step * s * math.sqrt(2 / math.pi) * series, s * s)


def _seen(comparison: Comparison, view: str) -> Measurement:
    """The share in a view whose intended update is known: it is the native one."""
    name = setting(view=view)
    if comparison.update_is_zero:
        return undefined(METRICS[0], name, ZERO, default=False)
    scale = comparison.update_norm[0]
    squared, along = 0.0, 0.0
    for rows in row_blocks(comparison.stored.shape):  # embeddings do not fit in float64 at once
        before, after = comparison.origin.stored[rows], comparison.stored[rows]
        seen = (after.bfloat16().double() - before.bfloat16().double()) / scale
        squared += float((seen * seen).sum())
        along += float((seen * ((after.double() - before.double()) / scale)).sum())
    if squared == 0.0:
        return undefined(METRICS[0], name, "no entry changed in this view", default=False)
    share = min(max(1 - along**2 / squared, 0.0), 1.0)
    error = comparison.stored.numel() ** 0.5 * 2.0**-50
    return ok(METRICS[0], name, share, error, "1 - cos^2 to the wide update", default=False)


def nulls_stable_rank(comparison: Comparison) -> list[Null]:
    """Stable rank of rounding noise on W0's own steps; none where the update carries no rounding."""
    drawn = [energy / float(sigma[0]) ** 2 for energy, sigma in _drawn(comparison)]
    return [_null("stable_rank", setting(view="native"), drawn, True)] if drawn else []


def nulls_hill(comparison: Comparison) -> list[Null]:
    """Hill index of rounding noise on W0's own steps, for every k at which the update has one."""
    found = []
    for item in hill.measure(comparison):
        k = int(item.setting.split(";")[0].removeprefix("k="))
        tops = [sigma[:k] for _, sigma in _drawn(comparison) if item.value is not None and len(sigma) >= k]
        drawn = [(k - 1) / float(np.log(top[:-1] / top[-1]).sum()) for top in tops if top[0] > top[-1] > 0]
        if len(drawn) == DRAWS:
            found.append(_null("hill_tail", item.setting, drawn, item.is_default))
    return found


def _null(metric: str, name: str, drawn: list[float], default: bool) -> Null:
    mean, sd = float(np.mean(drawn)), float(np.std(drawn, ddof=1))
    return Null(metric, name, "rounding", mean, sd, len(drawn), "draws of u U(-1/2, 1/2), Lanczos", default)


def _drawn(comparison: Comparison) -> list[tuple[float, Array]]:
    """Energy and leading singular values of each noise draw, in one arbitrary unit; kept as long as the origin is."""
    origin = comparison.origin
    if comparison.update_is_zero or origin.p == 1 or regime(comparison) not in ("on-grid", "one end"):
        return []
    if origin not in _DRAWS:
        generator = torch.Generator().manual_seed(seed_of(origin) >> 1)
        u = units(origin.bins)
        u = u / u.max()
        k = min(max(comparison.parameters.hill_k), origin.p)
        _DRAWS[origin] = [_draw(u, generator, k) for _ in range(DRAWS)]
    return _DRAWS[origin]


def _draw(u: Float64[Tensor, "m n"], generator: torch.Generator, k: int) -> tuple[float, Array]:
    noise = torch.rand(u.shape, generator=generator, dtype=torch.float64).sub_(0.5).mul_(u.cpu())
    return float((noise * noise).sum()), np.asarray(leading_triples(noise.float(), k, tolerance=1e-4).sigma[:k])
