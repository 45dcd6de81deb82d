"""The definitions of arXiv 2606.07082, sections 3 and 4, written once more: numpy, scipy and plain loops."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import scipy.linalg
from torch import Tensor

Array = np.ndarray[Any, np.dtype[np.float64]]


DEFINED = {
    "update_sparsity",
    "low_magnitude_overlap",
    "principal_overlap",
    "spectral_shift",
    "update_norm",
    "relative_update_norm",
    "update_operator_norm",
    "stable_rank",
    "hill_tail",
    "decay_coefficient",
    *(f"principal_energy_{side}" for side in ("left", "right")),
    *(f"rotation_{side}_{summary}_deg" for side in ("left", "right") for summary in ("mean", "median", "max")),
}


def as_float64(W: Tensor) -> Array:
    return W.double().numpy()


def round_to_bf16(W: Array) -> Array:
    """Round to nearest even on the top 16 bits of the float32 pattern."""
    bits = W.astype(np.float32).view(np.uint32)
    kept = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return kept.view(np.float32).astype(np.float64)


def seen(W: Tensor, view: str) -> Array:
    return round_to_bf16(as_float64(W)) if view == "bf16" else as_float64(W)


def changed(before: Array, after: Array, eta: float) -> np.ndarray[Any, np.dtype[np.bool_]]:
    mask = np.zeros(before.shape, dtype=bool)
    for index in np.ndindex(*before.shape):
        a, b = float(before[index]), float(after[index])
        mask[index] = not abs(b - a) <= eta * max(abs(a), abs(b))
    return mask


def bf16_steps(a: float, b: float) -> int:
    """How many steps along the bf16 numbers lie between two of them, both zeros being one number."""

    def place(x: float) -> int:
        bits = int(np.float32(abs(x)).view(np.uint32)) >> 16
        return -bits if x < 0 else bits

    return abs(place(a) - place(b))


def share_of(score: Array, alpha: float, *, largest: bool) -> Array:
    """How much of each entry the alpha share takes: sort, fill the quota group by group, spread it over ties."""
    remaining = alpha * score.size
    taken = np.zeros(score.shape)
    for value in sorted(set(score.reshape(-1).tolist()), reverse=largest):
        tied = score == value
        part = min(remaining, int(tied.sum()))
        taken[tied] = part / int(tied.sum())
        remaining -= part
    return taken


def overlap(taken: Array, mask: np.ndarray[Any, np.dtype[np.bool_]]) -> float | None:
    return float(taken[mask].sum() / mask.sum()) if mask.any() else None


def spectrum(W: Array) -> Array:
    scale = np.abs(W).max()
    return scipy.linalg.svd(W / scale, compute_uv=False, lapack_driver="gesvd") * scale if scale else W[0] * 0


def rank(sigma: Array, longest: int) -> int:
    return int((sigma > 4 * longest * np.finfo(float).eps * sigma[0]).sum()) if sigma.size and sigma[0] else 0


def leading(W: Array, k: int) -> tuple[Array, Array, Array]:
    scale = np.abs(W).max() or 1.0
    U, sigma, Vh = scipy.linalg.svd(W / scale, full_matrices=False, lapack_driver="gesvd")
    return U[:, :k], sigma[:k] * scale, Vh[:k].T


class Expected:
    """What every metric should be for one pair of matrices, keyed as the tables key it; None where undefined."""

    def __init__(self, before: Tensor, after: Tensor, k: int, rank: int, hill_k: int, eta: float = 1e-3) -> None:
        self.stored = before, after
        self.W0, self.W1 = as_float64(before), as_float64(after)
        self.dW = self.W1 - self.W0
        self.k, self.rank, self.hill_k, self.eta = k, rank, hill_k, eta
        self._masks: dict[str, np.ndarray[Any, np.dtype[np.bool_]]] = {}

    @staticmethod
    def covers(metric: str, setting: str) -> bool:
        """Whether its definition is written here: what is estimated rather than defined has tests of its own."""
        keys = {item.split("=")[0] for item in setting.split(";")}
        return metric in DEFINED and keys <= {"alpha", "eta", "rank", "view", "k", "decay"}

    def of(self, metric: str, setting: str) -> float | None:
        asked = dict(item.split("=") for item in setting.split(";"))
        if metric == "update_sparsity":
            return 1 - self._visible(asked) / self.W0.size
        if metric == "subspace_gap":
            return self._subspace_gap(int(asked["k"]))
        if metric == "increment_similarity":
            return None  # a pair has no earlier checkpoint
        if metric == "low_magnitude_overlap":
            score = np.abs(seen(self.stored[0], asked["view"]))
            return overlap(share_of(score, float(asked["alpha"]), largest=False), self._mask(asked["view"]))
        if metric == "principal_overlap":
            score = self.reconstruction()
            return overlap(share_of(score, float(asked["alpha"]), largest=True), self._mask(asked["view"]))
        if metric.startswith("rotation_"):
            _, side, summary, _ = metric.split("_")
            angles = self.angles(side)
            return None if angles is None else float(getattr(np, summary)(angles))
        if metric.startswith("principal_energy_"):
            return self._energy(metric.rsplit("_", 1)[1])
        if metric.startswith("visible_mask_"):
            return self._visible_mask(metric.rsplit("_", 1)[1])
        if asked.get("decay") == "removed":
            result: float | None = getattr(self, f"_{metric}_without_decay")()
            return result
        result = getattr(self, f"_{metric}")()
        return None if result is None else float(result)

    def _visible(self, asked: dict[str, str]) -> int:
        ends = [seen(W, asked["view"]) for W in self.stored]
        if "eta" in asked:
            return int(changed(*ends, float(asked["eta"])).sum())
        return sum(bf16_steps(a, b) >= int(asked["min_ulp"]) for a, b in zip(*(W.flat for W in ends), strict=True))

    def _sub_ulp_share(self) -> float | None:
        if not all(W.dtype.itemsize > 2 for W in self.stored) or np.array_equal(round_to_bf16(self.W1), self.W1):
            return None
        moved = np.flatnonzero(self.dW)
        if not moved.size:
            return None
        near = np.abs(round_to_bf16(self.W0)).flat
        exponent = [max(math.frexp(near[i])[1] - 1, -126) if near[i] else -126 for i in moved]
        lost = sum(abs(self.dW.flat[i]) < 2.0 ** (e - 7) / 2 for i, e in zip(moved, exponent, strict=True))
        return lost / moved.size

    def _visible_mask(self, kind: str) -> float | None:
        if self.stored[1].dtype.itemsize <= 2 or np.array_equal(round_to_bf16(self.W1), self.W1) or not self.dW.any():
            return None
        near = np.abs(round_to_bf16(self.W0))
        exponent = np.vectorize(lambda x: max(math.frexp(x)[1] - 1, -126) if x else -126)(near)
        foreseen, realised = np.abs(self.dW) >= 2.0 ** (exponent - 7) / 2, self._mask("bf16")
        total = {"jaccard": foreseen | realised, "precision": foreseen, "recall": realised}[kind].sum()
        return float((foreseen & realised).sum() / total) if total else None

    def _subspace_gap(self, k: int) -> float | None:
        sigma = np.append(spectrum(self.dW), 0.0)
        if rank(sigma[:-1], max(self.dW.shape)) < k:
            return None
        return float((sigma[k - 1] - sigma[k]) / sigma[0])

    def _mask(self, view: str) -> np.ndarray[Any, np.dtype[np.bool_]]:
        if view not in self._masks:
            self._masks[view] = changed(seen(self.stored[0], view), seen(self.stored[1], view), self.eta)
        return self._masks[view]

    def reconstruction(self) -> Array:
        if self.rank >= min(self.W0.shape):
            return np.abs(self.W0)
        U, sigma, V = leading(self.W0, self.rank)
        return np.abs(sum(s * np.outer(u, v) for u, s, v in zip(U.T, sigma, V.T, strict=True)))

    def angles(self, side: str) -> Array | None:
        k = min(self.k, *self.W0.shape)
        if self.W0.shape[0 if side == "left" else 1] <= self.k:
            return None
        if min(rank(spectrum(W), max(W.shape)) for W in (self.W0, self.W1)) < k:
            return None
        if not self.dW.any():
            return np.zeros(k)
        bases = [leading(W, k)[0 if side == "left" else 2] for W in (self.W0, self.W1)]
        return np.degrees(scipy.linalg.subspace_angles(*bases))

    def _energy(self, side: str) -> float | None:
        k = min(self.k, *self.W0.shape)
        if self.W0.shape[0 if side == "left" else 1] <= self.k or not self.dW.any():
            return None
        if rank(spectrum(self.W0), max(self.W0.shape)) < k:
            return None
        U, _, V = leading(self.W0, k)
        unit = self.dW / np.abs(self.dW).max()
        inside = U.T @ unit if side == "left" else unit @ V
        return float((inside**2).sum() / (unit**2).sum())

    def _spectral_shift(self) -> float | None:
        before, after = spectrum(self.W0), spectrum(self.W1)
        scale = np.abs(self.W0).max()
        if not scale:
            return None
        return float(np.linalg.norm((after - before) / scale) / np.linalg.norm(before / scale))

    def _update_norm(self) -> float:
        scale = np.abs(self.dW).max() or 1.0
        return float(scale * math.sqrt(math.fsum((x / scale) ** 2 for x in self.dW.reshape(-1))))

    def _relative_update_norm(self) -> float | None:
        scale = np.abs(self.W0).max()
        return self._update_norm() / float(scale * np.linalg.norm(self.W0 / scale)) if scale else None

    def _update_operator_norm(self) -> float:
        return float(spectrum(self.dW)[0])

    def _stable_rank(self) -> float | None:
        return (self._update_norm() / self._update_operator_norm()) ** 2 if self.dW.any() else None

    def _hill_tail(self) -> float | None:
        sigma, k = spectrum(self.dW), self.hill_k
        if rank(sigma, max(self.dW.shape)) < k:
            return None
        return 1 / (sum(math.log(sigma[i] / sigma[k - 1]) for i in range(k - 1)) / (k - 1))

    def _decay_coefficient(self) -> float | None:
        scale = np.abs(self.W0).max()
        return float((self.dW / scale * (self.W0 / scale)).sum() / ((self.W0 / scale) ** 2).sum()) if scale else None

    def _spectral_shift_without_decay(self) -> float | None:
        """As defined: the shift from W0 to W0 + (dW - c W0) / (1 + c)."""
        c, scale = self._decay_coefficient(), np.abs(self.W0).max()
        if c is None or 1 + c <= 1e-12:
            return None
        before, after = spectrum(self.W0), spectrum(self.W0 + (self.dW - c * self.W0) / (1 + c))
        return float(np.linalg.norm((after - before) / scale) / np.linalg.norm(before / scale))

    def _stable_rank_without_decay(self) -> float | None:
        c = self._decay_coefficient()
        if c is None or not self.dW.any():
            return None
        rest = self.dW - c * self.W0
        if np.abs(rest).max() <= 1e-12 * np.abs(self.W0).max():
            return None
        rest = rest / np.abs(rest).max()
        return float((rest**2).sum() / spectrum(rest)[0] ** 2)
