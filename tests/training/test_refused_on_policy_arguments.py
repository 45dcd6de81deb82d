"""Arguments that would change the method, and teachers that cannot serve, are named when the trainer is built."""

import pytest

from geopd.problems import character_tokenizer
from geopd.training import ScoreWeightedTrainer, build_model
from geopd.training.objective import Objective
from geopd.training.teacher import ModelTeacher
from tiny_on_policy import SHAPE, make, make_ours


@pytest.fixture(scope="module")
def tokenizer():
    return character_tokenizer()


@pytest.fixture
def trainer_of(tokenizer, tmp_path):
    return lambda objective, **kwargs: make_ours(objective, tokenizer, tmp_path, **kwargs)


@pytest.mark.parametrize(
    ("objective", "config", "match"),
    [
        (Objective(0.0), {"loss_type": "bnpo"}, "set loss_type='dapo'"),
        (Objective(1.0, rollouts="teacher"), {"use_transformers_continuous_batching": True}, "leave it out"),
    ],
)
def test_arguments_that_change_the_method_are_refused(objective, config, match, trainer_of):
    with pytest.raises(ValueError, match=match):
        trainer_of(objective, config=config)


def test_a_penalty_towards_a_reference_model_is_refused(tokenizer, tmp_path):
    student = build_model(SHAPE, tokenizer, seed=0)
    student.save_pretrained(tmp_path / "student")
    loaded = type(student).from_pretrained(tmp_path / "student")
    with pytest.raises(ValueError, match=r"beta=0\.1 adds a KL"):
        make(ScoreWeightedTrainer, tokenizer, tmp_path, model=loaded, config={"beta": 0.1}, objective=Objective(0.0))


def test_prompts_with_images_are_refused_where_a_teacher_scores(trainer_of):
    with pytest.raises(ValueError, match="the prompts contain images"):
        trainer_of(Objective(1.0))._teacher_logps({"pixel_values": None})


def test_unusable_teachers_are_named(tokenizer, tmp_path):
    def build(objective, teacher=None, **kwargs):
        return make(ScoreWeightedTrainer, tokenizer, tmp_path, objective=objective, teacher=teacher, **kwargs)

    with pytest.raises(ValueError, match="mix objective needs a teacher"):
        build(Objective(0.5))
    with pytest.raises(ValueError, match="rlvr objective uses no teacher"):
        build(Objective(0.0), object())
    with pytest.raises(ValueError, match="pass a ModelTeacher"):
        build(Objective(1.0, rollouts="teacher"), object())
    student = build_model(SHAPE, tokenizer, seed=0)
    with pytest.raises(ValueError, match="shares weights with the student"):
        build(Objective(1.0), ModelTeacher(student), model=student)
    small = build_model(SHAPE, tokenizer, seed=1)
    small.config.vocab_size = 7
    with pytest.raises(ValueError, match="vocabulary 7 is smaller"):
        build(Objective(1.0), ModelTeacher(small))


def test_teacher_rollouts_refuse_vllm(trainer_of):
    trainer = trainer_of(Objective(1.0, rollouts="teacher"))
    trainer.use_vllm = True
    with pytest.raises(ValueError, match="use_vllm samples from the student"):
        trainer._check_arguments()
