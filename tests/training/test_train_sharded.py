"""Checkpoints and evaluations of a model sharded over two CPU processes, against the whole model."""

import json

import pytest
import torch
from safetensors.torch import load_file
from sharded_run import judged
from test_two_processes import launch

from geopd.problems import character_tokenizer, distinct_problems
from geopd.training import VerifiableTask, accuracy, build_model, load_model
from geopd.training.checkpoint_schedule import merged_weights
from tiny_runs import SHAPE, weights

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # PEFT reads it
]


def test_a_sharded_model_is_saved_and_evaluated_as_a_whole_one(tmp_path):
    launch("sharded_run.py", 2, tmp_path, "full")
    tokenizer = character_tokenizer()
    whole = build_model(SHAPE, tokenizer, 0)
    with torch.no_grad():
        whole.lm_head.weight.mul_(40)
    saved = load_model(tmp_path / "checkpoint-3")
    for (name, value), expected in zip(saved.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(value, expected), name
    task = VerifiableTask(distinct_problems("selection", 5, 0), lambda p: p.prompt.strip(), judged)
    expected = accuracy(whole, tokenizer, task, temperature=0.0, max_new_tokens=10, seed=0)
    assert json.loads((tmp_path / "accuracy.json").read_text()) == pytest.approx(expected)
    assert 0 < expected[0] < 1


def test_a_sharded_adapter_is_merged_as_a_whole_one(tmp_path):
    from peft import LoraConfig, get_peft_model

    launch("sharded_run.py", 2, tmp_path, "lora")
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(build_model(SHAPE, character_tokenizer(), 0), lora)
    expected = merged_weights(model, torch.load(tmp_path / "state.pt"))
    saved = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    assert set(saved) == set(expected)
    assert all(torch.equal(saved[name], expected[name]) for name in saved)
    assert (tmp_path / "checkpoint-3" / "adapter" / "adapter_config.json").is_file()


def test_tied_weights_are_saved_once(tmp_path):
    launch("sharded_run.py", 2, tmp_path, "tied")
    saved = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    whole = build_model(SHAPE, character_tokenizer(), 0)
    assert set(dict(whole.named_parameters())) - set(saved) == {"lm_head.weight"}
    assert torch.equal(saved["model.embed_tokens.weight"], whole.model.embed_tokens.weight)


def test_two_processes_go_on_to_the_same_bits(tmp_path):
    """Each process has random states and a share of the prompts of its own."""
    launch("two_process_resume.py", 2, tmp_path)
    one, two = weights(tmp_path / "whole", 8), weights(tmp_path / "killed", 8)
    assert all(torch.equal(one[name], two[name]) for name in one)
    start = load_file(tmp_path / "student" / "model.safetensors")
    assert not torch.equal(one["lm_head.weight"], start["lm_head.weight"])
