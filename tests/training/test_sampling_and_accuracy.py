"""Decoding against the model's own generation and exact probabilities; accuracy against closed forms."""

import json
from types import SimpleNamespace

import pytest
import torch

from geopd.problems import Problem, character_tokenizer, distinct_problems, verify
from geopd.training import (
    ModelShape,
    Rollouts,
    VerifiableTask,
    accuracy,
    build_model,
    clustered_mean,
    evaluate_model,
    read_evaluations,
    sample_responses,
    write_evaluations,
)
from geopd.training import evaluation as evaluation_module

EOS, PAD = 1, 0


@pytest.fixture(scope="module")
def tokenizer():
    return character_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    model = build_model(ModelShape(hidden=32, layers=2, heads=2, key_value_heads=1, intermediate=48), tokenizer, 0)
    with torch.no_grad():  # sharper than at initialisation, so that responses differ in length
        model.lm_head.weight.mul_(40)
    return model


@pytest.fixture(scope="module")
def prompts(tokenizer):
    return torch.tensor(tokenizer([p.prompt for p in distinct_problems("selection", 40, 0)])["input_ids"])


def asked(problems):
    return VerifiableTask(problems, lambda problem: problem.prompt, verify)


def decode(model, prompts, **kwargs):
    return sample_responses(model, prompts, max_new_tokens=10, eos_token_id=EOS, pad_token_id=PAD, **kwargs)


def test_greedy_equals_the_models_own_generation(model, prompts):
    ours = decode(model, prompts, temperature=0)
    theirs = model.generate(
        input_ids=prompts, attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=10,
        eos_token_id=EOS, pad_token_id=PAD,
    )[:, prompts.shape[1] :]  # fmt: skip
    padded = torch.full_like(ours, PAD)
    padded[:, : theirs.shape[1]] = theirs
    assert torch.equal(ours, padded)


def test_ended_rows_are_padded_and_the_others_go_on(model, prompts):
    responses = decode(model, prompts, samples=4, generator=torch.Generator().manual_seed(0))
    lengths = []
    for row in responses.tolist():
        end = row.index(EOS) if EOS in row else len(row) - 1
        assert set(row[end + 1 :]) <= {PAD}
        lengths.append(end + 1)
    assert len(set(lengths)) > 2


