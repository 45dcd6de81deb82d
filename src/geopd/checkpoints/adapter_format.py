"""PEFT adapters over a base: LoRA, rsLoRA and DoRA, merged one tensor at a time as they are read.

For a weight W (m, n) with factors A (r, n) and B (m, r) of rank r: dW = s B A in fp32, s = alpha / r (rsLoRA:
alpha / sqrt(r)), and the weight is W + dW; with DoRA's magnitudes g (m,) it is g_i / ||W_i + dW_i|| (W_i + dW_i) for
each row i. The sum is rounded to W's dtype, as PEFT's ``merge_and_unload`` does. A weight held as (n, m), an embedding
or a Conv1D of GPT-2 and its kin, is W^T + dW^T. A head that is tied to the embedding is read apart from it where the
adapter holds something of its own for it, which is what the adapted model computes with. Source: Hu et al. 2021
(arXiv:2106.09685), Kalajdzievski 2023 (arXiv:2312.03732), Liu et al. 2024 (arXiv:2402.09353).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from geopd.checkpoints.adapter_settings import CONFIG, alpha_of, check_names, read_settings
from geopd.checkpoints.checkpoint import Checkpoint, CheckpointError, OpenBase, TensorInfo, holds_conv1d
from geopd.checkpoints.safetensors_format import open_single
from geopd.checkpoints.torch_zip_format import open_torch_zip

_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(?:\.weight)?")
_CONV1D_TYPES = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_CONV1D = re.compile(r"(?:.+\.)?(?:attn|crossattention|mlp)\.(?:c_attn|q_attn|c_proj|c_fc)")
_HEADS = ("lm_head.weight", "embed_out.weight")
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")


@dataclass(frozen=True, slots=True)
class Factors:
    """The adapter's tensors for one weight of the base, by kind; whether that is held as (inputs, outputs)."""

    module: str
    a: str
    b: str
    magnitude: str | None
    transposed: bool


@dataclass(frozen=True, slots=True)
class AdapterSource:
    """Reads a tensor of the base with the adapter's update, or the adapter's own where it replaces the base's.

    ``tied``: the base's embedding, by the name of a head that the base does not hold apart from it.
    """

    adapter: Checkpoint
    base: Checkpoint
    factors: dict[str, Factors]
    replaced: dict[str, str]
    tied: dict[str, str]
    settings: dict[str, Any]

    def read(self, name: str) -> Tensor:
        """The merged tensor in the base's dtype.

        Raises:
            CheckpointError: if the base or the adapter cannot give its part.
        """
        # an adapted embedding is saved whole beside its factors
        replaced = self.replaced.get(name)
        weight = self.adapter.read(replaced) if replaced else self.base.read(self.tied.get(name, name))
        return self._merged(weight, self.factors[name]) if name in self.factors else weight

    def _merged(self, weight: Tensor, held: Factors) -> Tensor:
        product = self.adapter.read(held.b).float() @ self.adapter.read(held.a).float()
        update = (product.T if held.transposed else product).mul_(self._scale(held))
        # in place where no digit changes: not above fp32, nor where the norm's order of summation would be another
        in_place = weight.dtype != torch.float64 and not held.transposed
        moved = update.add_(weight) if in_place else weight + update
        if held.magnitude is not None:
            by_row = moved.T if held.transposed else moved  # one row for each output
            factor = self.adapter.read(held.magnitude).float().view(-1) / torch.linalg.norm(by_row, dim=1)
            moved = moved.mul_(factor.view(1, -1) if held.transposed else factor.view(-1, 1))
        return moved.to(weight.dtype)

    def _scale(self, held: Factors) -> float:
        rank = self.adapter.tensors[held.a].shape[0]
        alpha = alpha_of(self.settings, held.module)
        return alpha / math.sqrt(rank) if self.settings.get("use_rslora") else alpha / rank


