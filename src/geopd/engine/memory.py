"""How much memory may be used, and how much a task took.

May be used: what the machine has left, or what a container's limit leaves, whichever is less.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

UNKNOWN = 1 << 62  # where no limit can be read: then cores alone decide how many tasks run
_CGROUP = Path("/sys/fs/cgroup")
_PROCESS = Path("/proc/self")
_SHARE = 0.8  # of it for tasks: estimates are not exact, and the page cache is what makes reading fast


def available_bytes(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = _CGROUP) -> int:
    """Bytes that could be allocated now: MemAvailable, or the control group's limit less its use if that is smaller.

    Both versions of control groups are read; ``UNKNOWN`` where the system tells neither.
    """
    return min(_free(meminfo), _left(cgroup, "memory.max", "memory.current", "inactive_file"), _version_one(cgroup))


def budget() -> int:
    """Bytes that all workers together may take."""
    return int(available_bytes() * _SHARE)


def _free(meminfo: Path) -> int:
    try:
        lines = meminfo.read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return UNKNOWN


def _version_one(cgroup: Path) -> int:
    return _left(cgroup / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def _left(folder: Path, limit: str, use: str, reclaimable: str) -> int:
    try:
        most = int((folder / limit).read_text(encoding="ascii"))
        now = int((folder / use).read_text(encoding="ascii"))
        # files in the page cache count as used and are given up first
        lines = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
        now -= sum(int(line.split()[1]) for line in lines if line.split()[0] == reclaimable)
    except (OSError, ValueError):  # no control group, or its limit is the word max
        return UNKNOWN
    return max(most - now, 0)


def watch_peak() -> None:
    """Begin anew with what ``peak_bytes`` says; where the system does not allow it, it stays the process's."""
    with suppress(OSError):
        (_PROCESS / "clear_refs").write_text("5")


def peak_bytes() -> int | None:
    """This process's own memory at its highest since it is watched; None where the system does not say.

    Resident pages less those of mapped files, which the system may take back; a worker maps what it reads.
    """
    highest, mapped = _status("VmHWM"), mapped_bytes()
    return None if highest is None or mapped is None else highest - mapped


def mapped_bytes() -> int | None:
    """Resident pages of mapped files, libraries among them; None where the system does not say."""
    return _status("RssFile")


def _status(key: str) -> int | None:
    try:
        with (_PROCESS / "status").open(encoding="ascii") as lines:
            return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))
    except (OSError, StopIteration):
        return None
