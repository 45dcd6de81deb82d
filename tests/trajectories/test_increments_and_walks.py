"""Increments between checkpoints, the gap that holds a subspace, and the random-walk null of Sim_K."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from geopd.diagnostics import CATALOGUE, Comparison, OriginMatrix, Parameters, Place, Trajectory, UpdateSubspace
from geopd.diagnostics.increments import measure_gap, measure_similarity, nulls_similarity
from geopd.diagnostics.trajectory import increment_of
from geopd.diagnostics.walk import DRAWS, nulls, walk_similarity
from geopd.results import Null, Status
from prescribed import normal, orthogonal, with_spectrum

PARAMETERS = Parameters(similarity_k=(3, 2), hill_k=(4,))


def path_of(states: list[Tensor], parameters: Parameters = PARAMETERS, seed: int = 1) -> list[Comparison]:
    """Every checkpoint of a run, the origin first among the states."""
    origin = OriginMatrix(states[0], parameters)
    steps = [increment_of(origin, before if i else None, after) for i, (before, after) in enumerate(pairwise(states))]
    trajectory = Trajectory(steps, seed)
    end = UpdateSubspace(Comparison(origin, states[-1]).update_decomposition)
    found = [Comparison(origin, W, end, Place(trajectory, i)) for i, W in enumerate(states[1:])]
    found[-1].final = UpdateSubspace(end.decomposition, is_this=True)
    return found


def accumulate(start: Tensor, steps: list[Tensor]) -> list[Tensor]:
    states = [start]
    for step in steps:
        states.append(states[-1] + step)
    return states


def low_rank(seed: int, m: int, n: int, sigma: list[float], right: Tensor | None = None) -> Tensor:
    V = orthogonal(seed + 1, n, len(sigma)) if right is None else right
    return (orthogonal(seed, m, len(sigma)) * torch.tensor(sigma, dtype=torch.float64)) @ V.T


def test_similarity_of_increments_by_hand() -> None:
    states = accumulate(normal(1, 30, 20), [normal(s, 30, 20) for s in (2, 3, 4)])
    runs = path_of(states)
    for t in (1, 2):
        for item in measure_similarity(runs[t]):
            K = int(item.setting.split(";")[0].removeprefix("k="))
            now, before = (np.linalg.svd((states[i + 1] - states[i]).numpy())[2][:K].T for i in (t, t - 1))
            assert item.value == pytest.approx(np.linalg.norm(now.T @ before) ** 2 / K, rel=1e-9)
            assert item.status is Status.OK
            assert item.is_default is (K == 3)
    assert [n.mean for n in nulls_similarity(runs[1])] == [3 / 20, 2 / 20]


def test_a_channel_kept_and_a_channel_left() -> None:
    V = orthogonal(5, 20)
    steps = [
        low_rank(s, 30, 20, [3.0, 2.0, 1.0], V[:, cols]) for s, cols in ((1, [0, 1, 2]), (2, [0, 1, 2]), (3, [2, 3, 4]))
    ]
    runs = path_of(accumulate(torch.zeros(30, 20, dtype=torch.float64), steps))
    found = [measure_similarity(run)[0] for run in runs]
    assert found[0].status is Status.UNDEFINED
    assert found[0].note == "the first checkpoint's increment has none before it"
    assert nulls_similarity(runs[0]) == []
    assert found[1].value == pytest.approx(1.0, abs=1e-12)
    assert found[2].value == pytest.approx(1 / 3, abs=1e-12)


def test_what_is_undefined() -> None:
    flat = low_rank(1, 30, 20, [2.0, 1.0])
    states = accumulate(normal(9, 30, 20), [normal(2, 30, 20), flat, normal(3, 30, 20)])
    runs = path_of(states)
    assert measure_similarity(runs[1])[0].note == "numerical rank of this increment is 2 < K = 3"
    assert measure_similarity(runs[2])[0].note == "numerical rank of the previous increment is 2 < K = 3"
    assert measure_similarity(runs[2])[1].status is Status.OK
    alone = Comparison(OriginMatrix(states[0], PARAMETERS), states[1])
    assert measure_similarity(alone)[0].status is Status.UNDEFINED
    assert nulls(alone) == []
    origin = runs[0].origin
    torn = Trajectory([increment_of(origin, None, states[1]), None, None], 1)
    item = measure_similarity(Comparison(origin, states[3], None, Place(torn, 2)))[0]
    assert item.note == "a checkpoint before this one could not be read"


def test_the_gap_below_a_subspace() -> None:
    update = with_spectrum([4.0, 3.0, 2.5, 1.0, 0.5], 30, 20)
    rows = measure_gap(Comparison(OriginMatrix(torch.zeros_like(update), PARAMETERS), update))
    assert [row.value for row in rows] == pytest.approx([1.5 / 4, 0.5 / 4], rel=1e-9)
    assert all(row.error is not None and row.error < 1e-12 for row in rows)
    thin = low_rank(1, 30, 20, [2.0, 1.0])
    rows = measure_gap(Comparison(OriginMatrix(torch.zeros_like(thin), PARAMETERS), thin))
    assert rows[0].note == "numerical rank of the update is 2 < K = 3"
    assert rows[1].value == pytest.approx(0.5)


def test_shared_rounding_of_bf16_checkpoints_is_unresolved() -> None:
    """Independent fp32 steps far below half a unit, saved in bf16: what is similar is W_{t-1}'s rounding."""
    W0 = (0.02 * normal(1, 64, 48)).bfloat16()
    masters = accumulate(W0.double(), [1e-5 * normal(s, 64, 48) for s in (2, 3, 4)])
    saved = path_of([W0, *(W.bfloat16() for W in masters[1:])])
    item = measure_similarity(saved[2])[0]
    assert item.status is Status.UNRESOLVED
    assert item.value is not None
    assert "bf16 rounding, shared by both increments" in (item.note or "")
    wide = path_of([W0.float(), *(W.float() for W in masters[1:])])
    assert measure_similarity(wide[2])[0].status is Status.OK
    increment = wide[2].place.trajectory.increments[2] if wide[2].place else None
    assert increment is not None
    assert increment.noise == 0.0


