"""The leading singular values of noise: independent centred entries whose variance differs by row and by column.

Variances a_i b_j (the row and column sums of the actual ones, over their total). What departs from that product is not
seen: ``departure`` says how much that is. The resolvent of N N^T in the limit of many rows and columns follows from two
numbers, x z = sum_i a_i / (1 - a_i y) and y z = sum_j b_j / (1 - b_j x), and so does the expected count of squared
singular values above lambda, Im Phi(lambda + i0) / pi with

    Phi(z) = sum_i log(1 - a_i y) + sum_j log(1 - b_j x) + x y z,

stationary in x and y. The edge is where x(z) ceases to be real: where z^2 = sum (a/(1 - a y))^2 sum (b/(1 - b x))^2.
For entries alike it is (sqrt m + sqrt n)^2. The i-th largest value lies near the count i - 3/4 (the mean positions of
the Airy process of real matrices; .281 for the first), its sd follows from Tracy and Widom's law. No draw is made; the
cost does not depend on the size of the matrix: rows and columns are taken together in groups of like scale.

The stable rank is within 10% of draws and the Hill index within 20% (from k = 8 on; below, within the draws' own
spread) where all three hold (``holds``):

- the largest square has at most .17 of the energy: beyond, a few entries, rows or columns are the spectrum, the limit
  of many rows and columns does not apply, and the stable rank could fall below 1.
- no row and no column has (sum_j v_ij^2)^(1/2) over .1 of the edge: one entry or a few would stand alone. Rounding of
  weights smaller than about 60 x 60 mostly fails here.
- the edge of the variances averaged over 12 x 12 groups of like rows and like columns is within 4% of that of the
  product of their sums. Entries that merely vary average out; blocks, bands and diagonals do not.

Source: Girko's equations of a separable variance profile; Hachem, Loubaton and Najim (2007); draws in docs/log.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import PchipInterpolator
from scipy.optimize import brentq

Array = NDArray[np.float64]
Complex = NDArray[np.complex128]
_SINGLE, _GROUPS = 16, 32  # the largest scales one by one, since they may lie alone, and the rest in growing groups
LARGEST_SHARE, LARGEST_ENTRY, LARGEST_DEPARTURE = 0.17, 0.1, 0.04
"""Limits of ``holds``, measured against draws."""
_FIRST = 0.281  # count at the mean of the Tracy-Widom law of real matrices
_BELOW, _EDGE_SD = 0.824, 0.514  # count one sd below that mean; the sd in units of the distance from there to the edge
_LEVELS = 2.0 * 0.1 ** np.arange(8)  # heights above the real axis, in edges, through which x and y are carried to it
_REFINED, _SMOOTH = 2, 2.0  # times to look again where neighbouring slopes differ by more than a factor of this
_PROBED, _PROBES = 4, 4  # intervals looked into at a time, and points in each
_ITERATIONS, _STILL, _HALVINGS = 400, 1e-7, 11  # of the edge of blocks: to a few parts in 10000
_LANDING = 6  # Newton steps on the real axis itself


@dataclass(frozen=True, slots=True)
class Scales:
    """Groups of rows or columns of like variance: the variance of each, and how many it stands for."""

    value: Array
    count: Array

    @classmethod
    def of(cls, variance: Array) -> Scales:
        """Groups of a side's variances that keep their sum and their largest values; zeros carry nothing."""
        ordered = np.sort(variance[variance > 0])[::-1]
        if len(ordered) <= _SINGLE + _GROUPS:
            return cls(ordered, np.ones(len(ordered)))
        bounds = np.unique(np.geomspace(_SINGLE, len(ordered), _GROUPS + 1).round().astype(np.int64))
        sizes = np.diff(bounds).astype(np.float64)
        means = np.add.reduceat(ordered, bounds[:-1]) / sizes
        return cls(np.concatenate([ordered[:_SINGLE], means]), np.concatenate([np.ones(_SINGLE), sizes]))


