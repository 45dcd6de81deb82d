"""What every entry of the catalogue promises. A new diagnostic is covered by being in it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from geopd.diagnostics import (
    CATALOGUE,
    GROUPS,
    PAIR_CATALOGUE,
    Comparison,
    Diagnostic,
    OriginMatrix,
    PairDiagnostic,
    Parameters,
    Place,
    Rank,
    RunPair,
    Trajectory,
    UpdateSubspace,
    select,
    select_pairs,
)
from geopd.diagnostics.coordinates import visible_signs
from geopd.diagnostics.trajectory import increment_of
from geopd.results import METRICS, Measurement, Status
from geopd.spectral import decompose
from prescribed import PAIRS, normal, orthogonal, with_spectrum

PARAMETERS = Parameters(Rank("4"), Rank("3"), (0.5, 0.3), 1e-3, (2, 3), (4, 3))
LINEAR = {"update_norm", "update_operator_norm"}  # these scale with the weights; everything else is free of units
ONE_SIDED = {
    "subspace_similarity",
    "increment_similarity",
}  # defined by right singular vectors only: not a transposable statement

each_diagnostic = pytest.mark.parametrize("diagnostic", CATALOGUE, ids=lambda d: d.metrics[0])
each_of_runs = pytest.mark.parametrize("diagnostic", PAIR_CATALOGUE, ids=lambda d: d.metrics[0])
each_pair = pytest.mark.parametrize("name", PAIRS)


def compare(before: Tensor, after: Tensor, parameters: Parameters = PARAMETERS, *, last: bool = False) -> Comparison:
    """As the second checkpoint of a run of three, or as the last of two; the first went half the way."""
    origin = OriginMatrix(before.clone(), parameters)
    end = after if last else after.double() + 1e-3 * after.double().abs().max() * normal(99, *after.shape)
    subspace = decompose(end.double() - before.double(), max(parameters.similarity_k))
    if after.shape != before.shape:
        return Comparison(origin, after)
    half = ((before.double() + after.double()) / 2).to(after.dtype)
    path = Trajectory([increment_of(origin, None, half), increment_of(origin, half, after)], seed=1)
    return Comparison(origin, after.clone(), UpdateSubspace(subspace, is_this=last), Place(path, 1))


def runs_of(name: str) -> RunPair:
    """Two runs: the pair's later weights, and those with every other entry left where it was."""
    pair = PAIRS[name]
    origin = OriginMatrix(pair.before.clone(), PARAMETERS)
    other = pair.after.clone()
    other[::2] = pair.before.to(other.dtype)[::2]
    return RunPair(origin, *(visible_signs(Comparison(origin, W)) for W in (pair.after, other)))


def comparison_of(name: str) -> Comparison:
    return compare(PAIRS[name].before, PAIRS[name].after)


@cache
def shared(name: str, transposed: bool = False) -> Comparison:
    """One comparison for all diagnostics: that this changes nothing is a test of its own."""
    pair = PAIRS[name]
    if transposed:
        return compare(pair.before.T.contiguous(), pair.after.T.contiguous())
    return comparison_of(name)


def mirrored(metric: str) -> str:
    return metric.replace("left", "LEFT").replace("right", "left").replace("LEFT", "right")


def agree(here: Measurement, there: Measurement, factor: float = 1.0) -> None:
    """Equal within what both certify; a value that hangs on a closed gap may differ in everything but existence."""
    assert (here.value is None) == (there.value is None), (here, there)
    if here.value is None or there.value is None:
        assert here.status == there.status
        return
    if Status.UNRESOLVED in (here.status, there.status):
        return
    assert here.error is not None
    assert there.error is not None
    slack = 2 * (factor * here.error + there.error) + 1e-9 * abs(there.value) + 1e-13 * factor
    assert abs(factor * here.value - there.value) <= slack, (here, there)