def test_noise_of_an_increment_is_its_roundings() -> None:
    W0 = (0.02 * normal(1, 200, 150)).bfloat16()
    masters = accumulate(W0.double(), [1e-3 * normal(s, 200, 150) for s in (2, 3)])
    run = path_of([W0, *(W.bfloat16() for W in masters[1:])])
    assert run[0].place is not None
    for i, step in enumerate(run[0].place.trajectory.increments):
        stored = [W0.double(), masters[1].bfloat16().double(), masters[2].bfloat16().double()]
        error = (stored[i + 1] - stored[i]) - (masters[i + 1] - masters[i])
        assert step is not None
        assert step.noise == pytest.approx(float(error.norm() / step.norm) ** 2, rel=0.1)


def test_the_first_increment_serves_the_first_update() -> None:
    states = accumulate(normal(1, 30, 20), [normal(s, 30, 20) for s in (2, 3)])
    first = path_of(states)[0]
    assert first.place is not None
    assert first.place.trajectory.increments[0] is not None
    assert first.update_decomposition is first.place.trajectory.increments[0].decomposition
    alone = Comparison(OriginMatrix(states[0], PARAMETERS), states[1])
    assert torch.equal(alone.update_decomposition.right, first.update_decomposition.right)


def draws(
    count: int, shape: tuple[int, int], norms: list[float], ranks: list[int], k: int
) -> tuple[list[float], list[float]]:
    found = np.array([walk_similarity(shape, norms, ranks, k, np.random.default_rng(i)) for i in range(count)])
    return found.mean(axis=0).tolist(), found.std(axis=0, ddof=1).tolist()


def test_a_walk_of_rank_four_looks_locked() -> None:
    mean, sd = draws(8, (512, 512), [1.0] * 5, [4] * 5, 16)
    assert mean == pytest.approx([0.21, 0.42, 0.61, 0.82, 1.0], abs=0.025)
    assert max(sd) < 0.03


