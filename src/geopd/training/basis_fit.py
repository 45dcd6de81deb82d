"""Whether a model can be confined to a basis, and if not, which globs make one that it can be confined to."""

from __future__ import annotations

from typing import Any

from torch import nn

from geopd.training.basis import Basis
from geopd.training.named_parameters import NamedParameter, globs_over

__all__ = ["check_fit"]


def check_fit(model: Any, parameters: dict[str, NamedParameter], basis: Basis, *, adapter: bool) -> None:
    """Require that the model holds every matrix of a basis in its shape; for an adapter, as an ``nn.Linear``.

    Args:
        model: without adapters.
        parameters: its parameters by canonical name.
        basis: the basis.
        adapter: whether the matrices are to be adapted.

    Raises:
        ValueError: some matrix cannot be confined; names the first, why, and the globs for ``geopd basis`` that select
            the others.
    """
    faults = {}
    for name in basis.names:
        fault = _absence(name, parameters) if name not in parameters else None
        if fault is None and adapter:
            fault = _no_linear(model, parameters[name].path)
        if fault is not None:
            faults[name] = fault
            continue
        shape = tuple(parameters[name].parameter.shape)
        if not basis.fits(name, shape):
            dims = " x ".join(map(str, shape))
            raise ValueError(
                f"{name}: the basis was not made for a weight of shape {dims}: use the basis of this model"
            )
    if faults:
        name, fault = next(iter(faults.items()))
        count = f" ({len(faults)} of {len(basis.names)} matrices cannot be confined)" if len(faults) > 1 else ""
        raise ValueError(f"{name}: {fault}{count}: {_remedy(basis, faults)}")


def _remedy(basis: Basis, faults: dict[str, str]) -> str:
    globs = globs_over((name for name in basis.names if name not in faults), faults)
    if not globs:
        return "use a basis of this model's matrices"
    options = " ".join(f"--matrices '{glob}'" for glob in globs)
    return f"make the basis of the others, `geopd basis` with {options}"


def _absence(name: str, parameters: dict[str, NamedParameter]) -> str:
    stacks = [found.path for found in parameters.values() if found.parameter.ndim > 2]
    if stacks and "experts" in name.split("."):
        return f"the basis names it and the model holds its experts in stacks such as {stacks[0]}"
    if holder := next((found.path for found in parameters.values() if name in found.inside), None):
        return f"the basis names it and the model holds it inside {holder}, in another layout"
    return "the basis names it and the model has no such matrix"


def _no_linear(model: Any, path: str) -> str | None:
    module = model.get_submodule(path.removesuffix(".weight")) if path.endswith(".weight") else None
    if isinstance(module, nn.Linear):
        return None
    what = type(module).__name__ if module is not None else "a bare parameter"
    return f"an adapter needs an nn.Linear, and this is {what}, which only mode 'gradient' confines"