@pytest.mark.parametrize("diagnostic", [*CATALOGUE, *PAIR_CATALOGUE], ids=lambda d: d.metrics[0])
def test_metrics_are_declared_and_glossed(diagnostic: Diagnostic | PairDiagnostic) -> None:
    assert diagnostic.metrics
    for metric in diagnostic.metrics:
        assert METRICS[metric].name == metric
        assert METRICS[metric].gloss
        assert METRICS[metric].label
        assert METRICS[metric].unit
    assert any(diagnostic.group in members for members in GROUPS.values())


def test_each_metric_is_measured_once_and_every_glossed_metric_is_measured() -> None:
    measured = [metric for diagnostic in (*CATALOGUE, *PAIR_CATALOGUE) for metric in diagnostic.metrics]
    assert len(measured) == len(set(measured))
    assert set(measured) == set(METRICS)


@each_pair
@each_diagnostic
def test_rows(diagnostic: Diagnostic, name: str) -> None:
    comparison = shared(name)
    rows = diagnostic.measure(comparison)
    keys = [(item.metric, item.setting) for item in rows]
    assert len(keys) == len(set(keys))
    assert {item.metric for item in rows} == set(diagnostic.metrics)
    for item in rows:
        pairs = item.setting.split(";")
        assert pairs == sorted(pairs)
        assert all(len(pair.split("=")) == 2 and all(pair.split("=")) for pair in pairs)
        assert item.method
        if item.value is not None:
            assert math.isfinite(item.value)
            assert item.error is not None
            assert item.error >= 0
        if item.status is not Status.OK:
            assert item.note
    for metric in diagnostic.metrics:
        headlines = [item.setting for item in rows if item.metric == metric and item.is_default]
        assert headlines == [diagnostic.setting(PARAMETERS)]
    for null in diagnostic.nulls(comparison):
        assert (null.metric, null.setting) in keys
        matching = next(item for item in rows if (item.metric, item.setting) == (null.metric, null.setting))
        assert null.is_default == matching.is_default
        assert matching.value is not None, "a null beside nothing to compare with"
        assert null.sd is None or null.sd >= 0
        assert null.draws != 1 or null.sd is None, "one draw tells no spread"
    named = [(null.metric, null.setting, null.null) for null in diagnostic.nulls(comparison)]
    assert len(named) == len(set(named))


@each_pair
@each_of_runs
def test_rows_of_two_runs(diagnostic: PairDiagnostic, name: str) -> None:
    runs = runs_of(name)
    (item,), nulls = diagnostic.measure(runs), diagnostic.nulls(runs)
    assert (item.metric, item.setting, item.is_default) == (diagnostic.metrics[0], diagnostic.setting(PARAMETERS), True)
    assert (item.value is None) == (item.status is Status.UNDEFINED) == (not nulls)
    for null in nulls:
        assert (null.metric, null.setting, null.is_default) == (item.metric, item.setting, True)
        assert 0 <= null.mean <= 1
        assert null.sd is not None
        assert null.sd >= 0
    assert diagnostic.measure(runs_of(name)) == [item]
    assert diagnostic.nulls(runs_of(name)) == nulls
    swapped = RunPair(runs.origin, runs.other, runs.one)
    assert diagnostic.measure(swapped) == [item]


@pytest.mark.parametrize("name", ["bf16", "float32", "wide", "repeated", "zero update", "row"])
@each_diagnostic
def test_measuring_twice_gives_the_same_bits(diagnostic: Diagnostic, name: str) -> None:
    here, there = comparison_of(name), comparison_of(name)
    assert diagnostic.measure(here) == diagnostic.measure(there)
    assert diagnostic.nulls(here) == diagnostic.nulls(there)
    assert diagnostic.measure(here) == diagnostic.measure(here), "what it computed is kept unchanged"


@pytest.mark.parametrize("name", ["decaying", "bf16", "zero update"])
@each_diagnostic
def test_a_diagnostic_does_not_depend_on_those_before_it(diagnostic: Diagnostic, name: str) -> None:
    alone, after_all = comparison_of(name), comparison_of(name)
    for other in reversed(CATALOGUE):
        other.measure(after_all)
        other.nulls(after_all)
    assert diagnostic.measure(alone) == diagnostic.measure(after_all)
    assert diagnostic.nulls(alone) == diagnostic.nulls(after_all)


