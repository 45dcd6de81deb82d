"""Checkpoints of a large model's shape on disk: bf16, spectra that decay, and updates as small as training's.

A weight is rank 256 with a power law over Gaussian noise; an update is rank 64 with a power law over noise of the same
energy, of rms 1e-4 a checkpoint, and every checkpoint is rounded to bf16. Only the layers' 2-D weights are there.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

_WEIGHT, _WEIGHT_RANK, _WEIGHT_DECAY = 0.02, 256, 0.6
_STEP, _STEP_RANK, _STEP_DECAY = 1e-4, 64, 0.5


@dataclass(frozen=True)
class Model:
    """A decoder's public shape: of every layer the matrices' (rows, cols) and how many there are of each."""

    layers: int
    hidden: int
    intermediate: int
    queries: int
    keys: int
    experts: int = 0
    """0: one dense feed-forward block; else so many of this ``intermediate``, behind a router."""

    def matrices(self) -> dict[str, tuple[int, int]]:
        """One layer's matrices by name; of the experts the first alone, ``copies`` says how often it is there."""
        block = "mlp.experts.0" if self.experts else "mlp"
        router = {"mlp.gate": (self.experts, self.hidden)} if self.experts else {}
        return router | {
            "self_attn.q_proj": (self.queries, self.hidden),
            "self_attn.k_proj": (self.keys, self.hidden),
            "self_attn.v_proj": (self.keys, self.hidden),
            "self_attn.o_proj": (self.hidden, self.queries),
            f"{block}.gate_proj": (self.intermediate, self.hidden),
            f"{block}.up_proj": (self.intermediate, self.hidden),
            f"{block}.down_proj": (self.hidden, self.intermediate),
        }

    def shapes(self) -> dict[tuple[int, int], int]:
        """How many matrices the whole model has of each (rows, cols)."""
        found: dict[tuple[int, int], int] = {}
        for name, shape in self.matrices().items():
            copies = self.experts if "experts" in name else 1
            found[shape] = found.get(shape, 0) + self.layers * copies
        return found


MODELS = {
    "Qwen3-8B": Model(36, 4096, 12288, 4096, 1024),
    "Qwen3-32B": Model(64, 5120, 25600, 8192, 1024),
    "Qwen3-235B-A22B": Model(94, 4096, 1536, 8192, 512, experts=128),
}


def write(folder: Path, model: Model, layers: int, checkpoints: int) -> tuple[Path, Path]:
    """A base of so many layers and a run of ``checkpoint-100``, ``-200``, ... away from it; their paths."""
    base, run = folder / "base", folder / "run"
    places = [base, *(run / f"checkpoint-{100 * i}" for i in range(1, checkpoints + 1))]
    indices: list[dict[str, str]] = [{} for _ in places]
    for layer in range(layers):
        file = f"model-{layer + 1:05d}-of-{layers:05d}.safetensors"
        states: list[dict[str, Tensor]] = [{} for _ in places]
        for position, (name, (rows, cols)) in enumerate(model.matrices().items()):
            generator = torch.Generator().manual_seed(1000 * layer + position)
            for state, weight in zip(states, _path(rows, cols, checkpoints, generator), strict=True):
                state[f"model.layers.{layer}.{name}.weight"] = weight
        for place, state, index in zip(places, states, indices, strict=True):
            place.mkdir(parents=True, exist_ok=True)
            save_file(state, place / file)
            index |= dict.fromkeys(state, file)
    for place, index in zip(places, indices, strict=True):
        (place / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return base, run


def _path(rows: int, cols: int, checkpoints: int, generator: torch.Generator) -> list[Tensor]:
    """A weight and its checkpoints."""
    weight = _decaying(rows, cols, _WEIGHT_RANK, _WEIGHT_DECAY, generator).mul_(_WEIGHT)
    found = [weight.bfloat16()]
    del weight
    for _ in range(checkpoints):
        step = _decaying(rows, cols, _STEP_RANK, _STEP_DECAY, generator).mul_(_STEP)
        found.append(step.add_(found[-1]).bfloat16())
    return found


def _decaying(rows: int, cols: int, rank: int, decay: float, generator: torch.Generator) -> Tensor:
    """Rms 1: half of the energy with singular values i^-decay (nearly), half Gaussian noise."""
    rank = min(rank, rows, cols)
    scales = torch.arange(1, rank + 1) ** -decay
    left = torch.randn(rows, rank, generator=generator) * (scales / (2**0.5 * torch.linalg.vector_norm(scales)))
    noise = torch.randn(rows, cols, generator=generator).mul_(0.5**0.5)
    return noise.addmm_(left, torch.randn(rank, cols, generator=generator))
