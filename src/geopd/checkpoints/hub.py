"""Checkpoints named by their id on a model hub: fetched into the hub client's cache, only the files that are read.

``org/name`` or ``org/name@revision`` (a branch, a tag or a commit). A path that exists always wins. The client's own
settings hold: ``HF_ENDPOINT``, ``HF_HOME``, ``HF_TOKEN`` and ``HF_HUB_OFFLINE``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from glob import escape
from pathlib import Path

from geopd.checkpoints.checkpoint import INDEX_BYTES, CheckpointError, read_json
from geopd.checkpoints.containment import file_within

INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
_SMALL = ("config.json", _ADAPTER[0], INDEX)
_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(\S+))?", re.ASCII)
_FILES = frozenset({".safetensors", ".bin", ".pt", ".pth", ".json"})  # a mistyped file is not asked for on the hub


@dataclass(frozen=True, slots=True)
class _Repository:
    name: str
    revision: str | None

    def __str__(self) -> str:
        return f"{self.name}@{self.revision}" if self.revision else self.name


def located(named: str | Path) -> Path:
    """Where the checkpoint lies that a user named: the path itself, or the folder its hub id was fetched to.

    A path that exists, and a text that cannot be an id, come back as they are. Of a repository ``config.json`` and the
    safetensors weights (the index and the shards it names, or the one file, or a PEFT adapter) are fetched, nothing
    else; what the cache holds already is not fetched again, and serves alone where the hub cannot be reached.

    Raises:
        CheckpointError: if there is no such repository or revision, it is closed to this user, holds no safetensors
            weights, or cannot be reached and is not whole in the cache.
    """
    match = _ID.fullmatch(str(named))
    if Path(named).exists() or match is None or Path(match[1]).suffix in _FILES:
        return Path(named)
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(match[1])
    except HFValidationError:
        return Path(named)
    return _fetched(_Repository(match[1], match[2]))


def hub_name(path: Path) -> str | None:
    """The name, without its owner, of the repository whose snapshot in the hub's cache a folder is; None elsewhere."""
    repository = path.parent.parent.name
    if path.parent.name != "snapshots" or not repository.startswith("models--"):
        return None
    return repository.rsplit("--", 1)[-1]


def _fetched(repository: _Repository) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HTTPError, RevisionNotFoundError

    name, bars = repository.name, _bars()
    try:
        try:
            info = HfApi().model_info(name, revision=repository.revision)
        except RevisionNotFoundError:
            raise
        except (OSError, HTTPError) as error:
            return _from_cache(repository, error)
        present = {file.rfilename for file in info.siblings or ()}
        needed = _needed(repository, present)
        revision = repository.revision  # by its own name first: the cache then knows its commit
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=needed, tqdm_class=bars))
        if INDEX in needed:
            shards = [escape(shard) for shard in _shards(folder) if shard in present]  # the reader tells the absent
            if shards:
                snapshot_download(name, revision=folder.name, allow_patterns=shards, tqdm_class=bars)
        return folder
    except (OSError, HTTPError) as error:
        raise CheckpointError(_complaint(repository, error)) from error


def _bars() -> type:
    """The client's progress bars, of which one forgets to be quiet where standard error is no terminal."""
    from huggingface_hub.utils import tqdm

    def quiet(bar: object, *args: object, disable: bool | None = None, **settings: object) -> None:
        tqdm.__init__(bar, *args, disable=disable, **settings)

    return type("_Bar", (tqdm,), {"__init__": quiet})


def _needed(repository: _Repository, present: Iterable[str]) -> list[str]:
    """What is fetched first: the small files, and the weights unless an index lists them."""
    present = set(present)
    small = [name for name in _SMALL if name in present]
    if INDEX in present:
        return small
    if _SINGLE in present:
        return [*small, _SINGLE]
    if present.issuperset(_ADAPTER):
        return [*small, _ADAPTER[1]]
    others = sorted(name for name in present if Path(name).suffix in {".bin", ".pt", ".pth", ".gguf", ".safetensors"})
    holds = f" (it holds {', '.join(others[:3])}{' and more' if len(others) > 3 else ''})" if others else ""
    raise CheckpointError(
        f"{repository}: has no {_SINGLE} and no {INDEX} on the hub{holds}; name a revision that has them, or download "
        "it and name the folder"
    )


def _shards(folder: Path) -> list[str]:
    listing = folder / INDEX
    weight_map = read_json(listing, INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{listing}: has no weight_map; the repository's index is damaged")
    return sorted({file_within(folder, str(name), listing).name for name in weight_map.values()})


def _from_cache(repository: _Repository, error: Exception) -> Path:
    """The cached snapshot where it is whole, when the hub gave ``error``."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(repository.name, revision=repository.revision, local_files_only=True))
    except FileNotFoundError as absent:
        # another program may have left out files that are not read here
        folder = Path(getattr(absent, "snapshot_path", None) or "")
    if folder == Path() or not folder.is_dir():
        raise CheckpointError(_complaint(repository, error)) from error
    files = {file.name for file in folder.iterdir() if file.exists()}
    lists = INDEX in files
    complete = set(_shards(folder)) <= files if lists else _SINGLE in files or files.issuperset(_ADAPTER)
    if not complete:
        raise CheckpointError(_complaint(repository, error)) from error
    return folder


def _complaint(repository: _Repository, error: Exception) -> str:
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, GatedRepoError):
        return f"{repository}: gated on the hub; ask for access on its page there, then `hf auth login` or set HF_TOKEN"
    if isinstance(error, RevisionNotFoundError):
        return f"{repository}: its repository has no such revision; name one of its branches, tags or commits"
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"{repository}: no such file or folder here, and no such repository on the hub; check the name, and if it "
            "is private, `hf auth login` or set HF_TOKEN"
        )
    missing = f"{repository}: no such file or folder here, and not whole in the hub's cache"
    if isinstance(error, OfflineModeIsEnabled) or (
        isinstance(error, LocalEntryNotFoundError) and constants.is_offline_mode()
    ):
        return f"{missing}, which is all that HF_HUB_OFFLINE leaves; unset it, or `hf download {repository.name}` first"
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if isinstance(error, HfHubHTTPError):
        return f"{repository}: the hub refused it ({reason}); check HF_TOKEN, or try again later"
    return f"{missing}, and fetching it failed ({reason}); check the connection and the disk, and try again"
