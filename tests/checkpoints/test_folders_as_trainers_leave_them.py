"""Every folder that a user of a trainer might name: what it is taken for, or which one to name instead."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from checkpoints_on_disk import save_tensors
from geopd.checkpoints import CheckpointError, open_checkpoint, open_run
from seeded_checkpoints import lay, seed

GOLDEN = Path(__file__).parent / "golden"


def trl(home: Path) -> None:
    for step in (100, 200):
        folder = lay("safetensors_file", home / "runs" / "opd" / f"checkpoint-{step}")
        for state in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
            torch.save({"state": {0: {"exp_avg": torch.ones(3)}}}, folder / state)


def peft(home: Path) -> None:
    for step in (100, 300):
        folder = lay("adapter", home / "lora" / f"checkpoint-{step}")
        shutil.rmtree(folder / "base")


def torchtitan(home: Path) -> None:
    for step in (10, 20):
        lay("distributed", home / "outputs" / "checkpoint" / f"step-{step}")


def accelerate(home: Path) -> None:
    for inside in ("pytorch_model_fsdp_0", "optimizer_0"):
        lay("distributed", home / "out" / "checkpoint-100" / inside)


def verl(home: Path) -> None:
    for step in (5, 10):
        folder = lay("verl", home / "grpo" / f"global_step_{step}" / "actor")
        for other in (folder / "optim_world_size_2_rank_0.pt", folder.parent / "data.pt"):
            torch.save({}, other)
    (home / "grpo" / "latest_checkpointed_iteration.txt").write_text("10")


def nemo_rl(home: Path) -> None:
    for inside in ("weights", "optimizer"):
        lay("distributed", home / "dpo" / "step_170" / "policy" / inside)
    (home / "dpo" / "step_170" / "training_info.json").write_text("{}")


def nemo_rl_megatron(home: Path) -> None:
    weights = home / "dpo" / "step_170" / "policy" / "weights"
    shutil.copytree(GOLDEN / "megatron_dense" / "iter_0000007", weights / "iter_0000000")
    (weights / "latest_checkpointed_iteration.txt").write_text("0")


def slime(home: Path) -> None:
    shutil.copytree(GOLDEN / "megatron_dense" / "iter_0000007", home / "slime" / "iter_0000099")
    (home / "slime" / "latest_checkpointed_iteration.txt").write_text("99")


def deepspeed(home: Path) -> None:
    lay("deepspeed", home / "zero")


def deepspeed_of_the_trainer(home: Path) -> None:
    lay("deepspeed", home / "run" / "checkpoint-1")
    save_tensors(
        home / "run" / "checkpoint-1", load_file(lay("safetensors_file", home / "weights") / "model.safetensors")
    )


# layout, what is named -> label, steps, format
NAMED: list[tuple[Callable[[Path], None], str, str, tuple[int | None, ...], str]] = [
    (trl, "runs/opd", "opd", (100, 200), "safetensors"),
    (trl, "runs/opd/checkpoint-200", "opd", (200,), "safetensors"),
    (peft, "lora", "lora", (100, 300), "PEFT adapter"),
    (peft, "lora/checkpoint-300", "lora", (300,), "PEFT adapter"),
    (torchtitan, "outputs/checkpoint", "checkpoint", (10, 20), "torch distributed checkpoint"),
    (torchtitan, "outputs/checkpoint/step-20", "checkpoint", (20,), "torch distributed checkpoint"),
    (accelerate, "out", "out", (100,), "torch distributed checkpoint"),
    (accelerate, "out/checkpoint-100", "out", (100,), "torch distributed checkpoint"),
    (verl, "grpo", "grpo", (5, 10), "verl FSDP"),
    (verl, "grpo/global_step_10", "grpo", (10,), "verl FSDP"),
    (verl, "grpo/global_step_10/actor", "actor", (None,), "verl FSDP"),
    (nemo_rl, "dpo", "dpo", (170,), "torch distributed checkpoint"),
    (nemo_rl, "dpo/step_170", "dpo", (170,), "torch distributed checkpoint"),
    (nemo_rl, "dpo/step_170/policy/weights", "weights", (None,), "torch distributed checkpoint"),
    (nemo_rl_megatron, "dpo", "dpo", (170,), "Megatron torch_dist"),
    (slime, "slime", "slime", (99,), "Megatron torch_dist"),
    (slime, "slime/iter_0000099", "slime", (99,), "Megatron torch_dist"),
    (deepspeed, "zero", "zero", (1,), "DeepSpeed ZeRO"),
    (deepspeed, "zero/global_step1", "zero", (1,), "DeepSpeed ZeRO"),
    (deepspeed_of_the_trainer, "run", "run", (1,), "safetensors"),
    (deepspeed_of_the_trainer, "run/checkpoint-1", "run", (1,), "safetensors"),
    (deepspeed_of_the_trainer, "run/checkpoint-1/global_step1", "checkpoint-1", (1,), "DeepSpeed ZeRO"),
]


@pytest.mark.parametrize(("layout", "named", "label", "steps", "form"), NAMED)
def test_what_a_folder_is_taken_for(
    layout: Callable[[Path], None],
    named: str,
    label: str,
    steps: tuple[int | None, ...],
    form: str,
    tmp_path: Path,
) -> None:
    layout(tmp_path)
    run = open_run(tmp_path / named)
    assert (run.label, tuple(step for step, _ in run.checkpoints), run.warnings) == (label, steps, ())
    base = save_tensors(tmp_path / "base", load_file(lay("safetensors_file", tmp_path / "seed") / "model.safetensors"))
    for _, path in run.checkpoints:
        checkpoint = open_checkpoint(path, base)
        assert checkpoint.format == form
        assert not checkpoint.unreadable
        assert not any("exp_avg" in name for name in checkpoint.tensors)


@pytest.mark.parametrize(
    ("layout", "named", "instead"),
    [
        (trl, "", "runs/opd"),
        (torchtitan, "outputs", "outputs/checkpoint"),
        (verl, "", "grpo"),
        (nemo_rl, "dpo/step_170/policy", "dpo/step_170/policy/weights"),
        (slime, "", "slime"),
    ],
)
def test_a_folder_above_is_told_what_to_name_instead(
    layout: Callable[[Path], None], named: str, instead: str, tmp_path: Path
) -> None:
    layout(tmp_path)
    with pytest.raises(CheckpointError, match=rf"{tmp_path / named}: holds no weights .*; name {tmp_path / instead}, "):
        open_checkpoint(open_run(tmp_path / named).checkpoints[0][1])


def test_a_folder_of_one_state_dict_is_told_to_name_the_file(tmp_path: Path) -> None:
    (tmp_path / "final.pt").write_bytes(seed("zip_pickle").files["pytorch_model.bin"])
    with pytest.raises(CheckpointError, match=r"if final\.pt is a model's state dict, name the file itself"):
        open_checkpoint(tmp_path)
    assert open_checkpoint(tmp_path / "final.pt").format == "torch zip"
