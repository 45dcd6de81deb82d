"""Real checkpoints on disk: tiny models of the covered families through ``save_pretrained``, and bare tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

LAYERS, HIDDEN, INTERMEDIATE, VOCABULARY = 2, 32, 48, 64
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")
FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "olmo2", "qwen3_moe")
EXPERTS = 4


def save_model(
    family: str,
    path: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    max_shard_size: str = "1GB",
    **settings: object,
) -> Path:
    """A tiny model of a family with seeded weights, saved as its users would save it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    extra: dict[str, object] = {"head_dim": 8} if family in ("qwen3", "gemma2", "qwen3_moe") else {}
    if family == "qwen3_moe":
        extra |= {"num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    config = AutoConfig.for_model(
        family,
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": HIDDEN,
            "intermediate_size": INTERMEDIATE,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "tie_word_embeddings": False,
            "pad_token_id": 0,
        }
        | extra
        | settings,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
    model.to(dtype).save_pretrained(path, max_shard_size=max_shard_size)
    return path


def save_tensors(path: Path, tensors: Mapping[str, Tensor], config: Mapping[str, object] | None = None) -> Path:
    """One ``model.safetensors`` with exactly these tensors."""
    path.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors")
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    return path


def save_shards(path: Path, shards: list[Mapping[str, Tensor]]) -> Path:
    """Shards with their index, named as ``save_pretrained`` names them."""
    path.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    for i, tensors in enumerate(shards, 1):
        shard = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / shard)
        weight_map |= dict.fromkeys(tensors, shard)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def q_name(layer: int = 0) -> str:
    """The query projection's name on disk."""
    return f"model.layers.{layer}.self_attn.q_proj.weight"


def down_name(layer: int = 0) -> str:
    """The down projection's name on disk."""
    return f"model.layers.{layer}.mlp.down_proj.weight"


def small_weights(seed: int = 0, *, layers: int = 2, rows: int = 24, cols: int = 16) -> dict[str, Tensor]:
    """Two matrices a layer, an embedding and a norm, bf16."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return (0.02 * torch.randn(*shape, generator=generator)).bfloat16()

    found = {"model.embed_tokens.weight": draw(40, cols), "model.norm.weight": 1 + draw(cols)}
    for layer in range(layers):
        found[q_name(layer)] = draw(rows, cols)
        found[down_name(layer)] = draw(cols, rows)
    return found


def moved(weights: Mapping[str, Tensor], size: float, seed: int = 1) -> dict[str, Tensor]:
    """Every weight with Gaussian noise of a given size added, stored in the weight's own dtype."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (tensor.double() + size * torch.randn(tensor.shape, generator=generator).double()).to(tensor.dtype)
        for name, tensor in weights.items()
    }


def save_run(path: Path, weights: Mapping[str, Tensor], steps: list[int], *, size: float = 1e-3, seed: int = 1) -> Path:
    """A run whose checkpoints move steadily away from ``weights``, in ``checkpoint-N`` folders."""
    for i, step in enumerate(steps, 1):
        save_tensors(path / f"checkpoint-{step}", moved(weights, size * i, seed))
    return path


def write_run_json(path: Path, **fields: object) -> Path:
    """A ``run.json`` with these fields over a valid one."""
    path.mkdir(parents=True, exist_ok=True)
    value = {"schema_version": 1, "paradigm": "opd", "seed": 0, "origin": None, "settings": {}, "tags": {}} | fields
    (path / "run.json").write_text(json.dumps({k: v for k, v in value.items() if v is not ...}))
    return path


def save_adapter(base: Path, path: Path, **settings: Any) -> Any:
    """A LoRA with random factors over a base, saved by PEFT; PEFT's model, loaded from there again."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=4, lora_alpha=8, **settings))
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data.add_(0.05 * torch.randn(weight.shape, generator=generator))
    model.save_pretrained(path)
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), path)
