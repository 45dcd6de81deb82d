"""Verifiable tasks: prompts, demonstrations, verifiers and the tokenizer they are written in."""

from geopd.problems.arithmetic import (
    ANSWER_MARK,
    MAX_RESPONSE_CHARACTERS,
    PROMPT_CHARACTERS,
    Problem,
    parse_prompt,
    verify,
)
from geopd.problems.demonstrations import (
    CLEAN,
    DIRECT,
    Demonstration,
    DemonstrationStyle,
    base_mixture,
    demonstrate,
    demonstrations,
    string_task,
)
from geopd.problems.splits import Split, distinct_problems, draw_problem, split_of
from geopd.problems.tokenizer import VOCABULARY, character_tokenizer

__all__ = [
    "ANSWER_MARK",
    "CLEAN",
    "DIRECT",
    "MAX_RESPONSE_CHARACTERS",
    "PROMPT_CHARACTERS",
    "VOCABULARY",
    "Demonstration",
    "DemonstrationStyle",
    "Problem",
    "Split",
    "base_mixture",
    "character_tokenizer",
    "demonstrate",
    "demonstrations",
    "distinct_problems",
    "draw_problem",
    "parse_prompt",
    "split_of",
    "string_task",
    "verify",
]
