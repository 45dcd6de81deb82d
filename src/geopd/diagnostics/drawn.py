"""Nulls by drawing: updates without structure, stored as the run stored its own, and measured like it (``--nulls N``).

``gaussian``: isotropic, scaled so that its energy after rounding equals ||dW||^2. ``permuted``: the update's entries
permuted among weights of equal bf16 magnitude, outward and inward steps kept as such, so that norm, density and
low-magnitude overlap stay what they were; the stronger null for spectra, principal overlap and similarity. Each draw
costs one more checkpoint. Drawn rows take the place of closed forms of the same name; the increments of a trajectory
are not drawn (their null is a walk).
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from geopd.diagnostics.bf16_grid import on_bf16_grid
from geopd.diagnostics.comparison import Comparison
from geopd.diagnostics.gaussian_update import scale_for_energy
from geopd.results import Measurement, Null

Measure = Callable[[Comparison], list[Measurement]]


def drawn_nulls(comparison: Comparison, measures: Iterable[Measure], draws: int, seed: int) -> list[Null]:
    """Mean and sd over ``draws`` updates of either kind of whatever the measures give a value for.

    ``seed`` should depend on the matrix's name alone, so that draws do not depend on order or workers. ``sd`` is null
    for one draw. A value is drawn only where every draw has it.
    """
    if draws == 0 or comparison.update_is_zero:
        return []
    measures = list(measures)
    found = []
    for name, draw in (("gaussian", _gaussian), ("permuted", _permuted)):
        values: dict[tuple[str, str, bool], list[float]] = defaultdict(list)
        for number in range(draws):
            generator = torch.Generator().manual_seed((seed + 2 * number + (name == "permuted")) % 2**63)
            stored = draw(comparison, generator)
            if stored is None:
                break
            for item in _measured(comparison, stored, measures):
                if item.value is not None:
                    values[item.metric, item.setting, item.is_default].append(item.value)
        found += [
            Null(metric, setting, name, statistics.fmean(seen), _sd(seen), draws, "draws", default)
            for (metric, setting, default), seen in values.items()
            if len(seen) == draws
        ]
    return found


def _sd(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def _measured(comparison: Comparison, stored: Tensor, measures: list[Measure]) -> Iterator[Measurement]:
    # the drawn update is another one than the final's, even at the last checkpoint
    final = None if comparison.final is None else replace(comparison.final, is_this=False)
    other = Comparison(comparison.origin, stored, final)
    for measure in measures:
        yield from measure(other)


def _gaussian(comparison: Comparison, generator: torch.Generator) -> Float[Tensor, "m n"] | None:
    s = scale_for_energy(comparison)
    if s is None:
        return None
    noise = torch.randn(comparison.stored.shape, generator=generator, dtype=torch.float64)
    return _as_stored(comparison, noise.mul_(s) + comparison.origin.stored.double().cpu())


def _permuted(comparison: Comparison, generator: torch.Generator) -> Float[Tensor, "m n"]:
    W0 = comparison.origin.stored
    bins = comparison.origin.bins[:].reshape(-1).cpu()
    sign = torch.where(torch.signbit(W0), -1.0, 1.0).double().reshape(-1).cpu()
    outward = comparison.update().reshape(-1).cpu() * sign
    order = torch.sort(bins, stable=True).indices
    shuffled = torch.randperm(bins.numel(), generator=generator)
    source = shuffled[torch.sort(bins[shuffled], stable=True).indices]
    moved = torch.empty_like(outward)
    moved[order] = outward[source]
    return _as_stored(comparison, W0.double().cpu() + (moved * sign).reshape(W0.shape))


def _as_stored(comparison: Comparison, W: Float64[Tensor, "m n"]) -> Float[Tensor, "m n"]:
    # bf16 numbers in a wider file were rounded too, so a draw is
    return (W.bfloat16() if on_bf16_grid(comparison.stored) else W).to(comparison.stored)
