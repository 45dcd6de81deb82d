"""PEFT adapters over a base: LoRA, rsLoRA and DoRA, merged one tensor at a time as they are read.

For a weight W (m, n) with factors A (r, n) and B (m, r) of rank r: dW = s B A in fp32, s = alpha / r (rsLoRA:
alpha / sqrt(r)), and the weight is W + dW; with DoRA's magnitudes g (m,) it is g_i / ||W_i + dW_i|| (W_i + dW_i) for
each row i. The sum is rounded to W's dtype, as PEFT's ``merge_and_unload`` does. Source: Hu et al. 2021
(arXiv:2106.09685), Kalajdzievski 2023 (arXiv:2312.03732), Liu et al. 2024 (arXiv:2402.09353).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from geopd.checkpoints.checkpoint import Checkpoint, CheckpointError, OpenBase, TensorInfo, read_json
from geopd.checkpoints.safetensors_format import open_single
from geopd.checkpoints.torch_zip_format import open_torch_zip

CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(?:\.weight)?")
# settings under which the merged weight is not W + s B A, or under which there is none
_UNREAD = (
    "use_qalora",
    "use_bdlora",
    "target_parameters",
    "layer_replication",
    "alora_invocation_tokens",
    "trainable_token_indices",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "lora_bias",
)
_MOVES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # starts that take B A out of the base's weights
_PLAIN_PATTERN = re.compile(r"\^?[\w.\\-]*(?:(?:\.\*|\\d\+|\[\d-\d\]\+?)[\w.\\-]*){0,2}\$?")


@dataclass(frozen=True, slots=True)
class Factors:
    """The adapter's tensors for one weight of the base, by kind."""

    module: str
    a: str
    b: str
    magnitude: str | None
    embedding: bool


@dataclass(frozen=True, slots=True)
class AdapterSource:
    """Reads a tensor of the base with the adapter's update, or the adapter's own where it replaces the base's."""

    adapter: Checkpoint
    base: Checkpoint
    factors: dict[str, Factors]
    replaced: dict[str, str]
    settings: dict[str, Any]

    def read(self, name: str) -> Tensor:
        """The merged tensor in the base's dtype.

        Raises:
            CheckpointError: if the base or the adapter cannot give its part.
        """
        # an adapted embedding is saved whole beside its factors
        replaced = self.replaced.get(name)
        weight = self.adapter.read(replaced) if replaced else self.base.read(name)
        return self._merged(weight, self.factors[name]) if name in self.factors else weight

    def _merged(self, weight: Tensor, held: Factors) -> Tensor:
        product = self.adapter.read(held.b).float() @ self.adapter.read(held.a).float()
        transposed = held.embedding or bool(self.settings.get("fan_in_fan_out"))
        update = (product.T if transposed else product).mul_(self._scale(held))
        # in place where no digit changes: not above fp32, nor where the norm's order of summation would be another
        in_place = weight.dtype != torch.float64 and not transposed
        moved = update.add_(weight) if in_place else weight + update
        if held.magnitude is not None:
            by_row = moved.T if transposed else moved  # one row for each output
            factor = self.adapter.read(held.magnitude).float().view(-1) / torch.linalg.norm(by_row, dim=1)
            moved = moved.mul_(factor.view(1, -1) if transposed else factor.view(-1, 1))
        return moved.to(weight.dtype)

    def _scale(self, held: Factors) -> float:
        rank = self.adapter.tensors[held.a].shape[0]
        alpha = float(_setting(self.settings, "alpha_pattern", "lora_alpha", held.module))
        return alpha / math.sqrt(rank) if self.settings.get("use_rslora") else alpha / rank


