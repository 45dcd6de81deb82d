"""One question per file: definition, formula, source and null. Adding one is one file and one line in CATALOGUE.

A diagnostic is a function of a ``Comparison`` that returns measurements, and one that returns matched nulls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from geopd.diagnostics import (
    coordinates,
    decay,
    gaussian_spectrum,
    hill,
    increments,
    noise_nulls,
    overlap,
    perturbation,
    principal_energy,
    rotation,
    rounding,
    sparsity,
    spectral_shift,
    stable_rank_denoised,
    subspace_similarity,
    update_size,
    visible_mask,
    walk,
)
from geopd.diagnostics.comparison import ENDS, Comparison, OriginMatrix, UpdateSubspace
from geopd.diagnostics.coordinates import RunPair
from geopd.diagnostics.drawn import drawn_nulls
from geopd.diagnostics.parameters import Parameters, Rank
from geopd.diagnostics.trajectory import Place, Trajectory
from geopd.diagnostics.values import failed, unresolved
from geopd.results import Measurement, Null, Status, setting

Item = TypeVar("Item", Measurement, Null)


def _native(_: Parameters) -> str:
    return setting(view="native")


def _no_nulls(_: Comparison) -> list[Null]:
    return []


def _all_of(*functions: Callable[[Comparison], list[Item]]) -> Callable[[Comparison], list[Item]]:
    """What several functions say of one metric, one after the other."""
    return lambda comparison: [item for function in functions for item in function(comparison)]


def _unless_noisy(measure: Callable[[Comparison], list[Measurement]]) -> Callable[[Comparison], list[Measurement]]:
    """Values of the update's spectrum, ``unresolved`` where bf16 rounding makes too much of its energy."""

    def judged(comparison: Comparison) -> list[Measurement]:
        found = measure(comparison)
        reason = rounding.noise_verdict(comparison) if any(item.status is Status.OK for item in found) else None
        return [unresolved(item, reason) if reason else item for item in found]

    return judged


def _unless_violated(measure: Callable[[Comparison], list[Measurement]]) -> Callable[[Comparison], list[Measurement]]:
    """Spectra and angles, ``failed`` where they break a bound that holds for every matrix: no wrong number passes."""

    def judged(comparison: Comparison) -> list[Measurement]:
        found = measure(comparison)
        broken = perturbation.violation(comparison) if any(item.value is not None for item in found) else None
        return [failed(item, broken) if broken else item for item in found]

    return judged


@dataclass(frozen=True, slots=True)
class Diagnostic:
    """What it measures, in which group, how, and what chance gives."""

    metrics: tuple[str, ...]
    group: str
    setting: Callable[[Parameters], str]
    """The headline's setting: what a failed measurement is recorded under."""
    measure: Callable[[Comparison], list[Measurement]]
    nulls: Callable[[Comparison], list[Null]] = _no_nulls
    vectors: frozenset[str] = frozenset()
    """Of which ends (``origin``, ``checkpoint``) it needs leading singular vectors."""


