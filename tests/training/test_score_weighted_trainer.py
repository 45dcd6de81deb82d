"""The trainer's advantages and gradients against stock GRPO and against a minimal plain-torch loop."""

import pytest
import torch
from datasets import Dataset
from transformers import set_seed
from trl import GRPOTrainer

from geopd.problems import character_tokenizer, distinct_problems
from geopd.training import (
    ModelShape,
    OptimiserSettings,
    Rollouts,
    ScoreWeightedTrainer,
    build_model,
    on_policy_config,
    paradigm_of,
)

# TRL 1.16 reads the old name of this property at every rollout; nothing of ours can avoid it.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

PROMPTS, SAMPLES, LENGTH = 4, 4, 8
SHAPE = ModelShape(hidden=32, layers=2, heads=2, key_value_heads=1, intermediate=48)


@pytest.fixture(scope="module")
def tokenizer():
    return character_tokenizer()


def reward(prompts, completions, **_):
    """A task that an untrained model solves sometimes: an odd number of digits."""
    return [float(sum(character.isdigit() for character in text) % 2) for text in completions]


def make(cls, tokenizer, folder, steps=2, seed=3, **kwargs):
    args = on_policy_config(
        OptimiserSettings(steps, 1e-3, warmup_steps=0),
        Rollouts(PROMPTS, SAMPLES, LENGTH),
        run=folder,
        seed=seed,
    )
    prompts = [problem.prompt for problem in distinct_problems("train", 40, 0)]
    return cls(
        model=build_model(SHAPE, tokenizer, seed=0),
        reward_funcs=reward,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
        **kwargs,
    )


def scored_batch(trainer):
    """One rollout batch as training sees it, from a fixed random state."""
    prompts = trainer.train_dataset["prompt"][:PROMPTS]
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    set_seed(11)
    return trainer._generate_and_score_completions([{"prompt": p} for p in prompts for _ in range(SAMPLES)])


def plain_logps(model, prompt_ids, response_ids):
    """Log-probabilities of one unpadded response, by the model's ordinary forward."""
    ids = torch.cat([prompt_ids, response_ids]).unsqueeze(0)
    logits = model(input_ids=ids).logits[0, len(prompt_ids) - 1 : -1]
    return torch.log_softmax(logits, dim=-1).gather(1, response_ids.unsqueeze(1)).squeeze(1)


