"""Where a model's weights stand against W0, one matrix at a time, while it trains.

Shapes: W, W0 and dW = W - W0 are (m, n); V_K, the top-K right singular vectors of dW, is (n, K).

- ``stable_rank``: ||dW||_F^2 / ||dW||_op^2
- ``update_norm``: ||dW||_F, in weight units
- ``top_energy``: sum of the K largest sigma^2, over ||dW||_F^2
- ``similarity_previous``: ||V_K^T V_K(previous look)||_F^2 / K
- ``similarity_reference``: ||V_K^T V_ref||_F^2 / K, V_ref the first K columns of the reference basis
- ``visible_share``: share of entries whose bf16 value differs from W0's

Source: arXiv 2606.07082, sections 3 and 4. For independent isotropic subspaces both similarities are K / n.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from geopd.checkpoints import Checkpoint
from geopd.spectral import frobenius, leading_triples
from geopd.training.basis import read_basis
from geopd.training.live_weights import LiveMatrix

__all__ = ["METRICS", "LiveGeometry", "MatrixValues", "means", "on_every_process", "raise_everywhere"]

METRICS = (
    "stable_rank",
    "update_norm",
    "top_energy",
    "similarity_previous",
    "similarity_reference",
    "visible_share",
)
# Residuals of a thousandth of sigma_1: values are then right to about its square over the gap, far inside what a curve
# shows, and the iteration ends two to three times earlier than at the 1e-7 that stored measurements ask for.
TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True)
class MatrixValues:
    """The values of one matrix at one look; None where the definition gives none, and ``note`` where reading failed."""

    name: str
    module: str
    values: dict[str, float | None]
    note: str | None = None


@contextmanager
def _full_precision() -> Iterator[None]:
    """Matrix products of float32 as float32: where training allows TF32 or bf16 they would lose the delta's digits."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    held = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, held, strict=True):
            backend.fp32_precision = precision


class LiveGeometry:
    """The watched matrices of a model, and the V_K of the last look at each.

    A look reads W0 from disk and holds one matrix at a time: W0, dW and a basis, never a second model. With several
    processes each measures every world-size-th matrix; all of them take part in gathering all.

    Args:
        origin: W0.
        matrices: what to watch, in the same order on every process.
        k: K of the top-K energy and of the similarities.
        reference: a file of ``geopd basis`` with (n, K or wider) for every matrix; read here, the K columns of every
            matrix stay in memory.

    Raises:
        ValueError: K is larger than a matrix allows, or the reference is unreadable, lacks a matrix or has another
            shape.
    """

    def __init__(
        self, origin: Checkpoint, matrices: Sequence[LiveMatrix], k: int, reference: Path | None = None
    ) -> None:
        smallest = min(matrices, key=lambda matrix: min(matrix.shape))
        if not 1 <= k <= min(smallest.shape):
            raise ValueError(
                f"similarity_k={k}: choose 1 to {min(smallest.shape)}, the smaller side of {smallest.weight.name}"
            )
        self.reference = {} if reference is None else _references(reference, matrices, k)
        self.origin = origin
        self.matrices = tuple(matrices)
        self.k = k
        self._previous: dict[str, Tensor] = {}

    @torch.no_grad()
    @_full_precision()
    def look(self) -> list[MatrixValues]:
        """The values of every watched matrix now, in name order, on every process. A collective.

        A matrix that is not finite, or whose W0 can no longer be read, keeps its row with the reason as its note.

        Raises:
            RuntimeError: measuring failed on a process for any other reason; raised on all of them, so that none
                waits for the others.
        """
        rank, world = _rank_and_world()
        rows: list[MatrixValues] = []
        failure: Exception | None = None
        for start in range(0, len(self.matrices), world):
            mine = None
            for index, matrix in enumerate(self.matrices[start : start + world]):
                try:
                    gathered = matrix.gather()
                    if index == rank:
                        mine = (matrix, *gathered)
                    del gathered
                except Exception as error:
                    failure = error
            if mine is not None and failure is None:
                try:
                    rows.append(self._values(*mine))
                except Exception as error:
                    failure = error
        reason = None if failure is None else f"process {rank}: {type(failure).__name__}: {failure}"
        shared = on_every_process((rows, reason))
        if reasons := [reason for _, reason in shared if reason]:
            raise RuntimeError(f"the geometry could not be measured: {reasons[0]}") from failure
        return sorted((row for part, _ in shared for row in part), key=lambda row: row.name)

    def _values(self, matrix: LiveMatrix, base: Tensor, delta: Tensor | None) -> MatrixValues:
        name, module = matrix.weight.name, matrix.weight.module
        try:
            W0 = self.origin.read(matrix.origin_tensor).to(base.device)
            values, V = _measure(base, delta, W0, self.k, self._previous.pop(name, None), self.reference.get(name))
        except ValueError as error:
            return MatrixValues(name, module, dict.fromkeys(METRICS), str(error))
        if V is not None:
            self._previous[name] = V
        return MatrixValues(name, module, values)


