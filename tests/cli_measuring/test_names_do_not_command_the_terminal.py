"""A tensor's name with line breaks and control sequences is written out wherever it is printed."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from checkpoints_on_disk import moved, save_tensors
from command_line import geopd
from geopd.engine.progress import Terminal
from geopd.results.printable import printable

EVIL = "evil\n\x1b[2Jall fine\x07\u202e[red].w"
WRITTEN = r"evil\n\x1b[2Jall fine\x07\u202e[red].w"
BASE = {f"{EVIL}.weight": torch.eye(4), f"{EVIL}.left.weight": torch.ones(2, 2, 2)}


@pytest.fixture
def ends(tmp_path: Path) -> tuple[Path, Path]:
    return save_tensors(tmp_path / "base", BASE), save_tensors(tmp_path / "run", moved(BASE, 0.1))


def assert_tame(text: str) -> None:
    assert WRITTEN in text
    assert all(line.isprintable() for line in text.split("\n"))
    assert not any(line.startswith("all fine") for line in text.split("\n"))


def test_the_plan_the_measurement_and_its_summary(ends: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    planned = geopd("plan", *ends)
    measured = geopd("measure", *ends, "--out", out, "--workers", "1", "--metrics", "entrywise")
    shown, timed = geopd("show", out), geopd("show", out, "--timing")
    assert [planned.code, measured.code, shown.code, timed.code] == [0, 0, 0, 0]
    assert "left out" in measured.err
    for text in (planned.out, measured.err, shown.out, timed.out):
        assert_tame(text)
    assert json.dumps(EVIL) in geopd("plan", *ends, "--json").out, "for programs the name is as it is"


def test_a_failed_matrix_and_half_of_a_surrogate_pair_are_written_out() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    terminal = Terminal(Console(file=stream, width=200))
    terminal.say("[red]failed[/] a\ud800b\r")
    stream.seek(0)
    assert stream.read() == "failed a\\ud800b\\r\n"


def test_what_is_printed_anyway_stays() -> None:
    assert printable("layers.0 – 3 °, größer 权重") == "layers.0 – 3 °, größer 权重"
