"""Megatron's ``torch_dist`` checkpoints (``iter_N``), as slime and NeMo write them too, under transformers' names.

The folder is a torch distributed checkpoint with Megatron's names; ``common.pt`` holds the settings of the run. Layers
lie stacked in one tensor or one by one; both are read. Padded rows of the vocabulary are cut off, with a note.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from geopd.checkpoints.checkpoint import Checkpoint, CheckpointError, read_config, read_json, tensor_info
from geopd.checkpoints.dcp_format import METADATA, DcpSource, read_chunked
from geopd.checkpoints.dcp_metadata import ChunkedTensor
from geopd.checkpoints.megatron_names import Attention, Part, Rows, parts_of
from geopd.checkpoints.pickled_values import Inert, inert
from geopd.checkpoints.torch_zip import ALLOWED, TorchZip

COMMON, SETTINGS, LATEST = "common.pt", "metadata.json", "latest_checkpointed_iteration.txt"
_OPTIMISER = re.compile(r"(?:^|\.)(?:optimizer|opt_param_scheduler|rng_state|rerun_state_machine)(?:\.|$)")
_VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight", "lm_head.bias")


@dataclass(frozen=True, slots=True)
class MegatronSource:
    """Reads the part of a Megatron tensor that a transformers tensor is."""

    chunks: DcpSource
    parts: Mapping[str, Part]

    def read(self, name: str) -> Tensor:
        """The tensor, of the chunks that hold some of it.

        Raises:
            CheckpointError: as ``DcpSource.read``.
        """
        part = self.parts[name]
        tensor = self.chunks.read_part(part.stored, part.index)
        if part.rows is not None:
            grouped = tensor.reshape(part.rows.groups, -1, *tensor.shape[1:])
            tensor = grouped[:, part.rows.start : part.rows.stop].reshape(part.shape)
        return tensor


def _folder(path: Path) -> Path | None:
    """The ``iter_N`` folder that a path is; for a folder of one ``release``, that."""
    release = path / "release"
    if (path / LATEST).is_file() and (release / METADATA).is_file():
        return release
    return path if path.is_dir() else None


def recognises_megatron(path: Path) -> bool:
    """Whether a path is an ``iter_N`` folder of Megatron: one with ``common.pt`` and a listing or ``metadata.json``.

    A folder of several is a run; its ``latest_checkpointed_iteration.txt`` is not needed.
    """
    folder = _folder(path)
    if folder is None:
        return False
    if (folder / "mp_rank_00").is_dir() or (folder / "mp_rank_00_000").is_dir():
        return True
    return (folder / COMMON).is_file() and any((folder / name).is_file() for name in (METADATA, SETTINGS))


def open_megatron(path: Path) -> Checkpoint:
    """A checkpoint of a path that ``recognises_megatron``.

    Head counts come from the ``config.json`` in the folder or the one above, else from the args in ``common.pt``.
    Without them the attention's fused tensors are unreadable, and the rest is read.

    Raises:
        CheckpointError: if it is of another of Megatron's formats, or as ``open_dcp``.
    """
    folder = _folder(path)
    assert folder is not None
    _require_torch_dist(folder)
    args, unread = _args(folder / COMMON)
    config = read_config(folder) or read_config(folder.parent) or _config_of(args)
    tensors, files, faults = read_chunked(folder)
    weights = {
        name: held
        for name, held in tensors.items()
        if not _OPTIMISER.search(name) and not name.endswith("._extra_state") and "._extra_state." not in name
    }
    if not weights:
        raise CheckpointError(f"{folder / METADATA}: lists no weights; name the folder that the model was saved to")
    parts, lost = _parts(weights, _attention(config), faults)
    parts, warnings = _without_padding(folder, parts, config, args)
    return Checkpoint(
        folder,
        "Megatron torch_dist",
        {name: tensor_info(name, part.shape, weights[part.stored].dtype) for name, part in parts.items()},
        MegatronSource(DcpSource(files, weights), parts),
        lost,
        config,
        (*unread, *warnings),
    )


def _require_torch_dist(folder: Path) -> None:
    settings = read_json(folder / SETTINGS) if (folder / SETTINGS).is_file() else {}
    backend = settings.get("sharded_backend", "torch_dist")
    if backend != "torch_dist" or not (folder / COMMON).is_file():
        found = backend if backend != "torch_dist" else "torch (mp_rank_*)"
        raise CheckpointError(
            f"{folder}: written in Megatron's format {found}, which is not read; save it with --ckpt-format torch_dist"
        )


def _args(path: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The run's args, and what is to be told where ``common.pt`` cannot be read as data."""
    try:
        value = TorchZip(path, {**ALLOWED, **inert("argparse.Namespace", "types.SimpleNamespace")}).value
    except CheckpointError as error:
        return {}, (f"{error}. The run's args are not read: only config.json says heads and vocabulary",)
    found = value.get("args") if isinstance(value, dict) else None
    state = found.state if isinstance(found, Inert) else found
    args = {name: item for name, item in state.items() if isinstance(name, str)} if isinstance(state, dict) else {}
    return args, ()


