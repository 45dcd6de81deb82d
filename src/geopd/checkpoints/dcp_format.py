"""Torch distributed checkpoints: torchtitan's ``step-N``, accelerate's sharded FSDP, FSDP2 and ``dcp.save``.

``.metadata`` lists every tensor's chunks and where in which ``.distcp`` file each lies. A tensor of one chunk is a view
of the mapped file; one of several is put together when it is read. Optimiser state beside the weights is left alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from geopd.checkpoints.checkpoint import Checkpoint, CheckpointError, read_config, tensor_info
from geopd.checkpoints.containment import file_within
from geopd.checkpoints.dcp_chunks import ChunkFile
from geopd.checkpoints.dcp_metadata import Chunk, ChunkedTensor, read_dcp_metadata

METADATA = ".metadata"
_INSIDE = ("", "pytorch_model_fsdp_0", "model")
"""Where the listing lies: in the folder itself, accelerate's folder in it, slime's FSDP folder in it."""
_NO_WEIGHTS = frozenset(
    (
        *("optimizer", "optimizers", "optimizer_states", "optim", "lr_scheduler", "lr_schedulers", "scheduler"),
        *("dataloader", "train_state", "rng", "rng_state", "rng_states"),
    )
)
_WRAPPERS = frozenset({"app", "app_state", "model_state", "model_state_dict", "state_dict", "state", "module"})


@dataclass
class DcpSource:
    """Puts tensors together from their chunks."""

    files: Mapping[str, Path]
    tensors: Mapping[str, ChunkedTensor]
    _open: dict[str, ChunkFile] = field(default_factory=dict)

    def read(self, name: str) -> Tensor:
        """The whole tensor.

        Raises:
            CheckpointError: if a chunk is not where the listing says.
        """
        return self.read_part(name, ())

    def read_part(self, name: str, index: tuple[int, ...]) -> Tensor:
        """``tensor[index]``, for an index of leading dimensions; only chunks that hold some of it are read.

        Raises:
            CheckpointError: as ``read``.
        """
        tensor, fixed = self.tensors[name], len(index)
        shape = tensor.shape[fixed:]
        wanted = [chunk for chunk in tensor.chunks if _holds(chunk, index)]
        if len(wanted) == 1 and wanted[0].sizes[fixed:] == shape:
            return self._chunk(name, wanted[0])[_within(wanted[0], index)].contiguous()
        found = torch.empty(shape, dtype=tensor.dtype)
        for chunk in wanted:
            place = tuple(slice(o, o + n) for o, n in zip(chunk.offsets[fixed:], chunk.sizes[fixed:], strict=True))
            found[place] = self._chunk(name, chunk)[_within(chunk, index)]
        return found

    def _chunk(self, name: str, chunk: Chunk) -> Tensor:
        try:
            if chunk.file not in self._open:
                self._open[chunk.file] = ChunkFile(self.files[chunk.file])
            return self._open[chunk.file].read(chunk, self.tensors[name].dtype)
        except CheckpointError as error:
            raise CheckpointError(f"tensor {name}: {error}") from error


def _holds(chunk: Chunk, index: tuple[int, ...]) -> bool:
    return all(o <= i < o + n for o, n, i in zip(chunk.offsets, chunk.sizes, index, strict=False))


def _within(chunk: Chunk, index: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(i - o for i, o in zip(index, chunk.offsets, strict=False))


def dcp_folder(path: Path) -> Path | None:
    """The folder with the listing (or, where it is lost, with ``.distcp`` files) of a checkpoint; None without one."""
    if not path.is_dir():
        return path.parent if path.name == METADATA or path.suffix == ".distcp" else None
    homes = [path / name for name in _INSIDE]
    listed = next((home for home in homes if (home / METADATA).is_file()), None)
    return listed or next((home for home in homes if home.is_dir() and any(home.glob("*.distcp"))), None)


def recognises_dcp(path: Path) -> bool:
    """Whether a path is a torch distributed checkpoint: a folder with ``.metadata`` or ``.distcp`` files."""
    return dcp_folder(path) is not None


def open_dcp(path: Path) -> Checkpoint:
    """A checkpoint of a path that ``recognises_dcp``, with the ``config.json`` beside it or in the folder above.

    Names lose what the saving script wrapped them in (``app``, ``model_state``), and one ``model.`` where the model's
    own names begin with it again. Chunks that are absent, short or leave gaps make their own tensor unreadable.

    Raises:
        CheckpointError: if the listing is absent or unreadable, names a file outside the folder, or lists no weights.
    """
    folder = dcp_folder(path)
    assert folder is not None
    tensors, files, faults = read_chunked(folder)
    weights = {name: held for name, held in tensors.items() if not _NO_WEIGHTS & set(name.split(".")[:2])}
    if not weights:
        raise CheckpointError(
            f"{folder / METADATA}: lists no weights ({len(tensors)} tensors of optimisers and the like); name the "
            "folder that the model was saved to"
        )
    names = _unwrapped(list(weights))
    kept = {names[name]: held for name, held in weights.items()}
    lost = {names[name]: faults[name] for name in weights if name in faults}
    return Checkpoint(
        path if path.is_dir() else folder,
        "torch distributed checkpoint",
        {name: tensor_info(name, held.shape, held.dtype) for name, held in kept.items() if name not in lost},
        DcpSource(files, kept),
        lost,
        read_config(folder) or read_config(folder.parent),
    )


def read_chunked(folder: Path) -> tuple[dict[str, ChunkedTensor], dict[str, Path], dict[str, str]]:
    """Every tensor of a folder's listing, its files, and why those that cannot be read cannot.

    Raises:
        CheckpointError: as ``open_dcp``.
    """
    listing = folder / METADATA
    if not listing.is_file():
        raise CheckpointError(
            f"{folder}: holds .distcp files and no {METADATA}, the listing of what is in them: a save cut short, or a "
            "copy without hidden files; copy it from where the checkpoint was written"
        )
    tensors = read_dcp_metadata(listing)
    files = {
        name: file_within(folder, name, listing)
        for name in sorted({chunk.file for held in tensors.values() for chunk in held.chunks})
    }
    sizes = {name: file.stat().st_size if file.is_file() else None for name, file in files.items()}
    faults = {}
    for name, held in tensors.items():
        fault = f"{listing}: {held.fault}" if held.fault else None
        for chunk in held.chunks:
            size = sizes[chunk.file]
            if size is None:
                fault = f"{files[chunk.file]}: {METADATA} names it and it is absent; copy or write it again"
            elif chunk.start + chunk.length > size:
                fault = f"{files[chunk.file]}: truncated ({size:,} bytes); write or download it again"
        if fault:
            faults[name] = fault
    return tensors, files, faults


def _unwrapped(names: list[str]) -> dict[str, str]:
    """The names without what all of them begin with: wrappers, and ``model.`` where another follows in some of them."""
    short = dict(zip(names, names, strict=True))
    while True:
        split = {name: part.partition(".") for name, part in short.items()}
        heads = {head for head, _, _ in split.values()}
        rests = {rest for _, _, rest in split.values()}
        if len(heads) != 1 or "" in rests:
            return short
        (head,) = heads
        twice = head == "model" and any(rest.split(".")[0] in ("model", "module", "_orig_mod") for rest in rests)
        if head not in _WRAPPERS and not twice:
            return short
        short = {name: rest for name, (_, _, rest) in split.items()}
