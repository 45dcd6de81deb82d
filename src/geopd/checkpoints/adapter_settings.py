"""What ``adapter_config.json`` says of a PEFT adapter: the settings that are read, and a refusal of those that are not.

The config is as little to be trusted as the weights: its patterns are regular expressions, of which only those are
tried that cannot run away.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from geopd.checkpoints.checkpoint import CheckpointError, is_path, read_json

CONFIG = "adapter_config.json"
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
_LONGEST_NAME = 256  # of a module that patterns are tried on: their time grows with its cube


def read_settings(folder: Path) -> dict[str, Any]:
    """The config of the adapter in a folder.

    Raises:
        CheckpointError: if it is absent or no JSON, or says what is not read.
    """
    file = folder / CONFIG
    if not file.is_file():
        raise CheckpointError(f"{folder}: an adapter without its {CONFIG}, which holds its scale; copy it there")
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
    # an integer of JSON may be longer than any float
    if not all(type(alpha) in (int, float) and abs(alpha) <= sys.float_info.max for alpha in numbers):
        raise CheckpointError(f"{file}: lora_alpha or alpha_pattern is no number; copy the config again")
    named = settings.get("base_model_name_or_path")
    if named is not None and not is_path(named):
        raise CheckpointError(f"{file}: base_model_name_or_path {str(named)[-200:]!r} is no path; put the base's there")
    if strange := next((text for text in alphas if not _is_read(text)), None):
        raise CheckpointError(f"{file}: alpha_pattern {strange[:200]!r} is not read; merge the adapter first")
    return settings


def check_names(folder: Path, settings: dict[str, Any], modules: Iterable[str]) -> None:
    """Refuse modules whose names are too long to try patterns on.

    Raises:
        CheckpointError: naming the first.
    """
    if not settings.get("alpha_pattern"):
        return
    if long := next((module for module in modules if len(module) > _LONGEST_NAME), None):
        raise CheckpointError(
            f"{folder / CONFIG}: alpha_pattern over a module of {len(long):,} letters ({long[:60]}...) is not read, at "
            f"most {_LONGEST_NAME} are; merge the adapter first"
        )


def alpha_of(settings: dict[str, Any], module: str) -> float:
    """A module's alpha: that of the first pattern which matches the end of its name, else the adapter's."""
    for pattern, value in (settings.get("alpha_pattern") or {}).items():
        if re.match(_at_the_end(pattern), module):
            return float(value)
    return float(settings["lora_alpha"])


def _at_the_end(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"


def _is_read(pattern: str) -> bool:
    if len(pattern) > 200 or not _PLAIN_PATTERN.fullmatch(pattern):
        return False
    try:
        re.compile(_at_the_end(pattern))
    except re.error:
        return False
    return True