def _measure(
    base: Float[Tensor, "m n"],
    delta: Float[Tensor, "m n"] | None,
    W0: Float[Tensor, "m n"],
    k: int,
    previous: Float[Tensor, "n k"] | None,
    reference: Float[Tensor, "n k"] | None,
) -> tuple[dict[str, float | None], Float[Tensor, "n k"] | None]:
    """The values of dW = base + delta - W0, and V_K; no V_K where its numerical rank in float32 is below K.

    dW is taken in float32 (float64 where an end is): the difference of two float32 numbers is rounded relative to
    itself, so a small update keeps its digits, and the delta is added to it, not to the weight.
    """
    exact = torch.float64 if torch.float64 in (base.dtype, W0.dtype) else torch.float32
    dW = base.to(exact, copy=True).sub_(W0)
    after = base if delta is None else base.to(exact) + delta
    if delta is not None:
        dW += delta
    changed = torch.count_nonzero(after.bfloat16() != W0.bfloat16())
    found = leading_triples(dW, k, tolerance=TOLERANCE)  # refuses what is not finite, so it comes first
    norm = frobenius(dW)[0]
    values: dict[str, float | None] = dict.fromkeys(METRICS)
    values |= {"update_norm": norm, "visible_share": float(changed) / dW.numel()}
    top = float(found.sigma[0])
    if norm == 0.0 or top == 0.0:
        return values, None
    values["stable_rank"] = (norm / top) ** 2
    values["top_energy"] = min(1.0, float((found.sigma[:k] / norm).square().sum()))
    if float(found.sigma[k - 1]) <= max(dW.shape) * torch.finfo(torch.float32).eps * top:
        return values, None  # directions beyond the rank are rounding: a similarity of them says nothing
    V = found.right[:, :k].to(torch.float32)
    for metric, basis in (("similarity_previous", previous), ("similarity_reference", reference)):
        if basis is not None:
            overlap = V.double().T @ basis[:, :k].to(V.device).double()
            values[metric] = float(overlap.square().sum()) / k
    return values, V


def means(rows: Sequence[MatrixValues]) -> dict[str, float]:
    """Unweighted means over matrices: ``metric`` over all, ``metric/module`` per module; undefined ones left out."""
    held: dict[str, list[float]] = defaultdict(list)
    for metric in METRICS:
        for row in rows:
            value = row.values[metric]
            if value is not None:
                held[metric].append(value)
                held[f"{metric}/{row.module}"].append(value)
    return {name: sum(values) / len(values) for name, values in held.items()}


def _references(path: Path, matrices: Sequence[LiveMatrix], k: int) -> dict[str, Tensor]:
    """The first K columns of the reference for every matrix."""
    try:
        basis = read_basis(path)
    except ValueError as error:
        raise ValueError(f"reference {error}") from error
    if basis.is_mask:
        raise ValueError(f"reference {path}: holds a coordinate mask, no directions: pass a basis of another kind")
    for matrix in matrices:
        name, n = matrix.weight.name, matrix.shape[1]
        if name not in basis.vectors:
            raise ValueError(f"reference {path}: has no basis for {name}; make it with the same matrices")
        V = basis.vectors[name]
        if V.shape[0] != n or V.shape[1] < k:
            raise ValueError(
                f"reference {path}: the basis of {name} is {'x'.join(map(str, V.shape))}, and {n} rows and at least "
                f"similarity_k={k} columns are needed: lower similarity_k, or make the basis with a larger k"
            )
    return {matrix.weight.name: basis.vectors[matrix.weight.name][:, :k].clone() for matrix in matrices}


def _rank_and_world() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def on_every_process(item: Any) -> list[Any]:
    """What each process passed, by rank, on all of them; a list of the one item without torch.distributed."""
    _, world = _rank_and_world()
    if world == 1:
        return [item]
    items: list[Any] = [None] * world
    torch.distributed.all_gather_object(items, item)
    return items


def raise_everywhere(reason: str | None) -> None:
    """Raise the first process's reason on every process, so that none goes on alone into a collective.

    Raises:
        ValueError: some process passed a reason.
    """
    for found in on_every_process(reason):
        if found:
            raise ValueError(found)
