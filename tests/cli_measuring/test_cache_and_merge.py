"""``geopd cache``, ``geopd merge`` and the options of ``geopd measure`` that go with them, as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from checkpoints_on_disk import moved, save_run, save_tensors, small_weights
from command_line import geopd, start_geopd
from geopd.engine import decomposition_cache

SMALL = ("--rotation-k", "p/4", "--principal-rank", "p/4", "--similarity-k", "2", "--hill-k", "4", "--quiet")
ALONE = ("--workers", "1", *SMALL)


@pytest.fixture(autouse=True)
def cache_even_the_small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(decomposition_cache, "SMALLEST", 8)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


@pytest.fixture
def world(tmp_path: Path) -> tuple[Path, Path]:
    """A base and a run of two steps: four matrices that are decomposed."""
    return save_tensors(tmp_path / "base", small_weights()), save_run(tmp_path / "opd", small_weights(), [1, 2])


def same(here: Path, there: Path) -> None:
    for name in ("measurements", "nulls", "runs", "evaluations"):
        assert (here / f"{name}.parquet").read_bytes() == (there / f"{name}.parquet").read_bytes(), name


def test_the_cache_fills_serves_tells_and_clears(world: tuple[Path, Path], tmp_path: Path) -> None:
    cache = tmp_path / "kept"
    for out in ("cold", "warm"):
        assert geopd("measure", *world, "--out", tmp_path / out, "--cache-dir", cache, *ALONE).code == 0
    assert geopd("measure", *world, "--out", tmp_path / "off", "--cache-dir", "none", *ALONE).code == 0
    same(tmp_path / "cold", tmp_path / "off")
    same(tmp_path / "warm", tmp_path / "off")
    told = json.loads(geopd("cache", "info", "--cache-dir", cache, "--json").out)
    assert (told["cache_dir"], told["entries"]) == (str(cache), 4)
    assert told["bytes"] == sum(path.stat().st_size for path in cache.iterdir())
    assert told["oldest_use"] <= told["newest_use"]
    plain = geopd("cache", "info", "--cache-dir", cache).out
    assert f"{cache}: 4 decomposition(s), 0.00 GB\nlast used between " in plain
    assert json.loads(geopd("cache", "clear", "--cache-dir", cache, "--json").out)["entries"] == 4
    assert geopd("cache", "clear", "--cache-dir", cache).out == f"{cache}: removed 0 decomposition(s), 0.00 GB\n"
    assert geopd("cache", "info", "--cache-dir", cache).out == f"{cache}: 0 decomposition(s), 0.00 GB\n"


def test_by_default_the_users_cache_folder_is_used_and_none_leaves_it_alone(
    world: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "xdg" / "geopd" / "decompositions"
    assert geopd("measure", *world, "--out", tmp_path / "off", "--cache-dir", "none", *ALONE).code == 0
    assert not folder.exists()
    assert geopd("measure", *world, "--out", tmp_path / "on", *ALONE).code == 0
    assert len(list(folder.iterdir())) == 4
    assert json.loads(geopd("cache", "info", "--json").out)["cache_dir"] == str(folder)


def test_a_run_measured_later_finds_the_origins_decompositions(
    world: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from geopd.diagnostics import comparison

    base, opd = world
    assert geopd("measure", base, opd, "--out", tmp_path / "out", *ALONE).code == 0
    seen: list[int] = []
    decompose = comparison.decompose
    monkeypatch.setattr(comparison, "decompose", lambda W, k: (seen.append(k), decompose(W, k))[1])
    other = save_tensors(tmp_path / "other", moved(small_weights(), 1e-3, seed=7))
    assert geopd("measure", base, other, "--out", tmp_path / "out", *ALONE).code == 0
    assert len(seen) == 4, "the four matrices of the checkpoint, none of the origin"


def test_a_cache_of_no_size_keeps_nothing(world: tuple[Path, Path], tmp_path: Path) -> None:
    kept = ("--cache-dir", tmp_path / "kept", "--cache-gb", "0")
    assert geopd("measure", *world, "--out", tmp_path / "out", *kept, *ALONE).code == 0
    assert json.loads(geopd("cache", "info", "--cache-dir", tmp_path / "kept", "--json").out)["entries"] == 0


def test_shards_measured_and_merged(world: tuple[Path, Path], tmp_path: Path) -> None:
    assert geopd("measure", *world, "--out", tmp_path / "whole", *ALONE).code == 0
    for i in (1, 2):
        result = geopd("measure", *world, "--out", tmp_path / "out", "--shard", f"{i}/2", *ALONE)
        assert result.code == 0
        assert f"next, when all shards are done: geopd merge {tmp_path / 'out'}\n" in result.out
    assert f"when all are done: geopd merge {tmp_path / 'out'}" in geopd("show", tmp_path / "out").complaint()
    plain = geopd("merge", tmp_path / "out")
    assert (plain.code, plain.err) == (0, "")
    assert plain.out.startswith(f"2 shard(s), 6 measured -> {tmp_path / 'out'}\n")
    same(tmp_path / "out", tmp_path / "whole")
    elsewhere = geopd("merge", tmp_path / "elsewhere", tmp_path / "out", "--json")
    told = {"out": str(tmp_path / "elsewhere"), "shards": 2, "matrices": 6, "failed": {"opd": {}}, "notes": []}
    assert json.loads(elsewhere.out) == told
    same(tmp_path / "elsewhere", tmp_path / "whole")


@pytest.mark.slow
def test_shards_measured_side_by_side_share_a_folder_and_a_cache(world: tuple[Path, Path], tmp_path: Path) -> None:
    common = ("--out", tmp_path / "out", "--cache-dir", tmp_path / "kept", *ALONE)
    jobs = [start_geopd("measure", *world, "--shard", f"{i}/2", *common) for i in (1, 2)]
    for job in jobs:
        _, err = job.communicate(timeout=300)
        assert (job.returncode, err) == (0, "")
    assert geopd("merge", tmp_path / "out").code == 0
    assert geopd("measure", *world, "--out", tmp_path / "whole", "--cache-dir", "none", *ALONE).code == 0
    same(tmp_path / "out", tmp_path / "whole")


def test_a_failed_matrix_makes_the_merge_exit_with_1(tmp_path: Path) -> None:
    weights = moved(small_weights(), 1e-3)
    weights["model.norm.weight"][0] = float("inf")
    base, tuned = save_tensors(tmp_path / "base", small_weights()), save_tensors(tmp_path / "tuned", weights)
    assert geopd("measure", base, tuned, "--out", tmp_path / "out", "--shard", "1/1", *ALONE).code == 1
    result = geopd("merge", tmp_path / "out")
    assert result.code == 1
    assert "1 of them failed" in result.out
    assert "failed: tuned: norm: " in result.err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--shard", "3/2"), r"--shard 3/2: give i/n with 1 <= i <= n"),
        (("--engine", "slurm"), r"--engine slurm: one of local, ray"),
        (("--engine", "ray", "--device", "tpu"), r"--device tpu: one of auto, cpu, cuda"),
        (("--address", "head:6379"), r"--address head:6379: goes with --engine ray"),
    ],
)
def test_options_that_make_no_sense_are_one_line(
    world: tuple[Path, Path], tmp_path: Path, arguments: tuple[str, ...], complaint: str
) -> None:
    line = geopd("measure", *world, "--out", tmp_path / "out", *arguments, *ALONE).complaint()
    assert complaint in line
    assert not (tmp_path / "out").exists()


def test_a_cache_folder_that_is_a_file_is_refused(world: tuple[Path, Path], tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for command in (("measure", *world, "--out", tmp_path / "out"), ("cache", "info"), ("cache", "clear")):
        assert f"--cache-dir {file}: is a file" in geopd(*command, "--cache-dir", file).complaint()
    assert "--cache-dir none: keeps nothing" in geopd("cache", "info", "--cache-dir", "none").complaint()


def test_a_folder_without_shards_is_refused(tmp_path: Path) -> None:
    assert f"{tmp_path / 'none'}: holds no shard" in geopd("merge", tmp_path / "none").complaint()
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("command", [("merge",), ("cache", "info"), ("cache", "clear")], ids=" ".join)
def test_help_has_an_example(command: tuple[str, ...]) -> None:
    result = geopd(*command, "--help")
    assert result.code == 0
    assert f"Example: geopd {' '.join(command)}" in result.out


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_a_ray_started_here_measures_the_same(world: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("ray")
    assert geopd("measure", *world, "--out", tmp_path / "local", *ALONE).code == 0
    job = start_geopd("measure", *world, "--out", tmp_path / "ray", "--engine", "ray", "--workers", "2", *SMALL)
    out, err = job.communicate(timeout=300)
    assert (job.returncode, err) == (0, "")
    assert out.startswith("6 measured")
    same(tmp_path / "ray", tmp_path / "local")
