"""From a path to a checkpoint: which format lies there."""

from __future__ import annotations

from pathlib import Path

from geopd.checkpoints.checkpoint import Checkpoint, CheckpointError, read_json
from geopd.checkpoints.safetensors_format import INDEX, SINGLE, open_sharded, open_single

_UNREAD = {
    "adapter_model.safetensors": "a PEFT adapter; merge it into its base first (`model.merge_and_unload()`)",
    "pytorch_model.bin": "pickled weights; save them with `save_pretrained(..., safe_serialization=True)`",
    "pytorch_model.bin.index.json": "pickled weights; save them with `save_pretrained(..., safe_serialization=True)`",
    ".metadata": "a torch distributed checkpoint; convert it with `torch.distributed.checkpoint.format_utils`",
}


def holds_weights(folder: Path) -> bool:
    """Whether a folder itself holds weights that ``open_checkpoint`` reads."""
    return any((folder / name).is_file() for name in (INDEX, SINGLE))


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a checkpoint: a safetensors file, or a folder with ``model.safetensors`` or its index and shards.

    Only headers are read.

    Raises:
        CheckpointError: if nothing readable lies at the path; the text names what was found and the remedy.
    """
    path = Path(path)
    if path.is_file():
        if path.suffix != ".safetensors":
            raise CheckpointError(f"{path}: not a .safetensors file; name a checkpoint folder or a safetensors file")
        return open_single(path, _config(path.parent))
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such file or folder")
    if (path / INDEX).is_file():
        return open_sharded(path / INDEX, _config(path))
    if (path / SINGLE).is_file():
        return open_single(path / SINGLE, _config(path))
    for name, remedy in _UNREAD.items():
        if (path / name).exists():
            raise CheckpointError(f"{path}: holds {name}: {remedy}")
    if shards := sorted(file.name for file in path.glob("*.safetensors")):
        raise CheckpointError(
            f"{path}: holds {shards[0]} but neither {SINGLE} nor {INDEX}; download the index, or name the file itself"
        )
    raise CheckpointError(f"{path}: no {SINGLE} and no {INDEX} here; name the folder that holds them")


def _config(folder: Path) -> dict[str, object]:
    file = folder / "config.json"
    return read_json(file) if file.is_file() else {}


def checkpoint_digest(path: str | Path) -> str:
    """Content digest of the checkpoint at a path, the same for every file layout of the same tensors.

    Raises:
        CheckpointError: as ``open_checkpoint``.
    """
    return open_checkpoint(path).digest()
