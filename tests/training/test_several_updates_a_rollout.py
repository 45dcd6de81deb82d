"""Rollouts that serve several updates: clipping, reuse of old log-probabilities, vLLM's correction, adapters."""

from types import SimpleNamespace

import peft
import pytest
import torch

from geopd.problems import character_tokenizer
from geopd.training import build_model
from geopd.training.objective import Objective
from tiny_on_policy import (
    LENGTH,
    SHAPE,
    UNEQUAL,
    gradients,
    make_ours,
    plain_coefficients,
    plain_gradients,
    plain_logps,
    reward,
    scored_batch,
    unpadded,
)

# TRL 1.16 reads the old name of this property at every rollout; nothing of ours can avoid it.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TWO_UPDATES = {"steps_per_generation": 2, "per_device_train_batch_size": 8, "generation_batch_size": 16}


@pytest.fixture(scope="module")
def tokenizer():
    return character_tokenizer()


@pytest.fixture
def trainer_of(tokenizer, tmp_path):
    return lambda objective, **kwargs: make_ours(objective, tokenizer, tmp_path, **kwargs)


def moved(tokenizer):
    """The student some updates later."""
    student = build_model(SHAPE, tokenizer, 0)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for value in student.parameters():
            value += 0.02 * torch.randn(value.shape, generator=generator)
    return student


@pytest.mark.parametrize("rollouts", ["student", "teacher"])
def test_a_later_update_clips_the_ratio_high_and_low_unless_the_teacher_wrote(rollouts, tokenizer, trainer_of):
    """Plain oracle: min(rho a, clip(rho, .8, 1.28) a) for the student's own rollouts, a grad log p for the teacher's;
    a_t stays that of the rollout."""
    objective = Objective(0.5, rollouts=rollouts)
    trainer = trainer_of(objective, prompts=UNEQUAL, config={"steps_per_generation": 2})
    batch = scored_batch(trainer)
    assert ("old_per_token_logps" in batch) == (rollouts == "student")
    trainer.model.load_state_dict(moved(tokenizer).state_dict())
    loss, found = gradients(trainer, batch)

    old, teacher, student = build_model(SHAPE, tokenizer, 0), build_model(SHAPE, tokenizer, 1), moved(tokenizer)
    rows = unpadded(batch)
    with torch.no_grad():
        before = [plain_logps(old, *row) for row in rows]
        gaps = [mine - plain_logps(teacher, *row) for mine, row in zip(before, rows, strict=True)]
    rewards = reward(None, tokenizer.batch_decode(batch["completion_ids"], skip_special_tokens=True))
    total, clipped = torch.zeros(()), 0
    for a, row, then in zip(plain_coefficients(objective, gaps, rewards), rows, before, strict=True):
        now = plain_logps(student, *row)
        ratio = (now - (then if rollouts == "student" else now.detach())).exp()
        clipped += int(((ratio > 1.28) & (a > 0) | (ratio < 0.8) & (a < 0)).sum())
        total = total - torch.min(ratio * a, ratio.clamp(0.8, 1.28) * a).sum()
    assert (clipped > 0) == (rollouts == "student")
    # A rollout of two updates: its tokens are shared out between them.
    mean = total / (sum(len(then) for then in before) / 2)
    mean.backward()
    assert loss == pytest.approx(mean.item(), abs=2e-6)
    for name, value in student.named_parameters():
        assert torch.allclose(found[name], value.grad, atol=2e-6), name


def test_old_log_probabilities_are_reused_instead_of_another_forward(trainer_of, monkeypatch):
    """One forward by GRPO and one by the teacher; the same coefficients as with a forward of our own."""
    calls = []
    batches = []
    for steps in (1, 2):
        trainer = trainer_of(Objective(1.0), config={"steps_per_generation": steps})
        for who, model in (("student", trainer.model), ("teacher", trainer.teacher.model)):
            fused = model.forward

            def counted(*args, _fused=fused, _who=who, **kwargs):
                if kwargs.get("fused_lm_head"):
                    calls.append(_who)
                return _fused(*args, **kwargs)

            monkeypatch.setattr(model, "forward", counted)
        batches.append(scored_batch(trainer))
        assert calls == ["student", "teacher"]
        calls.clear()
    assert torch.equal(batches[0]["advantages"], batches[1]["advantages"])


