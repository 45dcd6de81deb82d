"""Exact training in a subspace: a LoRA adapter whose A is frozen to V_K^T.

W = W0 + B A with A = V^T (K, n) fixed and B (m, K) trained from zero, so W - W0 lies in the span of V whatever the
optimiser does, and the optimiser's state is m x K. Gradients agree with the projection: dL/dB = (dL/dW) V.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from geopd.training.basis import Basis
from geopd.training.basis_fit import check_fit
from geopd.training.named_parameters import canonical_name, named_parameters, rest_of

__all__ = ["ADAPTER", "adapted_layers", "adapter_for"]

ADAPTER = "default"  # PEFT's name for the first adapter, which TRL and the Trainer's resume rely on


class _Fixed(nn.Parameter):
    """A parameter that stays frozen: PEFT makes every A trainable again whenever an adapter is chosen, as TRL does for
    a KL term, and its gradient would then count in the norm that is clipped."""

    def requires_grad_(self, requires_grad: bool = True) -> _Fixed:  # noqa: ARG002
        """Nothing."""
        return self


def adapter_for(model: Any, basis: Basis, *, train_rest: bool = False) -> Any:
    """A ``peft.PeftModel`` that trains B alone: A frozen to V^T, A and B float32, alpha = r, no dropout, no rsLoRA.

    Saving, loading, merging and serving are PEFT's. Matrices with fewer columns get their own rank (``rank_pattern``;
    some servers want one rank for all). The global random state is left as it was.

    Args:
        model: a transformers model; its modules are wrapped in place.
        basis: V by canonical name; every matrix it names must be an ``nn.Linear`` of the model.
        train_rest: whether norms, biases, embeddings and head are trained too (PEFT's ``modules_to_save``: copies).

    Raises:
        ValueError: the basis is a mask, or names what is no ``nn.Linear`` of the model (an expert stack, an
            embedding), or of another width; ``train_rest`` meets a parameter PEFT cannot save.
    """
    from peft import LoraConfig, get_peft_model

    if basis.is_mask:
        raise ValueError("an adapter trains a subspace, and this basis is a mask: use mode 'mask'")
    parameters = named_parameters(model)
    check_fit(model, parameters, basis, adapter=True)
    paths = {name: parameters[name].path.removesuffix(".weight") for name in basis.names}
    ranks = {paths[name]: V.shape[1] for name, V in basis.vectors.items()}
    rank = max(ranks.values())
    lower = {re.escape(path): r for path, r in ranks.items() if r != rank}
    rest = [p.path for p in rest_of(parameters, basis.names).values()] if train_rest else []
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        rank_pattern=dict(lower),
        alpha_pattern=dict(lower),
        target_modules=sorted(paths.values()),
        lora_dropout=0.0,
        use_rslora=False,
        bias="all" if any(_is_bias(path) for path in rest) else "none",
        modules_to_save=_modules_to_save(model, rest) or None,
        ensure_weight_tying=tied and train_rest,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):  # PEFT draws an A that is replaced below
        adapted = get_peft_model(model, config)
    layers = dict(adapted.get_base_model().named_modules())
    for name, V in basis.vectors.items():
        _fix(layers[paths[name]], V)
    return adapted


def adapted_layers(model: Any, basis: Basis) -> dict[str, Any]:
    """PEFT's LoRA layer of every matrix in the basis, by canonical name.

    Raises:
        ValueError: the model holds no adapter on one of them.
    """
    from peft.tuners.lora import LoraLayer

    layers = {
        canonical_name(f"{path}.weight"): module
        for path, module in model.named_modules()
        if isinstance(module, LoraLayer) and ADAPTER in module.lora_A
    }
    for name in basis.names:
        if name not in layers:
            raise ValueError(f"{name}: the model has no adapter on it; call Projection.prepare(model) first")
    return {name: layers[name] for name in basis.names}


def _is_bias(path: str) -> bool:
    return path.rsplit(".", 1)[-1] == "bias"


def _modules_to_save(model: Any, rest: list[str]) -> list[str]:
    modules = []
    for path in rest:
        if _is_bias(path):
            continue
        module, _, leaf = path.rpartition(".")
        if leaf != "weight" or len(list(model.get_submodule(module).children())):
            raise ValueError(
                f"train_rest: {path} is not the weight of a module of its own, which PEFT could save: "
                "leave train_rest off, or use mode 'gradient'"
            )
        modules.append(module)
    return modules


def _fix(layer: Any, V: Tensor) -> None:
    A, B = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
    device = A.weight.device
    A.weight = _Fixed(V.T.contiguous().to(device), requires_grad=False)
    B.weight = nn.Parameter(torch.zeros(B.weight.shape, dtype=torch.float32, device=device))
