"""Whether a teacher can judge a student's tokens: the same ids, the same end, the same template, the same temperature.

Distillation compares log-probabilities of token *ids*, so two vocabularies of one size with two ids exchanged give
numbers that look right and teach nonsense. Every check refuses; none repairs.
"""

from __future__ import annotations

from itertools import islice, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geopd.training.json_http import ServerError

if TYPE_CHECKING:
    from geopd.training.teacher_server import ServerTeacher

__all__ = ["check_teacher", "check_teacher_server"]

_SHOWN = 3
_PROBED_TOKENS = 512
_PROBE_MESSAGES = [
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "And 3 + 3?"},
]


def check_teacher(
    student_tokenizer: Any,
    teacher_tokenizer: Any,
    *,
    student_vocab_size: int | None = None,
    teacher_vocab_size: int | None = None,
    allow_template_mismatch: bool = False,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
) -> None:
    """Refuse a teacher whose tokens, end, template or temperature are not the student's.

    Args:
        student_tokenizer: a transformers tokenizer.
        teacher_tokenizer: a transformers tokenizer.
        student_vocab_size: rows of the student's output matrix; padding beyond the vocabulary is fine. None: unknown.
        teacher_vocab_size: rows of the teacher's output matrix, as above.
        allow_template_mismatch: accept different chat templates; the student's own is then the one that is used.
        student_temperature: of sampling and of the loss.
        teacher_temperature: that the teacher's logits are divided by.

    Raises:
        ValueError: names the first thing that does not fit, and the remedy.
    """
    _check_temperatures(student_temperature, teacher_temperature)
    student, teacher = student_tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
    _check_vocabularies(student, teacher)
    _check_rows("student", student_vocab_size, student)
    _check_rows("teacher", teacher_vocab_size, student)
    _check_ends(student_tokenizer, teacher_tokenizer)
    if not allow_template_mismatch:
        _check_templates(student_tokenizer.chat_template, teacher_tokenizer.chat_template)


def check_teacher_server(
    server: ServerTeacher,
    student_tokenizer: Any,
    *,
    teacher_tokenizer: str | Path | None = None,
    student_vocab_size: int | None = None,
    allow_template_mismatch: bool = False,
    student_temperature: float = 1.0,
) -> None:
    """Refuse a served teacher that does not fit, as far as can be seen from outside.

    ``GET /v1/models`` must list the model. Where ``POST /tokenize`` is offered (vLLM, SGLang), a text made of 512
    tokens spread over the student's vocabulary and of its end token must get the student's ids, and a conversation must
    be rendered as the student renders it. A tokenizer folder given beside it is compared in full.

    Args:
        server: the teacher.
        student_tokenizer: a transformers tokenizer.
        teacher_tokenizer: the folder of the served model's tokenizer on this machine, needed where the server offers no
            ``/tokenize``.
        student_vocab_size: rows of the student's output matrix, None when unknown.
        allow_template_mismatch: accept different chat templates.
        student_temperature: of sampling and of the loss; the server's is 1.

    Raises:
        ValueError: names what does not fit or cannot be seen, and the remedy.
    """
    _check_temperatures(student_temperature, 1.0)
    _check_rows("student", student_vocab_size, student_tokenizer.get_vocab())
    server.served_model()
    if teacher_tokenizer is not None:
        check_teacher(
            student_tokenizer,
            _load_tokenizer(teacher_tokenizer),
            allow_template_mismatch=allow_template_mismatch,
        )
    elif student_tokenizer.eos_token_id is None:
        raise _no_end("student")
    try:
        _check_served_tokens(server, student_tokenizer)
    except ServerError as error:
        if error.status not in (404, 405):
            raise
        if teacher_tokenizer is None:
            raise ValueError(
                f"{server.url} offers no /tokenize, so its token ids cannot be compared with the student's: pass "
                "teacher_tokenizer, a folder with the served model's tokenizer"
            ) from None
        return
    if not allow_template_mismatch and student_tokenizer.chat_template is not None:
        _check_served_template(server, student_tokenizer)


def _check_temperatures(student: float, teacher: float) -> None:
    if student != teacher or not student > 0:
        raise ValueError(
            f"student temperature {student:g} and teacher temperature {teacher:g}: they must be equal and positive, "
            "or the difference of log-probabilities is no divergence; set both to the sampling temperature"
        )


