"""Gradient covariance of both signals against one response at a time by autograd, and where it is undefined."""

import math

import pytest
import torch
from torch import nn

from geopd.problems import character_tokenizer
from geopd.training import ModelShape, ModelTeacher, VerifiableTask, build_model
from geopd.training.gradient_covariance import gradient_covariance
from geopd.training.own_samples import Responses, response_logits, sample_own
from gradients_by_hand import jackknife, rank_by_pairs
from tiny_on_policy import LENGTH, SHAPE, UNEQUAL, plain_logps

SAMPLES, SEED = 4, 5
LAYERS = 2


def odd(_, text):
    return float(sum(character.isdigit() for character in text) % 2)


@pytest.fixture(scope="module")
def tokenizer():
    return character_tokenizer()


def sharp(tokenizer, seed):
    """Far from uniform, so that responses differ in length and the teacher's gap is not small."""
    model = build_model(SHAPE, tokenizer, seed)
    with torch.no_grad():
        model.lm_head.weight.mul_(40)
    return model


@pytest.fixture
def student(tokenizer):
    return sharp(tokenizer, 0)


def measure(student, tokenizer, teacher=None, verifier=odd, problems=UNEQUAL, **changes):
    settings = {"samples": SAMPLES, "seed": SEED, "max_new_tokens": LENGTH, **changes}
    teacher = teacher or ModelTeacher(sharp(tokenizer, 1))
    return gradient_covariance(student, teacher, tokenizer, VerifiableTask(problems, str, verifier), **settings)


def own(student, tokenizer):
    return sample_own(student, tokenizer, UNEQUAL, samples=SAMPLES, max_new_tokens=LENGTH, seed=SEED)


def one_by_one(student, tokenizer, coefficients):
    """Gradients (B, d) of every matrix by its path, each from a backward pass over one unpadded response."""
    found = {}
    responses = own(student, tokenizer)
    for row in range(len(responses)):
        prompt = responses.prompt_ids[row][responses.prompt_mask[row].bool()]
        answer = responses.ids[row][responses.mask[row].bool()]
        student.zero_grad()
        logps = plain_logps(student, prompt, answer)
        (coefficients(row, prompt, answer, logps.detach()) * logps).sum().backward()
        for path, parameter in student.named_parameters():
            if parameter.dim() == 2 and ".layers." in path:
                found.setdefault(path, []).append(parameter.grad.flatten().clone())
    student.zero_grad()
    return {path: torch.stack(rows) for path, rows in found.items()}


def rewards_of(student, tokenizer):
    texts = tokenizer.batch_decode(own(student, tokenizer).ids, skip_special_tokens=True)
    return torch.tensor([odd("", text) for text in texts])


def test_ranks_are_those_of_gradients_taken_one_response_at_a_time(student, tokenizer):
    """All matrices, prompts of unequal length, responses that end early."""
    rows = measure(student, tokenizer)
    other, rewards = sharp(tokenizer, 1), rewards_of(student, tokenizer)
    groups = rewards.view(-1, SAMPLES)
    scalars = ((groups - groups.mean(dim=1, keepdim=True)) / (groups.std(dim=1, keepdim=True) + 1e-4)).flatten()
    scalars[(groups == groups[:, :1]).all(dim=1).repeat_interleave(SAMPLES)] = 0.0

    def gap(row, prompt, answer, logps):
        return plain_logps(other, prompt, answer).detach() - logps

    opd = one_by_one(student, tokenizer, gap)
    rlvr = one_by_one(student, tokenizer, lambda row, *_: scalars[row])
    belongs = [prompt for prompt in range(len(UNEQUAL)) for _ in range(SAMPLES)]
    assert len(rows) == len(opd) == 7 * LAYERS
    assert len({int(length) for length in own(student, tokenizer).mask.sum(dim=1)}) > 2
    for row in rows:
        first, second = (each[f"model.{row['matrix']}.weight"] for each in (opd, rlvr))
        check(row, first, second, belongs)
        nonzero = second.any(dim=1)
        assert 0 < row["rlvr_zero"] == int((~nonzero).sum())
        assert row["opd_zero"] == 0
        kept = [prompt for prompt, there in zip(belongs, nonzero.tolist(), strict=True) if there]
        unit = nn.functional.normalize(second[nonzero], dim=1)
        assert row["rlvr_unit"] == pytest.approx(rank_by_pairs(unit, kept), rel=1e-3)
        assert row["opd_unit"] == pytest.approx(rank_by_pairs(nn.functional.normalize(first, dim=1), belongs), rel=1e-3)
        assert row["log_ratio_unit"] == pytest.approx(math.log(row["opd_unit"] / row["rlvr_unit"]), rel=1e-9)


def check(row, first, second, belongs):
    def ratio(kept):
        names = [belongs[i] for i in kept]
        return math.log(rank_by_pairs(first[kept], names) / rank_by_pairs(second[kept], names))

    assert row["opd"] == pytest.approx(rank_by_pairs(first, belongs), rel=1e-3)
    assert row["rlvr"] == pytest.approx(rank_by_pairs(second, belongs), rel=1e-3)
    assert row["log_ratio"] == pytest.approx(ratio(range(len(belongs))), abs=1e-3)
    assert row["se"] == pytest.approx(jackknife(ratio, belongs), rel=1e-2)
    assert row["note"] is None
    assert (row["prompts"], row["samples"]) == (len(UNEQUAL), SAMPLES)


