"""The decomposition cache: bit for bit what is computed, bounded, checked, shared by processes, never required."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from checkpoints_on_disk import moved, q_name, save_run, save_tensors, small_weights
from geopd.diagnostics import OriginMatrix, Parameters, Rank, comparison
from geopd.engine import MeasureOptions, decomposition_cache, make_plan
from geopd.engine.decomposition_cache import DecompositionCache, default_cache_dir
from geopd.engine.task import Task, perform
from geopd.results import Part
from geopd.spectral import Decomposition, decompose

OPTIONS = MeasureOptions(rotation_k="p/4", principal_rank="p/4", similarity_k=(2,), hill_k=(4,))
PARAMETERS = Parameters(Rank("8"), Rank("4"), (0.5,), 1e-3, (2,), (4,))
FIELDS = ("sigma", "left", "right", "sigma_error")


@pytest.fixture(autouse=True)
def cache_even_the_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decomposition_cache, "SMALLEST", 8)


@pytest.fixture
def cache(tmp_path: Path) -> DecompositionCache:
    return DecompositionCache(tmp_path / "cache")


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many vectors each computed decomposition was asked for."""
    seen: list[int] = []

    def watched(W: torch.Tensor, k: int) -> Decomposition:
        seen.append(k)
        return decompose(W, k)

    monkeypatch.setattr(comparison, "decompose", watched)
    return seen


def matrix(rows: int, cols: int, *, seed: int = 0, spread: float = 0.0) -> torch.Tensor:
    """Gaussian bf16 weights; ``spread``: decades that the singular values span beside, for the paths that need them."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(rows, cols, generator=generator, dtype=torch.float64)
    if spread:
        U, _, Vh = torch.linalg.svd(W, full_matrices=False)
        return (U * torch.logspace(0, -spread, min(rows, cols), dtype=torch.float64)) @ Vh
    return (0.02 * W).bfloat16()


def through(cache: DecompositionCache, W: torch.Tensor, parameters: Parameters = PARAMETERS) -> Decomposition:
    origin = OriginMatrix(W, parameters)
    with cache.lent(origin):
        return origin.decomposition


def same(one: Decomposition, other: Decomposition) -> bool:
    tensors = all(
        torch.equal(a, b) and a.stride() == b.stride() and a.dtype == b.dtype
        for a, b in ((getattr(one, name), getattr(other, name)) for name in FIELDS)
    )
    scalars = [{k: v for k, v in d.__dict__.items() if k not in FIELDS} for d in (one, other)]
    return tensors and scalars[0] == scalars[1]


def only_entry(cache: DecompositionCache) -> Path:
    (path,) = cache.root.iterdir()
    return path


def tasks_of(root: Path, *, cols: int = 64) -> list[Task]:
    """Two layers' matrices over a run of three checkpoints in bf16 and of one in float32 whose shift is tiny."""
    weights = small_weights(rows=96, cols=cols)
    base = save_tensors(root / "base", weights)
    runs = [save_run(root / "opd", weights, [1, 2, 3])]
    tiny = {name: tensor.float() * (1 + 1e-7 * torch.rand(tensor.shape)) for name, tensor in weights.items()}
    runs.append(save_tensors(root / "rlvr", tiny))
    plan = make_plan(base, runs, OPTIONS)
    keys = {(run.run.label, name): f"{run.run.label} {name}" for run in plan.runs for name in run.pairs}
    return plan.tasks(keys)


def values(parts: list[Part]) -> list[tuple[Any, ...]]:
    """All of a part but how long it took."""
    return [
        (
            p.key,
            repr(p.measurements),
            repr(p.nulls),
            {name: v.tobytes() for name, v in p.vectors.items()},
            p.record["method"],
        )
        for p in parts
    ]


@pytest.mark.parametrize(
    ("W", "method"),
    [
        (matrix(40, 24), "direct"),
        (matrix(24, 40), "direct"),
        (matrix(150, 120), "gram"),
        (matrix(120, 150), "gram"),
        (matrix(130, 120, spread=100.0), "qr"),
        (matrix(120, 130, spread=100.0), "qr"),
        (torch.zeros(120, 100), "zero matrix"),
    ],
    ids=lambda value: value if isinstance(value, str) else "x".join(map(str, value.shape)),
)
def test_what_comes_back_is_bit_for_bit_what_went_in(
    cache: DecompositionCache, computed: list[int], W: torch.Tensor, method: str
) -> None:
    first, second = through(cache, W), through(cache, W)
    assert first.method == method
    assert computed == [8]
    assert same(second, decompose(W, 8))
    assert same(first, second)


def test_every_value_of_a_task_is_the_same_with_the_cache_cold_warm_or_off(
    tmp_path: Path, cache: DecompositionCache, computed: list[int]
) -> None:
    tasks = tasks_of(tmp_path)
    off = [values(perform(task)) for task in tasks]
    computed.clear()
    cold = [values(perform(replace(task, cache=cache))) for task in tasks]
    of_cold = len(computed)
    warm = [values(perform(replace(task, cache=cache))) for task in tasks]
    assert cold == off
    assert warm == off
    assert len(computed) - of_cold == of_cold - 4, "the four origins alone were kept"


