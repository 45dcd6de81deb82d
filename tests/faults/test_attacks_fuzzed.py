"""A few hundred damaged checkpoints of every format, the same each time; ``make fuzz`` does them by the million."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from geopd.checkpoints import NotEnoughMemoryError, open_checkpoint
from seeded_checkpoints import SEEDS, HangError, Trial, keep, lay, seed

CASES = 150


@pytest.fixture
def timed() -> Iterator[None]:
    def over(*_: object) -> None:
        raise HangError

    before = signal.signal(signal.SIGPROF, over)
    yield
    signal.signal(signal.SIGPROF, before)


@pytest.mark.parametrize("target", sorted(set(SEEDS) - {"bare_pickle"}))
def test_what_is_damaged_is_whole_to_begin_with(target: str, tmp_path: Path) -> None:
    made = seed(target)
    lay(target, tmp_path)
    checkpoint = open_checkpoint(tmp_path / made.path, tmp_path / made.base if made.base else None)
    assert len(checkpoint.tensors) >= 4
    assert not checkpoint.unreadable
    assert all(tuple(checkpoint.read(name).shape) == info.shape for name, info in checkpoint.tensors.items())


@pytest.mark.parametrize("target", sorted(SEEDS))
def test_a_damaged_checkpoint_is_read_or_refused_in_its_time_and_memory(
    target: str, tmp_path: Path, timed: None
) -> None:
    trial = Trial(target, 0, tmp_path / "c")

    @settings(
        max_examples=CASES, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )
    @given(st.integers(0, 2**20))
    def one(case: int) -> None:
        assert trial.run(case) is None

    one()
    assert trial.tally.outcomes["refused"] > 0
    assert sum(trial.tally.outcomes.values()) >= CASES


@pytest.mark.parametrize("target", sorted(SEEDS))
def test_a_case_is_the_same_each_time(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = Trial(target, 3, tmp_path)
    found = [one.files(case) for case in range(50)]
    monkeypatch.setattr("time.time", lambda: 2e9)
    two = Trial(target, 3, tmp_path)
    assert [two.files(case) for case in range(50)] == found
    assert len({tuple(files.values()) for files in found}) > 30


def test_what_is_wrong_is_found_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, timed: None) -> None:
    trial = Trial("safetensors_file", 0, tmp_path / "c")

    def wrong(*_: object) -> None:
        raise RecursionError("too deep")

    def hungry(*_: object) -> object:
        held = bytearray(64 << 20)
        return wrong() if not held else open_checkpoint(trial.scratch / "nowhere")

    def endless(*_: object) -> None:
        while True:
            pass

    monkeypatch.setattr("fuzz.trial.open_checkpoint", wrong)
    assert trial.run(5) == "RecursionError: too deep"

    def starved(*_: object) -> None:
        raise NotEnoughMemoryError(f"{trial.scratch}: not enough memory")

    monkeypatch.setattr("fuzz.trial.open_checkpoint", starved)
    assert "more memory than there is" in str(trial.run(5))
    unread = SimpleNamespace(tensors={"w": None}, read=starved, unreadable={})
    monkeypatch.setattr("fuzz.trial.open_checkpoint", lambda *_: unread)
    assert "more memory than there is" in str(trial.run(5))
    monkeypatch.setattr("fuzz.trial.SECONDS", 0.2)
    monkeypatch.setattr("fuzz.trial.open_checkpoint", endless)
    assert "more than" in str(trial.run(6))
    monkeypatch.setattr("fuzz.trial.SECONDS", 5.0)
    monkeypatch.setattr("fuzz.trial.open_checkpoint", hungry)
    assert "allocated" in str(trial.run(0)), "every 64th case is weighed"
    (file,) = keep(trial, 5, tmp_path / "kept").iterdir()
    assert file.read_bytes() == trial.files(5)["model.safetensors"]
