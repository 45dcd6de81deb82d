"""The same weights give the bit-identical tables in whichever format and layout they lie."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoints_on_disk import moved, save_shards, save_tensors
from command_line import geopd
from geopd.checkpoints import open_checkpoint
from seeded_checkpoints import SEEDS

GOLDEN = Path(__file__).parent / "golden"
SMALL = ("--rotation-k", "p/4", "--principal-rank", "p/4", "--similarity-k", "2", "--hill-k", "4", "--workers", "1")
Weights = dict[str, Tensor]


def tables(base: Path, tuned: Path, out: Path) -> list[pl.DataFrame]:
    """What the engine makes of a pair, always called the same; without the step, which a folder's name carries."""
    result = geopd("measure", base, f"tuned={tuned}", "--out", out, "--matrices", "all", *SMALL)
    assert result.code == 0, result.err
    return [pl.read_parquet(out / f"{name}.parquet").drop("step") for name in ("measurements", "nulls")]


def assert_same(found: list[pl.DataFrame], expected: list[pl.DataFrame]) -> None:
    for table, wanted in zip(found, expected, strict=True):
        assert table.height > 0
        assert table.equals(wanted)


def halves(weights: Weights) -> list[Weights]:
    names = sorted(weights)
    middle = len(names) // 2
    return [{name: weights[name] for name in part} for part in (names[:middle], names[middle:])]


def write_bin_shards(path: Path, weights: Weights) -> None:
    shards = {f"pytorch_model-{i:05d}-of-00002.bin": part for i, part in enumerate(halves(weights), 1)}
    path.mkdir()
    for name, part in shards.items():
        torch.save(part, path / name)
    weight_map = {name: shard for shard, part in shards.items() for name in part}
    (path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


def write_pickle(path: Path, weights: Weights, name: str, wrapper: str | None = None) -> None:
    path.mkdir()
    torch.save({wrapper: weights} if wrapper else weights, path / name)


def write_seed(kind: str) -> Callable[[Path, Weights], None]:
    """As the fuzzing's own checkpoint of a kind is written, with these weights."""

    def write(path: Path, weights: Weights) -> None:
        for name, data in SEEDS[kind](weights).files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)

    return write


WRITERS: dict[str, tuple[str, Callable[[Path, Weights], object]]] = {
    "safetensors shards": ("safetensors shards", lambda path, weights: save_shards(path, halves(weights))),
    ".bin": ("torch zip", lambda path, weights: write_pickle(path, weights, "pytorch_model.bin")),
    ".bin shards": ("torch zip shards", write_bin_shards),
    ".pt": ("torch zip", lambda path, weights: write_pickle(path, weights, "model.pt", "model_state_dict")),
    "torch distributed": ("torch distributed checkpoint", write_seed("distributed")),
    "verl": ("verl FSDP", write_seed("verl")),
    "DeepSpeed": ("DeepSpeed ZeRO", write_seed("deepspeed")),
}


@pytest.fixture(scope="module")
def tuned() -> Weights:
    """What the Megatron fixture was made from: qwen3 in fp32."""
    return load_file(GOLDEN / "megatron_dense" / "transformers" / "model.safetensors")


@pytest.fixture(scope="module")
def expected(tuned: Weights, tmp_path_factory: pytest.TempPathFactory) -> list[pl.DataFrame]:
    home = tmp_path_factory.mktemp("plain")
    base = save_tensors(home / "base", moved(tuned, 1e-3))
    return tables(base, save_tensors(home / "tuned", tuned), home / "out")


@pytest.mark.parametrize("kind", WRITERS)
def test_both_ends_in_another_format(kind: str, tuned: Weights, expected: list[pl.DataFrame], tmp_path: Path) -> None:
    form, write = WRITERS[kind]
    paths = []
    for name, weights in (("base", moved(tuned, 1e-3)), ("tuned", tuned)):
        write(tmp_path / name, weights)
        paths.append(tmp_path / name / "model.pt" if kind == ".pt" else tmp_path / name)
        assert open_checkpoint(paths[-1]).format == form
    assert_same(tables(paths[0], paths[1], tmp_path / "out"), expected)


def test_a_checkpoint_of_megatron_itself(tuned: Weights, expected: list[pl.DataFrame], tmp_path: Path) -> None:
    base = save_tensors(tmp_path / "base", moved(tuned, 1e-3))
    assert_same(tables(base, GOLDEN / "megatron_dense" / "iter_0000007", tmp_path / "out"), expected)


@pytest.mark.parametrize("fixture", ["zero1", "zero2", "zero3", "megatron_experts", "megatron_layers"])
def test_the_other_fixtures_of_real_writers(fixture: str, tmp_path: Path) -> None:
    path = GOLDEN / fixture
    held = open_checkpoint(path / ("iter_0000007" if fixture.startswith("megatron") else "global_step2"))
    oracle = path / ("transformers/model.safetensors" if fixture.startswith("megatron") else "masters.safetensors")
    weights = load_file(oracle)
    if "frozen.weight" in held.tensors:  # which DeepSpeed's own conversion leaves out
        weights["frozen.weight"] = held.read("frozen.weight").clone()
    base = save_tensors(tmp_path / "base", moved(weights, 1e-3))
    plain = tables(base, save_tensors(tmp_path / "plain", weights), tmp_path / "expected")
    assert_same(tables(base, held.path, tmp_path / "out"), plain)


