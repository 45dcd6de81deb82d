"""A model's parameters by the canonical names its checkpoints have, whatever wraps the model."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig

from geopd.matrices import Expert, Piece, Role, canonical_names, layout_of

__all__ = ["WRAPPERS", "NamedParameter", "canonical_name", "globs_over", "live_pieces", "named_parameters", "rest_of"]

WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
"""What wrappers insert into a parameter's path; its name on disk has none of it."""


@dataclass(frozen=True, slots=True)
class NamedParameter:
    """A parameter, the dotted path the model knows it by, and what it counts as."""

    path: str
    role: Role
    parameter: Tensor
    inside: tuple[str, ...] = ()
    """Canonical matrices that it holds in another layout: fused, stacked or transposed."""


def canonical_name(path: str) -> str:
    """The canonical name of the matrix at a dotted path."""
    ((name, _),) = layout_of({_bare(path): (1, 1)}).pieces.items()
    return canonical_names({name: (1, 1)})[name].name


def named_parameters(model: Any) -> dict[str, NamedParameter]:
    """Every parameter of a model without adapters by canonical name; tied weights appear once.

    One that is no canonical matrix itself but holds some has its own name, and theirs in ``inside``.
    """
    found = {_bare(path): (path, value) for path, value in model.named_parameters()}
    pieces = layout_of({bare: tuple(value.shape) for bare, (_, value) in found.items()}, _config(model)).pieces
    names = {piece.stored: name for name, piece in pieces.items() if not piece.cuts}
    inside: dict[str, list[str]] = {}
    for name, weight in canonical_names({name: piece.shape for name, piece in pieces.items()}).items():
        if pieces[name].cuts:
            inside.setdefault(pieces[name].stored, []).append(weight.name)
    weights = canonical_names({names.get(bare, bare): tuple(value.shape) for bare, (_, value) in found.items()})
    named = {bare: weights[names.get(bare, bare)] for bare in found}
    return {
        named[bare].name: NamedParameter(path, named[bare].role, value, tuple(inside.get(bare, ())))
        for bare, (path, value) in found.items()
    }


def live_pieces(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Piece]:
    """The canonical matrices in a model's parameters, by name; a stack of experts stays one.

    Args:
        model: its configuration says how fused parameters are laid out.
        shapes: of the parameters, by the names they would have without wrappers and adapters.
    """
    found = layout_of(shapes, _config(model)).pieces
    stacks = {piece.stored for piece in found.values() if any(isinstance(cut, Expert) for cut in piece.cuts)}
    kept = {name: piece for name, piece in found.items() if piece.stored not in stacks}
    return kept | {name: Piece(name, tuple(shapes[name])) for name in sorted(stacks)}


def _config(model: nn.Module) -> dict[str, Any]:
    held = (getattr(module, "config", None) for module in model.modules())  # wrappers have configurations of their own
    found: dict[str, Any] = next((config.to_dict() for config in held if isinstance(config, PretrainedConfig)), {})
    return found


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
