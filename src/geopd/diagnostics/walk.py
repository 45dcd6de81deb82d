"""How similar to its end would a run look that wanders at random? The ``random_walk`` null of Sim_K.

Cumulative updates of any walk approach its end, W_end = W_t + (the rest), so Sim_K rises without a channel. The null
walk has the run's own increment norms; its increments are independent, of rank r = the observed increment's stable rank
(rounded, at least 1) with r equal singular values between Haar-random frames, so that its norm and stable rank are the
observed ones. Sim_K(t, end) where fewer than K directions have been visited counts the missing ones as zero.

Nothing of the size of W is formed. With the frames of all increments stacked, X = Q_x T_x (m x R, R = sum of r) and
Y = Q_y T_y, W_t = Q_x (T_x[:, :R_t] S T_y[:, :R_t]^T) Q_y^T: right singular vectors in the coordinates of Q_y are those
of the small core, and Q is never needed. T of a Gaussian stack is drawn directly (Bartlett: chi-distributed diagonal,
Gaussian above), its blocks then orthonormalised. Cost: one symmetric eigenproblem of size R_t per checkpoint and draw.

No null is stored where bf16 rounding makes more than 10% of this update's energy or can make as much of an increment's
up to the end: checkpoints of an origin off the bf16 grid then share W0's rounding error, and those of a narrow run each
carry their own, neither of which a walk in factored form can contain. At such a share of this update Sim_K itself is
unresolved; at a share of .1 walks of wide weights saved narrow score within .005 (rank 4), .01 (16) and .04 (64, too
low) of the same walks unrounded (n = 384). None either beyond R = 1024, where increments are
so spread that the core would cost as much as a decomposition.

Source: geopd; rank-4 increments at n = 512, K = 16: .20 .41 .61 .81 1 over five equal steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from geopd.diagnostics import subspace_similarity
from geopd.diagnostics.comparison import Comparison
from geopd.diagnostics.rounding import TOO_NOISY, noise_verdict
from geopd.diagnostics.trajectory import Trajectory
from geopd.results import Null

Array = NDArray[np.float64]
DRAWS = 4
WIDEST = 1024
"""Most directions a walk may visit in all."""
_DRAWN: WeakKeyDictionary[Trajectory, dict[int, Array]] = WeakKeyDictionary()


def walk_similarity(
    shape: tuple[int, int], norms: Sequence[float], ranks: Sequence[int], k: int, draw: np.random.Generator
) -> Array:
    """Sim_K(t, end) at every step of one random walk, (steps,).

    ``norms``, ``ranks``: Frobenius norm (any one unit) and rank of each increment, at least 1 and at most min(m, n);
    an increment of norm 0 visits nothing. The draw depends on shape, norms and ranks alone.
    """
    m, n = shape
    left, right = (_frames(side, ranks, draw) for side in (m, n))
    largest = max(norms)
    weight = np.repeat([norm / largest / rank**0.5 for norm, rank in zip(norms, ranks, strict=True)], ranks)
    bases = []
    for stop in np.cumsum(ranks):
        live = np.flatnonzero(weight[:stop] > 0)
        core = (left[:, live] * weight[live]) @ right[:, live].T
        bases.append(_leading_right(core[: min(stop, len(left)), : min(stop, len(right))], min(k, len(live))))
    end = bases[-1]
    return np.array([float(np.linalg.norm(end[: len(basis)].T @ basis) ** 2) / k for basis in bases])


def _frames(side: int, ranks: Sequence[int], draw: np.random.Generator) -> Array:
    """Coordinates (min(side, R), R) of Haar-random orthonormal frames, one block of columns per increment."""
    total = sum(ranks)
    rows = min(side, total)
    T = np.triu(draw.standard_normal((rows, total)), 1)
    diagonal = np.arange(rows)
    T[diagonal, diagonal] = np.sqrt(draw.chisquare(side - diagonal))
    start = 0
    for rank in ranks:
        block = slice(start, start + rank)
        reach = min(start + rank, rows)
        Q, R = np.linalg.qr(T[:reach, block])
        T[:reach, block] = Q * np.where(np.diagonal(R) < 0, -1.0, 1.0)
        start += rank
    return T


def _leading_right(core: Array, k: int) -> Array:
    """Top-k right singular vectors of a core, (columns, k)."""
    size = core.shape[1]
    if k == 0:
        return np.zeros((size, 0))
    _, vectors = scipy.linalg.eigh(core.T @ core, subset_by_index=(size - k, size - 1))
    found: Array = vectors
    return found


def _drawn(trajectory: Trajectory, shape: tuple[int, int], k: int) -> Array | None:
    """Draws x steps of Sim_K, kept as long as the trajectory; None where the run has no such walk."""
    kept = _DRAWN.setdefault(trajectory, {})
    if k not in kept:
        steps = _steps(trajectory, min(shape))
        kept[k] = np.empty((0, 0))
        if steps is not None:
            draw = np.random.default_rng(trajectory.seed)
            kept[k] = np.array([walk_similarity(shape, *steps, k, draw) for _ in range(DRAWS)])
    return kept[k] if kept[k].size else None


def _steps(trajectory: Trajectory, p: int) -> tuple[list[float], list[int]] | None:
    """Norm and rank of every increment; None where one is unknown or noisy, or they visit too many directions."""
    norms, ranks = [], []
    for increment in trajectory.increments:
        if increment is None or increment.noise > TOO_NOISY:
            return None
        norms.append(increment.norm)
        ranks.append(min(max(round(increment.stable_rank or 1.0), 1), p))
    return (norms, ranks) if norms and max(norms) > 0 and sum(ranks) <= WIDEST else None


def nulls(comparison: Comparison) -> list[Null]:
    """Mean and sd of Sim_K(t, end) over the walks, for every K at which the run has a value."""
    place = comparison.place
    if place is None or noise_verdict(comparison) is not None:
        return []
    shape = (comparison.origin.rows, comparison.origin.cols)
    found = []
    ks = comparison.parameters.similarity_k
    for k, item in zip(ks, subspace_similarity.measure(comparison), strict=True):
        drawn = None if item.value is None else _drawn(place.trajectory, shape, k)
        if drawn is not None:
            here = drawn[:, place.position]
            mean, sd = float(here.mean()), float(here.std(ddof=1))
            method = "walks of the observed increment norms and stable ranks, factored"
            found.append(
                Null("subspace_similarity", item.setting, "random_walk", mean, sd, DRAWS, method, item.is_default)
            )
    return found
