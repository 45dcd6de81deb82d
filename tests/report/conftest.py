from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def full_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A made-up full study: one of everything, the baselines and arms with three seeds. Do not write into it."""
    from synthetic_full_study import FullStudy, some_runs

    return FullStudy(tmp_path_factory.mktemp("full_study") / "results", runs=some_runs()).write()


@pytest.fixture(scope="session")
def full_report(full_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a copy of that folder, with its claims decided."""
    from geopd.claims import decide_claims
    from geopd.report import write_report

    root = shutil.copytree(full_folder, tmp_path_factory.mktemp("full_report") / "results")
    decide_claims(root)
    return write_report(root)
