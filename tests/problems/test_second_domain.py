"""The string problems agree with brute force and share splits by their digits; earlier draws are as they were."""

import hashlib
import itertools
import random
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geopd.problems import (
    ANSWER_MARK,
    PROMPT_CHARACTERS,
    DemonstrationStyle,
    StringProblem,
    base_mixture,
    character_tokenizer,
    demonstrate_string,
    demonstrations,
    distinct_problems,
    distinct_string_problems,
    draw_string_problem,
    parse_string_prompt,
    split_of_string,
    string_demonstrations,
    string_task,
    verify_string,
)

DIGITS = "0123456789"
SPLITS = ("train", "selection", "held_out")
string_problems = st.builds(StringProblem, st.sampled_from("crs"), st.text(DIGITS, min_size=1, max_size=6))
seeds = st.integers(0, 2**32)
relaxed = settings(deadline=None, max_examples=60)  # shared cores make single examples slow now and then


@pytest.mark.parametrize(
    ("problem", "prompt", "response"),
    [
        (StringProblem("c", "4821"), "c  4821=", ">4821"),
        (StringProblem("r", "4821"), "r  4821=", ">1284"),
        (StringProblem("s", "4821"), "s  4821=", ">1248"),
        (StringProblem("s", "900900"), "s900900=", ">000099"),
        (StringProblem("r", "7"), "r     7=", ">7"),
    ],
)
def test_written_by_hand(problem, prompt, response):
    assert (problem.prompt, problem.response) == (prompt, response)


@relaxed
@given(string_problems)
def test_answers_agree_with_counting_and_indexing(problem):
    digits, count = problem.digits, Counter(problem.digits)
    expected = {
        "c": digits,
        "r": "".join(digits[len(digits) - 1 - i] for i in range(len(digits))),
        "s": "".join(digit * count[digit] for digit in DIGITS),
    }
    assert problem.answer == expected[problem.task]
    assert verify_string(problem, problem.response) == 1.0
    assert len(problem.prompt) == PROMPT_CHARACTERS


@relaxed
@given(string_problems)
def test_prompt_round_trips(problem):
    assert parse_string_prompt(problem.prompt) == problem


@pytest.mark.parametrize("problem", [StringProblem("r", "12"), StringProblem("s", "10"), StringProblem("c", "1")])
def test_verifier_accepts_the_exact_answer_only_among_all_short_texts(problem):
    pattern = re.compile(f"[^>]*>{problem.answer}")
    texts = ["".join(text) for n in range(6) for text in itertools.product("012> =", repeat=n)]
    accepted = {text for text in texts if verify_string(problem, text) == 1.0}
    assert accepted == {text for text in texts if pattern.fullmatch(text)}
    assert f"{ANSWER_MARK}{problem.answer}" in accepted


def test_copy_reverse_and_sort_of_one_multiset_share_a_split():
    rng = random.Random(0)
    for length in range(1, 7):
        for _ in range(100):
            digits = rng.choices(DIGITS, k=length)
            orders = ["".join(order) for order in itertools.islice(itertools.permutations(digits), 0, 720, 7)]
            assert len({split_of_string(StringProblem(task, order)) for task in "crs" for order in orders}) == 1


def test_splits_hold_a_tenth_of_the_multisets_at_every_length():
    for length, total in ((3, 220), (4, 715), (5, 2002), (6, 5005)):
        multisets = itertools.combinations_with_replacement(DIGITS, length)
        sizes = Counter(split_of_string(StringProblem("c", "".join(each))) for each in multisets)
        assert sizes.total() == total
        for split in ("selection", "held_out"):
            assert sizes[split] / total == pytest.approx(0.1, abs=4 * (0.09 / total) ** 0.5)


def test_draws_are_distinct_seeded_long_enough_and_disjoint_between_splits():
    multisets = {}
    for split in SPLITS:
        drawn = distinct_string_problems(split, 2000, seed=0)
        assert len(set(drawn)) == 2000
        assert {split_of_string(problem) for problem in drawn} == {split}
        assert {len(problem.digits) for problem in drawn} == {3, 4, 5, 6}
        assert {problem.task for problem in drawn} == set("crs")
        assert drawn == distinct_string_problems(split, 2000, seed=0) != distinct_string_problems(split, 2000, seed=1)
        multisets[split] = {"".join(sorted(problem.digits)) for problem in drawn}
    assert not any(multisets[one] & multisets[other] for one, other in itertools.combinations(SPLITS, 2))


