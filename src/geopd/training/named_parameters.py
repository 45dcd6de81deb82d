"""A model's parameters by the canonical names its checkpoints have, whatever wraps the model."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from geopd.matrices import Role, canonical_names

__all__ = ["NamedParameter", "canonical_name", "named_parameters", "rest_of"]

_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")


@dataclass(frozen=True, slots=True)
class NamedParameter:
    """A parameter, the dotted path the model knows it by, and what it counts as."""

    path: str
    role: Role
    parameter: Tensor


def canonical_name(path: str) -> str:
    """The canonical name of the matrix at a dotted path."""
    bare = _bare(path)
    return canonical_names({bare: (1, 1)})[bare].name


def named_parameters(model: Any) -> dict[str, NamedParameter]:
    """Every parameter of a model without adapters by canonical name; tied weights appear once."""
    found = dict(model.named_parameters())
    weights = canonical_names({_bare(path): tuple(value.shape) for path, value in found.items()})
    named = {path: weights[_bare(path)] for path in found}
    return {named[path].name: NamedParameter(path, named[path].role, value) for path, value in found.items()}


def rest_of(parameters: dict[str, NamedParameter], projected: Collection[str]) -> dict[str, NamedParameter]:
    """Norms, biases, embeddings and head: what ``train_rest`` is about. Matrices outside the basis are not in it."""
    return {
        name: found
        for name, found in parameters.items()
        if name not in projected and found.role in (Role.VECTOR, Role.EMBEDDING)
    }


def _bare(path: str) -> str:
    for wrapper in _WRAPPERS:
        path = path.replace(wrapper, "")
    return path
