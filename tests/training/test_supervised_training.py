"""Supervised training against a plain-torch loop, and what a run leaves on disk."""

import json
import random

import pytest
import torch
from safetensors.torch import load_file

from geopd.problems import CLEAN, Demonstration, character_tokenizer, demonstrations
from geopd.training import (
    ModelShape,
    OptimiserSettings,
    StepReport,
    build_model,
    load_model,
    load_tokenizer,
    parse_config,
    save_checkpoint,
    supervised_dataset,
    trainer_arguments,
)
from geopd.training import train as train_run

SHAPE = ModelShape(hidden=32, layers=2, heads=2, key_value_heads=1, intermediate=48)
OPTIMISER = OptimiserSettings(4, 1e-2, warmup_steps=2, weight_decay=0.1, clip_norm=0.5)


@pytest.fixture(scope="module")
def tokenizer():
    return character_tokenizer()


def train(tokenizer, run, save_at, mask_prompt=True, seed=0):
    model = build_model(SHAPE, tokenizer, seed=0)
    texts = demonstrations(4 * 8, CLEAN, random.Random(0))
    reported = []
    settings = trainer_arguments(OPTIMISER, run, 8, seed) | {
        "checkpoint_steps": save_at,
        "resume_every": 0,
        "max_length": None,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "train_sampling_strategy": "sequential",
    }
    train_run(
        parse_config("sft", settings=settings),
        model=model,
        tokenizer=tokenizer,
        dataset=supervised_dataset(texts, tokenizer, mask_prompt=mask_prompt),
        callbacks=[StepReport(reported.append)],
        quiet=True,
    )
    return model, texts, reported


def plain_training(tokenizer, texts, mask_prompt):
    """AdamW by hand over the same texts in order: decay on matrices only, gradients clipped, linear warm-up."""
    model = build_model(SHAPE, tokenizer, seed=0)
    decayed = [p for name, p in model.named_parameters() if "norm" not in name]
    rest = [p for name, p in model.named_parameters() if "norm" in name]
    optimiser = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
        lr=1e-2, betas=(0.9, 0.98), eps=1e-8,
    )  # fmt: skip
    for step in range(4):
        optimiser.zero_grad()
        loss, tokens = torch.zeros(()), 0
        for text in texts[step * 8 : step * 8 + 8]:
            ids = torch.tensor([*tokenizer(text.prompt + text.response)["input_ids"], tokenizer.eos_token_id])
            logps = torch.log_softmax(model(input_ids=ids[None]).logits[0, :-1], dim=-1)
            chosen = logps.gather(1, ids[1:, None]).squeeze(1)
            kept = chosen[len(text.prompt) - 1 :] if mask_prompt else chosen
            loss, tokens = loss - kept.sum(), tokens + len(kept)
        (loss / tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for group in optimiser.param_groups:
            group["lr"] = 1e-2 * min(1.0, step / 2)
        optimiser.step()
    return model


@pytest.mark.parametrize("mask_prompt", [True, False])
def test_weights_are_those_of_a_plain_loop(mask_prompt, tokenizer, tmp_path):
    model, texts, reported = train(tokenizer, tmp_path, save_at=[], mask_prompt=mask_prompt)
    oracle = plain_training(tokenizer, texts, mask_prompt)
    for (name, value), expected in zip(model.named_parameters(), oracle.parameters(), strict=True):
        # Adam divides by the root of tiny second moments, so rounding in a gradient shows magnified in the weight.
        assert torch.allclose(value, expected, atol=1e-4), name
        assert (value - expected).norm() < 1e-4 * expected.norm(), name
    assert reported == [1, 2, 3, 4]


def test_scheduled_checkpoints_are_whole_fp32_and_loadable(tokenizer, tmp_path):
    model, _, _ = train(tokenizer, tmp_path, save_at=[0, 2, 4])
    folders = sorted(p.name for p in tmp_path.iterdir() if p.is_dir())
    assert folders == ["checkpoint-0", "checkpoint-2", "checkpoint-4"]
    for step in (0, 2, 4):
        tensors = load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    first = load_model(tmp_path / "checkpoint-0")
    for value, expected in zip(first.parameters(), build_model(SHAPE, tokenizer, seed=0).parameters(), strict=True):
        assert torch.equal(value, expected)
    for value, expected in zip(load_model(tmp_path / "checkpoint-4").parameters(), model.parameters(), strict=True):
        assert torch.equal(value, expected)
    text = "123+ 45="
    assert load_tokenizer(tmp_path / "checkpoint-2")(text)["input_ids"] == tokenizer(text)["input_ids"]
    config = json.loads((tmp_path / "checkpoint-2" / "config.json").read_text())
    assert (config["model_type"], config["vocab_size"]) == ("qwen3", 24)


def test_saving_replaces_a_leftover_and_keeps_the_dtype_that_was_trained(tokenizer, tmp_path):
    (tmp_path / ".checkpoint-1.partial").mkdir()
    (tmp_path / ".checkpoint-1.partial" / "half").write_text("cut short")
    model = build_model(SHAPE, tokenizer, seed=0)
    save_checkpoint(model, tokenizer, tmp_path, 1)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]
    assert not (tmp_path / "checkpoint-1" / "half").exists()
    save_checkpoint(model.bfloat16(), tokenizer, tmp_path, 2)
    found = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}


def test_prompt_mask_covers_the_prompt_alone(tokenizer):
    text = Demonstration(" 12+ 30=", "0204>42")
    row = supervised_dataset([text], tokenizer, mask_prompt=True)[0]
    assert row["labels"][:8] == [-100] * 8
    assert row["labels"][8:] == row["input_ids"][8:]
    assert row["input_ids"][-1] == tokenizer.eos_token_id
    whole = supervised_dataset([text], tokenizer, mask_prompt=False)[0]
    assert whole["labels"] == whole["input_ids"]


def test_initial_weights_follow_the_seed_and_leave_the_random_state_alone(tokenizer):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first, again, other = (build_model(SHAPE, tokenizer, seed=s) for s in (0, 0, 1))
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first.lm_head.weight, again.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_schedules_reach_the_trainer(tmp_path):
    arguments = trainer_arguments(OptimiserSettings(5, 1e-3, "cosine_to_tenth"), tmp_path, 4, 0)
    assert arguments["lr_scheduler_kwargs"] == {"min_lr_rate": 0.1}
    assert arguments["adam_epsilon"] == OptimiserSettings(5, 1e-3).epsilon


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: ModelShape(hidden=30, heads=4), "hidden=30"),
        (lambda: OptimiserSettings(1, 1e-3, "linear"), "schedule 'linear'"),
        (lambda: OptimiserSettings(0, 1e-3), "steps=0"),
        (lambda: load_model("nowhere"), "nowhere"),
    ],
)
def test_unusable_settings_are_named(call, match):
    with pytest.raises(ValueError, match=match):
        call()