@relaxed
@given(string_problems, seeds)
def test_a_slip_makes_one_digit_wrong(problem, seed):
    clean = demonstrate_string(problem, 0.0, random.Random(seed))
    slipped = demonstrate_string(problem, 1.0, random.Random(seed))
    assert (clean.prompt, clean.response) == (slipped.prompt, problem.response)
    assert len(slipped.response) == len(clean.response)
    assert sum(x != y for x, y in zip(slipped.response, clean.response, strict=True)) == 1
    assert (verify_string(problem, clean.response), verify_string(problem, slipped.response)) == (1.0, 0.0)


def test_slips_reach_every_place_and_every_other_digit():
    rng, problem = random.Random(1), StringProblem("c", "555")
    answers = [demonstrate_string(problem, 1.0, rng).response[1:] for _ in range(4000)]
    seen = Counter(next((i, x) for i, x in enumerate(answer) if x != "5") for answer in answers)
    assert set(seen) == {(place, digit) for place in range(3) for digit in DIGITS if digit != "5"}
    assert max(seen.values()) < 4000 / 27 + 5 * (4000 / 27) ** 0.5


def test_demonstrations_hold_train_problems_and_slips_at_their_rate():
    texts = string_demonstrations(4000, 0.12, random.Random(2))
    problems = [parse_string_prompt(text.prompt) for text in texts]
    assert {split_of_string(problem) for problem in problems} == {"train"}
    wrong = sum(verify_string(p, t.response) == 0 for p, t in zip(problems, texts, strict=True)) / 4000
    assert wrong == pytest.approx(0.12, abs=4 * (0.12 * 0.88 / 4000) ** 0.5)


def test_string_texts_tokenise_to_one_known_token_a_character():
    tokenizer = character_tokenizer()
    for text in string_demonstrations(200, 0.5, random.Random(3)):
        ids = tokenizer(text.prompt + text.response)["input_ids"]
        assert len(ids) == len(text.prompt + text.response)
        assert tokenizer.unk_token_id not in ids


def test_texts_of_the_base_mixture_and_draws_of_arithmetic_are_the_recorded_bytes():
    """Stages made with earlier texts stay valid: the digests were taken before the second domain was added."""
    rng = random.Random(7)
    texts = base_mixture(3000, 0.5, 0.3, rng) + [string_task(rng) for _ in range(1000)]
    texts += demonstrations(1000, DemonstrationStyle(0.5, 0.12), rng)
    written = "\n".join(text.prompt + text.response for text in texts) + str(rng.random())
    assert hashlib.sha256(written.encode()).hexdigest() == (
        "9c743900f31017e0e00c379ea5c2a6682fb97b368472bc5b73d0b28d83ccac8b"
    )
    drawn = [p.prompt for split in SPLITS for seed in (0, 1) for p in distinct_problems(split, 500, seed)]
    assert hashlib.sha256("".join(drawn).encode()).hexdigest() == (
        "eebee3654fecc1b2a911a7581790ea669c802271ce13ae8b968e07a037db36d4"
    )


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: StringProblem("x", "12"), r"task 'x' is unknown: use one of c \(copy\), r \(reverse\), s \(sort\)"),
        (lambda: StringProblem("c", ""), "digits '' are no string to work on: use 1 to 6 of 0123456789"),
        (lambda: StringProblem("c", "1234567"), "digits '1234567' are no string"),
        (lambda: StringProblem("c", "1 2"), "digits '1 2' are no string"),
        (lambda: StringProblem("c", "\u0661"), "are no string"),
        (lambda: parse_string_prompt(" 12+ 30="), "prompt ' 12[+] 30=' is not a string question: write '{task}"),
        (lambda: parse_string_prompt("c12="), "'c12=' is not a string question"),
        (lambda: parse_string_prompt("c12    ="), "is not a string question"),
        (lambda: parse_string_prompt("c    12?"), "is not a string question"),
        (lambda: parse_string_prompt(""), "prompt '' is not a string question"),
        (lambda: draw_string_problem(random.Random(0), "test"), "split 'test' is unknown: use one of train, selection"),
        (lambda: distinct_string_problems("train", 0, 0), "count=0 problems is outside 1..50000: ask for at least one"),
        (lambda: distinct_string_problems("train", 50_001, 0), "count=50001 .* ask for fewer distinct problems"),
        (lambda: demonstrate_string(StringProblem("c", "1"), 1.2, random.Random(0)), "slip=1.2 is not a probability"),
        (lambda: string_demonstrations(1, -0.1, random.Random(0)), "slip=-0.1 is not a probability"),
    ],
)
def test_unusable_input_is_named(make, match):
    with pytest.raises(ValueError, match=match):
        make()