def test_the_golden_pair_is_the_same_through_the_cache(
    cache: DecompositionCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "golden"))
    import regenerate

    class Through(OriginMatrix):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            with cache.lent(self):
                _ = self.decomposition, self.exact_sigma

    expected = regenerate.rows()
    monkeypatch.setattr(regenerate, "OriginMatrix", Through)
    assert regenerate.rows() == expected, "as it is filled, and already read from"
    assert regenerate.rows() == expected, "as it is read"
    assert cache.contents().entries == 4, "with vectors and values without squaring, in float32 and in bf16"
    del sys.modules["regenerate"]


def test_an_entry_belongs_to_content_settings_numerics_and_threads(
    cache: DecompositionCache, computed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    W = matrix(40, 24)
    changed = W.clone()
    changed[3, 4] *= 2
    through(cache, W)
    for other in (changed, W.float(), W.T.contiguous(), W.reshape(24, 40)):
        through(cache, other)
    through(cache, W, replace(PARAMETERS, rotation_k=Rank("6")))
    through(replace(cache, numerics=1), W)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    through(cache, W)
    monkeypatch.undo()
    monkeypatch.setattr(decomposition_cache, "SMALLEST", 8)
    monkeypatch.setattr(decomposition_cache, "machine", lambda: ["another processor"])
    through(cache, W)
    assert cache.contents().entries == 9


def test_values_without_vectors_and_without_squaring_are_entries_of_their_own(
    cache: DecompositionCache, computed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    W = matrix(150, 120)
    for vectors in (frozenset({"origin"}), frozenset[str]()):
        for _ in range(2):
            origin = OriginMatrix(W, PARAMETERS, vectors)
            with cache.lent(origin):
                found = origin.decomposition, origin.exact_sigma
            assert same(found[0], decompose(W, 8 if vectors else 0))
    assert computed == [8, 0]
    assert cache.contents().entries == 3, "the values without squaring are one"
    monkeypatch.setattr(comparison, "singular_values", None)
    again = OriginMatrix(W, PARAMETERS)
    with cache.lent(again):
        assert torch.equal(again.exact_sigma[0], found[1][0])
        assert again.exact_sigma[1] == found[1][1]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))


def change_a_bound(path: Path) -> None:
    data = path.read_bytes()
    start = data.index(b"perturbation")
    digit = next(i for i in range(start, len(data)) if data[i : i + 1].isdigit())
    path.write_bytes(data[:digit] + (b"9" if data[digit : digit + 1] != b"9" else b"8") + data[digit + 1 :])


def without_metadata(path: Path) -> None:
    from safetensors.torch import save_file

    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    save_file(tensors, path)


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        flip_a_bit,
        change_a_bound,
        without_metadata,
        lambda p: p.write_bytes(b""),
        lambda p: p.write_text("no"),
    ],
    ids=["truncated", "one bit", "a bound", "no metadata", "empty", "no safetensors"],
)
def test_a_damaged_entry_is_told_computed_anew_and_replaced(
    cache: DecompositionCache, computed: list[int], caplog: pytest.LogCaptureFixture, damage: Callable[[Path], object]
) -> None:
    W = matrix(150, 120)
    sound = through(cache, W)
    damage(only_entry(cache))
    with caplog.at_level(logging.WARNING):
        assert same(through(cache, W), sound)
    assert computed == [8, 8]
    assert f"{only_entry(cache)}: damaged cache entry" in caplog.text
    assert "computed anew" in caplog.text
    caplog.clear()
    assert same(through(cache, W), sound)
    assert (computed, caplog.text) == ([8, 8], "")


def test_a_full_cache_lets_the_least_recently_used_go(cache: DecompositionCache, computed: list[int]) -> None:
    matrices = [matrix(40, 24, seed=seed) for seed in range(4)]
    through(cache, matrices[0])
    one = cache.contents().bytes
    small = replace(cache, limit=3 * one + 4096)
    for W in matrices[1:3]:
        through(small, W)
    for i, path in enumerate(sorted(cache.root.iterdir(), key=lambda path: path.stat().st_mtime_ns)):
        os.utime(path, (1000 + i, 1000 + i))
    through(small, matrices[0])  # used again, so the second is the oldest now
    through(small, matrices[3])
    assert cache.contents().bytes <= small.limit
    computed.clear()
    for seed in (0, 2, 3):
        through(small, matrices[seed])
    assert computed == []
    through(small, matrices[1])
    assert computed == [8]


def test_what_this_measurement_used_is_not_pushed_out_by_the_rest_of_it(
    cache: DecompositionCache, computed: list[int]
) -> None:
    """A model larger than the limit, read twice in one order: plain eviction would never hit."""
    matrices = [matrix(40, 24, seed=seed) for seed in range(6)]
    through(cache, matrices[0])
    size = cache.contents().bytes
    cache.clear()
    for _ in range(2):
        bounded = replace(cache, limit=3 * size + 4096, since=time.time() - 1)
        for W in matrices:
            through(bounded, W)
    assert cache.contents().entries == 3
    assert len(computed) == 1 + 6 + 3