def _check_vocabularies(student: dict[str, int], teacher: dict[str, int]) -> None:
    if student == teacher:
        return
    differing = sorted(
        (token for token in student.keys() | teacher.keys() if student.get(token) != teacher.get(token)),
        key=lambda token: (student.get(token, len(student)), teacher.get(token, len(teacher)), token),
    )
    shown = "; ".join(
        f"{token!r} is {_id_in(student, token)} for the student and {_id_in(teacher, token)} for the teacher"
        for token in islice(differing, _SHOWN)
    )
    raise ValueError(
        f"teacher and student differ in {len(differing)} token ids ({len(teacher)} and {len(student)} tokens): {shown}"
        f"{'; ...' if len(differing) > _SHOWN else ''}. Use a teacher with the student's tokenizer"
    )


def _check_rows(whose: str, rows: int | None, vocabulary: dict[str, int]) -> None:
    if rows is not None and rows <= max(vocabulary.values()):
        raise ValueError(
            f"the {whose} has {rows} vocabulary rows but token ids run to {max(vocabulary.values())}: resize its "
            "embeddings or use the tokenizer it was trained with"
        )


def _id_in(vocabulary: dict[str, int], token: str) -> str:
    return str(vocabulary[token]) if token in vocabulary else "absent"


def _check_ends(student: Any, teacher: Any) -> None:
    for whose, tokenizer in (("student", student), ("teacher", teacher)):
        if tokenizer.eos_token_id is None:
            raise _no_end(whose)
    if student.eos_token_id != teacher.eos_token_id:
        raise ValueError(
            f"a response ends with {student.eos_token!r} (id {student.eos_token_id}) for the student and "
            f"{teacher.eos_token!r} (id {teacher.eos_token_id}) for the teacher: set the student tokenizer's eos_token "
            "to the teacher's"
        )


def _no_end(whose: str) -> ValueError:
    return ValueError(f"the {whose}'s tokenizer has no eos_token, so responses cannot end: set one before training")


def _check_templates(student: Any, teacher: Any) -> None:
    if student == teacher:
        return
    if not isinstance(student, str) or not isinstance(teacher, str):
        missing = [whose for whose, template in (("student", student), ("teacher", teacher)) if template is None]
        how = f"the {missing[0]} has none" if missing else "they are of different kinds"
    else:
        place = next(i for i, (a, b) in enumerate(zip_longest(student, teacher)) if a != b)
        how = f"from character {place} on: {student[place : place + 40]!r} and {teacher[place : place + 40]!r}"
    raise ValueError(
        f"the chat templates of student and teacher differ, {how}. Give both one template, or pass "
        "allow_template_mismatch if the teacher is to judge the student's"
    )


def _load_tokenizer(folder: str | Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"teacher_tokenizer={folder} holds no tokenizer that can be loaded: {error}") from None


def _check_served_tokens(server: ServerTeacher, tokenizer: Any) -> None:
    ids = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids))
    text = tokenizer.decode(ids[:: max(1, len(ids) // _PROBED_TOKENS)]) + tokenizer.eos_token
    expected = tokenizer(text, add_special_tokens=False)["input_ids"]
    difference = _first_difference(tokenizer, expected, server.tokenize(text))
    if difference:
        raise ValueError(
            f"{server.url} and the student give different token ids to one text, {difference}. Serve a teacher with "
            "the student's tokenizer"
        )


def _check_served_template(server: ServerTeacher, tokenizer: Any) -> None:
    expected = tokenizer.apply_chat_template(
        _PROBE_MESSAGES, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    try:
        difference = _first_difference(tokenizer, expected, server.tokenize(_PROBE_MESSAGES))
    except ServerError as error:
        if error.status is None or error.status >= 500:
            raise
        difference = f"it refuses messages ({error})"
    if difference:
        raise ValueError(
            f"{server.url} does not render a conversation as the student does, {difference}. Give both one chat "
            "template, or pass allow_template_mismatch if the teacher is to judge the student's"
        )


def _first_difference(tokenizer: Any, expected: list[int], found: list[int]) -> str:
    for place, pair in enumerate(zip_longest(expected, found)):
        if pair[0] != pair[1]:
            ours, theirs = (
                "the end" if token is None else f"{token} ({tokenizer.convert_ids_to_tokens(token)!r})"
                for token in pair
            )
            return f"at place {place} the student has {ours}, the server {theirs}"
    return ""
