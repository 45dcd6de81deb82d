"""One trainer for distillation, verifiable reward and their mixture: GRPO with another coefficient.

TRL's GRPO loss is ``-(1/N) sum_{i,t} ratio_{i,t} A_{i,t}``; with one update a rollout the ratio is 1 in value and its
gradient is grad log p, so the loss's gradient is minus the score-weighted form g = sum_t a_t grad log p(y_t|x,y_<t)
divided by N, the number of response tokens of the whole batch (``loss_type="dapo"``). Only a_t and who samples depend
on the objective: a_t comes from :mod:`geopd.objectives`. With more updates a rollout the ratio is clipped as GRPO clips
it, and a_t stays what it was when the responses were written. A rollout holds whole updates, since N, the root mean
squares and the token selection are taken over a rollout.

Shapes: B responses, T tokens. Source: arXiv 2606.07082, Sections 2 and 6.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from trl import GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing

from geopd.objectives import (
    mixed_advantages,
    normalised_mixture,
    reverse_kl_advantages,
    signal_energy,
    token_weights,
)
from geopd.training.objective import Objective
from geopd.training.score_weighted_arguments import check_router_loss, check_score_weighted_arguments
from geopd.training.teacher import ModelTeacher, Teacher, response_logps

__all__ = ["ScoreWeightedTrainer"]


class ScoreWeightedTrainer(GRPOTrainer):  # type: ignore[misc]
    """GRPOTrainer whose advantages are the objective's coefficients, one a token.

    The sequence advantage is the one GRPO computed from the reward functions, exactly 0 in groups whose rewards are
    all equal; the token advantage is minus the sampled-token reverse KL to the teacher. Where GRPO has computed
    ``old_per_token_logps`` (several updates a rollout, or vLLM) these are the student's score; otherwise one forward
    pass without gradient is. vLLM's importance-sampling ratio multiplies the loss as in GRPO.

    With rollouts by the teacher there are no importance weights: the ratio is 1 at every update, so clipping never
    acts, whatever ``epsilon``. Evaluation always samples from the student.

    Logged, over response tokens of all processes: ``rlvr/advantage_rms``; and with a teacher ``opd/advantage_rms``
    (nats), ``opd/reverse_kl`` (the mean r_t; under teacher rollouts its negative estimates the forward divergence and
    is logged as ``opd/forward_kl``), ``opd/signal_share`` (distillation's share of the root mean squares as mixed) and,
    with a token selection, ``kept_token_share``.

    Args:
        *args: as for GRPOTrainer; a reward function is needed at every alpha, since it is logged even where its
            weight is zero.
        objective: what is optimised.
        teacher: needed where the objective uses one. A :class:`ModelTeacher` is placed or sharded as the student is.
        **kwargs: as for GRPOTrainer.

    Raises:
        ValueError: a teacher is missing, superfluous, shares weights with the student or has too small a vocabulary;
            or the arguments change the loss into another or cannot sample from the teacher (see
            :mod:`geopd.training.score_weighted_arguments`).
    """

    def __init__(self, *args: Any, objective: Objective, teacher: Teacher | None = None, **kwargs: Any) -> None:
        self.objective = objective
        if (teacher is None) == objective.needs_teacher:
            verb = "needs a" if objective.needs_teacher else "uses no"
            raise ValueError(f"the {objective.paradigm} objective {verb} teacher: pass teacher accordingly")
        super().__init__(*args, **kwargs)
        self.teacher = teacher
        self._check_arguments()
        if isinstance(teacher, ModelTeacher):
            self._check_model(teacher)
            teacher.prepare(
                self.accelerator,
                temperature=self.temperature,
                batch_size=self.args.per_device_train_batch_size,
                cast_lm_head_to_fp32=self.args.cast_lm_head_to_fp32,
            )

    def _check_arguments(self) -> None:
        check_score_weighted_arguments(self.args, self.objective)
        check_router_loss(self.args, self.model.config)
        if self.objective.rollouts == "student":
            return
        if not isinstance(self.teacher, ModelTeacher):
            raise ValueError("rollouts='teacher' samples in this process: pass a ModelTeacher as teacher")
        if self.rollout_func is not None:
            raise ValueError("rollout_func samples from the student: leave it out with rollouts='teacher'")

    def _check_model(self, teacher: ModelTeacher) -> None:
        students = {id(parameter) for parameter in self.model.parameters()}
        if any(id(parameter) in students for parameter in teacher.model.parameters()):
            raise ValueError("the teacher shares weights with the student: load a second copy of them as the teacher")
        size, needed = teacher.model.config.get_text_config().vocab_size, len(self._tokenizer)
        if size < needed:
            raise ValueError(f"teacher vocabulary {size} is smaller than the tokenizer's {needed}: they must share one")

    def _generate_single_turn(
        self, prompt_ids: list[list[int]], images: Any, multimodal_fields: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if self.objective.rollouts == "student" or not self.model.training:
            return super()._generate_single_turn(prompt_ids, images, multimodal_fields, *args, **kwargs)
        assert isinstance(self.teacher, ModelTeacher)
        return self.teacher.generate(prompt_ids, self.generation_config, self.accelerator.device), None

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        rewards: Tensor = super()._calculate_rewards(*args, **kwargs)
        self._rewards = rewards  # of all processes; the method that calls this one keeps none of it
        return rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        mask = output["completion_mask"]
        if "tool_mask" in output:
            mask = mask * output["tool_mask"]
        rlvr = output["advantages"].masked_fill(self._in_equal_groups(len(mask)), 0.0)
        if self.objective.alpha > 0.0:
            opd = reverse_kl_advantages(self._student_logps(output), self._teacher_logps(output), mask)
        else:
            opd = torch.zeros(mask.shape, dtype=rlvr.dtype, device=rlvr.device)
        if self.objective.rollouts == "teacher" and self.model.training:
            # The student did not sample: GRPO's ratio to its former self would be no importance weight.
            output.pop("old_per_token_logps", None)
        output["advantages"] = self._coefficients(opd, rlvr, mask)
        return output

    def _in_equal_groups(self, rows: int) -> Tensor:
        """Of this process's responses (B,), those whose group has one reward throughout, unscored ones aside.

        Their advantage is 0 but for the rounding of the group's mean, which the small denominator would amplify.
        """
        size = self.num_generations if self.model.training else self.num_generations_eval
        rewards = self._rewards
        if self.multi_objective_aggregation == "sum_then_normalize":
            total = (rewards * self.reward_weights.to(rewards.device)).nansum(dim=1, keepdim=True)
            rewards = total.masked_fill(rewards.isnan().all(dim=1, keepdim=True), float("nan"))
        groups = rewards.view(-1, size, rewards.shape[1])
        lowest = groups.nan_to_num(nan=float("inf")).amin(dim=1)
        highest = groups.nan_to_num(nan=float("-inf")).amax(dim=1)
        equal = (lowest >= highest).all(dim=1).repeat_interleave(size)
        start = self.accelerator.process_index * rows
        return equal[start : start + rows]

    def _student_logps(self, output: dict[str, Any]) -> Tensor:
        """Log-probabilities (B, T) of the responses under the student that the rollout began with, nats."""
        if "old_per_token_logps" in output:
            logps: Tensor = output["old_per_token_logps"]
            return logps
        with disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            return response_logps(
                self.model,
                *_responses(output),
                batch_size=self.args.per_device_train_batch_size,
                accelerator=self.accelerator,
            )

    def _teacher_logps(self, output: dict[str, Any]) -> Tensor:
        assert self.teacher is not None
        if "pixel_values" in output:
            raise ValueError("the prompts contain images, which no teacher here can see: train on text, or set alpha=0")
        return self.teacher.token_logps(*_responses(output), self.temperature)

    def _coefficients(self, opd: Tensor, rlvr: Tensor, mask: Tensor) -> Tensor:
        """The objective's a_t, (B, T), with figures over all processes logged."""
        objective = self.objective
        weights = token_weights(-opd, mask, objective.token_selection, objective.rho, self._generator(len(mask)))
        sums = torch.cat(
            [
                signal_energy(opd, rlvr, mask),
                torch.stack([opd.sum().float(), weights.count_nonzero().float()]),
            ]
        )
        sums = self.accelerator.reduce(sums, reduction="sum")
        self._log_signals(*sums.tolist())
        if objective.normalise:
            mixed = normalised_mixture(objective.alpha, opd, rlvr, mask, energy=sums[:3])
        else:
            mixed = mixed_advantages(objective.alpha, opd, rlvr)
        return mixed * weights

    def _generator(self, rows: int) -> torch.Generator | None:
        """Random state of the token selection, one for each rollout of a run however its processes divide it."""
        if self.objective.token_selection != "random":
            return None
        place = self.args.seed, self.state.global_step
        generator = torch.Generator().manual_seed(int(np.random.SeedSequence(place).generate_state(1)[0]))
        # Selection draws a seed for each response: pass over those of the processes before this one.
        torch.randint(2**62, (self.accelerator.process_index * rows,), generator=generator)
        return generator

    def _log_signals(self, tokens: float, opd_energy: float, rlvr_energy: float, opd_sum: float, kept: float) -> None:
        objective, metrics = self.objective, self._metrics["train" if self.model.training else "eval"]
        tokens = max(tokens, 1.0)
        opd_rms, rlvr_rms = (opd_energy / tokens) ** 0.5, (rlvr_energy / tokens) ** 0.5
        metrics["rlvr/advantage_rms"].append(rlvr_rms)
        if objective.token_selection != "all":
            metrics["kept_token_share"].append(kept / tokens)
        if objective.alpha == 0.0:
            return
        metrics["opd/advantage_rms"].append(opd_rms)
        if objective.rollouts == "teacher" and self.model.training:
            metrics["opd/forward_kl"].append(opd_sum / tokens)
        else:
            metrics["opd/reverse_kl"].append(-opd_sum / tokens)
        if objective.normalise:
            opd_rms, rlvr_rms = float(opd_rms > 0), float(rlvr_rms > 0)
        signal = objective.alpha * opd_rms + (1.0 - objective.alpha) * rlvr_rms
        if signal > 0:
            metrics["opd/signal_share"].append(objective.alpha * opd_rms / signal)


def _responses(output: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return output["prompt_ids"], output["prompt_mask"], output["completion_ids"], output["completion_mask"]