ZERO_UPDATE = {
    "update_sparsity": 1.0,
    "update_norm": 0.0,
    "relative_update_norm": 0.0,
    "update_operator_norm": 0.0,
    "spectral_shift": 0.0,
    "decay_coefficient": 0.0,
} | {metric: 0.0 for diagnostic in CATALOGUE for metric in diagnostic.metrics if metric.startswith("rotation")}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(24, 20), (1, 30), (30, 1), (1, 1), (20, 24), (4, 4)], ids=str)
@each_diagnostic
def test_zero_update(diagnostic: Diagnostic, shape: tuple[int, int], dtype: torch.dtype) -> None:
    W0 = normal(3, *shape).to(dtype)
    rows = diagnostic.measure(compare(W0, W0, last=True))
    diagnostic.nulls(compare(W0, W0, last=True))
    for item in rows:
        if item.value is None:
            assert item.status is Status.UNDEFINED
        else:
            assert item.value == ZERO_UPDATE[item.metric]
            assert item.status is Status.OK
    if not diagnostic.metrics[0].startswith("rotation"):
        assert all((item.value is not None) == (item.metric in ZERO_UPDATE) for item in rows)


@each_pair
@each_diagnostic
def test_transposing_swaps_the_sides_and_nothing_else(diagnostic: Diagnostic, name: str) -> None:
    here = diagnostic.measure(shared(name))
    there = diagnostic.measure(shared(name, transposed=True))
    swapped = {(mirrored(item.metric), item.setting): item for item in there}
    for item in here:
        if item.metric not in ONE_SIDED:
            agree(item, swapped[item.metric, item.setting])


@pytest.mark.parametrize("factor", [2.0**-7])
@pytest.mark.parametrize("name", ["bf16", "float32", "massive ties", "wide", "row", "rank-deficient"])
@each_diagnostic
def test_scale_law(diagnostic: Diagnostic, name: str, factor: float) -> None:
    """Powers of two move no bf16 rounding, so norms scale and everything else stays."""
    pair = PAIRS[name]
    here = diagnostic.measure(shared(name))
    there = diagnostic.measure(compare(factor * pair.before, factor * pair.after))
    for one, other in zip(here, there, strict=True):
        assert (one.metric, one.setting) == (other.metric, other.setting)
        agree(one, other, factor if one.metric in LINEAR else 1.0)


@each_diagnostic
def test_unlike_shapes_are_refused(diagnostic: Diagnostic) -> None:
    with pytest.raises(ValueError, match=r"shapes differ: \(3, 2\) against \(2, 3\)"):
        diagnostic.measure(Comparison(OriginMatrix(torch.ones(3, 2), PARAMETERS), torch.ones(2, 3)))


def _values(comparison: Comparison, group: str) -> Iterator[Measurement]:
    for diagnostic in CATALOGUE:
        if diagnostic.metrics[0].startswith(group):
            yield from diagnostic.measure(comparison)


bounded = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
sides = st.integers(2, 14)


@bounded
@given(m=sides, n=sides, seed=st.integers(0, 1000), size=st.sampled_from([1e-8, 1e-3, 0.3]))
def test_spectra_do_not_see_orthogonal_changes_of_basis(m: int, n: int, seed: int, size: float) -> None:
    p = min(m, n)
    before = with_spectrum([1.5**-i for i in range(p)], m, n, seed)
    after = before + size * normal(seed + 5, m, n)
    L, R = orthogonal(seed + 6, m), orthogonal(seed + 7, n)
    parameters = Parameters(Rank("3"), Rank("2"), similarity_k=(2,), hill_k=(2,))
    here = compare(before, after, parameters, last=True)
    there = compare(L @ before @ R, L @ after @ R, parameters, last=True)
    for group in ("rotation", "spectral", "stable", "update_op", "hill", "principal_energy"):
        for one, other in zip(_values(here, group), _values(there, group), strict=True):
            # rounding the ends to bf16 is not a change of basis
            if one.status is Status.OK and other.status is Status.OK and "view=bf16" not in one.setting:
                assert one.value is not None
                assert one.error is not None
                assert other.error is not None
                # the change of basis itself rounds the weights, by about 1e-15 of their norm
                gap = max(float(c.origin.decomposition.gap(min(3, p))) for c in (here, there))
                rounding = 1e-14 * (1 + math.degrees(1) / gap + 100 / size)
                assert other.value == pytest.approx(one.value, rel=1e-9, abs=one.error + other.error + rounding)


