"""Fixtures that several test folders share."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

# matrices here are tiny: threads that wait for each other take longer than the work
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session", autouse=True)
def _cache_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing that a test starts touches the user's cache of decompositions."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def study_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A made-up results folder of four runs; read it, do not write into it."""
    from synthetic_results import Folder, write_notes

    root = Folder(tmp_path_factory.mktemp("study_results") / "results").write()
    write_notes(root)
    return root


@pytest.fixture(scope="session")
def study_report(study_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a copy of that folder, with its claims decided."""
    from geopd.claims import decide_claims
    from geopd.report import write_report

    root = shutil.copytree(study_folder, tmp_path_factory.mktemp("study_report") / "results")
    decide_claims(root)
    return write_report(root)
