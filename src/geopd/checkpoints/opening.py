"""From a path to a checkpoint: which format lies there."""

from __future__ import annotations

import re
from pathlib import Path

from geopd.checkpoints.adapter_format import open_adapter
from geopd.checkpoints.checkpoint import Checkpoint, CheckpointError, unreadable_at
from geopd.checkpoints.deepspeed_format import refused_latest
from geopd.checkpoints.formats import FORMATS, format_of
from geopd.checkpoints.safetensors_format import INDEX, SINGLE

_STEP = re.compile(r"(?:checkpoint|step|global_step|iter)[-_]?0*(\d+)", re.IGNORECASE)
_DEPTH, _LOOKED_INTO = 4, 200  # levels and folders below one without weights


def step_of(name: str) -> int | None:
    """The step a folder name carries (``checkpoint-63``, ``global_step_255``, ``iter_0005375``); None without one."""
    match = _STEP.fullmatch(name)
    return int(match[1]) if match else None


def holds_weights(folder: Path) -> bool:
    """Whether a folder itself holds weights that ``open_checkpoint`` reads."""
    return folder.is_dir() and format_of(folder) is not None


def is_adapter(path: Path) -> bool:
    """Whether a path holds an adapter, which is read over a base."""
    form = format_of(path)
    return form is not None and form.open is open_adapter


def open_checkpoint(path: str | Path, base: str | Path | None = None) -> Checkpoint:
    """Open a checkpoint where it lies, in whichever of ``formats.FORMATS`` it is written. Only headers are read.

    ``base`` is what an adapter is read over; without one it is the local path that the adapter's config names. A
    checkpoint with weights of its own ignores it.

    Raises:
        CheckpointError: if nothing readable lies at the path; the text names what was found and the remedy.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder")
    form = format_of(path)
    if form is None:
        raise CheckpointError(_unrecognised(path))

    def open_base(named: str | None) -> Checkpoint:
        if base is None and (named is None or not Path(named).exists()):
            where = f"the base its config names, {named}, is not a local path" if named else "its config names no base"
            raise CheckpointError(f"{path}: an adapter, and {where}; name the base it was trained over")
        home = Path(base if base is not None else str(named))
        if home.exists() and is_adapter(home):
            raise CheckpointError(f"{home}: the base of {path} is an adapter too: merge it into its own base first")
        return open_checkpoint(home)

    with unreadable_at(path):
        return form.open(path, open_base)


def name_instead(path: Path) -> str:
    """What to name instead of a folder that holds no weights, as the end of a message."""
    below = [path]
    for depth in range(_DEPTH):
        children = [child for folder in below for child in _folders_in(folder)][:_LOOKED_INTO]
        if found := [child for child in children if holds_weights(child)]:
            # of step-numbered checkpoints the folder that holds them all
            named = found[0].parent if depth and step_of(found[0].name) is not None else found[0]
            return f"name {named}, which does"
        below = children
    if states := sorted(file.name for file in path.iterdir() if file.suffix in (".pt", ".pth", ".bin")):
        return f"if {states[0]} is a model's state dict, name the file itself"
    return "name the folder that holds weights, or a folder of step-numbered ones"


def _folders_in(folder: Path) -> list[Path]:
    try:
        inside = [child for child in folder.iterdir() if child.is_dir() and not child.is_symlink()]
    except OSError:
        return []
    return sorted(child for child in inside if "optim" not in child.name)


def _unrecognised(path: Path) -> str:
    names = ", ".join(form.name for form in FORMATS)
    if not path.is_dir():
        return f"{path}: not a checkpoint file ({names} are read); name a checkpoint folder or a safetensors file"
    if shards := sorted(file.name for file in path.glob("*.safetensors")):
        return f"{path}: holds {shards[0]} but neither {SINGLE} nor {INDEX}; fetch the index, or name the file itself"
    if refusal := refused_latest(path):
        return refusal
    return f"{path}: holds no weights that are read ({names}); {name_instead(path)}"


def checkpoint_digest(path: str | Path, base: str | Path | None = None) -> str:
    """Content digest of the checkpoint at a path, the same for every file layout of the same tensors.

    Raises:
        CheckpointError: as ``open_checkpoint``.
    """
    return open_checkpoint(path, base).digest()