@bounded
@given(m=sides, n=sides, seed=st.integers(0, 1000), share=st.floats(0.05, 1.0))
def test_masks_do_not_see_the_order_of_rows_and_columns(m: int, n: int, seed: int, share: float) -> None:
    before = normal(seed, m, n).bfloat16()
    after = torch.where(normal(seed + 1, m, n) < share, -before, before)
    order = torch.Generator().manual_seed(seed)
    rows, cols = torch.randperm(m, generator=order), torch.randperm(n, generator=order)
    parameters = Parameters(Rank("2"), Rank("64"), similarity_k=(2,), hill_k=(2,))
    here = compare(before, after, parameters)
    there = compare(before[rows][:, cols].contiguous(), after[rows][:, cols].contiguous(), parameters)
    for group in ("update_sparsity", "low_magnitude", "principal_overlap"):
        assert list(_values(here, group)) == list(_values(there, group))


@bounded
@given(seed=st.integers(0, 1000), rank=st.integers(1, 4))
def test_permuted_rows_keep_the_principal_mask(seed: int, rank: int) -> None:
    before = normal(seed, 12, 9)
    after = torch.where(normal(seed + 1, 12, 9) < 0, -before, before)
    parameters = Parameters(Rank("2"), Rank(str(rank)))
    rows = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    here = list(_values(compare(before, after, parameters), "principal_overlap"))
    there = list(_values(compare(before[rows], after[rows], parameters), "principal_overlap"))
    for one, other in zip(here, there, strict=True):
        agree(one, other)


def test_groups_and_metrics_select_what_they_name() -> None:
    chosen = (*select(["full"]), *select_pairs(["full"]))
    assert {metric for diagnostic in chosen for metric in diagnostic.metrics} == set(METRICS)
    assert select(["sign_agreement"]) == select_pairs(["hill_tail"]) == ()
    assert [d.metrics for d in select_pairs(["sign_agreement", "hill_tail"])] == [("sign_agreement",)]
    assert {d.group for d in select(["entrywise"])} == {"entrywise"}
    assert {d.group for d in select(["update"])} == {"entrywise", "update"}
    assert [d.metrics for d in select(["hill_tail"])] == [("hill_tail",)]
    with pytest.raises(ValueError, match=r"--metrics: no metric or group hill; groups are entrywise, update, full"):
        select(["hill"])


@pytest.mark.parametrize("text", ["0", "-3", "p/0", "half", "2.5", "p", ""])
def test_a_rank_that_is_none(text: str) -> None:
    with pytest.raises(ValueError, match="is no rank: give a positive integer"):
        Rank(text)


def test_ranks_of_a_shape() -> None:
    assert Rank("512").of(4, 4) == 512
    assert Rank("p/8").of(100, 64) == 8
    assert Rank("p/8").of(4, 4) == 2


@pytest.mark.parametrize(
    ("wrong", "option"),
    [
        ({"alphas": (1.0,)}, "--alpha"),
        ({"alphas": ()}, "--alpha"),
        ({"alphas": (0.5, 0.5)}, "--alpha"),
        ({"eta": -0.1}, "--eta"),
        ({"eta": float("nan")}, "--eta"),
        ({"similarity_k": (0,)}, "--similarity-k"),
        ({"similarity_k": (4, 4)}, "--similarity-k"),
        ({"hill_k": (1,)}, "--hill-k"),
        ({"hill_k": (3, 3)}, "--hill-k"),
    ],
)
def test_parameters_out_of_range_name_their_option(wrong: dict[str, object], option: str) -> None:
    with pytest.raises(ValueError, match=option):
        Parameters(**wrong)  # type: ignore[arg-type]