@dataclass(frozen=True, slots=True)
class _Line:
    """Distance below the edge, in edges, against the count reached there; both rising from 0."""

    below: Array
    count: Array

    @classmethod
    def of(cls, below: Array, count: Array) -> _Line | None:
        order = np.argsort(below)
        order = order[np.isfinite(count[order])]
        if len(order) == 0:
            return None
        rising = np.maximum.accumulate(np.append(0.0, count[order]))
        # in a gap of the spectrum the count stands still: both ends of it are kept
        return cls(np.append(0.0, below[order]), rising + 1e-7 * np.arange(len(rising)))

    def __call__(self, count: Array) -> Array:
        # the count grows like the 3/2th power below an edge
        found: Array = PchipInterpolator(self.count ** (2 / 3), self.below)(count ** (2 / 3))
        return found

    def rough(self, reach: float) -> Array | None:
        """Points inside the longest intervals whose slope differs from a neighbour's; None where there are none.

        Isolated scales leave gaps in the spectrum, with an edge of their own behind them.
        """
        last = min(int(np.searchsorted(self.count, reach)) + 1, len(self.count))
        length = np.diff(self.below[:last])
        slope = length / np.diff(self.count[:last] ** (2 / 3))
        turn = np.abs(np.log(slope[1:] / slope[:-1])) > math.log(_SMOOTH)
        uneven = np.append(turn, False) | np.append(False, turn)
        if not uneven.any():
            return None
        longest = np.argsort(np.where(uneven, length, 0.0))[-_PROBED:]
        inner = np.linspace(0.0, 1.0, _PROBES + 2)[1:-1]
        return np.unique(self.below[longest, None] + length[longest, None] * inner)


class NoiseSpectrum:
    """Expected leading squared singular values, as shares of the energy (the sum of all squares).

    ``rows``, ``cols``: the noise's expected energy in every row and every column, any one unit, not all zero.
    ``k``: how many of the leading values will be asked for.
    """

    def __init__(self, rows: Array, cols: Array, k: int) -> None:
        self.rows, self.cols = Scales.of(rows / rows.sum()), Scales.of(cols / cols.sum())
        self.edge, self._gap = self._at_edge()
        self._line = self._followed(max(float(positions(k)[-1]), _BELOW))

    def _real(self, gap: float) -> tuple[float, float, float, float]:
        """z, 1/x, 1/y and z^2 sum (b/(1 - b x))^-2 sum (a/(1 - a y))^-2 beyond the spectrum.

        ``gap``: distance of 1/y from the largest a, where it is a pole; that of 1/x from the largest b is solved for.
        """
        a, b = self.rows.value, self.cols.value
        over = a / (gap + (a[0] - a))
        level = float(self.rows.count @ over)  # x y z
        other = (
            float(b[0] * self.cols.count[0]) / level
        )  # where the largest alone would reach the level: below the root
        for _ in range(60):
            part = b / (other + (b[0] - b))
            total = float(self.cols.count @ part)
            # Newton for 1/total, which is nearly straight
            step = total * (total - level) / level / float(self.cols.count @ (part**2 / b))
            other += step
            if abs(step) <= 1e-13 * other:
                break
        v, w = float(b[0]) + other, float(a[0]) + gap
        squares = float(self.rows.count @ over**2) * float(self.cols.count @ part**2)  # times (v w)^2
        return level * v * w, v, w, level**2 / squares

    def _at_edge(self) -> tuple[float, float]:
        """The largest point of the spectrum, and the distance below it at which the first count would be reached."""
        top = float(self.rows.value[0])
        found = brentq(lambda log_gap: math.log(self._real(top * math.exp(log_gap))[3]), -30.0, 30.0, xtol=1e-9)
        gaps = top * np.exp(found + np.array([-1e-3, 0.0, 1e-3]))
        z, v, w, _ = np.array([self._real(gap) for gap in gaps]).T
        bend = (z[2] - 2 * z[1] + z[0]) / 2e-6
        slope = (1 / (v[2] * w[2]) - 1 / (v[0] * w[0])) / 2e-3
        return float(z[1]), float((math.sqrt(bend) / abs(slope)) ** (2 / 3))

    def leading(self, count: Array) -> Array | None:
        """lambda below which lie all but ``count`` (ascending) of the squares; None where they are not so many."""
        if self._line is None or self._line.count[-1] < count[-1]:
            return None
        found: Array = self.edge * (1 - self._line(count))
        return found

    def _followed(self, reach: float) -> _Line | None:
        """The count from the edge downwards until it reaches this, if the spectrum has so many."""
        gap = self._gap * (1.5 * math.pi * reach) ** (2 / 3)  # where the square-root law of the edge reaches it
        below = np.linspace(0.0, 1.0, 17)[1:] ** 2 * min(1.6 * gap / self.edge, 0.98)
        found = self._counts(below)
        if not found[-1] >= reach:  # heavy heads: far fewer than the law of the edge says
            rest = 1 - (1 - below[-1]) * np.geomspace(0.8, 1e-3, 16)
            below, found = np.append(below, rest), np.append(found, self._counts(rest))
        line = _Line.of(below, found)
        for _ in range(_REFINED):
            probe = None if line is None else line.rough(reach)
            if probe is None:
                break
            below, found = np.append(below, probe), np.append(found, self._counts(probe))
            line = _Line.of(below, found)
        return line

    def _counts(self, below: Array) -> Array:
        """Expected number of squares above edge (1 - below); NaN where the equations were not solved."""
        level = self.edge * (1 - below)
        a, b = self.rows.value[:, None], self.cols.value[:, None]
        size, other = self.rows.count, self.cols.count
        z = level + 1j * self.edge * _LEVELS[0]
        x = y = 1 / z
        for _ in range(6):
            x, y = size @ (a / (1 - a * y)) / z, other @ (b / (1 - b * x)) / z
        for height in np.append(np.repeat(_LEVELS, 2), np.zeros(_LANDING)) * self.edge:
            z = level + 1j * height
            left, right = a / (1 - a * y), b / (1 - b * x)
            F, G = x * z - size @ left, y * z - other @ right
            B, C = size @ (left * left), other @ (right * right)
            determinant = z * z - B * C
            x, y = x - (F * z + B * G) / determinant, y - (z * G + C * F) / determinant
        wrong = (np.abs(x * z - size @ (a / (1 - a * y))) > 1e-6 * np.abs(x * z)) | (x.imag > 1e-6 * np.abs(x))
        phase = size @ np.log(1 - a * y) + other @ np.log(1 - b * x) + x * y * z
        # in a gap x and y are real, of either signed zero
        count: Array = np.abs(phase.imag) / math.pi
        count[wrong] = np.nan
        return count


