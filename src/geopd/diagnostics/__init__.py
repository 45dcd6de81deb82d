"""One question per file: definition, formula, source and null. Adding one is one file and one line in CATALOGUE.

A diagnostic is a function of a ``Comparison`` that returns measurements, and one that returns matched nulls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from geopd.diagnostics import (
    decay,
    gaussian_spectrum,
    hill,
    overlap,
    principal_energy,
    rotation,
    rounding,
    sparsity,
    spectral_shift,
    stable_rank_denoised,
    subspace_similarity,
    update_size,
)
from geopd.diagnostics.comparison import Comparison, OriginMatrix, UpdateSubspace
from geopd.diagnostics.parameters import Parameters, Rank
from geopd.results import Measurement, Null, setting

Item = TypeVar("Item", Measurement, Null)


def _native(_: Parameters) -> str:
    return setting(view="native")


def _no_nulls(_: Comparison) -> list[Null]:
    return []


def _all_of(*functions: Callable[[Comparison], list[Item]]) -> Callable[[Comparison], list[Item]]:
    """What several functions say of one metric, one after the other."""
    return lambda comparison: [item for function in functions for item in function(comparison)]


@dataclass(frozen=True, slots=True)
class Diagnostic:
    """What it measures, in which group, how, and what chance gives."""

    metrics: tuple[str, ...]
    group: str
    setting: Callable[[Parameters], str]
    """The headline's setting: what a failed measurement is recorded under."""
    measure: Callable[[Comparison], list[Measurement]]
    nulls: Callable[[Comparison], list[Null]] = _no_nulls


CATALOGUE: tuple[Diagnostic, ...] = (
    Diagnostic(sparsity.METRICS, "entrywise", sparsity.default_setting, sparsity.measure, sparsity.nulls),
    Diagnostic((overlap.LOW,), "entrywise", overlap.low_setting, overlap.measure_low, overlap.nulls_low),
    Diagnostic(("update_norm",), "entrywise", _native, update_size.measure_norm),
    Diagnostic(("relative_update_norm",), "entrywise", _native, update_size.measure_relative_norm),
    Diagnostic(rounding.METRICS, "entrywise", rounding.default_setting, rounding.measure),
    Diagnostic(decay.METRICS, "entrywise", decay.default_setting, decay.measure),
    Diagnostic(("update_operator_norm",), "update", _native, update_size.measure_operator_norm),
    Diagnostic(
        ("stable_rank",),
        "update",
        _native,
        _all_of(update_size.measure_stable_rank, decay.measure_stable_rank),
        _all_of(update_size.nulls_stable_rank, rounding.nulls_stable_rank),
    ),
    Diagnostic(
        stable_rank_denoised.METRICS, "update", stable_rank_denoised.default_setting, stable_rank_denoised.measure
    ),
    Diagnostic(hill.METRICS, "update", hill.default_setting, hill.measure, rounding.nulls_hill),
    Diagnostic(
        subspace_similarity.METRICS,
        "update",
        subspace_similarity.default_setting,
        subspace_similarity.measure,
        subspace_similarity.nulls,
    ),
    Diagnostic(rotation.METRICS, "full", rotation.default_setting, rotation.measure, gaussian_spectrum.nulls_rotation),
    Diagnostic(
        spectral_shift.METRICS,
        "full",
        _native,
        _all_of(spectral_shift.measure, decay.measure_spectral_shift),
        gaussian_spectrum.nulls_shift,
    ),
    Diagnostic(
        (overlap.PRINCIPAL,), "full", overlap.principal_setting, overlap.measure_principal, overlap.nulls_principal
    ),
    Diagnostic(
        principal_energy.METRICS, "full", rotation.default_setting, principal_energy.measure, principal_energy.nulls
    ),
)

GROUPS = {"entrywise": {"entrywise"}, "update": {"entrywise", "update"}, "full": {"entrywise", "update", "full"}}
"""What each group's name asks for: ``entrywise`` reads only, ``update`` adds dW's spectrum, ``full`` the origin's."""


def select(names: Iterable[str]) -> tuple[Diagnostic, ...]:
    """The diagnostics that the named metrics and groups ask for, in catalogue order.

    Raises:
        ValueError: if a name is neither a metric nor a group; the text lists them.
    """
    names = tuple(names)
    known = {metric for diagnostic in CATALOGUE for metric in diagnostic.metrics}
    if unknown := sorted(set(names) - known - set(GROUPS)):
        raise ValueError(
            f"--metrics: no metric or group {', '.join(unknown)}; groups are {', '.join(GROUPS)}; "
            f"metrics are {', '.join(sorted(known))}"
        )
    groups = set().union(*(GROUPS[name] for name in names if name in GROUPS))
    return tuple(d for d in CATALOGUE if d.group in groups or set(d.metrics) & set(names))


__all__ = [
    "CATALOGUE",
    "GROUPS",
    "Comparison",
    "Diagnostic",
    "OriginMatrix",
    "Parameters",
    "Rank",
    "UpdateSubspace",
    "select",
]
