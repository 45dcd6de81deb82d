"""PEFT adapters read over their base: the tensors of PEFT's own merge, and a named reason for every misfit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoints_on_disk import save_adapter, save_model, save_tensors
from geopd.checkpoints import CheckpointError, checkpoint_digest, holds_weights, open_checkpoint, open_run
from hostile import poisoned

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers by a name it will drop
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "fan_in_fan_out": False, "base_model_name_or_path": None}
BASE = {"model.q.weight": torch.arange(12.0).reshape(4, 3), "model.norm.weight": torch.ones(3)}


def write_adapter(path: Path, factors: dict[str, Tensor] | None = None, **settings: Any) -> Path:
    """An adapter on ``model.q`` as PEFT lays it out."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 3, generator=generator), torch.randn(4, 2, generator=generator)
    found = {"model.q.lora_A.weight": a, "model.q.lora_B.weight": b} if factors is None else factors
    path.mkdir(parents=True, exist_ok=True)
    save_file(
        {f"base_model.model.{name}": tensor for name, tensor in found.items()}, path / "adapter_model.safetensors"
    )
    (path / "adapter_config.json").write_text(json.dumps(CONFIG | settings))
    return path


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_tensors(tmp_path / "base", BASE, {"model_type": "qwen3"})


def refusal(path: Path, base: Path | None = None) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path, base)
    return str(caught.value)


GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 16}
KINDS: dict[str, tuple[str, torch.dtype, dict[str, Any]]] = {
    "LoRA over bf16": ("qwen3", torch.bfloat16, {"target_modules": ["q_proj", "down_proj"]}),
    "DoRA over bf16": ("qwen3", torch.bfloat16, {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "patterns of layers": (
        "qwen3",
        torch.float32,
        {
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {"layers.0.self_attn.q_proj": 2},
            "alpha_pattern": {r".*layers\.1\.self_attn\.q_proj": 5, "v_proj": 32},
        },
    ),
    "embedding": ("qwen3", torch.float32, {"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding with DoRA": ("qwen3", torch.float32, {"target_modules": ["embed_tokens"], "use_dora": True}),
    "biases": ("qwen2", torch.float32, {"target_modules": ["q_proj"], "bias": "all"}),
    "Conv1D": ("gpt2", torch.float32, {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "Conv1D with DoRA": ("gpt2", torch.float32, {"target_modules": ["c_fc"], "fan_in_fan_out": True, "use_dora": True}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.filterwarnings("ignore:Model config")
def test_a_real_adapter_loaded_and_merged_by_peft_is_bit_identical(kind: str, tmp_path: Path) -> None:
    family, dtype, settings = KINDS[kind]
    path = save_model(family, tmp_path / "base", dtype=dtype, **(GPT2 if family == "gpt2" else {}))
    loaded = save_adapter(path, tmp_path / "adapter", **settings)
    loaded.merge_and_unload().save_pretrained(tmp_path / "merged")
    adapted, merged = open_checkpoint(tmp_path / "adapter", path), open_checkpoint(tmp_path / "merged")
    assert set(adapted.tensors) == set(merged.tensors)
    assert {n: i.dtype for n, i in adapted.tensors.items()} == {n: i.dtype for n, i in merged.tensors.items()}
    assert [name for name in merged.tensors if not torch.equal(adapted.read(name), merged.read(name))] == []
    assert adapted.digest() == merged.digest() != checkpoint_digest(path)
    assert adapted.warnings == ()
    assert checkpoint_digest(tmp_path / "adapter") == merged.digest(), "the local base its config names is used"


def test_the_update_is_scale_times_b_times_a(base: Path, tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "adapter")
    factors = load_file(path / "adapter_model.safetensors")
    product = factors["base_model.model.model.q.lora_B.weight"] @ factors["base_model.model.model.q.lora_A.weight"]
    checkpoint = open_checkpoint(path, base)
    assert (checkpoint.format, checkpoint.config["model_type"]) == ("PEFT adapter", "qwen3")
    assert torch.equal(checkpoint.read("model.q.weight"), BASE["model.q.weight"] + product * 2.0)
    assert torch.equal(checkpoint.read("model.norm.weight"), BASE["model.norm.weight"])
    rank_stabilised = open_checkpoint(write_adapter(tmp_path / "rs", use_rslora=True), base)
    assert torch.equal(rank_stabilised.read("model.q.weight"), BASE["model.q.weight"] + product * (4 / 2**0.5))


def test_the_base_is_not_read_whole(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from geopd.checkpoints.safetensors_format import SafetensorsSource

    read: list[str] = []
    original = SafetensorsSource.read
    monkeypatch.setattr(SafetensorsSource, "read", lambda self, name: read.append(name) or original(self, name))
    checkpoint = open_checkpoint(write_adapter(tmp_path / "adapter"), base)
    assert [name for name in read if "lora" not in name] == []
    checkpoint.read("model.q.weight")
    assert [name for name in read if "lora" not in name] == ["model.q.weight"]


def test_a_pickled_adapter_is_the_same(base: Path, tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "adapter")
    digest = checkpoint_digest(path, base)
    file = path / "adapter_model.safetensors"
    torch.save(load_file(file), path / "adapter_model.bin")
    file.unlink()
    assert checkpoint_digest(path, base) == digest
    poisoned(path / "adapter_model.bin", tmp_path / "canary")
    assert "nothing was run" in refusal(path, base)
    assert not (tmp_path / "canary").exists()


def test_adapters_in_checkpoint_folders_are_a_run(base: Path, tmp_path: Path) -> None:
    for step in (10, 20):
        folder = write_adapter(tmp_path / "run" / f"checkpoint-{step}")
        torch.save({"state": {}}, folder / "optimizer.pt")
        assert holds_weights(folder)
    run = open_run(tmp_path / "run")
    assert [step for step, _ in run.checkpoints] == [10, 20]
    assert all(open_checkpoint(path, base).format == "PEFT adapter" for _, path in run.checkpoints)


def test_a_dead_adapter_is_a_warning(base: Path, tmp_path: Path) -> None:
    factors = {"model.q.lora_A.weight": torch.ones(2, 3), "model.q.lora_B.weight": torch.zeros(4, 2)}
    checkpoint = open_checkpoint(write_adapter(tmp_path / "dead", factors), base)
    assert checkpoint.warnings == (
        f"{tmp_path / 'dead'}: a dead adapter: every B is zero, so it changes none of the weights it adapts",
    )
    assert checkpoint.digest() == checkpoint_digest(base)


def test_a_base_other_than_the_one_its_config_names_is_told(base: Path, tmp_path: Path) -> None:
    other = save_tensors(tmp_path / "other", BASE)
    path = write_adapter(tmp_path / "adapter", base_model_name_or_path=str(other))
    (warning,) = open_checkpoint(path, base).warnings
    assert f"trained over {other}, read over {base}" in warning
    assert open_checkpoint(path).warnings == ()


def test_a_base_that_is_not_the_adapters_is_an_error_that_names_both(base: Path, tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "adapter")
    for wrong, reason in (
        ({"model.k.weight": torch.ones(4, 3)}, "adapts model.q.weight, which"),
        ({"model.q.weight": torch.ones(5, 3)}, "has factors of shapes (2, 3) and (4, 2), and is (5, 3) in"),
    ):
        message = refusal(path, save_tensors(tmp_path / reason[:6], wrong))
        assert reason in message
        assert str(path) in message
        assert str(tmp_path / reason[:6]) in message
        assert "is this the base it was trained over?" in message


@pytest.mark.parametrize("named", [None, "org/name"])
def test_an_adapter_without_a_base_at_hand_asks_for_it(named: str | None, tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "adapter", base_model_name_or_path=named)
    message = refusal(path)
    assert "name the base it was trained over" in message
    assert str(path) in message
    assert named is None or named in message


def test_an_adapter_over_an_adapter_is_refused(base: Path, tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "adapter", base_model_name_or_path=str(tmp_path / "adapter"))
    first = write_adapter(tmp_path / "first", base_model_name_or_path=str(base))
    for found in (refusal(path), refusal(path, first)):
        assert "is an adapter too: merge it into its own base first" in found


def test_an_embedding_saved_with_more_rows_replaces_the_bases(base: Path, tmp_path: Path) -> None:
    """Training resized the vocabulary; what compares the two checkpoints says so."""
    path = write_adapter(tmp_path / "adapter", {"model.q.weight": torch.ones(6, 3)})
    checkpoint = open_checkpoint(path, base)
    assert checkpoint.tensors["model.q.weight"].shape == (6, 3)
    assert torch.equal(checkpoint.read("model.q.weight"), torch.ones(6, 3))


def test_an_adapter_without_its_config_is_refused(base: Path, tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "adapter")
    (path / "adapter_config.json").unlink()
    assert "an adapter without its adapter_config.json, which holds its scale" in refusal(path, base)


def test_a_config_without_its_adapter_is_refused(base: Path, tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "adapter")
    (path / "adapter_model.safetensors").unlink()
    assert "has adapter_config.json and no adapter_model.safetensors" in refusal(path, base)


SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "another kind": ({"peft_type": "IA3"}, "peft_type 'IA3' is not read"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights=pissa_niter_4 is not read"),
    "parameters": ({"target_parameters": ["experts.gate_up_proj"]}, "target_parameters is not read"),
    "replicated layers": ({"layer_replication": [[0, 1]]}, "layer_replication is not read"),
    "no alpha": ({"lora_alpha": None}, "lora_alpha or alpha_pattern is no number"),
    "alpha of text": ({"alpha_pattern": {"q": "x"}}, "lora_alpha or alpha_pattern is no number"),
    "an alpha beyond any float": ({"lora_alpha": 10**400}, "lora_alpha or alpha_pattern is no number"),
    "an infinite alpha": ({"lora_alpha": float("inf")}, "lora_alpha or alpha_pattern is no number"),
    "a pattern that ends in a backslash": ({"alpha_pattern": {"q\\": 1}}, r"alpha_pattern 'q\\' is not read"),
    "a pattern with an unknown escape": ({"alpha_pattern": {"\\q": 1}}, r"alpha_pattern '\\q' is not read"),
    "patterns that run away": ({"alpha_pattern": {"(a+)+b": 1}}, "alpha_pattern '(a+)+b' is not read"),
    "alpha_pattern of another type": ({"alpha_pattern": [1]}, "lora_alpha or alpha_pattern is no number"),
    "a base that is a number": ({"base_model_name_or_path": 3}, "base_model_name_or_path '3' is no path"),
    "a base without end": ({"base_model_name_or_path": "x" * 5000}, "xxx' is no path"),
    "a base with a null byte": ({"base_model_name_or_path": "a\0b"}, "is no path"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_that_are_not_read_are_named(case: str, base: Path, tmp_path: Path) -> None:
    settings, message = SETTINGS[case]
    path = write_adapter(tmp_path / "adapter", **settings)
    found = refusal(path, base)
    assert message in found
    assert str(path / "adapter_config.json") in found


FACTORS: dict[str, tuple[dict[str, Tensor], str]] = {
    "one factor": ({"model.q.lora_A.weight": torch.ones(2, 3)}, "has one factor of two (lora_A)"),
    "nothing": ({}, "holds no tensors"),
    "ranks that differ": (
        {"model.q.lora_A.weight": torch.ones(2, 3), "model.q.lora_B.weight": torch.ones(4, 3)},
        "has factors of shapes (2, 3) and (4, 3)",
    ),
    "magnitudes of another size": (
        {
            "model.q.lora_A.weight": torch.ones(2, 3),
            "model.q.lora_B.weight": torch.ones(4, 2),
            "model.q.lora_magnitude_vector": torch.ones(9),
        },
        "does not have 4 entries",
    ),
}


@pytest.mark.parametrize("case", FACTORS)
def test_factors_that_do_not_fit_are_named(case: str, base: Path, tmp_path: Path) -> None:
    factors, message = FACTORS[case]
    assert message in refusal(write_adapter(tmp_path / "adapter", factors), base)