def _setting(settings: dict[str, Any], patterns: str, default: str, module: str) -> Any:
    """A setting of one module: the first pattern that matches the end of its name, else the default."""
    for pattern, value in (settings.get(patterns) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return settings[default]


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
    settings = _settings(folder / CONFIG)
    adapter = _weights(folder)
    base = open_base(settings.get("base_model_name_or_path") or None)
    factors, replaced = _targets(adapter, base)
    for name, held in factors.items():
        _check_fit(name, held, adapter, base, settings)
    infos = {name: _renamed(adapter.tensors[held], name) for name, held in replaced.items()}
    faults = {name: fault for name, held in factors.items() if (fault := _fault(adapter, held))}
    tensors = {name: info for name, info in (base.tensors | infos).items() if name not in faults}
    return Checkpoint(
        folder,
        "PEFT adapter",
        tensors,
        AdapterSource(adapter, base, factors, replaced, settings),
        base.unreadable | faults,
        base.config,
        (*base.warnings, *adapter.warnings, *_notes(folder, adapter, base, factors, settings)),
    )


def _settings(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise CheckpointError(f"{file.parent}: an adapter without its {CONFIG}, which holds its scale; copy it there")
    settings = read_json(file)
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{file}: peft_type {kind!r} is not read (LORA is); merge it into its base first")
    start = settings.get("init_lora_weights")
    unread = [name for name in _UNREAD if settings.get(name)]
    if isinstance(start, str) and start.lower().startswith(_MOVES_THE_BASE):
        unread.append(f"init_lora_weights={start}")
    if unread:
        raise CheckpointError(f"{file}: {', '.join(unread)} is not read; merge it first (`model.merge_and_unload()`)")
    alphas = settings.get("alpha_pattern") or {}
    numbers = [settings.get("lora_alpha"), *(alphas.values() if isinstance(alphas, dict) else [None])]
    if not all(type(alpha) in (int, float) and math.isfinite(alpha) for alpha in numbers):
        raise CheckpointError(f"{file}: lora_alpha or alpha_pattern is no number; copy the config again")
    named = settings.get("base_model_name_or_path")
    if named is not None and not _is_path(named):
        raise CheckpointError(f"{file}: base_model_name_or_path {str(named)[-200:]!r} is no path; put the base's there")
    # patterns are regular expressions: only those that cannot run away are tried
    if strange := next((text for text in alphas if len(text) > 200 or not _PLAIN_PATTERN.fullmatch(text)), None):
        raise CheckpointError(f"{file}: alpha_pattern {strange[:200]!r} is not read; merge the adapter first")
    return settings


def _is_path(named: object) -> bool:
    return isinstance(named, str) and "\0" not in named and all(len(part) < 256 for part in named.split("/"))


def _weights(folder: Path) -> Checkpoint:
    for name in _WEIGHTS:
        if (folder / name).is_file():
            file = folder / name
            return open_single(file, {}) if file.suffix == ".safetensors" else open_torch_zip(file)
    raise CheckpointError(f"{folder}: has {CONFIG} and no {_WEIGHTS[0]}; copy the adapter's weights there")


def _targets(adapter: Checkpoint, base: Checkpoint) -> tuple[dict[str, Factors], dict[str, str]]:
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
    absent = [name for name in (*factors, *replaced) if name not in base.tensors and name not in base.unreadable]
    if absent:
        raise CheckpointError(
            f"{adapter.path}: adapts {absent[0]}, which {base.path} does not hold ({len(absent)} such); "
            "is this the base it was trained over?"
        )
    return factors, replaced


def _check_fit(name: str, held: Factors, adapter: Checkpoint, base: Checkpoint, settings: dict[str, Any]) -> None:
    if name not in base.tensors or _fault(adapter, held):
        return
    a, b = adapter.tensors[held.a].shape, adapter.tensors[held.b].shape
    fits = len(a) == len(b) == 2 and a[0] == b[1] > 0
    update = (b[0], a[1]) if fits else (0, 0)
    if held.embedding or settings.get("fan_in_fan_out"):
        update = update[::-1]
    shape = base.tensors[name].shape
    if not fits or update != shape:
        raise CheckpointError(
            f"{adapter.path}: {name} has factors of shapes {a} and {b}, and is {shape} in {base.path}; "
            "is this the base it was trained over?"
        )
    if held.magnitude and math.prod(adapter.tensors[held.magnitude].shape) != b[0]:
        raise CheckpointError(f"{adapter.path}: {held.magnitude} does not have {b[0]} entries; copy the adapter again")


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
    zero = (not adapter.read(held.b).any() for held in factors.values() if not _fault(adapter, held))
    if factors and not any(held.magnitude for held in factors.values()) and all(zero):
        notes.append(f"{folder}: a dead adapter: every B is zero, so it changes none of the weights it adapts")
    return tuple(notes)
