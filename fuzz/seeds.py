"""Valid checkpoints to start from, one of each format, small, made by the writers that users have."""

from __future__ import annotations

import io
import json
import pickle
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save


@dataclass(frozen=True, slots=True)
class Seed:
    """A checkpoint's files by name; ``path`` is what is opened in its folder, ``kept`` what stays undamaged."""

    files: dict[str, bytes]
    path: str = ""
    kept: frozenset[str] = frozenset()
    base: str | None = None


def _weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"model.embed_tokens.weight": (6, 4), "model.norm.weight": (4,)}
    shapes |= {f"model.layers.0.self_attn.{name}_proj.weight": (4, 4) for name in "qkvo"}
    return {name: torch.randn(*shape, generator=generator).bfloat16() for name, shape in shapes.items()}


def _json(value: object) -> bytes:
    return json.dumps(value).encode()


def _torch(value: object) -> bytes:
    held = io.BytesIO()
    torch.save(value, held)
    return held.getvalue()


_CONFIG = _json({"model_type": "qwen3", "hidden_size": 4, "num_hidden_layers": 1, "tie_word_embeddings": False})


def _halves() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    weights = _weights()
    names = sorted(weights)
    return {n: weights[n] for n in names[:3]}, {n: weights[n] for n in names[3:]}


def _index(shards: dict[str, dict[str, torch.Tensor]]) -> bytes:
    weight_map = {name: shard for shard, tensors in shards.items() for name in tensors}
    return _json({"metadata": {"total_size": 100}, "weight_map": weight_map})


def safetensors_file() -> Seed:
    """One safetensors file with metadata."""
    return Seed({"model.safetensors": save(_weights(), {"format": "pt"})}, "model.safetensors")


def safetensors_index() -> Seed:
    """An index over two whole shards; the index and the config are damaged."""
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    shards = dict(zip(names, _halves(), strict=True))
    files = {name: save(tensors) for name, tensors in shards.items()}
    files |= {"model.safetensors.index.json": _index(shards), "config.json": _CONFIG}
    return Seed(files, kept=frozenset(names))


def zip_pickle() -> Seed:
    """A ``pytorch_model.bin``: tensors, a tied one, a parameter and settings beside them."""
    weights = _weights()
    state = {
        **weights,
        "lm_head.weight": weights["model.embed_tokens.weight"],
        "x": torch.nn.Parameter(torch.ones(2, 3)),
    }
    return Seed({"pytorch_model.bin": _torch({"state_dict": state, "step": 3})})


def adapter() -> Seed:
    """A LoRA adapter over a base; the adapter's config and weights are damaged, the base is not."""
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "use_rslora": False}
    config |= {"rank_pattern": {"k_proj": 1}, "alpha_pattern": {"k_proj": 2}, "modules_to_save": None, "bias": "none"}
    config |= {"use_dora": False, "fan_in_fan_out": False, "base_model_name_or_path": "base"}
    names = [f"base_model.model.model.layers.0.self_attn.{name}_proj.lora_" for name in "qk"]
    factors = {
        f"{name}{half}.weight": torch.ones(2, 4) if half == "A" else torch.ones(4, 2) for name in names for half in "AB"
    }
    files = {"adapter_config.json": _json(config), "adapter_model.safetensors": save(factors)}
    files["base/model.safetensors"] = save(_weights())
    return Seed(files, kept=frozenset({"base/model.safetensors"}), base="base")


def distributed(weights: dict[str, torch.Tensor] | None = None) -> Seed:
    """A torch distributed checkpoint of one process."""
    import torch.distributed.checkpoint as dcp

    weights = weights or _weights()
    with TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"model": weights}, checkpoint_id=folder, no_dist=True)
        files = {file.name: file.read_bytes() for file in Path(folder).iterdir()}
    listing = pickle.loads(files[".metadata"])
    listing.storage_meta = replace(listing.storage_meta, checkpoint_id="step-1", save_id="0")  # drawn at each save
    return Seed(files | {".metadata": pickle.dumps(listing)})


def verl(weights: dict[str, torch.Tensor] | None = None) -> Seed:
    """The files of two ranks, each with its half of every tensor; no process group talks."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    weights = weights or _weights()
    files = {"fsdp_config.json": _json({"FSDP_version": 2, "world_size": 2})}
    for rank in range(2):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=2)
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("fsdp",))
        state = {
            name: DTensor.from_local(W.chunk(2)[rank].clone(), mesh, [Shard(0)], shape=W.shape, stride=W.stride())
            for name, W in weights.items()
        }
        files[f"model_world_size_2_rank_{rank}.pt"] = _torch(state)
        dist.destroy_process_group()
    return Seed(files)


def deepspeed(weights: dict[str, torch.Tensor] | None = None) -> Seed:
    """ZeRO stage 2 of one rank, laid out as its documentation says (its writer is not used here)."""
    weights = weights or {name: tensor for name, tensor in _weights().items() if "proj" in name}
    shapes = {name: tensor.shape for name, tensor in weights.items()}
    model = {"module": weights, "param_shapes": [shapes], "buffer_names": [], "frozen_param_shapes": None}
    flat = torch.cat([tensor.float().flatten() for tensor in weights.values()])
    optimiser = {"zero_stage": 2, "partition_count": 1, "single_partition_of_fp32_groups": [flat]}
    home = "global_step1"
    files = {"latest": home.encode(), f"{home}/mp_rank_00_model_states.pt": _torch(model)}
    states = _torch({"optimizer_state_dict": optimiser})
    return Seed({**files, f"{home}/zero_pp_rank_0_mp_rank_00_optim_states.pt": states})


def pickled_index() -> Seed:
    """An index over two whole ``.bin`` shards."""
    names = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    shards = dict(zip(names, _halves(), strict=True))
    files = {name: _torch(tensors) for name, tensors in shards.items()}
    return Seed({**files, "pytorch_model.bin.index.json": _index(shards)}, kept=frozenset(names))


def bare_pickle() -> Seed:
    """A pickle alone, read with torch's allow-list: no file around it, the cheapest way at the stack machine."""
    value = {"a": [1, (2.5, "x"), None, True], "b": {"c": b"raw", 3: [torch.Size([2, 3])]}, "big": 2**70}
    return Seed({"value.pkl": pickle.dumps(value, protocol=2)})


SEEDS = {
    found.__name__: found
    for found in (
        safetensors_file,
        safetensors_index,
        adapter,
        zip_pickle,
        pickled_index,
        bare_pickle,
        distributed,
        verl,
        deepspeed,
    )
}
"""The checkpoints by name."""