def test_an_adapter_over_its_base_is_its_merged_checkpoint(tuned: Weights, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    base, adapter, merged = save_tensors(tmp_path / "base", tuned), tmp_path / "adapter", dict(tuned)
    adapter.mkdir()
    factors = {}
    for name in [name for name in tuned if name.endswith(("q_proj.weight", "down_proj.weight"))]:
        B, A = (
            torch.randn(*shape, generator=generator) for shape in ((len(tuned[name]), 2), (2, tuned[name].shape[1]))
        )
        stem = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        factors |= {f"{stem}A.weight": A, f"{stem}B.weight": B}
        merged[name] = tuned[name] + 1.5 * (B @ A)
    save_file(factors, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 3}))
    plain = tables(base, save_tensors(tmp_path / "merged", merged), tmp_path / "expected")
    assert_same(tables(base, adapter, tmp_path / "out"), plain)


H, D, HIDDEN, INNER, EXPERTS = 4, 6, 24, 20, 3


def split_weights(*, experts: bool = False) -> Weights:
    """Two layers with every matrix a tensor of its own."""
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, int]] = {}
    for layer in range(2):
        home = f"model.layers.{layer}."
        shapes |= {f"{home}self_attn.{part}_proj.weight": (H * D, HIDDEN) for part in "qkvo"}
        for mlp in [f"mlp.experts.{e}" for e in range(EXPERTS)] if experts else ["mlp"]:
            shapes |= {f"{home}{mlp}.{part}_proj.weight": (INNER, HIDDEN) for part in ("gate", "up")}
            shapes[f"{home}{mlp}.down_proj.weight"] = (HIDDEN, INNER)
    return {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}


def phi3(split: Weights, home: str) -> Weights:
    q, k, v, o = (split[f"{home}self_attn.{part}_proj.weight"] for part in "qkvo")
    gate, up, down = (split[f"{home}mlp.{part}_proj.weight"] for part in ("gate", "up", "down"))
    attention = {"self_attn.qkv_proj": torch.cat([q, k, v]), "self_attn.o_proj": o}
    parts = {**attention, "mlp.gate_up_proj": torch.cat([gate, up]), "mlp.down_proj": down}
    return {f"{home}{name}.weight": tensor for name, tensor in parts.items()}


def gpt_neox(split: Weights, home: str) -> Weights:
    q, k, v, o = (split[f"{home}self_attn.{part}_proj.weight"] for part in "qkvo")
    up, down = (split[f"{home}mlp.{part}_proj.weight"] for part in ("up", "down"))
    by_head = torch.cat([torch.cat([part[i * D : (i + 1) * D] for part in (q, k, v)]) for i in range(H)])
    parts = {"attention.query_key_value": by_head, "attention.dense": o}
    parts |= {"mlp.dense_h_to_4h": up, "mlp.dense_4h_to_h": down}
    return {f"{home.replace('model.', 'gpt_neox.')}{name}.weight": tensor for name, tensor in parts.items()}


def gpt2(split: Weights, home: str) -> Weights:
    q, k, v, o = (split[f"{home}self_attn.{part}_proj.weight"] for part in "qkvo")
    up, down = (split[f"{home}mlp.{part}_proj.weight"] for part in ("up", "down"))
    parts = {"attn.c_attn": torch.cat([q, k, v]), "attn.c_proj": o, "mlp.c_fc": up, "mlp.c_proj": down}
    return {f"{home.replace('model.layers', 'transformer.h')}{name}.weight": W.T for name, W in parts.items()}


def stacked(split: Weights, home: str) -> Weights:
    def stack(what: str) -> Tensor:
        return torch.stack([split[f"{home}mlp.experts.{e}.{what}_proj.weight"] for e in range(EXPERTS)])

    attention = {name: tensor for name, tensor in split.items() if name.startswith(f"{home}self_attn")}
    fused = torch.cat([stack("gate"), stack("up")], dim=1)
    return {**attention, f"{home}mlp.experts.gate_up_proj": fused, f"{home}mlp.experts.down_proj": stack("down")}


@pytest.mark.parametrize("layout", [phi3, gpt_neox, gpt2, stacked])
def test_a_fused_or_stacked_layout_is_the_split_one(layout: Callable[[Weights, str], Weights], tmp_path: Path) -> None:
    after = split_weights(experts=layout is stacked)
    if layout in (gpt_neox, gpt2):  # which have no gate
        after = {name: tensor for name, tensor in after.items() if "gate_proj" not in name}
    config = {"model_type": layout.__name__, "num_attention_heads": H}
    found: dict[bool, list[pl.DataFrame]] = {}
    for fused in (False, True):
        ends = []
        for name, weights in (("base", moved(after, 1e-3)), ("tuned", after)):
            if fused:
                weights = {k: W for i in range(2) for k, W in layout(weights, f"model.layers.{i}.").items()}
            ends.append(save_tensors(tmp_path / f"{name}-{fused}", weights, config))
        found[fused] = tables(*ends, tmp_path / f"out-{fused}")
    assert set(found[True][0]["matrix"]) == {name.removeprefix("model.").removesuffix(".weight") for name in after}
    assert_same(found[True], found[False])