def plain_gradients(student, teacher, batch, texts, alpha):
    """Gradient of -(1/N) sum a_t log p, the advantages written out one by one."""
    student.zero_grad()
    rewards = reward(None, texts)
    total, tokens = torch.zeros(()), 0
    for row, text_reward in enumerate(rewards):
        mask = batch["completion_mask"][row].bool()
        prompt, response = batch["prompt_ids"][row], batch["completion_ids"][row][mask]
        group = torch.tensor(rewards[row // SAMPLES * SAMPLES : (row // SAMPLES + 1) * SAMPLES])
        scalar = float((text_reward - group.mean()) / (group.std(correction=1) + 1e-4))
        logps = plain_logps(student, prompt, response)
        with torch.no_grad():
            distillation = plain_logps(teacher, prompt, response) - logps
        total = total - ((alpha * distillation + (1 - alpha) * scalar) * logps).sum()
        tokens += len(response)
    (total / tokens).backward()
    return {name: value.grad.clone() for name, value in student.named_parameters()}


@pytest.mark.parametrize("alpha", [1.0, 0.0, 0.3])
def test_gradient_is_the_plain_score_weighted_one(alpha, tokenizer, tmp_path):
    teacher = build_model(SHAPE, tokenizer, seed=1) if alpha else None
    trainer = make(ScoreWeightedTrainer, tokenizer, tmp_path, alpha=alpha, teacher=teacher)
    batch = scored_batch(trainer)
    assert batch["advantages"].shape == batch["completion_mask"].shape
    trainer.model.zero_grad()
    trainer.compute_loss(trainer.model, batch).backward()
    found = {name: value.grad.clone() for name, value in trainer.model.named_parameters()}

    texts = tokenizer.batch_decode(batch["completion_ids"], skip_special_tokens=True)
    assert 0 < sum(reward(None, texts)) < PROMPTS * SAMPLES
    student, oracle_teacher = build_model(SHAPE, tokenizer, seed=0), build_model(SHAPE, tokenizer, seed=1)
    expected = plain_gradients(student, oracle_teacher, batch, texts, alpha)
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, atol=1e-6), name


def test_alpha_zero_is_stock_grpo_to_the_last_bit(tokenizer, tmp_path):
    ours = make(ScoreWeightedTrainer, tokenizer, tmp_path, steps=3, alpha=0.0)
    stock = make(GRPOTrainer, tokenizer, tmp_path, steps=3)
    batch, expected = scored_batch(ours), scored_batch(stock)
    assert torch.equal(batch["completion_ids"], expected["completion_ids"])
    assert torch.equal(batch["advantages"], expected["advantages"].unsqueeze(1).expand_as(batch["advantages"]))
    assert expected["advantages"].abs().max() > 0
    for trainer in (ours, stock):
        set_seed(5)
        trainer.train()
    for (name, value), other in zip(ours.model.named_parameters(), stock.model.parameters(), strict=True):
        assert torch.equal(value, other), name


def test_a_teacher_with_the_students_weights_gives_exactly_zero(tokenizer, tmp_path):
    teacher = build_model(SHAPE, tokenizer, seed=0)
    batch = scored_batch(make(ScoreWeightedTrainer, tokenizer, tmp_path, alpha=1.0, teacher=teacher))
    assert torch.equal(batch["advantages"], torch.zeros_like(batch["advantages"]))


def test_padding_behind_a_response_gets_no_distillation(tokenizer, tmp_path):
    teacher = build_model(SHAPE, tokenizer, seed=1)
    batch = scored_batch(make(ScoreWeightedTrainer, tokenizer, tmp_path, alpha=1.0, teacher=teacher))
    behind = batch["completion_mask"] == 0
    assert torch.equal(batch["advantages"][behind], torch.zeros(int(behind.sum())))
    assert bool((batch["advantages"][~behind] != 0).all())


def test_mixture_is_the_weighted_sum_of_both_ends(tokenizer, tmp_path):
    batches = []
    for alpha in (1.0, 0.0, 0.25):
        teacher = build_model(SHAPE, tokenizer, seed=1) if alpha else None
        batches.append(scored_batch(make(ScoreWeightedTrainer, tokenizer, tmp_path, alpha=alpha, teacher=teacher)))
    opd, rlvr, mix = (batch["advantages"] for batch in batches)
    assert torch.allclose(mix, 0.25 * opd + 0.75 * rlvr, atol=1e-6)


def test_logged_reverse_kl_is_the_loss_of_pure_distillation(tokenizer, tmp_path):
    """With ratio 1 the loss is minus the mean advantage, which is the mean sampled reverse KL."""
    teacher = build_model(SHAPE, tokenizer, seed=1)
    trainer = make(ScoreWeightedTrainer, tokenizer, tmp_path, alpha=1.0, teacher=teacher)
    batch = scored_batch(trainer)
    loss = float(trainer.compute_loss(trainer.model, batch).detach())
    assert trainer._metrics["train"]["opd/reverse_kl"][-1] == pytest.approx(loss, rel=1e-5)
    assert trainer._metrics["train"]["opd/signal_share"][-1] == 1.0


def test_signal_share_of_a_mixture(tokenizer, tmp_path):
    teacher = build_model(SHAPE, tokenizer, seed=1)
    trainer = make(ScoreWeightedTrainer, tokenizer, tmp_path, alpha=0.05, teacher=teacher)
    scored_batch(trainer)
    metrics = trainer._metrics["train"]
    opd, rlvr = 0.05 * metrics["opd/advantage_rms"][-1], 0.95 * metrics["rlvr/advantage_rms"][-1]
    assert metrics["opd/signal_share"][-1] == pytest.approx(opd / (opd + rlvr))


def test_unusable_arguments_are_named(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="needs a teacher"):
        make(ScoreWeightedTrainer, tokenizer, tmp_path, alpha=0.5)
    with pytest.raises(ValueError, match="uses no teacher"):
        make(ScoreWeightedTrainer, tokenizer, tmp_path, alpha=0.0, teacher=object())
    with pytest.raises(ValueError, match="outside"):
        paradigm_of(1.5)
    wrong = build_model(SHAPE, tokenizer, seed=1)
    wrong.config.vocab_size = 7
    with pytest.raises(ValueError, match="vocabulary 7"):
        make(ScoreWeightedTrainer, tokenizer, tmp_path, alpha=1.0, teacher=wrong)


def test_paradigm_names():
    assert [paradigm_of(alpha) for alpha in (1.0, 0.5, 0.0)] == ["opd", "mix", "rlvr"]