def recognises_adapter(path: Path) -> bool:
    """Whether a path is ``adapter_model.safetensors`` (or ``.bin``), or a folder with it or with its config."""
    if path.is_file():
        return path.name in _WEIGHTS
    return any((path / name).is_file() for name in (*_WEIGHTS, CONFIG))


def open_adapter(path: Path, open_base: OpenBase) -> Checkpoint:
    """A checkpoint of the base's tensors with the adapter at a path that ``recognises_adapter`` merged into them.

    An adapter whose every B is zero changes nothing, which is a warning.

    Raises:
        CheckpointError: if the config is absent or of a kind that is not read, the base cannot be opened, or the
            adapter does not fit it (both are named).
    """
    folder = path if path.is_dir() else path.parent
    settings = read_settings(folder)
    adapter = _weights(folder)
    base = open_base(settings.get("base_model_name_or_path") or None)
    parts, replaced = _targets(adapter)
    check_names(folder, settings, (held.module for held in parts.values()))
    tied = _tied(adapter, base, (*parts, *replaced))
    read_from = tied | {name: name for name in base.unreadable}
    lost = {n: base.unreadable[of] for n, of in read_from.items() if of in base.unreadable and n not in replaced}
    lost |= {name: fault for name, held in parts.items() if (fault := _fault(adapter, held))}
    lost |= {name: adapter.unreadable[held] for name, held in replaced.items() if held in adapter.unreadable}
    infos = {name: _renamed(base.tensors[held], name) for name, held in tied.items() if held in base.tensors}
    infos |= {name: _renamed(adapter.tensors[held], name) for name, held in replaced.items() if name not in lost}
    whole = {name: info for name, info in (base.tensors | infos).items() if name not in lost}
    turned = _turned(parts, base, settings)
    factors = {
        name: _fitted(name, held, whole[name].shape, turned[name], adapter, base)
        for name, held in parts.items()
        if name in whole
    }
    return Checkpoint(
        folder,
        "PEFT adapter",
        whole,
        AdapterSource(adapter, base, factors, replaced, tied, settings),
        lost,
        base.config,
        (*base.warnings, *adapter.warnings, *_notes(folder, adapter, base, factors, settings)),
    )


def _weights(folder: Path) -> Checkpoint:
    for name in _WEIGHTS:
        if (folder / name).is_file():
            file = folder / name
            return open_single(file, {}) if file.suffix == ".safetensors" else open_torch_zip(file)
    raise CheckpointError(f"{folder}: has {CONFIG} and no {_WEIGHTS[0]}; copy the adapter's weights there")


def _targets(adapter: Checkpoint) -> tuple[dict[str, Factors], dict[str, str]]:
    """The base's weights the adapter updates, and those it replaces (``modules_to_save``, biases)."""
    parts: dict[str, dict[str, str]] = {}
    replaced: dict[str, str] = {}
    for name in (*adapter.tensors, *adapter.unreadable):
        short = name.removeprefix(_PREFIX)
        if match := _FACTOR.fullmatch(short):
            parts.setdefault(match[1], {})[match[2]] = name
        else:
            replaced[short.replace(".base_layer.", ".").replace(".modules_to_save.", ".")] = name
    factors = {}
    for module, held in parts.items():
        kind = "lora_embedding_" if "lora_embedding_A" in held else "lora_"
        if f"{kind}A" not in held or f"{kind}B" not in held:
            raise CheckpointError(f"{adapter.path}: {module} has one factor of two ({', '.join(held)}); copy it again")
        factors[f"{module}.weight"] = Factors(
            module, held[f"{kind}A"], held[f"{kind}B"], held.get("lora_magnitude_vector"), kind == "lora_embedding_"
        )
    if not factors and not replaced:
        raise CheckpointError(f"{adapter.path}: holds no tensors; save the adapter again")
    return factors, replaced


