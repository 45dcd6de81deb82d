"""One trainer for distillation, verifiable reward and their mixture: GRPO with another coefficient.

TRL's GRPO loss is ``-(1/N) sum_{i,t} ratio_{i,t} A_{i,t}``; with one update a rollout the ratio is 1 in value and its
gradient is grad log p, so the loss's gradient is minus the score-weighted form g = sum_t a_t grad log p(y_t|x,y_<t)
divided by N, the number of response tokens of the whole batch (``loss_type="dapo"``). Only a_t depends on the paradigm:
it comes from :mod:`geopd.objectives`.

Shapes: B responses, T tokens. Source: arXiv 2606.07082, Section 2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer
from trl.trainer.utils import add_fused_lm_head

from geopd.objectives import mixed_advantages, reverse_kl_advantages

__all__ = ["ScoreWeightedTrainer", "paradigm_of"]


def paradigm_of(alpha: float) -> str:
    """The paradigm's name: ``opd`` at alpha 1, ``rlvr`` at 0, ``mix`` between.

    Raises:
        ValueError: alpha is outside [0, 1].
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha={alpha} is outside [0, 1]: 1 is pure distillation, 0 pure verifiable reward")
    return {1.0: "opd", 0.0: "rlvr"}.get(alpha, "mix")


class ScoreWeightedTrainer(GRPOTrainer):  # type: ignore[misc]
    """GRPOTrainer whose advantages are ``alpha * A_OPD,t + (1 - alpha) * A_RLVR``.

    The sequence advantage is the one GRPO computed from the reward functions; the token advantage is minus the
    sampled-token reverse KL to the teacher. The teacher is scored through the same code path as the student, so a
    teacher with the student's weights gives exactly zero.

    Args:
        *args: as for GRPOTrainer; a reward function is needed at every alpha, since it is logged even where its
            weight is zero.
        alpha: weight of distillation, in [0, 1].
        teacher: a causal language model with the student's vocabulary; needed when alpha > 0. It is put in
            evaluation mode, frozen, and given TRL's fused head, so it must not be the student object itself.
        **kwargs: as for GRPOTrainer.

    Raises:
        ValueError: alpha is outside [0, 1]; a teacher is missing, superfluous, the student itself or of another
            vocabulary; or the arguments add a reference-model KL (``beta``), which is no part of these paradigms.
    """

    def __init__(self, *args: Any, alpha: float, teacher: Any = None, **kwargs: Any) -> None:
        self.paradigm = paradigm_of(alpha)
        self.alpha = alpha
        if (teacher is None) != (alpha == 0.0):
            raise ValueError(f"alpha={alpha} {'needs a' if alpha else 'uses no'} teacher: pass teacher accordingly")
        super().__init__(*args, **kwargs)
        if self.beta != 0.0:
            raise ValueError(f"beta={self.beta} adds a KL to a reference model: set beta=0 for these paradigms")
        self.teacher = self._prepared_teacher(teacher) if teacher is not None else None

    def _prepared_teacher(self, teacher: Any) -> Any:
        if teacher is self.model:
            raise ValueError("the teacher is the student object: load a second copy of the weights as the teacher")
        sizes = teacher.config.vocab_size, self.model.config.vocab_size
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"teacher vocabulary {sizes[0]} differs from the student's {sizes[1]}: they must share one"
            )
        teacher.eval().requires_grad_(False)
        add_fused_lm_head(teacher, temperature=self.temperature)
        return self.accelerator.prepare_model(teacher, evaluation_mode=True)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        mask = output["completion_mask"]
        if "tool_mask" in output:
            mask = mask * output["tool_mask"]
        rlvr = output["advantages"]
        if self.teacher is None:
            opd = torch.zeros(mask.shape, dtype=rlvr.dtype, device=rlvr.device)
        else:
            opd = reverse_kl_advantages(
                self._token_logps(self.model, output), self._token_logps(self.teacher, output), mask
            )
        output["advantages"] = mixed_advantages(self.alpha, opd, rlvr)
        self._log_signals(opd, rlvr, mask)
        return output

    @torch.no_grad()
    def _token_logps(self, model: Any, output: dict[str, Any]) -> Tensor:
        """Log-probabilities (B, T) of the response tokens under a model at the sampling temperature, nats."""
        logps: Tensor
        logps, _, _ = self._get_per_token_logps_and_entropies(
            model,
            torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1),
            torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1),
            output["completion_ids"].size(1),
            batch_size=self.args.per_device_train_batch_size,
        )
        return logps

    def _log_signals(self, opd: Tensor, rlvr: Tensor, mask: Tensor) -> None:
        """Log both raw signals' root mean squares over response tokens, and distillation's share of the mixture."""
        metrics = self._metrics["train" if self.model.training else "eval"]
        weight = mask.to(rlvr.dtype)
        sums = torch.stack(
            [weight.sum(), (opd * weight).sum(), (opd**2).sum(), (rlvr.unsqueeze(1) ** 2 * weight).sum()]
        )
        count, opd_sum, opd_square, rlvr_square = self.accelerator.reduce(sums, reduction="sum").tolist()
        tokens = max(count, 1.0)
        opd_rms, rlvr_rms = (opd_square / tokens) ** 0.5, (rlvr_square / tokens) ** 0.5
        metrics["rlvr/advantage_rms"].append(rlvr_rms)
        if self.teacher is None:
            return
        metrics["opd/reverse_kl"].append(-opd_sum / tokens)
        metrics["opd/advantage_rms"].append(opd_rms)
        signal = self.alpha * opd_rms + (1.0 - self.alpha) * rlvr_rms
        if signal > 0:
            metrics["opd/signal_share"].append(self.alpha * opd_rms / signal)
