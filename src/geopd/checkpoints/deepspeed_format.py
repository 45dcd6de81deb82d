"""DeepSpeed ZeRO checkpoints, stages 1 to 3: ``latest`` names a folder, in which every rank leaves its states.

What is read are the fp32 master weights (see ``zero_partitions``). A file ``*_model_states.pt`` opened by itself, or a
folder without optimiser states, gives the 16-bit weights of stages 0 to 2.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from geopd.checkpoints.checkpoint import Checkpoint, CheckpointError, read_config, tensor_info
from geopd.checkpoints.containment import file_within
from geopd.checkpoints.pickled_values import Allow, inert
from geopd.checkpoints.torch_zip import ALLOWED, TorchZip, extents, shown, tensors_of
from geopd.checkpoints.torch_zip_format import checkpoint_of
from geopd.checkpoints.zero_partitions import SegmentsSource, dict_in, masters

_LATEST = "latest"
_OPTIMISER = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d{1,6})_mp_rank_(\d{1,6})_optim_states\.pt")
_MODEL = re.compile(r"(?:zero_pp_rank_(\d{1,6})_)?mp_rank_(\d{1,6})_model_states\.pt")
_ALLOWED: Allow = {
    **ALLOWED,
    "deepspeed.runtime.zero.config.ZeroStageEnum": int,
    **inert(
        "deepspeed.runtime.fp16.loss_scaler.LossScaler",
        "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
        "deepspeed.utils.tensor_fragment.fragment_address",
        "argparse.Namespace",
    ),
}


def _home(path: Path) -> Path | None:
    """The folder with the states: the path itself, or the one its ``latest`` names."""
    if not path.is_dir():
        return None
    if _has_states(path):
        return path
    try:
        folder = _latest(path)
    except (OSError, ValueError):  # a refused one is told of where nothing else is found
        return None
    return folder if folder is not None and folder.is_dir() and _has_states(folder) else None


def _latest(path: Path) -> Path | None:
    listing = path / _LATEST
    if not listing.is_file():
        return None
    with listing.open("rb") as file:
        tag = file.read(255).decode().strip()
    return file_within(path, tag, listing)


def refused_latest(path: Path) -> str | None:
    """Why the folder that ``latest`` names is not followed; None where it may be, or there is no such file."""
    try:
        _latest(path)
    except CheckpointError as error:
        return str(error)
    except (OSError, ValueError) as error:
        return f"{path / _LATEST}: not the name of a folder ({error}); name the folder of the step itself"
    return None


def _has_states(folder: Path) -> bool:
    return any(_MODEL.fullmatch(file.name) and file.is_file() for file in folder.iterdir())


def _files(folder: Path, pattern: re.Pattern[str]) -> dict[tuple[int, int], Path]:
    """(rank, model-parallel rank) -> file, in order of rank."""
    files = [file for file in folder.iterdir() if file.is_file()]
    found = [(match, file) for file in files if (match := pattern.fullmatch(file.name))]
    named = [((int(match[1] or 0), int(match[2])), file) for match, file in found]
    ranks: dict[tuple[int, int], Path] = {}
    for rank, file in sorted(named):  # by number: as text, rank 10 comes before rank 2
        if rank in ranks:
            raise CheckpointError(f"{folder}: {ranks[rank].name} and {file.name} are of one rank: remove the stale one")
        ranks[rank] = file
    return ranks


def recognises_deepspeed(path: Path) -> bool:
    """Whether a path is a ``*_model_states.pt`` file, a folder of them, or one whose ``latest`` names such a folder."""
    return bool(path.is_file() and _MODEL.fullmatch(path.name)) or _home(path) is not None


def open_deepspeed(path: Path) -> Checkpoint:
    """A checkpoint of a path that ``recognises_deepspeed``, with the ``config.json`` in or above its folder.

    Raises:
        CheckpointError: if a rank's file is missing, the model is tensor-parallel, the partitions do not fit the
            parameters, or a file cannot be read.
    """
    if path.is_file():
        return _module(path, path, read_config(path.parent) or read_config(path.parent.parent), ())
    folder = _home(path)
    assert folder is not None
    config = read_config(folder) or read_config(folder.parent)
    models, optimisers = _files(folder, _MODEL), _files(folder, _OPTIMISER)
    if split := next((file for (_, mp), file in (models | optimisers).items() if mp), None):
        raise CheckpointError(f"{split}: of a tensor-parallel model, whose parts are not joined; convert it first")
    if not optimisers:
        note = f"{folder}: no *_optim_states.pt, which hold the fp32 masters: the weights are the model's 16-bit ones"
        return _module(next(iter(models.values())), folder, config, (note,))
    states = _states(folder, optimisers)
    files = [TorchZip(file, _ALLOWED) for file in models.values()]
    segments = masters(files, states)
    faults = {name: fault for name, held in segments.items() if (fault := held.fault())}
    tensors = {name: tensor_info(name, held.shape, held.dtype) for name, held in segments.items() if name not in faults}
    return Checkpoint(folder, "DeepSpeed ZeRO", tensors, SegmentsSource(segments), faults, config)


def _states(folder: Path, found: dict[tuple[int, int], Path]) -> list[TorchZip]:
    first = TorchZip(next(iter(found.values())), _ALLOWED)
    count = dict_in(first, "optimizer_state_dict").get("partition_count")
    counts: list[Any] = count if isinstance(count, list) else [count]
    if not counts or not all(type(n) is int and n == counts[0] and 0 < n < 1 << 20 for n in counts):
        raise CheckpointError(
            f"{first.path}: its partition_count ({shown(count)}) is not one number of ranks; not read"
        )
    world = counts[0]
    if missing := [rank for rank in range(world) if (rank, 0) not in found]:
        raise CheckpointError(
            f"{folder}: the *_optim_states.pt of rank {missing[0]} is missing ({len(missing)} of {world} ranks are); "
            "copy every rank's file here"
        )
    if len(found) > world:
        raise CheckpointError(f"{folder}: {len(found)} *_optim_states.pt for {world} ranks: remove the stale ones")
    return [first if found[rank, 0] == first.path else TorchZip(found[rank, 0], _ALLOWED) for rank in range(world)]


def _module(file: Path, path: Path, config: dict[str, Any], notes: tuple[str, ...]) -> Checkpoint:
    """The 16-bit weights that the model states hold."""
    opened = TorchZip(file, _ALLOWED)
    held = tensors_of(dict_in(opened, "module"))
    try:
        groups = opened.value.get("param_shapes") or ()
        shapes = {name: extents(shape) for group in groups for name, shape in group.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file}: its param_shapes are no dicts of shapes ({error}); copy it again") from error
    if any(name in held and held[name].shape != shape for name, shape in shapes.items()):
        raise CheckpointError(f"{file}: its weights are spread over the ranks (stage 3); name its folder instead")
    return checkpoint_of(opened, held, path, "DeepSpeed model states", config, notes)
