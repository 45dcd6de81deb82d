"""How much of the update lies in the origin's leading subspaces?

||U0_k^T dW||_F^2 / ||dW||_F^2 on the left and ||dW V0_k||_F^2 / ||dW||_F^2 on the right, k as for the rotation. Unlike
the mask overlaps this sees alignment that changes no visible entry. Null: k/m and k/n for an isotropic update.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float64
from torch import Tensor

from geopd.diagnostics.comparison import SIDES, Comparison
from geopd.diagnostics.update_size import ZERO
from geopd.diagnostics.values import resolved_within, undefined
from geopd.results import Measurement, Null, setting
from geopd.spectral import row_blocks

METRICS = tuple(f"principal_energy_{side}" for side in SIDES)
_BLOCK = 1 << 21  # entries: 16 MiB, enough rows for the products to run at speed
LIMIT = 1e-3  # absolute, on a scale from 0 to 1


def _dimension(comparison: Comparison, side: str) -> int:
    return comparison.origin.rows if side == "left" else comparison.origin.cols


def _undefined(comparison: Comparison, side: str) -> str | None:
    origin = comparison.origin
    asked = comparison.parameters.rotation_k.of(origin.rows, origin.cols)
    if _dimension(comparison, side) <= asked:
        return f"k = {asked} covers the whole {side} side of dimension {_dimension(comparison, side)}"
    if comparison.update_is_zero:
        return ZERO
    if origin.decomposition.rank < origin.rotation_k:
        return f"numerical rank of the origin is {origin.decomposition.rank} < k = {origin.rotation_k}"
    return None


def measure(comparison: Comparison) -> list[Measurement]:
    """Energy share in the origin's top-k left and right subspaces; the error follows from their gap."""
    origin = comparison.origin
    name = setting(k=comparison.parameters.rotation_k, view="native")
    k = origin.rotation_k
    found = []
    for metric, side in zip(METRICS, SIDES, strict=True):
        reason = _undefined(comparison, side)
        if reason is not None:
            found.append(undefined(metric, name, reason))
            continue
        value = min(_share(comparison, side, getattr(origin.decomposition, side)[:, :k]), 1.0)
        error = origin.decomposition.leading_sine(k)
        found.append(resolved_within(metric, name, value, error, LIMIT, origin.decomposition.method))
    return found


def _share(comparison: Comparison, side: str, basis: Float64[Tensor, "d k"]) -> float:
    """Share of the update's energy inside the span of an orthonormal basis of one side, streamed."""
    norm = comparison.update_norm[0]  # divided by first, so that the squares of a tiny update do not underflow
    update = comparison.difference()
    inside = torch.zeros(basis.shape[1], comparison.origin.cols, dtype=torch.float64, device=update.device)
    energies = []
    for rows in row_blocks(update.shape, _BLOCK):
        block = update[rows] / norm
        if side == "left":
            inside += basis[rows].T @ block
        else:
            energies.append(float(torch.linalg.matrix_norm(block @ basis) ** 2))
    return math.fsum(energies) if side == "right" else float(torch.linalg.matrix_norm(inside) ** 2)


def nulls(comparison: Comparison) -> list[Null]:
    """k/m and k/n, the isotropic expectation, with the sd of the Beta law that the share then follows."""
    name = setting(k=comparison.parameters.rotation_k, view="native")
    entries = comparison.stored.numel()
    k = comparison.origin.rotation_k
    found = []
    for metric, side in zip(METRICS, SIDES, strict=True):
        if _undefined(comparison, side) is None:
            mean = k / _dimension(comparison, side)
            sd = math.sqrt(2 * mean * (1 - mean) / (entries + 2))
            found.append(Null(metric, name, "gaussian", mean, sd, 0, "k/dimension; Beta law"))
    return found
