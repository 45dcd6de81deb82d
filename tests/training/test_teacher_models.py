"""A teacher model scores like a plain forward pass, at any dtype, placed or offloaded."""

import pytest
import torch
from transformers import GenerationConfig

from geopd.problems import character_tokenizer
from geopd.training import build_model
from geopd.training.teacher import ModelTeacher
from tiny_on_policy import SHAPE, plain_logps


@pytest.fixture(scope="module")
def tokenizer():
    return character_tokenizer()


@pytest.fixture
def batch(tokenizer):
    """Two prompts and responses of unequal length: ids and masks, padded left and right."""
    pad = tokenizer.pad_token_id
    prompts = torch.tensor([[pad, pad, 3, 4], [5, 6, 7, 8]])
    answers = torch.tensor([[9, 10, 11], [12, pad, pad]])
    return (
        prompts,
        torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]),
        answers,
        torch.tensor([[1, 1, 1], [1, 0, 0]]),
    )


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("settings", [{}, {"batch_size": 1}, {"offload": True}], ids=str)
def test_scores_are_those_of_a_plain_forward_without_padding(temperature, settings, tokenizer, batch):
    model = build_model(SHAPE, tokenizer, 1)
    prompts, prompt_mask, answers, answer_mask = batch
    found = ModelTeacher(build_model(SHAPE, tokenizer, 1), **settings).token_logps(*batch, temperature)
    assert not found.requires_grad
    for row in range(2):
        here, there = prompt_mask[row].bool(), answer_mask[row].bool()
        expected = plain_logps(model, prompts[row][here], answers[row][there], temperature)
        assert torch.allclose(found[row][there], expected, atol=1e-6)
        assert torch.equal(found[row][~there], torch.zeros(int((~there).sum())))


def test_a_bf16_teacher_scores_in_bf16_and_answers_in_fp32(tokenizer, batch):
    found = ModelTeacher(build_model(SHAPE, tokenizer, 1), dtype=torch.bfloat16)
    assert {value.dtype for value in found.model.parameters()} == {torch.bfloat16}
    scores = found.token_logps(*batch, 1.0)
    assert scores.dtype == torch.float32
    exact = ModelTeacher(build_model(SHAPE, tokenizer, 1)).token_logps(*batch, 1.0)
    assert 0 < float((scores - exact).abs().max()) < 0.05


def test_the_model_is_frozen_and_in_evaluation_mode(tokenizer):
    model = build_model(SHAPE, tokenizer, 1).train()
    ModelTeacher(model)
    assert not model.training
    assert not any(value.requires_grad for value in model.parameters())


def test_generation_keeps_each_response_up_to_its_first_end_token(tokenizer):
    """Greedy, so the oracle is a token-by-token argmax without padding or cache."""
    model = build_model(SHAPE, tokenizer, 1)
    prompts = [[3, 4, 5], [6]]
    ends = [tokenizer.eos_token_id, _greedy(model, prompts[0], 8, ())[2]]
    settings = GenerationConfig(
        max_new_tokens=8, do_sample=False, pad_token_id=tokenizer.pad_token_id, eos_token_id=ends
    )
    found = ModelTeacher(build_model(SHAPE, tokenizer, 1)).generate(prompts, settings, torch.device("cpu"))
    assert found == [_greedy(model, prompt, 8, ends) for prompt in prompts]
    assert found[0][-1] == ends[1]
    assert len(found[0]) <= 3


def test_a_teachers_own_sampling_settings_do_not_sample(tokenizer):
    """A stored min_p of .999 would make sampling greedy, two beams would search: neither draws as the student does."""
    settings = GenerationConfig(
        max_new_tokens=8, do_sample=True, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id
    )
    drawn = []
    for own in ({}, {"min_p": 0.999}, {"num_beams": 2}, {"suppress_tokens": [3, 4, 5]}, {"do_sample": True}):
        model = build_model(SHAPE, tokenizer, 1)
        model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, **own)
        teacher = ModelTeacher(model)
        assert teacher.model.generation_config.eos_token_id == tokenizer.eos_token_id
        torch.manual_seed(5)
        drawn.append(teacher.generate([[3, 4, 5]] * 4, settings, torch.device("cpu")))
    assert all(each == drawn[0] for each in drawn)
    assert len({tuple(row) for row in drawn[0]}) > 1


def _greedy(model, prompt, count, ends):
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in ends:
            break
    return ids[len(prompt) :]


def test_another_temperature_and_unknown_tokens_are_refused(tokenizer, batch):
    teacher = ModelTeacher(build_model(SHAPE, tokenizer, 1))
    teacher.token_logps(*batch, 1.0)
    with pytest.raises(ValueError, match=r"temperature=0\.5, but this teacher scores at 1\.0"):
        teacher.token_logps(*batch, 0.5)
    prompts, prompt_mask, answers, answer_mask = batch
    with pytest.raises(ValueError, match="token id 24 is beyond the teacher's vocabulary of 24"):
        teacher.token_logps(prompts, prompt_mask, answers.masked_fill(answers == 12, 24), answer_mask, 1.0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_offloaded_weights_visit_the_gpu_and_stay_at_home(tokenizer, batch):
    on_gpu = [part.cuda() for part in batch]
    teacher = ModelTeacher(build_model(SHAPE, tokenizer, 1), offload=True)
    home = {name: value.data_ptr() for name, value in teacher.model.named_parameters()}
    found = teacher.token_logps(*on_gpu, 1.0)
    placed = ModelTeacher(build_model(SHAPE, tokenizer, 1).cuda()).token_logps(*on_gpu, 1.0)
    assert torch.equal(found, placed)
    assert {name: value.data_ptr() for name, value in teacher.model.named_parameters()} == home
    assert {value.device.type for value in teacher.model.parameters()} == {"cpu"}