def positions(k: int) -> Array:
    """Counts at which the k largest squares lie on average."""
    found: Array = np.arange(k, dtype=np.float64) + 0.25
    found[0] = _FIRST
    return found


def first_square(noise: NoiseSpectrum) -> tuple[float, float] | None:
    """Mean of the largest square as a share of the energy, and its relative sd; None where there is not one whole."""
    found = noise.leading(np.array([_FIRST, _BELOW]))
    if found is None:
        return None
    return float(found[0]), _EDGE_SD * (noise.edge - float(found[1])) / float(found[0])


def holds(noise: NoiseSpectrum, entry: float, cells: Array, sizes: tuple[Array, ...]) -> bool:
    """Whether the closed form holds of variances v_ij (limits in the module's text).

    ``entry``: largest (sum v_ij^2)^(1/2) of a row or column over the sum of all v. ``cells``, ``sizes``: sums of v
    between groups of like rows and like columns (g, h), any one unit, and how many rows and columns are in each group.
    """
    first = first_square(noise)
    if first is None or first[0] > LARGEST_SHARE or entry > LARGEST_ENTRY * noise.edge:
        return False
    return departure(cells, sizes) <= LARGEST_DEPARTURE


def departure(cells: Array, sizes: tuple[Array, ...]) -> float:
    """|edge / edge of the product of the sums - 1|, for variances that are constant between groups (``holds``)."""
    filled = np.ix_(*(size > 0 for size in sizes))
    share, counts = cells[filled] / cells.sum(), tuple(size[size > 0] for size in sizes)
    product = np.outer(share.sum(axis=1), share.sum(axis=0))
    return abs(_block_edge(share, *counts) / _block_edge(product, *counts) - 1)


def _block_edge(share: Array, rows: Array, cols: Array) -> float:
    """Largest squared singular value of noise whose variances are constant in blocks, as a share of the energy.

    Above it, and only there, 1/x_g = s - sum_h v_gh m_h y_h, 1/y_h = s - sum_g v_gh n_g x_g has a positive solution,
    s the singular value: the limit of the iteration from 1/s upwards (Ajanki, Erdos and Krueger, 2017).
    """
    weight = share / np.outer(rows, cols)
    across, down = weight * cols, weight.T * rows

    def solved(s: float) -> bool:
        x, y = np.full(len(rows), 1 / s), np.full(len(cols), 1 / s)
        for _ in range(_ITERATIONS):
            level = s - across @ y
            if not (level > 0).all():
                return False
            other = s - down @ (1 / level)
            if not (other > 0).all():
                return False
            still = float(np.abs(1 / level / x - 1).max()) < _STILL
            x, y = 1 / level, 1 / other
            if still:
                return True
        return False

    # between the largest row or column alone and twice it: sigma_1 <= (row bound)^(1/2) + (column bound)^(1/2)
    ends = float(across.sum(axis=1).max()), float(down.sum(axis=1).max())
    low, high = math.sqrt(max(ends)), math.sqrt(ends[0]) + math.sqrt(ends[1])
    for _ in range(_HALVINGS):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if solved(middle) else (middle, high)
    return high * high
