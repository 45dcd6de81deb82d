"""What counts as a worker's own memory, and that mapped files are let go of."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import pytest

from checkpoints_on_disk import save_tensors, small_weights
from geopd.engine.inputs import close_mapped, opened
from geopd.engine.memory import mapped_bytes, peak_bytes, watch_peak

SIZE = 64 << 20
PAGE = mmap.PAGESIZE
SLACK = 8 << 20

pytestmark = pytest.mark.skipif(mapped_bytes() is None, reason="the system does not say what a process holds")


def required(count: int | None) -> int:
    assert count is not None
    return count


def test_the_peak_is_of_what_was_held_since_it_is_watched() -> None:
    watch_peak()
    before = required(peak_bytes())
    held = np.ones(SIZE, dtype=np.uint8)
    del held
    assert required(peak_bytes()) - before > SIZE - SLACK
    watch_peak()
    assert required(peak_bytes()) - before < SLACK


def test_pages_of_a_mapped_file_are_the_systems(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(SIZE))
    watch_peak()
    before, mapped_before = required(peak_bytes()), required(mapped_bytes())
    with (tmp_path / "file").open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert sum(mapped[i] for i in range(0, SIZE, PAGE)) == 0
        assert required(mapped_bytes()) - mapped_before > SIZE - SLACK
        assert abs(required(peak_bytes()) - before) < SLACK


def test_checkpoints_are_closed_once_much_is_mapped(tmp_path: Path) -> None:
    path = save_tensors(tmp_path / "base", small_weights())
    first = opened(path)
    close_mapped(required(mapped_bytes()) + SIZE)
    assert opened(path) is first
    close_mapped(0)
    assert opened(path) is not first
    name = next(iter(first.tensors))
    assert first.read(name).shape == opened(path).read(name).shape, "who still has it open reads on"
