"""PEFT adapters over weights held as (inputs, outputs) and over a head tied to the embedding, against PEFT itself."""

from __future__ import annotations

import json
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from checkpoints_on_disk import VOCABULARY, save_adapter, save_model, save_tensors
from geopd.checkpoints import Checkpoint, CheckpointError, open_checkpoint

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # peft asks transformers by a name it will drop
    pytest.mark.filterwarnings("ignore:Model config"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
    pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied"),
]
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16}


def adapted(family: str, path: Path, model_settings: dict[str, Any], **settings: Any) -> tuple[Any, Checkpoint]:
    """PEFT's model, loaded from an adapter with random factors over a base, and what we read of the two."""
    base = save_model(family, path / "base", dtype=torch.float32, **model_settings)
    loaded = save_adapter(base, path / "adapter", **settings).eval()
    return loaded, open_checkpoint(path / "adapter", base)


def assert_same(held: Checkpoint, merged: dict[str, Tensor]) -> None:
    assert [name for name in held.tensors if not torch.equal(held.read(name), merged[name])] == []


TARGETS = {
    "a linear head last": ["attn.c_proj", "lm_head"],
    "all kinds": ["c_attn", "c_proj", "c_fc", "lm_head"],
    "not square": ["c_fc", "lm_head"],
}


@pytest.mark.parametrize("named", ["gpt2", None])
@pytest.mark.parametrize("flag", [False, True])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("targets", TARGETS)
def test_weights_of_both_ways_round_in_one_adapter(
    targets: str, dora: bool, flag: bool, named: str | None, tmp_path: Path
) -> None:
    model, held = adapted("gpt2", tmp_path, GPT2, target_modules=TARGETS[targets], use_dora=dora, fan_in_fan_out=flag)
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["fan_in_fan_out"] is False, "what the last module, which is linear, set for all"
    if named is None:
        config = tmp_path / "base" / "config.json"
        kept = {key: value for key, value in json.loads(config.read_text()).items() if key != "model_type"}
        config.write_text(json.dumps(kept))
        held = open_checkpoint(tmp_path / "adapter", tmp_path / "base")
    assert_same(held, model.merge_and_unload().state_dict())