CATALOGUE: tuple[Diagnostic, ...] = (
    Diagnostic(sparsity.METRICS, "entrywise", sparsity.default_setting, sparsity.measure, sparsity.nulls),
    Diagnostic((overlap.LOW,), "entrywise", overlap.low_setting, overlap.measure_low, overlap.nulls_low),
    Diagnostic(("update_norm",), "entrywise", _native, update_size.measure_norm),
    Diagnostic(("relative_update_norm",), "entrywise", _native, update_size.measure_relative_norm),
    Diagnostic((sparsity.LOST,), "entrywise", sparsity.lost_setting, sparsity.measure_lost, sparsity.nulls_lost),
    Diagnostic(
        visible_mask.METRICS, "entrywise", visible_mask.default_setting, visible_mask.measure, visible_mask.nulls
    ),
    Diagnostic(rounding.METRICS, "entrywise", rounding.default_setting, rounding.measure),
    Diagnostic(decay.METRICS, "entrywise", decay.default_setting, decay.measure),
    Diagnostic(("update_operator_norm",), "update", _native, update_size.measure_operator_norm),
    Diagnostic(
        ("stable_rank",),
        "update",
        _native,
        _unless_noisy(_all_of(update_size.measure_stable_rank, decay.measure_stable_rank)),
        noise_nulls.nulls_stable_rank,
    ),
    Diagnostic(
        stable_rank_denoised.METRICS, "update", stable_rank_denoised.default_setting, stable_rank_denoised.measure
    ),
    Diagnostic(hill.METRICS, "update", hill.default_setting, _unless_noisy(hill.measure), noise_nulls.nulls_hill),
    Diagnostic(
        subspace_similarity.METRICS,
        "update",
        subspace_similarity.default_setting,
        _unless_noisy(subspace_similarity.measure),
        _all_of(subspace_similarity.nulls, walk.nulls),
    ),
    Diagnostic(
        (increments.SIMILARITY,),
        "update",
        increments.default_setting,
        increments.measure_similarity,
        increments.nulls_similarity,
    ),
    Diagnostic((increments.GAP,), "update", increments.default_setting, increments.measure_gap),
    Diagnostic(
        rotation.METRICS,
        "full",
        rotation.default_setting,
        _unless_violated(rotation.measure),
        gaussian_spectrum.nulls_rotation,
        frozenset(ENDS),
    ),
    Diagnostic(
        spectral_shift.METRICS,
        "full",
        _native,
        _unless_violated(_all_of(spectral_shift.measure, decay.measure_spectral_shift)),
        gaussian_spectrum.nulls_shift,
    ),
    Diagnostic(
        (overlap.PRINCIPAL,),
        "full",
        overlap.principal_setting,
        overlap.measure_principal,
        overlap.nulls_principal,
        frozenset({"origin"}),
    ),
    Diagnostic(
        principal_energy.METRICS,
        "full",
        rotation.default_setting,
        principal_energy.measure,
        principal_energy.nulls,
        frozenset({"origin"}),
    ),
)


@dataclass(frozen=True, slots=True)
class PairDiagnostic:
    """What is asked of two runs from one origin: the same questions as of a ``Diagnostic``."""

    metrics: tuple[str, ...]
    group: str
    setting: Callable[[Parameters], str]
    measure: Callable[[RunPair], list[Measurement]]
    nulls: Callable[[RunPair], list[Null]]


PAIR_CATALOGUE: tuple[PairDiagnostic, ...] = (
    PairDiagnostic(
        (coordinates.JACCARD,),
        "entrywise",
        coordinates.default_setting,
        coordinates.measure_jaccard,
        coordinates.nulls_jaccard,
    ),
    PairDiagnostic(
        (coordinates.SIGNS,),
        "entrywise",
        coordinates.default_setting,
        coordinates.measure_signs,
        coordinates.nulls_signs,
    ),
)
"""Metrics of two runs: rows whose ``other_run`` is set."""

GROUPS = {"entrywise": {"entrywise"}, "update": {"entrywise", "update"}, "full": {"entrywise", "update", "full"}}
"""What each group's name asks for: ``entrywise`` reads only, ``update`` adds dW's spectrum, ``full`` the origin's."""


def select(names: Iterable[str]) -> tuple[Diagnostic, ...]:
    """The diagnostics that the named metrics and groups ask for, in catalogue order.

    Raises:
        ValueError: if a name is neither a metric nor a group; the text lists them.
    """
    asked = _asked(names)
    return tuple(d for d in CATALOGUE if asked & {d.group, *d.metrics})


def select_pairs(names: Iterable[str]) -> tuple[PairDiagnostic, ...]:
    """The diagnostics of two runs that the named metrics and groups ask for, in catalogue order.

    Raises:
        ValueError: as ``select``.
    """
    asked = _asked(names)
    return tuple(d for d in PAIR_CATALOGUE if asked & {d.group, *d.metrics})


def _asked(names: Iterable[str]) -> set[str]:
    """The named metrics, and the groups' members."""
    named = set(names)
    catalogue: tuple[Diagnostic | PairDiagnostic, ...] = (*CATALOGUE, *PAIR_CATALOGUE)
    known = {metric for diagnostic in catalogue for metric in diagnostic.metrics}
    if unknown := sorted(named - known - set(GROUPS)):
        raise ValueError(
            f"--metrics: no metric or group {', '.join(unknown)}; groups are {', '.join(GROUPS)}; "
            f"metrics are {', '.join(sorted(known))}"
        )
    return (named & known).union(*(GROUPS[name] for name in named & set(GROUPS)))


__all__ = [
    "CATALOGUE",
    "GROUPS",
    "PAIR_CATALOGUE",
    "Comparison",
    "Diagnostic",
    "OriginMatrix",
    "PairDiagnostic",
    "Parameters",
    "Place",
    "Rank",
    "RunPair",
    "Trajectory",
    "UpdateSubspace",
    "drawn_nulls",
    "select",
    "select_pairs",
]
