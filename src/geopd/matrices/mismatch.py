"""Two checkpoints that share no name: what either is named like, and the likely reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from geopd.checkpoints import Checkpoint
from geopd.matrices.naming import unwrapped

_SHOWN = 3
_ADAPTER = (".lora_A.", ".lora_B.", ".lora_magnitude_vector", "lora_embedding_")


def no_common_names(origin: Checkpoint, tuned: Checkpoint) -> str:
    """The message for an origin and a later checkpoint of which no tensor has a name that the other has too."""
    return (
        f"{tuned.path}: nothing in it matches {origin.path}: its tensors are {_first(tuned)}, the other's "
        f"{_first(origin)}; {_reason(origin, tuned)}; is this the run's base?"
    )


def _names(checkpoint: Checkpoint) -> list[str]:
    return sorted({*checkpoint.tensors, *checkpoint.unreadable})


def _first(checkpoint: Checkpoint) -> str:
    names = _names(checkpoint)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _reason(origin: Checkpoint, tuned: Checkpoint) -> str:
    for side in (tuned, origin):
        if any(mark in name for name in _names(side) for mark in _ADAPTER):
            return f"{side.path} holds an adapter, not whole weights: name the folder with its adapter_config.json"
    before, after = ({unwrapped(name) for name in _names(side)} for side in (origin, tuned))
    for side, wrapped, plain in ((tuned, after, before), (origin, before, after)):
        prefix = _prefix(wrapped, plain)
        if prefix:
            return f"the names of {side.path} begin with {prefix!r}, as a wrapper leaves them: save the model inside it"
    kinds = [side.config.get("model_type") for side in (origin, tuned)]
    if all(kinds) and kinds[0] != kinds[1]:
        return f"config.json says {kinds[0]} and {kinds[1]}: two architectures"
    return "neither is the other with a prefix: two architectures, or not both of them language models"


def _prefix(wrapped: Collection[str], plain: Collection[str]) -> str | None:
    """What has to be removed from most names of one set to give names of the other."""
    found: Counter[str] = Counter()
    for name in wrapped:
        parts = name.split(".")
        for cut in range(1, len(parts)):
            if ".".join(parts[cut:]) in plain:
                found[".".join(parts[:cut]) + "."] += 1
                break
    prefix, times = found.most_common(1)[0] if found else ("", 0)
    return prefix if times > len(wrapped) // 2 else None
