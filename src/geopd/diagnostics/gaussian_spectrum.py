"""What would an update without structure have done to the spectrum and to the leading subspaces of W0?

The null is an isotropic Gaussian update E of the stored energy, s = ||dW||_F / sqrt(m n), added to W0; both of its
expectations need sigma(W0) alone, no further decomposition. Shapes: m x n, p = min(m, n); l_i = sigma_i^2.

Normalised spectral shift, the larger of two forms (each is biased low where the other holds):

- first order: delta sigma_i ~ N(0, s^2), so sqrt(p) s / ||sigma||, which is (||dW||/||W0||)/sqrt(max(m, n)). Within 7%
  while s is at most a quarter of the median gap of sigma(W0).
- flow: dl_i/dt = max(m, n) - 1 + sum_j (l_i + l_j)/(l_i - l_j), t from 0 to s^2 (second-order perturbation carried
  on), each denominator d regularised to (d^2 + 4 (l_i + l_j) step)/d; plus s^2/(1 + 5 s^2/gap_i^2) per value in
  quadrature, for the first-order part that level repulsion leaves. One step of it alone is 10% to 500% off beyond 4
  gaps; eight are within 10% at every size tried, up to updates larger than W0.

Principal angles: atan of the singular values of X, k x (dim - k), independent Gaussian with
Var X_ij = s^2 (l_i + l_j)/(l_i - l_j)^2, l_j = 0 beyond p on the long side. From k = 256 on neighbouring directions are
taken together, so that a draw has 128 to 255 rows whatever k is: entries carry the summed variance of their block over
its width, which keeps the law of the singular values but for the few largest. They are those of a draw times s, so two
draws of an origin serve all its checkpoints; they are seeded by the shape and by how often each magnitude occurs in W0:
the same on every machine and in any order. The mean is within 15%, the median within 6% while the mean angle is below
20 degrees (17% at 30). The maximum angle gets no null: it hangs on the one gap at k and on the one draw of the entry
across it, and X and the update it stands for differ by .3 to 2.3 times.

Source: measured against draws (docs/log.md); perturbation theory as in Stewart and Sun, Matrix Perturbation Theory.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import scipy.linalg
import torch
from numpy.typing import NDArray

from geopd.diagnostics import rotation
from geopd.diagnostics.comparison import SIDES, Comparison, OriginMatrix
from geopd.results import Null, setting

Array = NDArray[np.float64]
STEPS, DRAWS = 8, 2
METHOD = "atan of singular values of drawn X"
_SINGLE = 128  # leading singular values that the flow moves one by one; a power law's head is no continuum
_GROUPED = 256  # groups of consecutive values for the rest: the flow there sees the density only
_NEIGHBOURS = 8  # gaps either side that a local mean gap is taken over
_COARSE = 128  # leading directions that X is drawn for, or up to twice as many
_ANGLES: WeakKeyDictionary[OriginMatrix, dict[int, Array]] = WeakKeyDictionary()


def seed_of(origin: OriginMatrix) -> int:
    """A seed from what W0 holds (shape and count of every bf16 magnitude), not from where or when it is measured."""
    digest = hashlib.blake2b(f"{origin.rows}x{origin.cols}".encode(), digest_size=8)
    digest.update(origin.magnitude_counts.astype("<i8").tobytes())
    return int.from_bytes(digest.digest(), "little")


def update_scale(comparison: Comparison) -> float:
    """s = ||dW||_F / sqrt(m n), in weight units: the rms entry of the update as stored."""
    return comparison.update_norm[0] / math.sqrt(comparison.stored.numel())


def gaussian_shift(sigma: Array, longest: int, s: float) -> tuple[float, float | None, str]:
    """Expected NSS of a Gaussian update of scale s, its sd (first order only) and the form that gave it.

    ``sigma``: all p singular values, descending, not all zero; ``longest``: max(m, n); ``s`` in the unit of sigma.
    """
    sigma, s = sigma / sigma[0], s / float(sigma[0])  # squares of tiny weights would underflow
    size = float(np.linalg.norm(sigma))
    first = math.sqrt(len(sigma)) * s / size
    # one step is right where the update is small and too large elsewhere: it tells whether the flow can matter
    if second_order(sigma, longest, s, 1) > first * size:
        second = second_order(sigma, longest, s, STEPS) / size
        if second > first:
            return second, None, f"closed form, flow of {STEPS} steps"
    return first, s / math.sqrt(2.0) / size, "closed form, first order"


def second_order(sigma: Array, longest: int, s: float, steps: int) -> float:
    """Root sum of squares of all shifts by the flow, in the unit of sigma and s."""
    return math.hypot(_flow(sigma, longest, s, steps), _repelled(sigma, s))


def _flow(sigma: Array, longest: int, s: float, steps: int) -> float:
    """Root sum of squares of the deterministic shifts of the singular values."""
    start, weight = _grouped(sigma)
    levels, step = start.copy(), s * s / steps
    weights_squared = weight**2
    for _ in range(steps):
        apart, together = levels[:, None] - levels, levels[:, None] + levels
        regular = 4 * step * together * weights_squared
        regular += apart**2
        together *= apart
        # a vanishing denominator is a pair of equal zeros
        terms = np.divide(together, regular, out=together, where=regular > 0)
        levels = np.sort(np.maximum(levels + step * (longest - 1 + terms @ weight), 0.0))[::-1]
    return math.sqrt(float(weight @ (np.sqrt(levels) - np.sqrt(start)) ** 2))


def _grouped(sigma: Array) -> tuple[Array, Array]:
    """Squared singular values, the tail averaged over groups, and how many values each stands for."""
    if len(sigma) <= _SINGLE + _GROUPED:
        return sigma**2, np.ones(len(sigma))
    bounds = np.linspace(_SINGLE, len(sigma), _GROUPED + 1).astype(np.int64)
    sizes = np.diff(bounds).astype(np.float64)
    tail = np.add.reduceat(sigma**2, bounds[:-1]) / sizes
    return np.concatenate([sigma[:_SINGLE] ** 2, tail]), np.concatenate([np.ones(_SINGLE), sizes])


def _repelled(sigma: Array, s: float) -> float:
    """Root sum of squares of the random first-order shifts, damped where s exceeds the local mean gap."""
    if len(sigma) == 1:
        return s
    width = 2 * _NEIGHBOURS + 1
    padded = np.pad(-np.diff(sigma), _NEIGHBOURS, mode="edge")
    local = np.convolve(padded, np.ones(width) / width, mode="valid")
    gap = np.append(local, local[-1])
    return float(np.linalg.norm(s * gap / np.hypot(gap, math.sqrt(5.0) * s)))


@dataclass(frozen=True, slots=True)
class Coupling:
    """Var X per unit of s^2 in the unit of sigma_1, neighbouring rows and columns taken together ``width`` at a time.

    ``inside``: k rows against the p - k columns of the other singular vectors. ``beyond``: 1 / l_i, for each of the
    columns past p on the long side.
    """

    inside: Array
    beyond: Array
    width: int

    @classmethod
    def of(cls, sigma: Array, k: int) -> Coupling | None:
        """From all p singular values; None where the gap at k is 0, which leaves no subspace to turn."""
        p = len(sigma)
        if sigma[k - 1] == 0.0 or (k < p and sigma[k - 1] == sigma[k]):
            return None
        unit = (sigma / sigma[0]) ** 2
        head, rest = unit[:k, None], unit[None, k:]
        width = max(1, min(k, p - k or k) // _COARSE)
        rows, cols = (np.linspace(0, size, -(-size // width) + 1).astype(np.int64) for size in (k, p - k))
        down, across = np.diff(rows)[:, None], np.diff(cols)
        each = np.add.reduceat((head + rest) / (head - rest) ** 2, rows[:-1], axis=0)
        if p > k:
            each = np.add.reduceat(each, cols[:-1], axis=1)
        return cls(each / np.sqrt(down * across), np.add.reduceat(1 / unit[:k], rows[:-1]) / down[:, 0], width)

    def tangents(self, extra: int, draw: np.random.Generator) -> Array:
        """Singular values of one draw of X, ascending: one for each row of ``inside``.

        ``extra``: columns past p; they enter through a triangular factor of their Gram matrix (Bartlett), which has the
        same singular values.
        """
        rows, cols = self.inside.shape
        X = np.sqrt(self.inside) * draw.standard_normal((rows, cols))
        gram = X @ X.T
        past = round(extra / self.width)
        if past >= rows:
            factor = np.tril(draw.standard_normal((rows, rows)), -1)
            np.fill_diagonal(factor, np.sqrt(draw.chisquare(past - np.arange(rows, dtype=np.float64))))
        else:
            factor = draw.standard_normal((rows, past))
        if past:
            factor *= np.sqrt(self.beyond * (extra / past))[:, None]
            gram += factor @ factor.T
        squares: Array = scipy.linalg.eigvalsh(gram)
        # more rows than columns: the two subspaces must share directions
        squares[: max(0, rows - cols - past)] = 0.0
        found: Array = np.sqrt(np.maximum(squares, 0.0))
        return found


def nulls_shift(comparison: Comparison) -> list[Null]:
    """NSS of a Gaussian update of the stored energy; none for a zero update or a zero origin."""
    if comparison.update_is_zero or comparison.origin.norm[0] == 0.0:
        return []
    sigma = comparison.origin.decomposition.sigma.cpu().numpy()
    longest = max(comparison.origin.rows, comparison.origin.cols)
    mean, sd, method = gaussian_shift(sigma, longest, update_scale(comparison))
    return [Null("spectral_shift", setting(view="native"), "gaussian", mean, sd, 0, method)]


def nulls_rotation(comparison: Comparison) -> list[Null]:
    """Mean and median angle, either side, of a Gaussian update of the stored energy (degrees); no maximum."""
    found: list[Null] = []
    if comparison.update_is_zero:
        return found
    name, s = rotation.default_setting(comparison.parameters), update_scale(comparison)
    for side in SIDES:
        if isinstance(rotation.angles(comparison, side), str):
            continue
        tangents = _tangents(comparison.origin, side)
        if tangents is None:
            continue
        angles = np.degrees(np.arctan(s * tangents))
        for summary, drawn in (("mean", np.mean(angles, axis=1)), ("median", np.median(angles, axis=1))):
            metric, mean, sd = f"rotation_{side}_{summary}_deg", float(drawn.mean()), float(drawn.std(ddof=1))
            found.append(Null(metric, name, "gaussian", mean, sd, DRAWS, METHOD))
    return found


def _tangents(origin: OriginMatrix, side: str) -> Array | None:
    """Draws x directions: tangents per origin and dimension, per unit of s, kept as long as the origin is."""
    dimension = origin.rows if side == "left" else origin.cols
    kept = _ANGLES.setdefault(origin, {})
    if dimension not in kept:
        sigma = origin.decomposition.sigma.to(torch.float64).cpu().numpy()
        coupling = Coupling.of(sigma, origin.rotation_k)
        draw = np.random.default_rng(seed_of(origin))
        extra = dimension - len(sigma)
        drawn = [] if coupling is None else [coupling.tangents(extra, draw) / float(sigma[0]) for _ in range(DRAWS)]
        kept[dimension] = np.array(drawn)
    return kept[dimension] if kept[dimension].size else None