def test_samples_follow_the_exact_distribution(model, prompts):
    """Frequencies of the first two tokens against the softmax of an uncached forward, at another temperature."""
    temperature, count = 1.7, 4000
    prompt = prompts[:1]
    drawn = decode(model, prompt, samples=count, temperature=temperature, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        first = torch.softmax(model(input_ids=prompt).logits[0, -1] / temperature, dim=-1)
        token = int(torch.bincount(drawn[:, 0], minlength=24).argmax())
        longer = torch.cat([prompt, torch.tensor([[token]])], dim=1)
        second = torch.softmax(model(input_ids=longer).logits[0, -1] / temperature, dim=-1)
    following = drawn[drawn[:, 0] == token, 1]
    for tokens, probabilities in ((drawn[:, 0], first), (following, second)):
        frequencies = torch.bincount(tokens, minlength=24) / len(tokens)
        tolerance = 5 * (probabilities * (1 - probabilities) / len(tokens)).sqrt() + 2 / len(tokens)
        assert bool(((frequencies - probabilities).abs() <= tolerance).all())


def test_draws_repeat_with_the_seed_and_leave_the_global_state_alone(model, prompts):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    one, two = (decode(model, prompts, samples=2, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(torch.rand(2), expected)
    assert torch.equal(one, two)
    assert not torch.equal(one, decode(model, prompts, samples=2, generator=torch.Generator().manual_seed(6)))


def test_the_mode_of_the_model_is_kept(model, prompts):
    model.train()
    decode(model, prompts[:2], temperature=0)
    assert model.training
    model.eval()


def test_impossible_decoding_is_refused(model, prompts):
    with pytest.raises(ValueError, match="one response a prompt"):
        decode(model, prompts, temperature=0, samples=2)


def test_clustered_standard_error():
    scores = torch.tensor([[1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    value, se = clustered_mean(scores)
    assert value == pytest.approx(0.5)
    assert se == pytest.approx((((0.0 + 0.25 + 0.25) / 2) ** 0.5) / 3**0.5)
    with pytest.raises(ValueError, match="two problems"):
        clustered_mean(scores[:1])


def test_repeated_samples_do_not_shrink_the_error():
    """Eight copies of one answer carry no more information than one: the clustered error knows."""
    once = torch.tensor([[1.0], [0.0], [1.0], [1.0]])
    assert clustered_mean(once.repeat(1, 8)) == clustered_mean(once)


def test_accuracy_counts_verified_answers(tokenizer, monkeypatch):
    problems = [Problem(1, "+", 2), Problem(5, "-", 9), Problem(10, "+", 10)]
    texts = [["03>3", ">3"], [">-4", ">4"], ["0>0", ""]]

    def canned(model, prompt_ids, *, samples, **_):
        prompts = tokenizer.batch_decode(prompt_ids)
        rows = [texts[[p.prompt for p in problems].index(prompt)] for prompt in prompts]
        ids = [[*tokenizer(text)["input_ids"], EOS] if text else [EOS] for row in rows for text in row[:samples]]
        return torch.tensor([row + [PAD] * (6 - len(row)) for row in ids])

    monkeypatch.setattr(evaluation_module, "sample_responses", canned)
    value, se = accuracy(
        SimpleNamespace(device="cpu"), tokenizer, asked(problems), samples=2,
        temperature=1.0, max_new_tokens=12, seed=0,
    )  # fmt: skip
    assert value == pytest.approx(0.5)
    assert se == pytest.approx(0.5 / 3**0.5)


def test_evaluations_round_trip(model, tokenizer, tmp_path):
    problems = distinct_problems("selection", 20, 0)
    rows = evaluate_model(
        model, tokenizer, asked(problems), step=7, benchmark="selection",
        decodings=("greedy", "avg@2"), max_new_tokens=12, seed=0,
    )  # fmt: skip
    assert [(row.step, row.decoding, row.n) for row in rows] == [(7, "greedy", 20), (7, "avg@2", 20)]
    path = write_evaluations(tmp_path, rows)
    assert read_evaluations(tmp_path) == rows
    assert set(json.loads(path.read_text())[0]) == {"step", "benchmark", "decoding", "n", "value", "se"}
    assert read_evaluations(tmp_path / "elsewhere") == []
    path.write_text('[{"step": 1}]')
    with pytest.raises(ValueError, match="not a list of evaluation rows"):
        read_evaluations(tmp_path)
    with pytest.raises(ValueError, match="unknown"):
        evaluate_model(
            model, tokenizer, asked(problems), step=1, benchmark="x",
            decodings=("pass@1",), max_new_tokens=2, seed=0,
        )  # fmt: skip


def test_tasks_and_rollouts_refuse_what_cannot_be_judged():
    with pytest.raises(ValueError, match="2 problems have 1 prompts"):
        asked([Problem(1, "+", 2), Problem(1, "+", 2)]).by_prompt()
    with pytest.raises(ValueError, match="two responses or more"):
        Rollouts(prompts=4, samples=1, max_new_tokens=5)


def test_left_padding_changes_no_response(model, tokenizer):
    """Greedy responses to prompts of four lengths, padded together, against each prompt alone."""
    prompts = ["1+2=", "123-45=", "9=", "100+200=", "77+8="]
    rows = tokenizer(prompts)["input_ids"]
    longest = max(map(len, rows))
    ids = torch.tensor([[PAD] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    together = decode(model, ids, temperature=0, prompt_mask=mask)
    alone = torch.cat([decode(model, torch.tensor([row]), temperature=0) for row in rows])
    assert torch.equal(together, alone)
    assert len({tuple(row) for row in alone.tolist()}) > 2


def test_padded_samples_follow_the_distribution_of_the_prompt_alone(model, tokenizer):
    """First-token frequencies of a padded prompt against the softmax of an unpadded forward."""
    count, row = 4000, tokenizer("1+2=")["input_ids"]
    ids, mask = torch.tensor([[PAD] * 3 + row, tokenizer("123+45=")["input_ids"]]), torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    drawn = decode(model, ids, samples=count, prompt_mask=mask, generator=torch.Generator().manual_seed(1))[:count]
    with torch.no_grad():
        first = torch.softmax(model(input_ids=torch.tensor([row])).logits[0, -1], dim=-1)
    frequencies = torch.bincount(drawn[:, 0], minlength=24) / count
    tolerance = 5 * (first * (1 - first) / count).sqrt() + 2 / count
    assert bool(((frequencies - first).abs() <= tolerance).all())


def test_any_of_several_end_tokens_ends_a_response(model, prompts):
    plain = decode(model, prompts, temperature=0)
    token = int(plain[0, 1])
    ended = sample_responses(
        model, prompts, max_new_tokens=10, eos_token_id=[EOS, token], pad_token_id=PAD, temperature=0
    )
    for row, whole in zip(ended.tolist(), plain.tolist(), strict=True):
        end = next((i for i, each in enumerate(whole) if each in (EOS, token)), 9)
        assert row == whole[: end + 1] + [PAD] * (9 - end)


def test_a_process_that_has_ended_keeps_the_others_company(model, prompts):
    """Another process that never ends: as many forward passes as tokens, and the same responses."""
    calls = []
    together = decode(model, prompts, temperature=0, any_process=lambda here: calls.append(here) or True)
    assert torch.equal(together, decode(model, prompts, temperature=0))
    assert len(calls) == 9


def test_accuracy_pads_and_judges_in_batches(model, tokenizer):
    prompts = ["1+2=", "123-45=", "9=", "100+200="]
    seen = []

    def judge(problems, texts):
        seen.append(list(problems))
        return [float(sum(map(ord, text)) % 2) for text in texts]

    task = VerifiableTask(prompts, str, lambda problem, text: judge([problem], [text])[0], judge)
    value = accuracy(model, tokenizer, task, temperature=0.0, max_new_tokens=8, seed=0, prompts_a_batch=3)
    alone = [
        float(sum(map(ord, tokenizer.decode(row, skip_special_tokens=True))) % 2)
        for prompt in prompts
        for row in sample_responses(
            model, torch.tensor([tokenizer(prompt)["input_ids"]]), max_new_tokens=8, eos_token_id=EOS,
            pad_token_id=PAD, temperature=0,
        )
    ]  # fmt: skip
    assert value == pytest.approx(clustered_mean(torch.tensor(alone).unsqueeze(1)))
    assert [len(batch) for batch in seen] == [3, 1]
