"""Small decoder-only language models: built from a shape, loaded from a checkpoint, always in fp32."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

__all__ = ["ModelShape", "build_model", "load_model", "load_tokenizer"]


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The dimensions of a Qwen3 or Qwen3-MoE model with untied embeddings.

    Args:
        hidden: width of the residual stream.
        layers: decoder layers.
        heads: query heads; the head dimension is hidden / heads.
        key_value_heads: heads of keys and values, a divisor of ``heads``.
        intermediate: width of the gated MLP, or of one expert's.
        experts: experts of a mixture in every layer; 0 for a dense model.
        active: experts that a token is routed to.

    Raises:
        ValueError: the width does not divide into heads, or the heads into groups; or more experts are active than
            there are.
    """

    hidden: int = 128
    layers: int = 4
    heads: int = 4
    key_value_heads: int = 2
    intermediate: int = 384
    experts: int = 0
    active: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.active <= self.experts or (self.experts and not self.active):
            raise ValueError(f"active={self.active} of experts={self.experts}: route a token to 1 or more of them")
        if self.hidden % self.heads or self.heads % self.key_value_heads:
            raise ValueError(
                f"hidden={self.hidden} must be a multiple of heads={self.heads}, and heads of "
                f"key_value_heads={self.key_value_heads}: change one of them"
            )


def build_model(shape: ModelShape, tokenizer: PreTrainedTokenizerFast, seed: int, positions: int = 64) -> Any:
    """A freshly initialised Qwen3 or Qwen3-MoE causal language model in fp32; the same seed gives the same weights.

    Args:
        shape: the dimensions.
        tokenizer: sets the vocabulary size and the pad and end tokens.
        seed: of the initial weights; the global random state is left as it was.
        positions: the longest sequence the model declares, in tokens.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    common: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_value_heads,
        "head_dim": shape.hidden // shape.heads,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": positions,
        "tie_word_embeddings": False,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
        "dtype": torch.float32,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if not shape.experts:
            return Qwen3ForCausalLM(Qwen3Config(**common)).float()
        routed = {
            "num_experts": shape.experts,
            "num_experts_per_tok": shape.active,
            "moe_intermediate_size": shape.intermediate,
            "norm_topk_prob": True,  # as the released Qwen3 mixtures are
        }
        return Qwen3MoeForCausalLM(Qwen3MoeConfig(**common, **routed)).float()


def load_model(checkpoint: Path | str) -> PreTrainedModel:
    """A causal language model from a local folder, with fp32 weights.

    Raises:
        ValueError: the folder does not exist; nothing is looked up on a hub.
    """
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(_local(checkpoint), dtype=torch.float32, local_files_only=True)


def load_tokenizer(checkpoint: Path | str) -> PreTrainedTokenizerFast:
    """The tokenizer saved beside a checkpoint.

    Raises:
        ValueError: the folder does not exist; nothing is looked up on a hub.
    """
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(_local(checkpoint), local_files_only=True)


def _local(checkpoint: Path | str) -> str:
    folder = Path(checkpoint)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no config.json: pass a folder written by save_pretrained")
    return str(folder)
