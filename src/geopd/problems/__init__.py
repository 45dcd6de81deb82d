"""Verifiable tasks: prompts, demonstrations, verifiers and the tokenizer they are written in."""

from geopd.problems.arithmetic import (
    ANSWER_MARK,
    MAX_RESPONSE_CHARACTERS,
    PROMPT_CHARACTERS,
    Problem,
    parse_prompt,
    verify,
)
from geopd.problems.benchmarks import BENCHMARKS, Benchmark, BenchmarkTask, benchmark_task
from geopd.problems.demonstrations import (
    CLEAN,
    DIRECT,
    Demonstration,
    DemonstrationStyle,
    base_mixture,
    demonstrate,
    demonstrate_string,
    demonstrations,
    string_demonstrations,
    string_task,
)
from geopd.problems.splits import Split, distinct_problems, draw_problem, split_of
from geopd.problems.strings import (
    STRING_TASKS,
    StringProblem,
    distinct_string_problems,
    draw_string_problem,
    parse_string_prompt,
    split_of_string,
    verify_string,
)
from geopd.problems.tokenizer import VOCABULARY, character_tokenizer

__all__ = [
    "ANSWER_MARK",
    "BENCHMARKS",
    "CLEAN",
    "DIRECT",
    "MAX_RESPONSE_CHARACTERS",
    "PROMPT_CHARACTERS",
    "STRING_TASKS",
    "VOCABULARY",
    "Benchmark",
    "BenchmarkTask",
    "Demonstration",
    "DemonstrationStyle",
    "Problem",
    "Split",
    "StringProblem",
    "base_mixture",
    "benchmark_task",
    "character_tokenizer",
    "demonstrate",
    "demonstrate_string",
    "demonstrations",
    "distinct_problems",
    "distinct_string_problems",
    "draw_problem",
    "draw_string_problem",
    "parse_prompt",
    "parse_string_prompt",
    "split_of",
    "split_of_string",
    "string_demonstrations",
    "string_task",
    "verify",
    "verify_string",
]
