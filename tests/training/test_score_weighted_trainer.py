"""The trainer's advantages and gradients against stock GRPO and against a minimal plain-torch loop."""

import pytest
import torch
from datasets import Dataset
from transformers import set_seed
from trl import GRPOConfig, GRPOTrainer

from geopd.problems import character_tokenizer
from geopd.training import OptimiserSettings, ScoreWeightedTrainer, build_model, trainer_arguments
from geopd.training.objective import Objective
from geopd.training.teacher import ModelTeacher
from tiny_on_policy import (
    LENGTH,
    PROMPTS,
    SAMPLES,
    SHAPE,
    UNEQUAL,
    FixedResponses,
    gradients,
    make,
    make_ours,
    plain_gradients,
    reward,
    scored_batch,
    unpadded,
)

# TRL 1.16 reads the old name of this property at every rollout; nothing of ours can avoid it.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

OPD, RLVR = Objective(1.0), Objective(0.0)


@pytest.fixture(scope="module")
def tokenizer():
    return character_tokenizer()


@pytest.fixture
def trainer_of(tokenizer, tmp_path):
    return lambda objective, **kwargs: make_ours(objective, tokenizer, tmp_path, **kwargs)


OBJECTIVES = [
    OPD,
    RLVR,
    Objective(0.3),
    Objective(0.3, normalise=True),
    Objective(1.0, normalise=True),
    Objective(0.0, normalise=True),
    Objective(1.0, token_selection="top-gap", rho=0.25),
    Objective(1.0, token_selection="top-gap", rho=0.5, rollouts="teacher"),
    Objective(0.6, normalise=True, token_selection="top-gap", rho=0.3),
]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
@pytest.mark.parametrize("prompts", [None, UNEQUAL], ids=["equal_prompts", "unequal_prompts"])
def test_loss_and_gradient_are_the_plain_score_weighted_ones(objective, prompts, tokenizer, trainer_of):
    """The oracle sees each prompt and response alone, so left padding must change nothing either."""
    trainer = trainer_of(objective, prompts=prompts)
    batch = scored_batch(trainer)
    assert batch["advantages"].shape == batch["completion_mask"].shape
    assert bool((batch["prompt_mask"] == 0).any()) == (prompts is not None)
    loss, found = gradients(trainer, batch)

    texts = tokenizer.batch_decode(batch["completion_ids"], skip_special_tokens=True)
    rewards = reward(None, texts)
    assert 0 < sum(rewards) < PROMPTS * SAMPLES
    student, teacher = build_model(SHAPE, tokenizer, seed=0), build_model(SHAPE, tokenizer, seed=1)
    expected_loss, expected = plain_gradients(student, teacher, batch, rewards, objective)
    assert loss == pytest.approx(expected_loss, abs=1e-6)
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, atol=1e-6), name


def test_alpha_zero_is_stock_grpo_to_the_last_bit(tokenizer, tmp_path, trainer_of):
    ours = trainer_of(RLVR, steps=3)
    stock = make(GRPOTrainer, tokenizer, tmp_path, steps=3)
    batch, expected = scored_batch(ours), scored_batch(stock)
    assert torch.equal(batch["completion_ids"], expected["completion_ids"])
    mask = batch["completion_mask"]
    assert torch.equal(batch["advantages"], expected["advantages"].unsqueeze(1) * mask)
    assert expected["advantages"].abs().max() > 0
    for trainer in (ours, stock):
        set_seed(5)
        trainer.train()
    for (name, value), other in zip(ours.model.named_parameters(), stock.model.parameters(), strict=True):
        assert torch.equal(value, other), name