@pytest.mark.parametrize(
    ("shape", "norms", "ranks", "k"),
    [
        ((40, 30), [1.0, 2.0, 0.5, 1.0], [3, 1, 4, 2], 4),
        ((30, 40), [1.0] * 5, [9] * 5, 6),
        ((24, 16), [3.0, 1.0], [2, 2], 6),
    ],
    ids=["uneven", "wide and full", "fewer directions than K"],
)
def test_factored_walks_are_walks(shape: tuple[int, int], norms: list[float], ranks: list[int], k: int) -> None:
    """Against whole matrices: Haar frames from QR, summed, decomposed."""

    def dense(seed: int) -> list[float]:
        total, bases = torch.zeros(shape, dtype=torch.float64), []
        for i, (norm, rank) in enumerate(zip(norms, ranks, strict=True)):
            sigma = [norm / rank**0.5] * rank
            total = total + low_rank(1000 * seed + 10 * i, *shape, sigma)
            live = min(k, sum(ranks[: i + 1]))
            bases.append(torch.linalg.svd(total).Vh[:live].T)
        return [float(torch.linalg.matrix_norm(V.T @ bases[-1]) ** 2) / k for V in bases]

    whole = np.array([dense(seed) for seed in range(60)])
    mean, sd = draws(60, shape, norms, ranks, k)
    slack = 4 * np.sqrt((whole.var(axis=0, ddof=1) + np.square(sd)) / 60) + 1e-12
    assert np.all(np.abs(whole.mean(axis=0) - mean) <= slack)


def test_missing_directions_count_as_zero() -> None:
    mean, _ = draws(2, (64, 64), [1.0, 1.0], [2, 2], 8)
    assert mean == pytest.approx([2 / 8, 4 / 8])
    still, _ = draws(2, (64, 64), [0.0, 1.0, 0.0], [1, 2, 1], 2)
    assert still == pytest.approx([0.0, 1.0, 1.0])


def walk_nulls(run: Comparison) -> dict[str, Null]:
    return {null.setting: null for null in nulls(run)}


def test_the_null_has_the_run_s_own_norms_and_ranks() -> None:
    m, n = 80, 60
    parameters = Parameters(similarity_k=(4,), hill_k=(4,))
    steps = [low_rank(10 * s, m, n, [float(s)] * s) for s in (1, 2, 3, 4)]
    runs = path_of(accumulate(normal(1, m, n), steps), parameters, seed=5)
    expected = [
        walk_similarity((m, n), [1.0, 2 * 2**0.5, 3 * 3**0.5, 8.0], [1, 2, 3, 4], 4, g)
        for g in [np.random.default_rng(5)]
        for _ in range(DRAWS)
    ]
    mean = np.mean(expected, axis=0)
    assert walk_nulls(runs[0]) == {}, "Sim_4 has no value while the update has rank 1"
    for t in (2, 3):
        null = walk_nulls(runs[t])["k=4;view=native"]
        assert null.mean == pytest.approx(mean[t], rel=1e-9)
        assert (null.null, null.draws, null.is_default) == ("random_walk", DRAWS, True)
    again = path_of(accumulate(normal(1, m, n), steps), parameters, seed=5)
    assert walk_nulls(again[2]) == walk_nulls(runs[2])
    other = path_of(accumulate(normal(1, m, n), steps), parameters, seed=6)
    assert walk_nulls(other[2])["k=4;view=native"].mean != walk_nulls(runs[2])["k=4;view=native"].mean


def test_no_walk_where_rounding_is_shared() -> None:
    """Off the grid W0's rounding is in every checkpoint: a walk without it would call a false lock a finding."""
    masters = accumulate((0.02 * normal(1, 64, 48)).float().double(), [1e-4 * normal(s, 64, 48) for s in (2, 3)])
    wide, narrow = [W.float() for W in masters], [masters[0].float(), *(W.bfloat16() for W in masters[1:])]
    assert nulls(path_of(wide)[0])
    assert nulls(path_of(narrow)[0]) == []


def test_no_walk_through_what_could_not_be_read_or_is_too_wide() -> None:
    states = accumulate(normal(1, 30, 20), [normal(s, 30, 20) for s in (2, 3)])
    run = path_of(states)[1]
    torn = Trajectory([None, *run.place.trajectory.increments[1:]], 1) if run.place else None
    assert torn is not None
    assert nulls(run)
    assert nulls(Comparison(run.origin, states[2], run.final, Place(torn, 1))) == []
    still = path_of([states[0]] * 3)
    assert nulls(still[0]) == []


def test_the_catalogue_gives_both_nulls_of_similarity() -> None:
    states = accumulate(normal(1, 30, 20), [normal(s, 30, 20) for s in (2, 3)])
    diagnostic = next(d for d in CATALOGUE if "subspace_similarity" in d.metrics)
    assert {null.null for null in diagnostic.nulls(path_of(states)[0])} == {"gaussian", "random_walk"}