@pytest.mark.parametrize("rollouts", ["student", "teacher"])
@pytest.mark.parametrize("config", [{"num_iterations": 2}, TWO_UPDATES], ids=["num_iterations", "steps_per_generation"])
def test_training_with_several_updates_a_rollout_runs_and_logs(rollouts, config, trainer_of):
    trainer = trainer_of(Objective(0.5, rollouts=rollouts), steps=4, config={"logging_steps": 1, **config})
    trainer.train()
    history = [row for row in trainer.state.log_history if "loss" in row]
    assert len(history) == 4
    key = "opd/reverse_kl" if rollouts == "student" else "opd/forward_kl"
    assert [key in row for row in history] == [True, False, True, False]
    assert all(row["grad_norm"] > 0 for row in history)
    if rollouts == "teacher":
        assert all(row["clip_ratio/region_mean"] == 0.0 for row in history)


def test_vllm_correction_weighs_the_coefficients_by_trainer_over_sampler(tokenizer, trainer_of):
    """A stand-in sampler whose log-probabilities are off by a known amount a token."""
    generator = torch.Generator().manual_seed(3)

    def generate(prompts, **_):
        answers, logps = [], []
        for row, ids in enumerate(prompts):
            answer = [*(ids * 2)[: 1 + row % (LENGTH - 1)], tokenizer.eos_token_id]
            true = plain_logps(build_model(SHAPE, tokenizer, 0), torch.tensor(ids), torch.tensor(answer))
            answers.append(answer)
            logps.append([[float(each)] for each in true.detach() - shift(len(answer))])
        return prompts, answers, logps, None

    def shift(length):
        shifts.append(0.5 * torch.randn(length, generator=generator))
        return shifts[-1]

    shifts: list[torch.Tensor] = []
    objective = Objective(0.5, normalise=True, token_selection="top-gap", rho=0.5)
    config = {"vllm_importance_sampling_mode": "token_truncate", "vllm_importance_sampling_clip_max": 1.4}
    trainer = trainer_of(objective, prompts=UNEQUAL, config=config)
    trainer.use_vllm, trainer._last_loaded_step = True, -1
    trainer.vllm_generation = SimpleNamespace(sync_weights=lambda: None, generate=generate)
    batch = scored_batch(trainer)
    assert "old_per_token_logps" in batch
    loss, found = gradients(trainer, batch)

    student, teacher = build_model(SHAPE, tokenizer, 0), build_model(SHAPE, tokenizer, 1)
    rows = unpadded(batch)
    now = [plain_logps(student, *row) for row in rows]
    with torch.no_grad():
        gaps = [mine.detach() - plain_logps(teacher, *row) for mine, row in zip(now, rows, strict=True)]
    rewards = reward(None, tokenizer.batch_decode(batch["completion_ids"], skip_special_tokens=True))
    coefficients = plain_coefficients(objective, gaps, rewards)
    weighed = [a * s.exp().clamp(max=1.4) for a, s in zip(coefficients, shifts, strict=True)]
    tokens = sum(len(row) for row in now)
    assert loss == pytest.approx(-float(sum(a.sum() for a in weighed)) / tokens, abs=1e-5)
    (-sum((a * each).sum() for a, each in zip(weighed, now, strict=True)) / tokens).backward()
    for name, value in student.named_parameters():
        assert torch.allclose(found[name], value.grad, atol=1e-5), name
    difference = trainer._metrics["train"]["sampling/sampling_logp_difference/mean"]
    assert difference == pytest.approx([float(torch.cat(shifts).abs().mean())], rel=1e-4)


def test_an_adapter_gets_the_plain_gradient_and_the_teacher_is_left_alone(tokenizer, trainer_of):
    """LoRA gradients by the chain rule from the oracle's: dL/dB = s (dL/dW) A^T."""
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    trainer = trainer_of(Objective(0.5), prompts=UNEQUAL, peft_config=settings)
    batch = scored_batch(trainer)
    _, found = gradients(trainer, batch)
    rewards = reward(None, tokenizer.batch_decode(batch["completion_ids"], skip_special_tokens=True))
    student, teacher = build_model(SHAPE, tokenizer, 0), build_model(SHAPE, tokenizer, 1)
    _, expected = plain_gradients(student, teacher, batch, rewards, Objective(0.5))
    adapters = dict(trainer.model.named_parameters())
    checked = [name for name in found if ".lora_B." in name]
    assert len(checked) == 2 * SHAPE.layers
    for name in checked:
        full = expected[name.removeprefix("base_model.model.").replace(".lora_B.default", "")]
        a = adapters[name.replace("lora_B", "lora_A")].detach()
        assert torch.allclose(found[name], 2.0 * full @ a.T, atol=1e-6), name
    trainer.train()
    assert any(bool(value.detach().any()) for name, value in adapters.items() if ".lora_B." in name)
    for (name, value), other in zip(trainer.teacher.model.named_parameters(), teacher.parameters(), strict=True):
        assert torch.equal(value, other), name
