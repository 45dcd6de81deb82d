"""Arguments that would change the method, and teachers that cannot serve, are named when the trainer is built."""

from types import SimpleNamespace

import pytest
from transformers import LlamaConfig, MixtralConfig
from trl import GRPOConfig

from geopd.problems import character_tokenizer
from geopd.training import OptimiserSettings, Rollouts, ScoreWeightedTrainer, build_model, on_policy_config
from geopd.training.objective import Objective
from geopd.training.score_weighted_arguments import check_router_loss, check_score_weighted_arguments
from geopd.training.teacher import ModelTeacher
from tiny_on_policy import SHAPE, make, make_ours


@pytest.fixture(scope="module")
def tokenizer():
    return character_tokenizer()


@pytest.fixture
def trainer_of(tokenizer, tmp_path):
    return lambda objective, **kwargs: make_ours(objective, tokenizer, tmp_path, **kwargs)


REFUSED = [
    (Objective(0.0), {"loss_type": "bnpo"}, "set loss_type='dapo'"),
    (Objective(0.0), {"loss_type": "grpo"}, "set loss_type='dapo'"),
    (Objective(0.0), {"loss_type": "sapo"}, "set loss_type='dapo'"),
    (Objective(0.0), {"loss_type": "vespo"}, "set loss_type='dapo'"),
    (Objective(0.0), {"loss_type": "cispo"}, "set loss_type='dapo'"),
    (Objective(0.5), {"importance_sampling_level": "sequence"}, "set importance_sampling_level='token'"),
    (Objective(1.0), {"importance_sampling_level": "sequence"}, "set importance_sampling_level='token'"),
    (
        Objective(0.0, token_selection="random", rho=0.5),
        {"importance_sampling_level": "sequence"},
        "set importance_sampling_level='token'",
    ),
    (Objective(0.0), {"top_entropy_quantile": 0.2}, r"top_entropy_quantile=0\.2 drops tokens.*use token_selection"),
    (Objective(0.0), {"entropy_coef": 0.01}, "set entropy_coef=0"),
    (Objective(0.0), {"entropy_coef": -0.01}, "set entropy_coef=0"),
    (Objective(0.0), {"use_adaptive_entropy": True}, "use_adaptive_entropy .*leave it out"),
    (Objective(0.0), {"off_policy_mask_threshold": 0.1}, r"off_policy_mask_threshold=0\.1 .*leave it out"),
    (Objective(0.0), {"delta": 4.0}, r"delta=4\.0 .*leave it out"),
    (Objective(0.0), {"temperature": 0.0}, r"temperature=0\.0 .*set it above 0"),
    (Objective(0.0), {"gradient_accumulation_steps": 4}, r"steps_per_generation=1 is no multiple .*_steps=4.* to 4"),
    (
        Objective(0.0),
        {"gradient_accumulation_steps": 2, "steps_per_generation": 5},
        r"steps_per_generation=5 is no multiple of gradient_accumulation_steps=2.* to 4",
    ),
    (Objective(1.0, rollouts="teacher"), {"use_vllm": True}, "use_vllm samples from the student: leave it out"),
    (Objective(1.0, rollouts="teacher"), {"use_transformers_continuous_batching": True}, "leave it out"),
]


@pytest.mark.parametrize(("objective", "config", "match"), REFUSED, ids=str)
def test_arguments_that_change_the_method_are_refused(objective, config, match, tmp_path):
    args = on_policy_config(OptimiserSettings(2, 1e-3), Rollouts(4, 4, 8), run=tmp_path, seed=0)
    check_score_weighted_arguments(args, objective)
    for name, value in config.items():
        assert hasattr(args, name)
        setattr(args, name, value)
    with pytest.raises(ValueError, match=match):
        check_score_weighted_arguments(args, objective)


def test_the_trainer_refuses_them_too(trainer_of):
    with pytest.raises(ValueError, match="set importance_sampling_level='token'"):
        trainer_of(Objective(1.0), config={"importance_sampling_level": "sequence"})


def test_what_keeps_the_form_is_accepted(tmp_path):
    """TRL's own default of a rollout an update, whole updates of a rollout, and sequence ratios of even credit."""
    common = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "activation_checkpointing": False}
    for changes in (
        {"gradient_accumulation_steps": 8},
        {"gradient_accumulation_steps": 2, "steps_per_generation": 6},
        {"importance_sampling_level": "sequence", "mask_truncated_completions": True, "router_aux_loss_coef": 0.0},
    ):
        check_score_weighted_arguments(GRPOConfig(**common, **changes), Objective(0.0))


@pytest.mark.parametrize(
    ("own", "given", "refused"),
    [(0.001, None, 0.001), (0.001, 0.0, None), (0.0, None, None), (None, None, None), (None, 0.1, 0.1)],
)
def test_the_load_balancing_loss_of_experts_is_refused_unless_it_is_off(own, given, refused):
    shape = LlamaConfig() if own is None else MixtralConfig(router_aux_loss_coef=own)
    args = SimpleNamespace(router_aux_loss_coef=given)
    if refused is None:
        check_router_loss(args, shape)
        return
    with pytest.raises(ValueError, match=rf"router_aux_loss_coef={refused} .*set router_aux_loss_coef=0"):
        check_router_loss(args, shape)


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


def test_teacher_rollouts_refuse_a_rollout_function(trainer_of):
    trainer = trainer_of(Objective(1.0, rollouts="teacher"))
    trainer.rollout_func = print
    with pytest.raises(ValueError, match="rollout_func samples from the student"):
        trainer._check_arguments()
