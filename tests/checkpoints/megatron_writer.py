"""Writes the fixtures ``golden/megatron_*``: tiny models of transformers in checkpoints of Megatron core itself.

Megatron core is no dependency of the tests. To write them again: install megatron-core 0.16.0 beside torch and
transformers in an environment of its own (``pip install --no-deps megatron-core==0.16.0``), and there
``python tests/checkpoints/megatron_writer.py OUT``. It runs on a CPU: only the waiting for a GPU, the question for its
number and its random state are replaced. Each fixture holds ``iter_0000007`` and, as the oracle, the same model as
transformers saves it (``model.safetensors`` and ``config.json`` in ``transformers``). On one process, the two models'
outputs are compared before anything is written, so that the weights are known to mean the same.

- ``megatron_dense``: Qwen3 on two gloo processes (tensor parallel), layers stacked, a padded vocabulary;
- ``megatron_experts``: Qwen3-MoE, layers and experts stacked;
- ``megatron_layers``: Qwen2 (biases of q, k, v), layers one by one, tied embeddings.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

H, K, D, HIDDEN, INNER, EXPERTS, LAYERS, VOCABULARY, PADDED = 4, 2, 4, 16, 12, 3, 2, 22, 24
KINDS = {"dense": ("qwen3", 2), "experts": ("qwen3_moe", 1), "layers": ("qwen2", 1)}


def original(family: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": H,
        "num_key_value_heads": K,
        "tie_word_embeddings": family == "qwen2",
        "rope_theta": 10000.0,
        "max_position_embeddings": 32,
    }
    if family != "qwen2":
        settings["head_dim"] = D
    if family == "qwen3_moe":
        settings |= {"num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": INNER}
        settings["norm_topk_prob"] = True  # as Megatron routes
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter + 0.1 * torch.randn_like(parameter))
    return model


def megatron(family: str, world: int) -> Any:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    experts = {"num_moe_experts": EXPERTS, "moe_ffn_hidden_size": INNER, "moe_router_topk": 2}
    config = TransformerConfig(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        num_attention_heads=H,
        num_query_groups=K,
        kv_channels=D,
        ffn_hidden_size=INNER,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=family == "qwen2",
        qk_layernorm=family != "qwen2",
        normalization="RMSNorm",
        layernorm_epsilon=1e-6,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        tensor_model_parallel_size=world,
        hetereogenous_dist_checkpoint=family == "qwen2",
        **(experts if family == "qwen3_moe" else {}),
    )
    spec = get_gpt_layer_local_spec(
        num_experts=EXPERTS if family == "qwen3_moe" else None,
        moe_grouped_gemm=False,
        qk_layernorm=family != "qwen2",
        normalization="RMSNorm",
    )
    return GPTModel(
        config,
        spec,
        vocab_size=PADDED if world > 1 else VOCABULARY,
        max_sequence_length=32,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=family == "qwen2",
    )


def whole(name: str, hf: dict[str, Tensor]) -> Tensor:
    """Megatron's parameter from transformers' weights, before it is spread over processes."""
    top = {"embedding.word_embeddings.weight": "model.embed_tokens", "output_layer.weight": "lm_head"}
    if name in top:
        held = hf[f"{top[name]}.weight"]
        return torch.cat([held, torch.zeros(PADDED - VOCABULARY, HIDDEN)])
    if name == "decoder.final_layernorm.weight":
        return hf["model.norm.weight"]
    _, _, layer, *inside = name.split(".")
    home, kind = f"model.layers.{layer}.", inside[-1]
    what = ".".join(inside[:-1])
    renamed = {
        "input_layernorm": "input_layernorm",
        "pre_mlp_layernorm": "post_attention_layernorm",
        "self_attention.linear_proj": "self_attn.o_proj",
        "self_attention.q_layernorm": "self_attn.q_norm",
        "self_attention.k_layernorm": "self_attn.k_norm",
        "mlp.router": "mlp.gate",
    }
    if what in renamed:
        return hf[f"{home}{renamed[what]}.{kind}"]
    if what == "self_attention.linear_qkv":
        q, k, v = (hf[f"{home}self_attn.{part}_proj.{kind}"] for part in "qkv")
        groups = [
            torch.cat([q[g * (H // K) * D : (g + 1) * (H // K) * D], k[g * D : (g + 1) * D], v[g * D : (g + 1) * D]])
            for g in range(K)
        ]
        return torch.cat(groups)
    home += f"mlp.experts.{inside[3]}." if "local_experts" in inside else "mlp."
    if what.endswith("linear_fc2"):
        return hf[f"{home}down_proj.weight"]
    return torch.cat([hf[f"{home}gate_proj.weight"], hf[f"{home}up_proj.weight"]])


def part(name: str, value: Tensor, rank: int, world: int) -> Tensor:
    """What of a parameter a process holds: rows of what writes to many channels, columns of what reads them."""
    if world == 1 or "layernorm" in name or "router" in name:
        return value
    if "linear_proj" in name or "linear_fc2" in name:
        return value.chunk(world, dim=1)[rank]
    if "linear_fc1" in name:
        return torch.cat([half.chunk(world)[rank] for half in value.chunk(2)])
    return value.chunk(world)[rank]


def compare_outputs(model: Any, hf_model: Any) -> None:
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import moe_utils

    moe_utils.te_general_gemm = None  # asked for, and only defined where Transformer Engine is installed
    random.CudaRNGStatesTracker.fork = lambda *_, **__: nullcontext()  # without dropout nothing is drawn
    tokens = torch.arange(8).view(1, 8) % VOCABULARY
    mask = torch.ones(8, 8).triu(1).bool()[None, None]  # True where attention must not look
    with torch.no_grad():
        ours = model.eval()(tokens, torch.arange(8).view(1, 8), mask)
        theirs = hf_model.eval()(tokens).logits
    worst = float((ours.float() - theirs.float()).abs().max())
    print(f"outputs differ by {worst:.1e} at most, of {float(theirs.abs().max()):.1e}", flush=True)
    assert worst < 1e-5


def write(rank: int, world: int, port: int, family: str, out: str) -> None:
    warnings.simplefilter("ignore")
    from megatron.core import dist_checkpointing, parallel_state

    torch.set_num_threads(1)
    torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    parallel_state.initialize_model_parallel(world, 1)
    hf_model = original(family)
    saved = Path(out) / "transformers"
    if rank == 0:
        hf_model.save_pretrained(saved)
    dist.barrier()
    from safetensors.torch import load_file

    hf = load_file(saved / "model.safetensors")
    model = megatron(family, world)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(part(name, whole(name, hf), rank, world)[: len(parameter)])
    if world == 1:
        compare_outputs(model, hf_model)
    args = argparse.Namespace(
        num_attention_heads=H,
        num_query_groups=K,
        group_query_attention=True,
        kv_channels=D,
        vocab_size=VOCABULARY,
        padded_vocab_size=PADDED if world > 1 else VOCABULARY,
        untie_embeddings_and_output_weights=family != "qwen2",
        params_dtype=torch.float32,
        swiglu=True,
    )
    folder = Path(out) / "iter_0000007"
    if rank == 0:
        folder.mkdir()
        (Path(out) / "latest_checkpointed_iteration.txt").write_text("7")
    dist.barrier()
    state = {"model": model.sharded_state_dict(), "args": args, "checkpoint_version": 3.0, "iteration": 7}
    os.chdir(out)  # the path is written into the checkpoint
    dist_checkpointing.save(state, folder.name)
    dist.destroy_process_group()


def main() -> None:
    out = Path(sys.argv[1])
    for kind, (family, world) in KINDS.items():
        if len(sys.argv) > 2 and kind not in sys.argv[2:]:
            continue
        home = out / f"megatron_{kind}"
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir(parents=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        spawn(write, args=(world, port, family, str(home)), nprocs=world)
        (home / "transformers" / "generation_config.json").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
