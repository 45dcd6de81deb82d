"""Every way in which a teacher does not fit a student is refused, in process and over HTTP, and only those."""

import pytest

from geopd.problems import VOCABULARY, character_tokenizer
from geopd.training.compatibility import check_teacher, check_teacher_server
from geopd.training.language_model import ModelShape, build_model
from geopd.training.teacher_server import ServerTeacher
from model_server import ModelServer, serving

TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}={% endfor %}{% if add_generation_prompt %}>{% endif %}"
)


def tokenizer_of(symbols, eos="<eos>", template=None):
    """A character tokenizer with these symbols, in this order."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({symbol: i for i, symbol in enumerate(symbols)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    inner.decoder = decoders.Fuse()
    ends = {} if eos is None else {"eos_token": eos}
    made = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", **ends)
    made.chat_template = template
    return made


@pytest.fixture
def student():
    return tokenizer_of(VOCABULARY, template=TEMPLATE)


def test_equal_tokenizers_fit_whatever_the_padding_of_either_model(student):
    check_teacher(student, tokenizer_of(VOCABULARY, template=TEMPLATE))
    check_teacher(student, student, student_vocab_size=24, teacher_vocab_size=128)
    check_teacher(student, student, student_vocab_size=128, teacher_vocab_size=24)


def test_two_exchanged_ids_in_vocabularies_of_one_size_are_named(student):
    exchanged = list(VOCABULARY)
    exchanged[2], exchanged[5] = exchanged[5], exchanged[2]
    with pytest.raises(
        ValueError,
        match=r"differ in 2 token ids \(24 and 24 tokens\): '0' is 2 for the student and 5 for the teacher; "
        r"'3' is 5 for the student and 2 for the teacher\. Use a teacher with the student's tokenizer",
    ):
        check_teacher(student, tokenizer_of(exchanged, template=TEMPLATE))


def test_a_missing_token_is_named_and_a_long_list_cut(student):
    with pytest.raises(ValueError, match=r"differ in 1 token ids .*: '!' is absent for the student and 24 for the"):
        check_teacher(student, tokenizer_of([*VOCABULARY, "!"], template=TEMPLATE))
    with pytest.raises(ValueError, match=r"differ in 22 token ids .*; \.\.\."):
        check_teacher(student, tokenizer_of([*VOCABULARY[:2], *reversed(VOCABULARY[2:])], template=TEMPLATE))


@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_a_model_with_fewer_rows_than_token_ids_is_refused(student, whose):
    with pytest.raises(ValueError, match=f"the {whose} has 23 vocabulary rows but token ids run to 23"):
        check_teacher(student, student, **{f"{whose}_vocab_size": 23})


def test_a_missing_end_is_told_for_either(student):
    endless = tokenizer_of(VOCABULARY, eos=None, template=TEMPLATE)
    with pytest.raises(ValueError, match="the student's tokenizer has no eos_token"):
        check_teacher(endless, student)
    with pytest.raises(ValueError, match="the teacher's tokenizer has no eos_token"):
        check_teacher(student, endless)


def test_different_ends_are_named(student):
    with pytest.raises(ValueError, match=r"'<eos>' \(id 1\) for the student and '=' \(id 14\) for the teacher"):
        check_teacher(student, tokenizer_of(VOCABULARY, eos="=", template=TEMPLATE))


def test_different_templates_are_shown_unless_allowed(student):
    other = tokenizer_of(VOCABULARY, template=TEMPLATE.replace("}}=", "}}+"))
    with pytest.raises(
        ValueError, match=r"templates of student and teacher differ, from character 53 on: '=\{% .* '\+"
    ):
        check_teacher(student, other)
    with pytest.raises(ValueError, match="differ, the teacher has none"):
        check_teacher(student, tokenizer_of(VOCABULARY))
    check_teacher(student, other, allow_template_mismatch=True)
    check_teacher(tokenizer_of(VOCABULARY), tokenizer_of(VOCABULARY))


@pytest.mark.parametrize("temperatures", [(1.0, 0.7), (0.0, 0.0), (float("nan"), 1.0)])
def test_temperatures_that_are_not_one_positive_number_are_refused(student, temperatures):
    with pytest.raises(ValueError, match="must be equal and positive"):
        check_teacher(student, student, student_temperature=temperatures[0], teacher_temperature=temperatures[1])
    check_teacher(student, student, student_temperature=0.7, teacher_temperature=0.7)


@pytest.fixture
def state(student, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    tiny = ModelShape(hidden=8, layers=1, heads=1, key_value_heads=1, intermediate=8)
    return ModelServer(build_model(tiny, student, seed=0), student)


@pytest.fixture
def server(state):
    with serving(state) as url:
        yield ServerTeacher(url, retries=0)


def test_a_server_with_the_students_tokenizer_fits(server, student):
    check_teacher_server(server, student, student_vocab_size=24)


def test_a_student_with_fewer_rows_than_token_ids_is_refused_with_or_without_a_tokenizer_folder(
    server, student, tmp_path
):
    student.save_pretrained(tmp_path)
    for folder in (None, tmp_path):
        with pytest.raises(ValueError, match="the student has 23 vocabulary rows but token ids run to 23"):
            check_teacher_server(server, student, student_vocab_size=23, teacher_tokenizer=folder)


def test_a_server_with_other_ids_is_refused_at_the_first_place(server, state, student):
    exchanged = list(VOCABULARY)
    exchanged[2], exchanged[5] = exchanged[5], exchanged[2]
    state.tokenizer = tokenizer_of(exchanged, template=TEMPLATE)
    with pytest.raises(
        ValueError, match=r"different token ids to one text, at place 0 the student has 2 \('0'\), the "
    ):
        check_teacher_server(server, student)


def test_a_server_with_another_end_is_refused(server, state, student):
    without = [symbol if symbol != "<eos>" else "<end>" for symbol in VOCABULARY]
    state.tokenizer = tokenizer_of(without, eos="<end>", template=TEMPLATE)
    with pytest.raises(
        ValueError, match=r"different token ids to one text, at place \d+ the student has 1 \('<eos>'\)"
    ):
        check_teacher_server(server, student)


def test_a_server_with_another_template_is_refused_unless_allowed(server, state, student):
    state.tokenizer = tokenizer_of(VOCABULARY, template=TEMPLATE.replace("}}=", "}}+"))
    with pytest.raises(
        ValueError, match=r"does not render a conversation as the student does, at place \d+ the student"
    ):
        check_teacher_server(server, student)
    check_teacher_server(server, student, allow_template_mismatch=True)


def test_a_server_that_renders_no_messages_is_refused_unless_allowed(server, state, student):
    tokenize = state.tokenize
    state.tokenize = lambda body: tokenize(body) if "prompt" in body else (400, {"message": "no chat template"})
    with pytest.raises(ValueError, match=r"it refuses messages \(.*no chat template\)\. Give both one chat template"):
        check_teacher_server(server, student)
    check_teacher_server(server, student, allow_template_mismatch=True)


def test_a_server_without_tokenize_needs_a_tokenizer_folder(server, state, student, tmp_path):
    state.tokenize = None
    with pytest.raises(ValueError, match=r"offers no /tokenize, .*: pass teacher_tokenizer"):
        check_teacher_server(server, student)
    student.save_pretrained(tmp_path / "same")
    check_teacher_server(server, student, teacher_tokenizer=tmp_path / "same")
    tokenizer_of([*VOCABULARY, "!"], template=TEMPLATE).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="differ in 1 token ids"):
        check_teacher_server(server, student, teacher_tokenizer=tmp_path / "other")
    with pytest.raises(ValueError, match=r"teacher_tokenizer=.*nowhere holds no tokenizer"):
        check_teacher_server(server, student, teacher_tokenizer=tmp_path / "nowhere")


def test_a_folder_that_fits_does_not_hide_a_server_that_does_not(server, state, student, tmp_path):
    student.save_pretrained(tmp_path)
    state.tokenizer = tokenizer_of([*VOCABULARY[:2], *reversed(VOCABULARY[2:])], template=TEMPLATE)
    with pytest.raises(ValueError, match="different token ids to one text"):
        check_teacher_server(server, student, teacher_tokenizer=tmp_path)


def test_a_failing_server_another_temperature_and_a_missing_end_are_told(server, state, student):
    state.tokenize = lambda _: (500, {"message": "broken"})
    with pytest.raises(ValueError, match="HTTP 500: broken"):
        check_teacher_server(server, student)
    with pytest.raises(ValueError, match="teacher temperature 1: they must be equal"):
        check_teacher_server(server, student, student_temperature=0.6)
    with pytest.raises(ValueError, match="student's tokenizer has no eos_token"):
        check_teacher_server(server, tokenizer_of(VOCABULARY, eos=None))


def test_the_miniatures_tokenizer_fits_itself():
    check_teacher(character_tokenizer(), character_tokenizer(), student_vocab_size=24, teacher_vocab_size=24)
