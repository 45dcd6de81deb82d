"""Every benchmark holds what its sentence says, by plain integer arithmetic, and the same on every machine."""

import hashlib
import itertools

import pytest

from geopd.problems import (
    BENCHMARKS,
    Problem,
    benchmark_task,
    character_tokenizer,
    distinct_problems,
    distinct_string_problems,
    split_of,
    split_of_string,
)
from geopd.problems.benchmarks import is_long_chain

SIX = ("held_out", "carries", "subtraction", "no_working", "three_digits", "strings")
ARITHMETIC = (*SIX[:-1], "selection")


def carries(a, operator, b):
    """Places out of which something is carried or borrowed, from the remainders alone."""
    low, high = sorted((a, b))
    if operator == "+":
        return [a % 10**k + b % 10**k >= 10**k for k in (1, 2, 3)]
    return [high % 10**k < low % 10**k for k in (1, 2, 3)]


def longest_run(flags):
    return max((len(list(group)) for flag, group in itertools.groupby(flags) if flag), default=0)


def test_the_six_come_first_in_the_order_of_the_figure_and_each_says_what_it_asks():
    assert tuple(BENCHMARKS) == (*SIX, "selection")
    for benchmark in BENCHMARKS.values():
        assert benchmark.asks.endswith(".")
        assert benchmark.asks.count(".") == 1
    assert len({benchmark.asks for benchmark in BENCHMARKS.values()}) == 7


@pytest.mark.parametrize("name", BENCHMARKS)
def test_problems_are_distinct_seeded_and_prefixes_of_longer_lists(name):
    task = benchmark_task(name, 300, 0)
    assert len(set(task.problems)) == len({task.prompt(problem) for problem in task.problems}) == 300
    assert task.problems == benchmark_task(name, 300, 0).problems == benchmark_task(name, 400, 0).problems[:300]
    assert task.problems != benchmark_task(name, 300, 1).problems


@pytest.mark.parametrize("name", ARITHMETIC)
def test_arithmetic_benchmarks_keep_to_their_split(name):
    expected = "selection" if name == "selection" else "held_out"
    assert {split_of(problem) for problem in benchmark_task(name, 500, 0).problems} == {expected}


def test_held_out_and_selection_are_the_draws_of_their_splits():
    for name in ("held_out", "selection"):
        assert benchmark_task(name, 500, 0).problems == distinct_problems(name, 500, 0)


def test_long_chains_are_the_longest_there_are():
    """On a grid of all kinds of operands, against the remainders."""
    operands = [*range(0, 1000, 9), *range(100), 101, 999]
    for operator, most in (("+", 3), ("-", 2)):
        longest = 0
        for a, b in itertools.product(operands, repeat=2):
            run = longest_run(carries(a, operator, b))
            longest = max(longest, run)
            assert is_long_chain(Problem(a, operator, b)) == (run >= most)
        assert longest == most


def test_carries_holds_long_chains_of_both_operators_in_equal_parts():
    problems = benchmark_task("carries", 500, 0).problems
    for problem in problems:
        run = longest_run(carries(problem.a, problem.operator, problem.b))
        assert run == (3 if problem.operator == "+" else 2)
    assert sum(problem.operator == "+" for problem in problems) == pytest.approx(250, abs=4 * 125**0.5)


def test_there_are_enough_long_additions_for_the_largest_benchmark():
    pairs = ((a, b) for a in range(1, 1000) for b in range(max(a, 1000 - a), 1000))
    long = [pair for pair in pairs if sum(carries(pair[0], "+", pair[1])) == 3]
    held = [pair for pair in long[::4] if split_of(Problem(pair[0], "+", pair[1])) == "held_out"]
    assert 4 * len(held) > 5000  # unordered: there are twice as many questions, of which half a benchmark is drawn


def test_subtraction_holds_differences_of_either_sign():
    problems = benchmark_task("subtraction", 500, 0).problems
    assert {problem.prompt[3] for problem in problems} == {"-"}
    negative = sum(int(problem.answer) < 0 for problem in problems)
    assert negative == pytest.approx(250, abs=4 * 125**0.5)


def test_three_digits_holds_operands_from_100_on():
    problems = benchmark_task("three_digits", 500, 0).problems
    assert all(len(number) == 3 for p in problems for number in (str(p.a), str(p.b)))
    assert {problem.operator for problem in problems} == {"+", "-"}


def test_no_working_asks_the_held_out_problems_for_the_answer_alone():
    task, held_out = benchmark_task("no_working", 300, 0), benchmark_task("held_out", 300, 0)
    assert [task.prompt(p) for p in task.problems] == [held_out.prompt(p) + ">" for p in held_out.problems]
    for problem in task.problems:
        exact = str(problem.a + problem.b if problem.operator == "+" else problem.a - problem.b)
        assert task.verifier(problem, exact) == 1.0
        for wrong in (f">{exact}", problem.response, f"{exact}>{exact}", f" {exact}", f"{exact}0", f"0{exact}", ""):
            assert task.verifier(problem, wrong) == 0.0


def test_strings_holds_held_out_questions_of_the_second_domain():
    task = benchmark_task("strings", 500, 0)
    assert task.problems == distinct_string_problems("held_out", 500, 0)
    assert {split_of_string(problem) for problem in task.problems} == {"held_out"}
    for problem in task.problems:
        expected = {"c": problem.digits, "r": problem.digits[::-1], "s": "".join(sorted(problem.digits))}
        assert task.verifier(problem, f">{expected[problem.task]}") == 1.0
        assert task.verifier(problem, expected[problem.task]) == 0.0


@pytest.mark.parametrize("name", [name for name in BENCHMARKS if name != "no_working"])
def test_a_right_response_with_its_mark_is_accepted_and_a_wrong_one_is_not(name):
    task = benchmark_task(name, 100, 0)
    assert {task.verifier(problem, problem.response) for problem in task.problems} == {1.0}
    assert {task.verifier(problem, f"{problem.response}0") for problem in task.problems} == {0.0}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_prompts_have_one_length_and_tokenise_without_unknown_characters(name):
    task, tokenizer = benchmark_task(name, 300, 0), character_tokenizer()
    prompts = [task.prompt(problem) for problem in task.problems]
    assert {len(prompt) for prompt in prompts} == {9 if name == "no_working" else 8}
    ids = tokenizer(prompts)["input_ids"]
    assert {len(row) for row in ids} == {len(prompts[0])}
    assert tokenizer.unk_token_id not in itertools.chain.from_iterable(ids)


def test_the_lists_are_the_same_on_every_machine():
    texts = [task.prompt(p) for name in BENCHMARKS for task in [benchmark_task(name, 200, 0)] for p in task.problems]
    assert (
        hashlib.sha256("".join(texts).encode()).hexdigest()
        == "19d32d6b4f31bdcf29e54f39d59ef0af01c470070e4bcd6cad2d95e42b75f453"
    )


@pytest.mark.parametrize(
    ("name", "count", "match"),
    [
        ("aime24", 5, "benchmark 'aime24' is unknown: use one of held_out, carries, subtraction, no_working, three_d"),
        ("carries", 0, "benchmark 'carries' cannot give 0 problems: ask for 1 to 5000"),
        ("strings", 5001, "benchmark 'strings' cannot give 5001 problems"),
    ],
)
def test_unusable_benchmarks_are_told(name, count, match):
    with pytest.raises(ValueError, match=match):
        benchmark_task(name, count, 0)