def test_an_entry_of_the_future_does_not_stay_for_ever(cache: DecompositionCache) -> None:
    """The clock went back by a day: what was used then counts as used longest ago."""
    through(cache, matrix(40, 24))
    path, size = only_entry(cache), cache.contents().bytes
    os.utime(path, (time.time() + 86400,) * 2)
    through(replace(cache, limit=size + 4096, since=time.time() - 1), matrix(40, 24, seed=1))
    assert cache.contents().entries == 1
    assert not path.exists()


def test_an_entry_larger_than_the_limit_pushes_nothing_out(cache: DecompositionCache) -> None:
    through(cache, matrix(40, 24))
    through(replace(cache, limit=10_000), matrix(150, 120))
    assert cache.contents().entries == 1


def test_a_disk_that_is_nearly_full_is_left_to_the_results(
    cache: DecompositionCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decomposition_cache, "_RESERVE", 1 << 62)
    through(cache, matrix(40, 24))
    assert cache.contents().entries == 0


def test_a_cache_that_cannot_be_written_is_told_and_done_without(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    W = matrix(40, 24)
    assert same(through(DecompositionCache(tmp_path / "file" / "cache"), W), decompose(W, 8))
    assert "not kept in the cache" in caplog.text


def test_nothing_is_kept_of_a_task_that_fails(cache: DecompositionCache) -> None:
    origin = OriginMatrix(matrix(40, 24), PARAMETERS)

    def fails() -> None:
        with cache.lent(origin):
            _ = origin.decomposition
            raise ValueError("broken on purpose")

    with pytest.raises(ValueError, match="broken on purpose"):
        fails()
    assert cache.contents().entries == 0


def test_matrices_that_do_not_pay_are_not_kept(cache: DecompositionCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decomposition_cache, "SMALLEST", 25)
    through(cache, matrix(40, 24))
    assert not cache.root.exists()


def test_entrywise_metrics_leave_the_cache_alone(tmp_path: Path, cache: DecompositionCache) -> None:
    base = save_tensors(tmp_path / "base", small_weights())
    tuned = save_tensors(tmp_path / "tuned", moved(small_weights(), 1e-3))
    plan = make_plan(base, [tuned], MeasureOptions(metrics=("entrywise",)))
    for task in plan.tasks({("tuned", name): name for name in plan.runs[0].pairs}):
        perform(replace(task, cache=cache))
    assert not cache.root.exists()
    assert q_name() in small_weights()


def _fill(root: Path, seeds: list[int], limit: int, failures: Any) -> None:
    decomposition_cache.SMALLEST = 8
    cache = DecompositionCache(root, limit)
    try:
        for seed in seeds * 5:
            W = matrix(40, 24, seed=seed)
            if not same(through(cache, W), decompose(W, 8)):
                failures.put(f"seed {seed} came back changed")
    except Exception as error:  # told to the test
        failures.put(repr(error))


@pytest.mark.slow
def test_processes_that_fill_read_and_evict_together_never_read_a_wrong_value(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    failures = context.Queue()
    cache = DecompositionCache(tmp_path / "cache")
    seeds = list(range(6))
    workers = [
        context.Process(target=_fill, args=(cache.root, seeds[i:] + seeds[:i], 20_000, failures)) for i in range(2)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert failures.empty()
    assert 0 < cache.contents().bytes <= 20_000
    assert not list(cache.root.glob(".*")), "nothing half-written is left"


def test_half_written_entries_of_dead_processes_are_swept(cache: DecompositionCache) -> None:
    cache.root.mkdir()
    old, young = (cache.root / f".{name}.decomposition.safetensors.77.tmp" for name in ("old", "young"))
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (1000, 1000))
    through(cache, matrix(40, 24))
    assert (old.exists(), young.exists()) == (False, True)
    assert cache.clear().entries == 1
    assert not list(cache.root.iterdir())


def test_clearing_a_folder_that_holds_a_model_spares_the_model(tmp_path: Path) -> None:
    model = save_tensors(tmp_path / "model", small_weights())
    inside = DecompositionCache(model)
    through(inside, matrix(40, 24))
    assert (inside.contents().entries, inside.clear().entries) == (1, 1)
    assert [path.name for path in model.iterdir()] == ["model.safetensors"]


def test_the_default_folder_is_the_users_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "geopd" / "decompositions"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_dir() == Path.home() / ".cache" / "geopd" / "decompositions"


def test_entries_are_plain_safetensors(cache: DecompositionCache) -> None:
    through(cache, matrix(150, 120))
    with safe_open(only_entry(cache), framework="np") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        entry = json.loads(file.metadata()["entry"])
    assert shapes == {"sigma": (120,), "left": (150, 8), "right": (120, 8), "sigma_error": (120,)}
    assert entry["scalars"]["method"] == "gram"
