"""Addition and subtraction of one- to three-digit numbers, written out column by column.

A prompt is always eight characters, ``{a:>3}{op}{b:>3}=``, so a batch of prompts needs no padding. A worked response
lists one (carry, digit) pair per column, least significant first, then ``>`` and the answer::

    123+989=  ->  121111>1112        3+9 = 12, 2+8+1 = 11, 1+9+1 = 11
    402-  7=  ->  151903>395         2-7 borrows and leaves 5, 0-0-1 borrows and leaves 9, 4-0-1 = 3

**Negative results.** The working of a subtraction is that of the larger operand minus the smaller one, whose (borrow,
digit) pairs are non-negative; when ``a < b`` the answer carries a leading minus sign: ``7-402=`` has the working of
``402-7`` and ends in ``>-395``. The verifier accepts exactly ``str(a + b)`` or ``str(a - b)``: no leading zeros, no
plus sign, and no ``-0``.

Source: the miniature task of the study; verification by exact answer follows Section 4 of arXiv 2606.07082, where the
reward is binary accuracy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["ANSWER_MARK", "LARGEST_OPERAND", "MAX_RESPONSE_CHARACTERS", "PROMPT_CHARACTERS", "Problem", "verify"]

Operator = Literal["+", "-"]

ANSWER_MARK = ">"
LARGEST_OPERAND = 999
PROMPT_CHARACTERS = 8
MAX_RESPONSE_CHARACTERS = 11  # three columns of two, the mark, four characters of answer; the end token makes twelve


@dataclass(frozen=True, slots=True)
class Problem:
    """One question: ``a`` plus or minus ``b``.

    Args:
        a: first operand, 0 to 999.
        operator: ``"+"`` or ``"-"``.
        b: second operand, 0 to 999.

    Raises:
        ValueError: an operand is outside 0..999 or the operator is another character.
    """

    a: int
    operator: Operator
    b: int

    def __post_init__(self) -> None:
        for name, operand in (("a", self.a), ("b", self.b)):
            if not 0 <= operand <= LARGEST_OPERAND:
                raise ValueError(f"operand {name}={operand} is outside 0..{LARGEST_OPERAND}: use at most three digits")
        if self.operator not in ("+", "-"):
            raise ValueError(f"operator {self.operator!r} is unknown: use '+' or '-'")

    @property
    def prompt(self) -> str:
        """The question as the model reads it: eight characters ending in ``=``."""
        return f"{self.a:>3}{self.operator}{self.b:>3}="

    @property
    def answer(self) -> str:
        """The exact answer in decimal, with a leading minus sign when it is negative."""
        return str(self.a + self.b if self.operator == "+" else self.a - self.b)

    def columns(self) -> list[tuple[int, int]]:
        """The (carry or borrow, digit) of each column, least significant first.

        There are as many columns as the longer operand has digits. For addition the pair is ``divmod(x + y + carry,
        10)``. For subtraction it is the larger operand minus the smaller: ``digit = (x - y - borrow) mod 10``, and the
        borrow is 1 when that difference was negative.
        """
        high, low = (self.a, self.b) if self.operator == "+" or self.a >= self.b else (self.b, self.a)
        sign = 1 if self.operator == "+" else -1
        width = max(len(str(self.a)), len(str(self.b)))
        pairs: list[tuple[int, int]] = []
        carry = 0
        for place in range(width):
            x, y = high // 10**place % 10, low // 10**place % 10
            total = x + sign * (y + carry)
            carry = abs(total // 10)
            pairs.append((carry, total % 10))
        return pairs

    def read_off(self, columns: list[tuple[int, int]]) -> str:
        """The answer that a column working implies, whether or not the working is right.

        The digits are read most significant first behind the last carry; the sign is the problem's own.
        """
        magnitude = columns[-1][0] * 10 ** len(columns) + sum(digit * 10**i for i, (_, digit) in enumerate(columns))
        return f"-{magnitude}" if self.operator == "-" and self.a < self.b else str(magnitude)

    def working(self) -> str:
        """The column pairs as text, e.g. ``121111``."""
        return write_columns(self.columns())

    @property
    def response(self) -> str:
        """The full worked response, ``working>answer``."""
        return f"{self.working()}{ANSWER_MARK}{self.answer}"


def write_columns(columns: list[tuple[int, int]]) -> str:
    """Column pairs as text: carry then digit, least significant column first."""
    return "".join(f"{carry}{digit}" for carry, digit in columns)


def verify(problem: Problem, response: str) -> float:
    """Binary reward of a response: 1.0 iff the text after its only ``>`` is the exact answer, else 0.0.

    The working is not judged, as in the paper's verifier; end and padding tokens must have been removed.
    """
    _, mark, answer = response.partition(ANSWER_MARK)
    return float(bool(mark) and answer == problem.answer)


def parse_prompt(prompt: str) -> Problem:
    """The problem a prompt asks, the inverse of :attr:`Problem.prompt`.

    Raises:
        ValueError: the text is not eight characters of the form ``{a:>3}{op}{b:>3}=``.
    """
    try:
        a, operator, b = int(prompt[:3]), prompt[3], int(prompt[4:7])
        if operator not in ("+", "-"):
            raise ValueError(operator)
        problem = Problem(a, "+" if operator == "+" else "-", b)
    except (ValueError, IndexError) as error:
        raise ValueError(f"prompt {prompt!r} is not an arithmetic question: write '{{a:>3}}{{op}}{{b:>3}}='") from error
    if problem.prompt != prompt:
        raise ValueError(f"prompt {prompt!r} is not an arithmetic question: write {problem.prompt!r}")
    return problem