def _config_of(args: Mapping[str, Any]) -> dict[str, Any]:
    """What a config.json would say, as far as Megatron's args do."""
    heads = args.get("num_attention_heads")
    groups = args.get("num_query_groups") if args.get("group_query_attention", True) else heads
    untied = args.get("untie_embeddings_and_output_weights")
    found = {
        "num_attention_heads": heads,
        "num_key_value_heads": groups or heads,
        "head_dim": args.get("kv_channels"),
        "vocab_size": args.get("vocab_size"),
        "tie_word_embeddings": None if untied is None else not untied,
    }
    return {name: value for name, value in found.items() if isinstance(value, int)}


def _attention(config: Mapping[str, Any]) -> Attention:
    def count(name: str) -> int | None:
        value = config.get(name)
        return value if type(value) is int and value > 0 else None

    heads = count("num_attention_heads")
    return Attention(heads, count("num_key_value_heads") or heads, count("head_dim"))


def _parts(
    weights: Mapping[str, ChunkedTensor], attention: Attention, faults: Mapping[str, str]
) -> tuple[dict[str, Part], dict[str, str]]:
    gated = _gated(weights)
    parts: dict[str, Part] = {}
    lost: dict[str, str] = {}
    for stored, held in weights.items():
        for part in parts_of(stored, held.shape, attention, gated):
            if not isinstance(part, Part):
                lost[part[0]] = part[1]
            elif stored in faults:
                lost[part.name] = faults[stored]
            else:
                parts[part.name] = part
    return parts, lost


def _gated(weights: Mapping[str, ChunkedTensor]) -> dict[str, bool]:
    """Of every ``linear_fc1`` (without layer and expert numbers) whether it has twice the rows that fc2 has columns."""
    found: dict[str, bool] = {}
    for name, held in weights.items():
        other = weights.get(name.replace("linear_fc1", "linear_fc2"))
        if name.endswith("linear_fc1.weight") and other is not None and len(held.shape) > 1:
            place = re.sub(r"\.\d+\.", ".", name.removesuffix(".weight").removeprefix("decoder.layers."))
            place = re.sub(r"^\d+\.", "", place)
            found[place] = held.shape[-2] == 2 * other.shape[-1]
    return found


def _without_padding(
    folder: Path, parts: dict[str, Part], config: Mapping[str, Any], args: Mapping[str, Any]
) -> tuple[dict[str, Part], tuple[str, ...]]:
    """Embedding and head cut to the vocabulary, and what is to be told of it."""
    size = config.get("vocab_size") or args.get("vocab_size")
    padded = [name for name in _VOCABULARY if name in parts]
    if not padded:
        return parts, ()
    rows = parts[padded[0]].shape[0]
    if type(size) is not int or size <= 0:
        return parts, (
            f"{folder}: neither config.json nor the args in {COMMON} say the vocab_size: the {rows} rows of embedding "
            "and head may hold padding",
        )
    if rows <= size:
        return parts, ()
    cut = {name: replace(parts[name], shape=(size, *parts[name].shape[1:]), rows=Rows(0, size)) for name in padded}
    told = f"{folder}: embedding and head cut from {rows} rows to the vocabulary's {size}: the others are padding"
    return {**parts, **cut}, (told,)
