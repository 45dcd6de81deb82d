"""DeepSpeed, verl's way of saving, and PEFT: what is read is bit for bit what their own tools make of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from checkpoints_on_disk import save_model
from geopd.checkpoints import Checkpoint, checkpoint_digest, open_checkpoint

HERE = Path(__file__).parent


def assert_holds(checkpoint: Checkpoint, expected: Checkpoint) -> None:
    assert not checkpoint.unreadable
    assert expected.tensors.keys() <= checkpoint.tensors.keys()
    for name in expected.tensors:
        assert torch.equal(checkpoint.read(name), expected.read(name)), name


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeeds_masters_are_those_of_its_own_conversion(stage: int) -> None:
    folder = HERE / "golden" / f"zero{stage}"
    assert_holds(open_checkpoint(folder), open_checkpoint(folder / "masters.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "world"), [("fsdp1", 2), ("fsdp2", 2), ("hsdp", 4)])
def test_ranks_saved_as_verl_does_are_the_model(kind: str, world: int, tmp_path: Path) -> None:
    model = save_model("qwen3", tmp_path / "model")
    command = [sys.executable, HERE / "verl_writer.py", model, tmp_path / "global_step_3", world, kind]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert checkpoint_digest(tmp_path / "global_step_3") == checkpoint_digest(model)


KINDS: dict[str, dict[str, object]] = {
    "LoRA": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers by a name it will drop
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_what_peft_merges(kind: str, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = save_model("qwen3", tmp_path / "base", dtype=torch.float32)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], **KINDS[kind])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            weight.data.add_(0.05 * torch.randn(weight.shape, generator=generator))
    model.save_pretrained(tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = open_checkpoint(tmp_path / "merged")
    read = open_checkpoint(tmp_path / "adapter", base)
    assert_holds(read, merged)
    assert read.digest() == merged.digest() != checkpoint_digest(base)