@pytest.mark.parametrize("steps_per_generation", [1, 2], ids=["scored_here", "old_logps_reused"])
def test_a_teacher_with_the_students_weights_gives_exactly_zero(steps_per_generation, trainer_of):
    config = {"steps_per_generation": steps_per_generation}
    trainer = trainer_of(OPD, seed=0, prompts=UNEQUAL, config=config)
    batch = scored_batch(trainer)
    assert ("old_per_token_logps" in batch) == (steps_per_generation == 2)
    assert torch.equal(batch["advantages"], torch.zeros_like(batch["advantages"]))
    loss, found = gradients(trainer, batch)
    assert loss == 0.0
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in found.values())


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_(en|dis)able` is deprecated:FutureWarning")
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "gradient_checkpointing"])
def test_in_bf16_autocast_a_teacher_with_the_students_weights_still_gives_exactly_zero(
    checkpointing, tokenizer, tmp_path
):
    """A whole run, since accelerate wraps the student's forward when training begins."""
    shared = trainer_arguments(OptimiserSettings(1, 1e-3, warmup_steps=0), tmp_path, PROMPTS * SAMPLES, 3)
    shared |= {"bf16": True, "activation_checkpointing": checkpointing, "logging_steps": 1}
    trainer = ScoreWeightedTrainer(
        model=build_model(SHAPE, tokenizer, seed=0),
        reward_funcs=reward,
        args=GRPOConfig(**shared, num_generations=SAMPLES, max_completion_length=LENGTH, temperature=0.8),
        train_dataset=Dataset.from_dict({"prompt": UNEQUAL}),
        processing_class=tokenizer,
        objective=OPD,
        teacher=ModelTeacher(build_model(SHAPE, tokenizer, seed=0)),
    )
    assert trainer.accelerator.mixed_precision == "bf16"
    trainer.train()
    (row,) = (row for row in trainer.state.log_history if "loss" in row)
    assert (row["opd/advantage_rms"], row["loss"], row["grad_norm"]) == (0.0, 0.0, 0.0)
    assert row["entropy"] > 0


def test_padding_behind_a_response_gets_no_distillation(trainer_of):
    batch = scored_batch(trainer_of(OPD))
    behind = batch["completion_mask"] == 0
    assert torch.equal(batch["advantages"][behind], torch.zeros(int(behind.sum())))
    assert bool((batch["advantages"][~behind] != 0).all())


def test_mixture_is_the_weighted_sum_of_both_ends(trainer_of):
    opd, rlvr, mix = (scored_batch(trainer_of(Objective(alpha)))["advantages"] for alpha in (1.0, 0.0, 0.25))
    assert torch.allclose(mix, 0.25 * opd + 0.75 * rlvr, atol=1e-6)


def test_random_selection_keeps_the_share_of_every_response_and_differs_between_rollouts(trainer_of):
    trainer = trainer_of(Objective(1.0, token_selection="random", rho=0.5))
    batch = scored_batch(trainer)
    plain = scored_batch(trainer_of(OPD))["advantages"]
    lengths = batch["completion_mask"].sum(dim=1)
    kept = (batch["advantages"] != 0).sum(dim=1)
    assert torch.equal(kept, (lengths + 1) // 2)
    weights = (lengths / kept).unsqueeze(1)
    assert torch.allclose(batch["advantages"], torch.where(batch["advantages"] != 0, plain * weights, 0.0))
    share = float(kept.sum() / lengths.sum())
    assert trainer._metrics["train"]["kept_token_share"] == pytest.approx([share])
    assert torch.equal(scored_batch(trainer)["advantages"], batch["advantages"])
    trainer.state.global_step = 1
    assert not torch.equal(scored_batch(trainer)["advantages"], batch["advantages"])


def test_groups_of_equal_rewards_get_exactly_zero_and_the_rest_keep_their_denominator(tokenizer, tmp_path, trainer_of):
    """Three rewards of 0.9 have no exact mean: stock GRPO divides that rounding by 1e-4."""

    def tenths(prompts, completions, **_):
        return [
            0.9 if text == prompts[0] else 0.1 * len(answer) for text, answer in zip(prompts, completions, strict=True)
        ]

    def triples(trainer):
        trainer.num_generations = 3
        trainer.model.train()
        set_seed(11)
        prompts = trainer.train_dataset["prompt"][:PROMPTS]
        return trainer._generate_and_score_completions([{"prompt": p} for p in prompts for _ in range(3)])

    stock = triples(make(GRPOTrainer, tokenizer, tmp_path, rewards=tenths))["advantages"]
    batch = triples(trainer_of(RLVR, rewards=tenths))
    mask = batch["completion_mask"]
    assert stock[:3].abs().max() > 0
    assert torch.equal(batch["advantages"][:3], torch.zeros(3, mask.shape[1]))
    assert torch.equal(batch["advantages"][3:], (stock.unsqueeze(1) * mask)[3:])
    assert int(batch["num_items_in_batch"]) == int(mask.sum())


def test_equal_groups_are_found_past_unscored_responses_and_for_each_function_where_those_are_normalised(trainer_of):
    trainer = trainer_of(RLVR, rewards=[reward, reward])
    trainer.model.train()
    nan = float("nan")
    groups = [
        [[1, 0], [0, 1], [1, 0], [0, 1]],  # equal sums of unequal parts
        [[nan, 2], [nan, nan], [nan, 2], [nan, 2]],  # one unscored
        [[nan, nan]] * 4,
        [[1, 1], [1, 1], [1, 1], [1, 2]],
    ]
    trainer._rewards = torch.tensor(groups).view(16, 2)
    assert trainer._in_equal_groups(16).view(4, 4).tolist() == [[each] * 4 for each in (True, True, True, False)]
    trainer.multi_objective_aggregation = "normalize_then_sum"
    assert trainer._in_equal_groups(16).view(4, 4).tolist() == [[each] * 4 for each in (False, True, True, False)]


def test_logged_reverse_kl_is_the_loss_of_pure_distillation(trainer_of):
    """With ratio 1 the loss is minus the mean advantage, which is the mean sampled reverse KL."""
    trainer = trainer_of(OPD)
    loss, _ = gradients(trainer, scored_batch(trainer))
    metrics = trainer._metrics["train"]
    assert metrics["opd/reverse_kl"][-1] == pytest.approx(loss, rel=1e-5)
    assert metrics["opd/signal_share"][-1] == 1.0
    assert "kept_token_share" not in metrics


def test_logged_figures_of_a_mixture(trainer_of):
    trainer = trainer_of(Objective(0.05), prompts=UNEQUAL)
    batch = scored_batch(trainer)
    mask = batch["completion_mask"].bool()
    opd, rlvr = (scored_batch(trainer_of(end, prompts=UNEQUAL))["advantages"][mask] for end in (OPD, RLVR))
    opd_rms, rlvr_rms = float(opd.square().mean().sqrt()), float(rlvr.square().mean().sqrt())
    metrics = trainer._metrics["train"]
    assert metrics["opd/advantage_rms"] == pytest.approx([opd_rms])
    assert metrics["rlvr/advantage_rms"] == pytest.approx([rlvr_rms])
    share = 0.05 * opd_rms / (0.05 * opd_rms + 0.95 * rlvr_rms)
    assert metrics["opd/signal_share"] == pytest.approx([share])


def test_signal_share_of_a_normalised_mixture_is_alpha(trainer_of):
    trainer = trainer_of(Objective(0.05, normalise=True))
    scored_batch(trainer)
    assert trainer._metrics["train"]["opd/signal_share"] == pytest.approx([0.05])


def test_teacher_rollouts_come_from_the_teacher_and_evaluation_from_the_student(tokenizer, trainer_of):
    """A teacher whose head knows one token writes nothing else; a random student writes many."""
    trainer = trainer_of(Objective(1.0, rollouts="teacher"))
    token = tokenizer.convert_tokens_to_ids("7")
    with torch.no_grad():
        trainer.teacher.model.lm_head.weight.zero_()
        trainer.teacher.model.model.norm.weight.zero_()
        trainer.teacher.model.lm_head.bias = torch.nn.Parameter(50.0 * torch.eye(len(tokenizer))[token])
    batch = scored_batch(trainer)
    assert batch["completion_ids"].tolist() == [[token] * LENGTH] * (PROMPTS * SAMPLES)
    forward = trainer._metrics["train"]["opd/forward_kl"]
    assert forward == pytest.approx([float(batch["advantages"].mean())], rel=1e-5)
    assert "opd/reverse_kl" not in trainer._metrics["train"]
    trainer.model.eval()
    evaluated = trainer._generate_and_score_completions([{"prompt": "1+2="}] * SAMPLES)
    assert len(set(evaluated["completion_ids"].flatten().tolist())) > 1
    assert "opd/reverse_kl" in trainer._metrics["eval"]


def test_a_teacher_that_is_the_student_writes_what_the_student_would(trainer_of):
    """Same weights and random state: both ways of sampling agree token by token, left padding included."""
    batches = [
        scored_batch(trainer_of(Objective(1.0, rollouts=who), seed=0, prompts=UNEQUAL))
        for who in ("student", "teacher")
    ]
    for key in ("prompt_ids", "completion_ids", "completion_mask"):
        assert torch.equal(batches[0][key], batches[1][key]), key


def test_left_padding_of_any_width_leaves_the_loss(trainer_of):
    class Fixed(FixedResponses, ScoreWeightedTrainer):
        pass

    losses = []
    for multiple in (None, 16):
        trainer = trainer_of(Objective(0.4, normalise=True), cls=Fixed, prompts=UNEQUAL)
        trainer.pad_to_multiple_of = multiple
        batch = scored_batch(trainer)
        assert len({len(answer) for _, answer in unpadded(batch)}) > 2
        losses.append(gradients(trainer, batch))
    assert losses[0][0] == pytest.approx(losses[1][0], abs=1e-6)
    for name, gradient in losses[0][1].items():
        assert torch.allclose(gradient, losses[1][1][name], atol=1e-6), name
