"""Tiny on-policy trainers, fixed responses, and the score-weighted gradient written out one response at a time."""

import math

import torch
from datasets import Dataset
from transformers import set_seed

from geopd.problems import distinct_problems
from geopd.training import (
    ModelShape,
    OptimiserSettings,
    Rollouts,
    ScoreWeightedTrainer,
    build_model,
    on_policy_config,
)
from geopd.training.teacher import ModelTeacher

PROMPTS, SAMPLES, LENGTH = 4, 4, 8
SHAPE = ModelShape(hidden=32, layers=2, heads=2, key_value_heads=1, intermediate=48)
UNEQUAL = ["1+2=", "123-45=", "9+9=", "100+200=", "7-5=", "88+1="]


def reward(prompts, completions, **_):
    """A task that an untrained model solves sometimes: an odd number of digits."""
    return [float(sum(character.isdigit() for character in text) % 2) for text in completions]


def make(cls, tokenizer, folder, steps=2, seed=3, prompts=None, model=None, rewards=reward, config=None, **kwargs):
    """A trainer of the tiny student (seed 0); ``config`` overrides single arguments."""
    args = on_policy_config(
        OptimiserSettings(steps, 1e-3, warmup_steps=0),
        Rollouts(PROMPTS, SAMPLES, LENGTH),
        run=folder,
        seed=seed,
    )
    for name, value in (config or {}).items():
        assert hasattr(args, name)
        setattr(args, name, value)
    return cls(
        model=model or build_model(SHAPE, tokenizer, seed=0),
        reward_funcs=rewards,
        args=args,
        train_dataset=Dataset.from_dict(
            {"prompt": prompts or [each.prompt for each in distinct_problems("train", 40, 0)]}
        ),
        processing_class=tokenizer,
        **kwargs,
    )


def make_ours(objective, tokenizer, folder, cls=ScoreWeightedTrainer, seed=1, **kwargs):
    """Our trainer for an objective, with a teacher of weights ``seed`` where one is needed."""
    teacher = ModelTeacher(build_model(SHAPE, tokenizer, seed)) if objective.needs_teacher else None
    return make(cls, tokenizer, folder, objective=objective, teacher=teacher, **kwargs)


def scored_batch(trainer, prompts=None):
    """One rollout batch as training sees it, from a fixed random state."""
    prompts = (prompts or trainer.train_dataset["prompt"])[:PROMPTS]
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    set_seed(11)
    return trainer._generate_and_score_completions([{"prompt": p} for p in prompts for _ in range(SAMPLES)])


def gradients(trainer, batch):
    """Loss and gradients of the trainer on one batch."""
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


def unpadded(batch):
    """(prompt, response) of every row, without padding."""
    rows = zip(*(batch[key] for key in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")), strict=True)
    return [(prompt[here.bool()], answer[there.bool()]) for prompt, here, answer, there in rows]


def plain_logps(model, prompt, response, temperature=1.0):
    """Log-probabilities of one unpadded response, by the model's ordinary forward."""
    ids = torch.cat([prompt, response]).unsqueeze(0)
    logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float() / temperature
    return torch.log_softmax(logits, dim=-1).gather(1, response.unsqueeze(1)).squeeze(1)


def plain_coefficients(objective, gaps, rewards):
    """a_t of every response, from r_t and rewards, by the definitions and in Python numbers."""
    scalars = []
    for row in range(len(rewards)):
        group = torch.tensor(rewards[row // SAMPLES * SAMPLES : (row // SAMPLES + 1) * SAMPLES])
        scalars.append(float((rewards[row] - group.mean()) / (group.std(correction=1) + 1e-4)))
    tokens = sum(len(gap) for gap in gaps)
    opd_rms = rlvr_rms = 1.0
    if objective.normalise:
        opd_rms = math.sqrt(sum(float((gap**2).sum()) for gap in gaps) / tokens)
        rlvr_rms = math.sqrt(sum(len(gap) * scalar**2 for gap, scalar in zip(gaps, scalars, strict=True)) / tokens)
    found = []
    for gap, scalar in zip(gaps, scalars, strict=True):
        mixed = objective.alpha * -gap / opd_rms + (1 - objective.alpha) * scalar / rlvr_rms
        if objective.token_selection == "top-gap":
            kept = max(1, math.ceil(round(objective.rho * len(gap), 9)))
            chosen = sorted(range(len(gap)), key=lambda t: (-float(gap[t]), t))[:kept]
            mixed = torch.stack([mixed[t] * len(gap) / kept if t in chosen else mixed[t] * 0 for t in range(len(gap))])
        found.append(mixed)
    return found


def plain_gradients(student, teacher, batch, rewards, objective, temperature=1.0):
    """Loss -(1/N) sum a_t and the gradient of -(1/N) sum a_t log p, response by response without any padding."""
    student.zero_grad()
    rows = unpadded(batch)
    logps = [plain_logps(student, *row, temperature) for row in rows]
    with torch.no_grad():
        others = [plain_logps(teacher, *row, temperature) for row in rows]
    gaps = [mine.detach() - other for mine, other in zip(logps, others, strict=True)]
    coefficients = plain_coefficients(objective, gaps, rewards)
    tokens = sum(len(row) for row in logps)
    (-sum((a * each).sum() for a, each in zip(coefficients, logps, strict=True)) / tokens).backward()
    loss = -float(sum(a.sum() for a in coefficients)) / tokens
    return loss, {name: value.grad.clone() for name, value in student.named_parameters()}


class FixedResponses:
    """Mixed into a trainer: response k to a prompt is made of the prompt's own tokens, with lengths that differ."""

    def _generate_single_turn(self, prompt_ids, *_, **__):
        seen, found = {}, []
        for ids in map(tuple, prompt_ids):
            k = seen[ids] = seen.get(ids, -1) + 1
            length = 1 + (sum(ids) + 3 * k) % (LENGTH - 1)
            body = [ids[(k + place * (k + 1)) % len(ids)] for place in range(length)]
            found.append([*body, self._tokenizer.eos_token_id])
        return found, None