class Rewarding:
    """A teacher whose gap to the student is the response's group-normalised reward at every token."""

    def __init__(self, student, scalars):
        self.student, self.scalars = student, scalars

    @torch.no_grad()
    def token_logps(self, prompt_ids, prompt_mask, ids, mask, temperature):
        assert temperature == 1.0
        logits = response_logits(self.student, Responses(prompt_ids, prompt_mask, ids, mask))
        logps = logits.log_softmax(dim=-1).gather(2, ids.unsqueeze(2)).squeeze(2)
        return (logps + self.scalars[:, None]) * mask


def test_the_log_ratio_of_equal_signals_is_zero(student, tokenizer):
    groups = rewards_of(student, tokenizer).view(-1, SAMPLES)
    scalars = ((groups - groups.mean(dim=1, keepdim=True)) / (groups.std(dim=1, keepdim=True) + 1e-4)).flatten()
    for row in measure(student, tokenizer, Rewarding(student, scalars), matrices=["*.v_proj", "*.up_proj"]):
        assert row["log_ratio"] == pytest.approx(0, abs=1e-4)
        assert row["se"] == pytest.approx(0, abs=1e-4)


def test_rows_carry_canonical_names_in_their_order(student, tokenizer):
    rows = measure(student, tokenizer, matrices=["*.q_proj", "layers.1.mlp.down_proj"])
    assert [(row["matrix"], row["layer"], row["module"]) for row in rows] == [
        ("layers.0.self_attn.q_proj", 0, "q_proj"),
        ("layers.1.mlp.down_proj", 1, "down_proj"),
        ("layers.1.self_attn.q_proj", 1, "q_proj"),
    ]


def test_without_a_reward_to_compare_the_verifiable_rank_is_none(student, tokenizer):
    for row in measure(student, tokenizer, verifier=lambda *_: 1.0, matrices=["*.o_proj"]):
        assert row["rlvr"] is row["rlvr_unit"] is row["log_ratio"] is row["se"] is row["se_unit"] is None
        assert row["opd"] > 0
        assert row["rlvr_zero"] == len(UNEQUAL) * SAMPLES
        assert row["note"] == "rlvr: fewer than two prompts have a gradient that is not zero"


def test_the_student_is_left_as_it_was_and_draws_repeat(student, tokenizer):
    before = {name: value.clone() for name, value in student.state_dict().items()}
    student.train()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first = measure(student, tokenizer, matrices=["*.k_proj"])
    assert torch.equal(torch.rand(2), expected)
    assert student.training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in student.parameters())
    assert not any(module._forward_hooks for module in student.modules())
    assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())
    assert measure(student, tokenizer, matrices=["*.k_proj"]) == first
    assert measure(student, tokenizer, matrices=["*.k_proj"], seed=SEED + 1) != first


def test_frozen_weights_and_backward_passes_in_parts_change_nothing(student, tokenizer, monkeypatch):
    whole = measure(student, tokenizer)
    monkeypatch.setattr("geopd.training.gradient_covariance._ROWS", 7)
    monkeypatch.setattr("geopd.training.gradient_covariance._ENTRIES", 4000)
    parts = measure(student.requires_grad_(False), tokenizer)
    for one, other in zip(whole, parts, strict=True):
        for name in ("opd", "rlvr", "log_ratio", "se"):
            assert other[name] == pytest.approx(one[name], rel=1e-3, abs=1e-4)


def test_too_little_to_compare_is_refused(student, tokenizer):
    with pytest.raises(ValueError, match=r"1 problems, samples=4: a rank needs two problems"):
        measure(student, tokenizer, problems=UNEQUAL[:1])
    with pytest.raises(ValueError, match="samples=1"):
        measure(student, tokenizer, samples=1)
    with pytest.raises(ValueError, match=r"select none of the model's"):
        measure(student, tokenizer, matrices=["*.no_such_proj"])


def test_weights_that_are_no_linear_layer_are_refused(student, tokenizer):
    with pytest.raises(ValueError, match="embed_tokens is not the weight of one linear layer"):
        measure(student, tokenizer, matrices=["embed_tokens"])
    student.model.layers[1].mlp.up_proj.weight = student.model.layers[0].mlp.up_proj.weight
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj is not the weight of one linear layer"):
        measure(student, tokenizer)


def test_a_router_is_refused(tokenizer):
    shape = ModelShape(hidden=32, layers=1, heads=2, key_value_heads=1, intermediate=24, experts=2, active=1)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.gate is not the weight of one linear layer"):
        measure(build_model(shape, tokenizer, 0), tokenizer)


class Routed(nn.Linear):
    """A layer that sees tokens without knowing their response."""

    def forward(self, hidden):
        return super().forward(hidden.flatten(0, -2))


def test_a_layer_that_loses_the_response_is_refused(student, tokenizer):
    student.model.layers[0].mlp.up_proj = Routed(SHAPE.hidden, SHAPE.intermediate, bias=False)
    mlp = student.model.layers[0].mlp
    mlp.forward = lambda hidden: mlp.down_proj(
        mlp.act_fn(mlp.gate_proj(hidden)) * mlp.up_proj(hidden).view(*hidden.shape[:-1], -1)
    )
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj ran twice or put out \(\d+, 48\)"):
        measure(student, tokenizer)
    assert not any(module._forward_hooks for module in student.modules())
