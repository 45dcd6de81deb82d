"""Files that a listing (an index, a manifest) names: only those of its own folder are opened."""

from __future__ import annotations

import os
from pathlib import Path

from geopd.checkpoints.checkpoint import CheckpointError

_LONGEST = 255  # bytes, on every file system in use


def file_within(folder: Path, name: str, listing: Path) -> Path:
    """The file that ``listing`` names, whether it exists or not; its name has no folder part.

    A symbolic link may lead to another place in the folder, or, in the hub's cache, where every file of
    ``snapshots/<commit>`` is a link, to that repository's ``blobs`` or the cache's own.

    Raises:
        CheckpointError: if the name or a link leads out of the folder.
    """
    if name in ("", "..") or Path(name).name != name or not _can_be_a_file_name(name):
        raise CheckpointError(f"{listing}: names {name!r}, which is not a file of its own folder; refused")
    file = folder / name
    try:
        target = file.resolve()
    except (OSError, RuntimeError) as error:  # a loop of links
        raise CheckpointError(f"{listing}: names {name!r}, a link that leads nowhere ({error}); refused") from error
    if not any(target.is_relative_to(place) for place in _allowed(folder.resolve())):
        raise CheckpointError(
            f"{listing}: names {name!r}, a link to {target} outside its folder; refused. Put the file itself there"
        )
    return file


def _can_be_a_file_name(name: str) -> bool:
    try:
        return "\0" not in name and len(os.fsencode(name)) <= _LONGEST
    except UnicodeEncodeError:  # half of a surrogate pair
        return False


def _allowed(folder: Path) -> list[Path]:
    repository = folder.parent.parent
    if folder.parent.name != "snapshots" or not repository.name.startswith("models--"):
        return [folder]
    return [folder, repository / "blobs", repository.parent / "blobs"]
