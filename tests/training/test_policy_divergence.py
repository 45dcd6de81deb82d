"""Sequence KL on a policy's own samples against exact enumeration and closed forms."""

import math
import statistics

import pytest
import torch

from geopd.problems import character_tokenizer
from geopd.training import ModelShape, VerifiableTask, build_model
from geopd.training.own_samples import sample_own
from geopd.training.policy_divergence import kl_to
from tiny_on_policy import UNEQUAL

SHAPE = ModelShape(hidden=16, layers=1, heads=2, key_value_heads=1, intermediate=24)


@pytest.fixture(scope="module")
def tokenizer():
    return character_tokenizer()


def sharp(tokenizer, seed):
    model = build_model(SHAPE, tokenizer, seed)
    with torch.no_grad():
        model.lm_head.weight.mul_(40)
    return model


@pytest.fixture(scope="module")
def policy(tokenizer):
    return sharp(tokenizer, 0)


@pytest.fixture(scope="module")
def reference(tokenizer):
    return sharp(tokenizer, 1)


def divergence(policy, reference, tokenizer, prompts=UNEQUAL, **changes):
    settings = {"samples": 3, "max_new_tokens": 6, "seed": 0, **changes}
    return kl_to(policy, reference, tokenizer, VerifiableTask(prompts, str, lambda *_: 0.0), **settings)


@torch.no_grad()
def next_token(model, rows):
    """Log-probabilities of the token after each row of ids, float64."""
    return model(input_ids=torch.tensor(rows)).logits[:, -1].double().log_softmax(dim=-1)


def one_step(policy, reference, rows):
    """KL of the next token after each row."""
    p, q = next_token(policy, rows), next_token(reference, rows)
    return (p.exp() * (p - q)).sum(dim=-1)


def of_two_tokens(policy, reference, tokenizer, prompt):
    """KL of responses of at most two tokens, over all of them."""
    row = tokenizer(prompt)["input_ids"]
    first, exact = next_token(policy, [row])[0].exp(), float(one_step(policy, reference, [row]))
    going = [token for token in range(len(first)) if token != tokenizer.eos_token_id]
    second = one_step(policy, reference, [[*row, token] for token in going])
    return exact + float((first[going] * second).sum())


def test_equal_policies_do_not_diverge(policy, tokenizer):
    assert divergence(policy, sharp(tokenizer, 0), tokenizer) == (0.0, 0.0, 3 * len(UNEQUAL))


def test_one_token_responses_have_their_closed_form(policy, reference, tokenizer):
    """Prompts of unequal length, each scored alone; the samples of a prompt add no noise and no certainty."""
    exact = [float(one_step(policy, reference, [row])) for row in tokenizer(UNEQUAL)["input_ids"]]
    value, se, n = divergence(policy, reference, tokenizer, max_new_tokens=1, samples=5)
    assert value == pytest.approx(statistics.mean(exact), rel=1e-5)
    assert se == pytest.approx(statistics.stdev(exact) / math.sqrt(len(exact)), rel=1e-4)
    assert n == 5 * len(UNEQUAL)


def test_two_token_responses_agree_with_enumeration_within_the_standard_error(policy, reference, tokenizer):
    """Over 20 seeds the distance in standard errors is a standard normal's."""
    exact = of_two_tokens(policy, reference, tokenizer, "1+2=")
    scores = []
    for seed in range(20):
        value, se, _ = divergence(policy, reference, tokenizer, ["1+2="] * 100, max_new_tokens=2, seed=seed, samples=2)
        scores.append((value - exact) / se)
    assert 0.6 < math.sqrt(statistics.mean(score**2 for score in scores)) < 1.5
    assert abs(statistics.mean(scores)) < 3 / math.sqrt(20)


def test_the_end_token_counts_and_nothing_behind_it(policy, reference, tokenizer):
    """A policy that ends at once: one position, however long responses may be."""
    ending = sharp(tokenizer, 0)
    head = torch.nn.Linear(SHAPE.hidden, len(tokenizer))
    with torch.no_grad():
        head.weight.zero_()
        head.bias.zero_()
        head.bias[tokenizer.eos_token_id] = 200.0
    ending.lm_head = head
    rows = tokenizer(UNEQUAL)["input_ids"]
    exact = statistics.mean(float(-next_token(reference, [row])[0, tokenizer.eos_token_id]) for row in rows)
    assert divergence(ending, reference, tokenizer)[0] == pytest.approx(exact, rel=1e-5)


def test_scoring_in_parts_changes_nothing(policy, reference, tokenizer, monkeypatch):
    whole = divergence(policy, reference, tokenizer)
    monkeypatch.setattr("geopd.training.policy_divergence._LOGITS_AT_ONCE", 1)
    assert divergence(policy, reference, tokenizer) == pytest.approx(whole, rel=1e-5)


def test_more_prompts_than_a_batch_of_decoding(policy, reference, tokenizer, monkeypatch):
    monkeypatch.setattr("geopd.training.own_samples._PROMPTS_A_BATCH", 4)
    assert divergence(policy, reference, tokenizer, max_new_tokens=1)[0] == pytest.approx(
        statistics.mean(float(one_step(policy, reference, [row])) for row in tokenizer(UNEQUAL)["input_ids"]), rel=1e-5
    )


def test_the_mask_covers_the_end_token_and_nothing_behind_it(policy, tokenizer):
    responses = sample_own(policy, tokenizer, UNEQUAL, samples=8, max_new_tokens=9, seed=0)
    lengths = set()
    for ids, mask in zip(responses.ids.tolist(), responses.mask.tolist(), strict=True):
        end = ids.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in ids else len(ids)
        assert mask == [1] * end + [0] * (len(ids) - end)
        lengths.add(end)
    assert len(lengths) > 2


def test_the_modes_and_the_random_state_are_kept(policy, reference, tokenizer):
    policy.train()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first = divergence(policy, reference, tokenizer)
    assert torch.equal(torch.rand(2), expected)
    assert policy.training
    assert not reference.train(False).training
    policy.eval()
    assert divergence(policy, reference, tokenizer) == first
    assert divergence(policy, reference, tokenizer, seed=1) != first


def test_what_cannot_be_compared_is_refused(policy, reference, tokenizer):
    with pytest.raises(ValueError, match="1 problems have no standard error"):
        divergence(policy, reference, tokenizer, UNEQUAL[:1])
    larger = sharp(tokenizer, 1)
    larger.resize_token_embeddings(len(tokenizer) + 2, mean_resizing=False)
    with pytest.raises(ValueError, match="needs one vocabulary"):
        divergence(policy, larger, tokenizer)
    broken = sharp(tokenizer, 1)
    torch.nn.init.constant_(broken.lm_head.weight, float("nan"))
    with pytest.raises(ValueError, match="not finite: check that neither model"):
        divergence(policy, broken, tokenizer)