def test_a_flag_set_for_a_family_without_conv1d_names_holds(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, a, b = (torch.randn(shape, generator=generator) for shape in ((4, 4), (2, 4), (4, 2)))
    base = save_tensors(tmp_path / "base", {"model.w.weight": weight}, {"model_type": "own"})
    for flag in (True, False):
        path = tmp_path / f"adapter{flag}"
        path.mkdir()
        factors = {"base_model.model.model.w.lora_A.weight": a, "base_model.model.model.w.lora_B.weight": b}
        save_file(factors, path / "adapter_model.safetensors")
        (path / "adapter_config.json").write_text(
            json.dumps({"peft_type": "LORA", "lora_alpha": 2, "fan_in_fan_out": flag})
        )
        update = b @ a
        assert torch.equal(open_checkpoint(path, base).read("model.w.weight"), weight + (update.T if flag else update))


TIED = {"tie_word_embeddings": True}
WHOLE: dict[str, dict[str, Any]] = {
    "both saved": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "tying ensured": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
}


@pytest.mark.parametrize("kind", WHOLE)
def test_a_head_and_embedding_saved_whole_over_a_tied_base_are_pefts_merge(kind: str, tmp_path: Path) -> None:
    model, held = adapted("llama", tmp_path, TIED, **WHOLE[kind])
    assert "lm_head.weight" not in open_checkpoint(tmp_path / "base").tensors
    assert held.tensors["lm_head.weight"].shape == (VOCABULARY, 32)
    assert_same(held, model.merge_and_unload().state_dict())


FACTORED: dict[str, dict[str, Any]] = {
    "head": {"target_modules": ["q_proj", "lm_head"], "save_embedding_layers": False},
    "head, saved whole beside": {"target_modules": ["q_proj", "lm_head"]},
    "head with DoRA": {"target_modules": ["lm_head"], "use_dora": True},
    "both": {"target_modules": ["lm_head", "embed_tokens"], "ensure_weight_tying": True},
}


@pytest.mark.parametrize(
    ("family", "kind"), [("gpt2", kind) for kind in FACTORED if kind != "both"] + [("llama", kind) for kind in FACTORED]
)
def test_factors_on_a_tied_head_are_what_the_adapted_model_computes(family: str, kind: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    settings = dict(FACTORED[kind])
    if family == "gpt2":
        names = {"q_proj": "c_attn", "lm_head": "lm_head"}
        settings["target_modules"] = [names[target] for target in settings["target_modules"]]
    save = settings.pop("save_embedding_layers", True)
    base_settings = (GPT2 if family == "gpt2" else {}) | TIED
    model, held = adapted(family, tmp_path, base_settings, **settings)
    if not save:
        from safetensors.torch import load_file

        file = tmp_path / "adapter" / "adapter_model.safetensors"
        kept = {name: tensor for name, tensor in load_file(file).items() if "base_layer" not in name}
        save_file(kept, file)
        held = open_checkpoint(tmp_path / "adapter", tmp_path / "base")
    tokens = torch.arange(8)[None]
    expected = model(tokens).logits
    untied = AutoModelForCausalLM.from_pretrained(tmp_path / "base", tie_word_embeddings=False)
    untied.load_state_dict({name: held.read(name) for name in held.tensors}, strict=True)
    assert torch.allclose(untied.eval()(tokens).logits, expected, atol=1e-5)
    (warning,) = held.warnings
    assert "which the base has tied to its head or embedding" in warning


def test_a_head_over_a_base_that_ties_none_is_refused(tmp_path: Path) -> None:
    adapted("llama", tmp_path, TIED, **WHOLE["both saved"])
    config = tmp_path / "base" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": False}))
    with pytest.raises(CheckpointError, match=r"adapts lm_head\.weight, which .* does not hold \(1 such\)"):
        open_checkpoint(tmp_path / "adapter", tmp_path / "base")


def test_patterns_are_not_tried_on_names_without_end(tmp_path: Path) -> None:
    module = "model" + ".a" * 3000
    base = save_tensors(tmp_path / "base", {f"{module}.weight": torch.zeros(2, 2)})
    path = tmp_path / "adapter"
    path.mkdir()
    factors = {"lora_A": torch.ones(1, 2), "lora_B": torch.ones(2, 1)}
    save_file(
        {f"base_model.model.{module}.{kind}.weight": factor for kind, factor in factors.items()},
        path / "adapter_model.safetensors",
    )
    settings = {"peft_type": "LORA", "lora_alpha": 4, "alpha_pattern": {"a.*a.*b": 3}}
    (path / "adapter_config.json").write_text(json.dumps(settings))
    started = time.monotonic()
    with pytest.raises(CheckpointError, match="alpha_pattern over a module of 6,005 letters"):
        open_checkpoint(path, base)
    assert time.monotonic() - started < 1


def test_a_tensor_of_the_adapter_that_cannot_be_read_fails_alone(tmp_path: Path) -> None:
    """One that replaces the base's, as well as one that updates it."""
    q, k, norm = "model.q.weight", "model.k.weight", "model.norm.weight"
    base = save_tensors(tmp_path / "base", {q: torch.ones(4, 3), k: torch.ones(4, 3), norm: torch.ones(3)})
    path = tmp_path / "adapter"
    path.mkdir()
    sides = {"A": (2, 3), "B": (4, 2)}
    factors = {f"{m}.lora_{side}.weight": torch.ones(sides[side]) for m in ("model.q", "model.k") for side in "AB"}
    stored = {f"base_model.model.{name}": tensor for name, tensor in ({norm: torch.ones(3)} | factors).items()}
    torch.save(stored, tmp_path / "whole.bin")
    with zipfile.ZipFile(tmp_path / "whole.bin") as whole, zipfile.ZipFile(path / "adapter_model.bin", "w") as holed:
        for entry in whole.namelist():
            if not entry.endswith(("/data/0", "/data/1")):  # the norm, and A of q
                holed.writestr(entry, whole.read(entry))
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 2}))
    held = open_checkpoint(path, base)
    assert set(held.tensors) == {k}
    assert set(held.unreadable) == {q, norm}
    assert torch.equal(held.read(k), torch.full((4, 3), 3.0))