def _tied(adapter: Checkpoint, base: Checkpoint, names: Iterable[str]) -> dict[str, str]:
    """The base's embedding, by the name of the head that is tied to it: what the base need not hold."""
    held = base.tensors.keys() | base.unreadable.keys()
    absent = [name for name in names if name not in held]
    embeddings = [name for name in held if name.endswith(_EMBEDDINGS)] if absent else []
    # families that tie by default leave the setting out of their config.json
    if len(embeddings) != 1 or base.config.get("tie_word_embeddings", True) is not True:
        embeddings = []
    tied = {name: embedding for name in absent if name.endswith(_HEADS) for embedding in embeddings}
    if misfits := [name for name in absent if name not in tied]:
        raise CheckpointError(
            f"{adapter.path}: adapts {misfits[0]}, which {base.path} does not hold ({len(misfits)} such); "
            "is this the base it was trained over?"
        )
    return tied


def _turned(parts: dict[str, Factors], base: Checkpoint, settings: dict[str, Any]) -> dict[str, bool]:
    """Whether a weight may be a Conv1D, held as (inputs, outputs): by its name in families that have them."""
    family = base.config.get("model_type")
    if not family and holds_conv1d({name: info.shape for name, info in base.tensors.items()}):
        family = "gpt2"
    if family in _CONV1D_TYPES:
        return {name: _CONV1D.fullmatch(held.module) is not None for name, held in parts.items()}
    return dict.fromkeys(parts, bool(settings.get("fan_in_fan_out")))


def _fitted(
    name: str, held: Factors, shape: tuple[int, ...], turned: bool, adapter: Checkpoint, base: Checkpoint
) -> Factors:
    """The factors, with the way round that the weight is held; its shape tells, and of a square one ``turned``."""
    a, b = adapter.tensors[held.a].shape, adapter.tensors[held.b].shape
    fits = len(a) == len(b) == 2 and a[0] == b[1] > 0
    update = (b[0], a[1]) if fits else (0, 0)
    transposed = held.transposed or (turned and (update != shape or update[0] == update[1]))
    if not fits or (update[::-1] if transposed else update) != shape:
        raise CheckpointError(
            f"{adapter.path}: {name} has factors of shapes {a} and {b}, and is {shape} in {base.path}; "
            "is this the base it was trained over?"
        )
    if held.magnitude and math.prod(adapter.tensors[held.magnitude].shape) != b[0]:
        raise CheckpointError(f"{adapter.path}: {held.magnitude} does not have {b[0]} entries; copy the adapter again")
    return replace(held, transposed=transposed)


def _fault(adapter: Checkpoint, held: Factors) -> str | None:
    named = (held.a, held.b, *([held.magnitude] if held.magnitude else []))
    return next((adapter.unreadable[name] for name in named if name in adapter.unreadable), None)


def _renamed(info: TensorInfo, name: str) -> TensorInfo:
    return TensorInfo(name, info.shape, info.dtype, info.nbytes)


def _notes(
    folder: Path, adapter: Checkpoint, base: Checkpoint, factors: dict[str, Factors], settings: dict[str, Any]
) -> tuple[str, ...]:
    notes = []
    named = settings.get("base_model_name_or_path")
    if (
        named
        and Path(named).exists()
        and Path(named).resolve() not in (base.path.resolve(), base.path.parent.resolve())
    ):
        notes.append(f"{folder}: trained over {named}, read over {base.path}")
    tied = [name for name in factors if name.endswith((*_HEADS, *_EMBEDDINGS))]
    if (
        tied
        and base.config.get("tie_word_embeddings") is not False
        and not any(n.endswith(_HEADS) for n in base.tensors)
    ):
        notes.append(
            f"{folder}: updates {tied[0]}, which the base has tied to its head or embedding: each is read with its "
            "own update alone, as the adapted model computes; `merge_and_unload()` writes it into both"
        )
    zero = (not adapter.read(held.b).any() for held in factors.values() if not _fault(adapter, held))
    if factors and not any(held.magnitude for held in factors.values()) and all(zero):
        notes.append(f"{folder}: a dead adapter: every B is zero, so it changes none of the weights it adapts")
    return tuple(notes)
