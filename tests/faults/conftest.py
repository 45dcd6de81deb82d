"""What the fault tests share: a process that forks measurements, so that each costs its work and not its imports."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from forked_measurements import ForkedMeasurements


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "faults: kills, fills disks and takes rights away; GEOPD_FAULTS_ROUNDS rounds")


@pytest.fixture(scope="module")
def forked() -> Iterator[ForkedMeasurements]:
    """Measurements in processes of their own, which may be limited, stripped of rights or killed."""
    with ForkedMeasurements() as server:
        yield server
