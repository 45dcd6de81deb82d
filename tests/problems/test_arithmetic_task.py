"""The verifier, the demonstrations and the splits agree with integer arithmetic and with each other."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geopd.problems import (
    ANSWER_MARK,
    CLEAN,
    DIRECT,
    MAX_RESPONSE_CHARACTERS,
    PROMPT_CHARACTERS,
    VOCABULARY,
    DemonstrationStyle,
    Problem,
    base_mixture,
    character_tokenizer,
    demonstrate,
    demonstrations,
    distinct_problems,
    draw_problem,
    parse_prompt,
    split_of,
    string_task,
    verify,
)

operands = st.integers(0, 999)
problems = st.builds(Problem, operands, st.sampled_from("+-"), operands)
seeds = st.integers(0, 2**32)
relaxed = settings(deadline=None, max_examples=60)  # shared cores make single examples slow now and then


@pytest.mark.parametrize(
    ("problem", "prompt", "response"),
    [
        (Problem(123, "+", 989), "123+989=", "121111>1112"),
        (Problem(402, "-", 7), "402-  7=", "151903>395"),
        (Problem(7, "-", 402), "  7-402=", "151903>-395"),
        (Problem(0, "-", 0), "  0-  0=", "00>0"),
        (Problem(5, "+", 95), "  5+ 95=", "1010>100"),
    ],
)
def test_written_by_hand(problem, prompt, response):
    assert (problem.prompt, problem.response) == (prompt, response)


@relaxed
@given(problems)
def test_worked_response_is_true_and_verifies(problem):
    exact = problem.a + problem.b if problem.operator == "+" else problem.a - problem.b
    working, _, answer = problem.response.partition(ANSWER_MARK)
    assert int(answer) == exact
    assert verify(problem, problem.response) == 1.0
    assert len(problem.prompt) == PROMPT_CHARACTERS
    assert len(problem.response) <= MAX_RESPONSE_CHARACTERS
    # The columns' digits alone give the magnitude: an independent reading of the working.
    digits = working[1::2][::-1]
    assert int(working[-2] + digits) == abs(exact)


@relaxed
@given(problems)
def test_prompt_round_trips(problem):
    assert parse_prompt(problem.prompt) == problem


@relaxed
@given(problems, st.text(alphabet="0123456789+-=> ", max_size=12))
def test_verifier_accepts_the_exact_answer_only(problem, text):
    exact = problem.a + problem.b if problem.operator == "+" else problem.a - problem.b
    after = text.split(ANSWER_MARK, 1)
    assert verify(problem, text) == float(len(after) == 2 and after[1] == str(exact))


@pytest.mark.parametrize("wrong", ["5", ">05", "> 5", ">+5", ">5>5", ">5 ", "", ">", "15"])
def test_verifier_refuses_other_spellings(wrong):
    assert verify(Problem(2, "+", 3), wrong) == 0.0


@relaxed
@given(problems, seeds, st.sampled_from([0.0, 1.0]), st.sampled_from([0.0, 1.0]))
def test_slipped_demonstrations_never_verify_and_others_always_do(problem, seed, direct, slip):
    demonstration = demonstrate(problem, DemonstrationStyle(direct=direct, slip=slip), random.Random(seed))
    assert demonstration.prompt == problem.prompt
    assert verify(problem, demonstration.response) == 1.0 - slip
    assert demonstration.response.startswith(ANSWER_MARK) == (direct == 1.0)
    assert len(demonstration.response) <= MAX_RESPONSE_CHARACTERS
    if slip == 0.0 and direct == 0.0:
        assert demonstration.response == problem.response


def test_rates_of_slips_and_direct_answers():
    rng = random.Random(0)
    texts = demonstrations(4000, DemonstrationStyle(direct=0.4, slip=0.12), rng)
    direct = sum(text.response.startswith(ANSWER_MARK) for text in texts) / 4000
    wrong = sum(verify(parse_prompt(text.prompt), text.response) == 0 for text in texts) / 4000
    assert direct == pytest.approx(0.4, abs=4 * (0.4 * 0.6 / 4000) ** 0.5)
    assert wrong == pytest.approx(0.12, abs=4 * (0.12 * 0.88 / 4000) ** 0.5)


@relaxed
@given(problems)
def test_variants_of_one_question_share_a_split(problem):
    variants = [Problem(x, op, y) for op in "+-" for x, y in ((problem.a, problem.b), (problem.b, problem.a))]
    assert len({split_of(variant) for variant in variants}) == 1


def test_split_sizes_and_disjointness():
    rng = random.Random(1)
    draws = [Problem(rng.randint(0, 999), rng.choice("+-"), rng.randint(0, 999)) for _ in range(20_000)]
    shares = {name: sum(split_of(p) == name for p in draws) / 20_000 for name in ("train", "selection", "held_out")}
    assert shares["held_out"] == pytest.approx(0.1, abs=0.01)
    assert shares["selection"] == pytest.approx(0.1, abs=0.01)
    assert sum(shares.values()) == pytest.approx(1.0)


def test_split_is_no_function_of_the_answer():
    """Every last digit of the answer, and the sign, appear in each split at the rate of all problems."""
    rng = random.Random(2)
    draws = [Problem(rng.randint(0, 999), rng.choice("+-"), rng.randint(0, 999)) for _ in range(40_000)]
    for name in ("selection", "held_out"):
        chosen = [int(p.answer) for p in draws if split_of(p) == name]
        counts = [sum(abs(value) % 10 == digit for value in chosen) / len(chosen) for digit in range(10)]
        assert all(count == pytest.approx(0.1, abs=0.03) for count in counts)
        assert sum(value < 0 for value in chosen) / len(chosen) == pytest.approx(0.25, abs=0.03)


def test_draws_are_distinct_seeded_and_in_their_split():
    drawn = distinct_problems("held_out", 2000, seed=0)
    assert len(set(drawn)) == 2000
    assert {split_of(problem) for problem in drawn} == {"held_out"}
    assert drawn == distinct_problems("held_out", 2000, seed=0)
    assert drawn != distinct_problems("held_out", 2000, seed=1)


@relaxed
@given(seeds)
def test_training_texts_hold_train_problems_only(seed):
    rng = random.Random(seed)
    texts = demonstrations(20, CLEAN, rng) + base_mixture(40, worked=0.5, slip=0.3, rng=rng)
    arithmetic = [text for text in texts if text.prompt[0] not in "crs"]
    assert arithmetic
    assert {split_of(parse_prompt(text.prompt)) for text in arithmetic} == {"train"}


@relaxed
@given(seeds)
def test_string_tasks_are_what_they_say(seed):
    text = string_task(random.Random(seed))
    digits, answer = text.prompt[1:-1].strip(), text.response.removeprefix(ANSWER_MARK)
    expected = {"c": list(digits), "r": list(reversed(digits)), "s": sorted(digits)}[text.prompt[0]]
    assert list(answer) == expected
    assert len(text.prompt) == PROMPT_CHARACTERS


def test_mixture_rates():
    texts = base_mixture(6000, worked=0.6, slip=0.35, rng=random.Random(3))
    worked = [text for text in texts if text.prompt[0] not in "crs" and not text.response.startswith(ANSWER_MARK)]
    wrong = sum(verify(parse_prompt(text.prompt), text.response) == 0 for text in worked) / len(worked)
    assert len(worked) / 6000 == pytest.approx(0.6, abs=0.03)
    assert wrong == pytest.approx(0.35, abs=0.04)


@relaxed
@given(problems)
def test_tokenizer_round_trips_one_token_a_character(problem):
    tokenizer = _tokenizer()
    text = problem.prompt + problem.response
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text)
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode([*ids, tokenizer.eos_token_id, tokenizer.pad_token_id], skip_special_tokens=True) == text


_CACHE = []


def _tokenizer():
    if not _CACHE:
        _CACHE.append(character_tokenizer())
    return _CACHE[0]


def test_tokenizer_has_24_symbols_and_survives_saving(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = character_tokenizer()
    assert len(tokenizer) == len(VOCABULARY) == 24
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = " 12- 30=0"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert (again.pad_token_id, again.eos_token_id) == (0, 1)
    assert again.decode(again(text)["input_ids"]) == text


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Problem(1000, "+", 1), "a=1000"),
        (lambda: Problem(1, "*", 1), "operator"),
        (lambda: DemonstrationStyle(slip=1.2), "slip"),
        (lambda: parse_prompt("12+3="), "not an arithmetic question"),
        (lambda: parse_prompt("012+  3="), "not an arithmetic question"),
        (lambda: distinct_problems("train", 0, 0), "count=0"),
        (lambda: draw_problem(random.Random(0), "test"), "split"),
        (lambda: base_mixture(1, 2.0, 0.0, random.Random(0)), "worked"),
    ],
)
def test_unusable_input_is_named(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_direct_style_never_shows_working():
    rng = random.Random(4)
    assert all(text.response.startswith(ANSWER_MARK) for text in demonstrations(50, DIRECT, rng))
