"""Do two runs from one origin move the same coordinates, and in the same direction?

M_a, M_b: entries that changed visibly in the bf16 view (geopd.diagnostics.sparsity) by the last checkpoint of either
run; no units, exact counts.

- ``support_jaccard`` = |M_a and M_b| / |M_a or M_b|; undefined where nothing changed in either run.
- ``sign_agreement``: share of the entries in both whose changes, bf16 number minus bf16 number, have one sign;
  undefined where the runs share none.

Null ``independent``: the runs' changes are drawn apart, each with its observed density in every stratum of W0. With
n_b entries in stratum b, and p, q the two densities there, Jaccard = sum n_b p q / sum n_b (p + q - p q), its sd from
the hypergeometric overlap of every stratum. Small weights are visible first in any run, so strata matter. Their choice
follows the origin:

- on the bf16 grid: the magnitudes |W0|; signs agree by half, sd 1/(2 sqrt(shared)). Taken to mean that training
  started from the stored W0; runs of wider masters, of which only bf16 casts were kept, agree more (by .54 for two
  independent updates of half a step) and cannot be told from these.
- off it (fp32 masters): both runs cross the same rounding thresholds, at whichever side of its cell W0 lies, so entries
  and signs agree without any common cause. The strata are then the binary exponent of W0, the nearer threshold and the
  distance to it (quarter octaves of distance over step), and the signs' null is what the strata alone give,
  sum (a+ b+ + a- b-) / n_b over sum a b / n_b, a+ and a- counted outwards and inwards, with binomial sd.

Source: geopd; nulls checked against draws in the tests.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from weakref import WeakKeyDictionary

import numpy as np
import torch
from jaxtyping import Bool, Int8, Int16
from numpy.typing import NDArray
from torch import Tensor

from geopd.diagnostics.bf16_grid import UNITS
from geopd.diagnostics.comparison import Comparison, OriginMatrix
from geopd.diagnostics.parameters import Parameters
from geopd.diagnostics.values import COUNTED, ok, undefined
from geopd.results import Measurement, Null, setting
from geopd.spectral import count_bins
from geopd.spectral.norms import row_blocks

Array = NDArray[np.float64]
JACCARD, SIGNS = METRICS = ("support_jaccard", "sign_agreement")
_LEVELS = 64  # quarter octaves of the distance to the nearer threshold, per side of the cell
_CELLS: WeakKeyDictionary[OriginMatrix, Int16[Tensor, "m n"]] = WeakKeyDictionary()  # one for all pairs of runs


def default_setting(parameters: Parameters) -> str:
    """The setting of both metrics."""
    return setting(eta=parameters.eta, view="bf16")


def visible_signs(comparison: Comparison) -> Int8[Tensor, "m n"]:
    """Sign of every visible change in the bf16 view, 0 where there is none: one byte an entry."""
    changed = comparison.changed("bf16")
    signs = torch.empty(changed.shape, dtype=torch.int8, device=changed.device)
    for rows in row_blocks(changed.shape):
        before, after = comparison.origin.stored[rows].bfloat16(), comparison.stored[rows].bfloat16()
        # compared, not subtracted: a bf16 difference could underflow, and infinite ends have none
        signs[rows] = (after > before).to(torch.int8) - (after < before).to(torch.int8)
        signs[rows] *= changed[rows]
    return signs


@dataclass(frozen=True)
class _Strata:
    """Entries per stratum of W0, and those that each run changed outwards (away from zero) and inwards."""

    size: Array
    one: tuple[Array, Array]
    other: tuple[Array, Array]


class RunPair:
    """Two runs from one origin: the signs of their visible changes of one matrix, with what both metrics share."""

    def __init__(self, origin: OriginMatrix, one: Int8[Tensor, "m n"], other: Int8[Tensor, "m n"]) -> None:
        self.origin = origin
        self.one, self.other = one, other
        self.both: Bool[Tensor, "m n"] = (one != 0) & (other != 0)
        self.shared = int(self.both.sum())
        self.union = int((one != 0).sum()) + int((other != 0).sum()) - self.shared

    def agreeing(self) -> int:
        """Shared entries whose changes have one sign."""
        return int(((self.one == self.other) & self.both).sum())

    @cached_property
    def strata(self) -> _Strata:
        """Counts per stratum, only those that are not empty."""
        index = self.origin.bins if self.origin.on_grid else _kept_cells(self.origin)
        outward = torch.where(torch.signbit(self.origin.stored), -1, 1).to(torch.int8)
        size = count_bins(index)
        live = np.flatnonzero(size)

        def of(signs: Int8[Tensor, "m n"]) -> tuple[Array, Array]:
            away = signs * outward
            found = [count_bins(index, away == way)[live].astype(np.float64) for way in (1, -1)]
            return found[0], found[1]

        return _Strata(size[live].astype(np.float64), of(self.one), of(self.other))


def _kept_cells(origin: OriginMatrix) -> Int16[Tensor, "m n"]:
    if origin not in _CELLS:
        _CELLS[origin] = _cells(origin)
    return _CELLS[origin]


def _cells(origin: OriginMatrix) -> Int16[Tensor, "m n"]:
    """Stratum of every entry by exponent, nearer rounding threshold and distance to it, below 2^15."""
    found = torch.empty(origin.stored.shape, dtype=torch.int16, device=origin.stored.device)
    unit = torch.from_numpy(UNITS).to(found.device)
    for rows in row_blocks(origin.stored.shape):
        bins, exact = origin.bins[rows], origin.stored[rows].double().abs()
        exponent, rounded = (bins >> 7).long(), exact.bfloat16().double()
        u = unit[exponent]
        # the number below a power of two is only half a step away
        inward = torch.where(((bins & 0x7F) == 0) & (exponent > 1), u / 2, u)
        up, down = (rounded + u / 2 - exact) / u, (exact - rounded + inward / 2) / u
        level = (-4 * torch.minimum(up, down).log2()).clamp(0, _LEVELS - 1).long()
        found[rows] = (exponent * 2 * _LEVELS + (up < down) * _LEVELS + level).to(torch.int16)
    return found


def measure_jaccard(pair: RunPair) -> list[Measurement]:
    """Shared over all visibly changed entries; exact."""
    name = default_setting(pair.origin.parameters)
    if pair.union == 0:
        return [undefined(JACCARD, name, "no visible change in either run")]
    return [ok(JACCARD, name, pair.shared / pair.union, 0.0, COUNTED)]


def measure_signs(pair: RunPair) -> list[Measurement]:
    """Share of the shared entries that moved the same way in both runs; exact."""
    name = default_setting(pair.origin.parameters)
    if pair.shared == 0:
        return [undefined(SIGNS, name, "the runs share no visibly changed entry")]
    return [ok(SIGNS, name, pair.agreeing() / pair.shared, 0.0, COUNTED)]


def nulls_jaccard(pair: RunPair) -> list[Null]:
    """What two runs share whose changes are drawn apart, stratum by stratum."""
    if pair.union == 0:
        return []
    strata = pair.strata
    one, other = strata.one[0] + strata.one[1], strata.other[0] + strata.other[1]
    n = strata.size
    expected = float((one * other / n).sum())
    total = float((one + other).sum())
    variance = float((one * other * (n - one) * (n - other) / n**2 / np.maximum(n - 1, 1)).sum())
    union = total - expected
    sd = math.sqrt(variance) * total / union**2
    name = default_setting(pair.origin.parameters)
    return [Null(JACCARD, name, "independent", expected / union, sd, 0, _method(pair))]


def nulls_signs(pair: RunPair) -> list[Null]:
    """Half where W0 is on the bf16 grid; off it, what the side of W0's rounding cell decides for both runs."""
    if pair.shared == 0:
        return []
    mean = 0.5
    if not pair.origin.on_grid:
        strata = pair.strata
        (up, down), (other_up, other_down), n = strata.one, strata.other, strata.size
        agreeing = float(((up * other_up + down * other_down) / n).sum())
        mean = agreeing / float(((up + down) * (other_up + other_down) / n).sum())
    sd = math.sqrt(max(mean * (1 - mean), 0.0) / pair.shared)
    return [Null(SIGNS, default_setting(pair.origin.parameters), "independent", mean, sd, 0, _method(pair))]


def _method(pair: RunPair) -> str:
    over = "|W0|" if pair.origin.on_grid else "W0's place in its rounding cell"
    return f"closed form over {over}"
