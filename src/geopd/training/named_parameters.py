"""A model's parameters by the canonical names its checkpoints have, whatever wraps the model."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor

from geopd.matrices import Role, canonical_names

__all__ = ["WRAPPERS", "NamedParameter", "canonical_name", "globs_over", "named_parameters", "rest_of"]

WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
"""What wrappers insert into a parameter's path; its name on disk has none of it."""


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


def globs_over(names: Iterable[str], others: Collection[str] = ()) -> list[str]:
    """The shortest list of globs that select these names and none of the others: every number in them a ``*``.

    A name stands for itself where its glob would also select one of the others.
    """
    globs: dict[str, None] = {}
    for name in names:
        glob = ".".join("*" if part.isdigit() else part for part in name.split("."))
        globs[name if any(fnmatchcase(other, glob) for other in others) else glob] = None
    return list(globs)


def _bare(path: str) -> str:
    for wrapper in WRAPPERS:
        path = path.replace(f"{wrapper}.", "")
    return path
