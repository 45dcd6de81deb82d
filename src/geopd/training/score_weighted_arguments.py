"""Which of GRPO's arguments keep its loss the mean of a_t grad log p over the tokens of an update; others are refused.

The list is that of every branch of the loss of TRL 1.16's GRPOTrainer. What changes the rewards' advantages
(``scale_rewards``, ``reward_weights``), the tokens that count (``mask_truncated_completions``), the range of the ratio
(``epsilon``, ``epsilon_high``) or the sampler's correction (``vllm_importance_sampling_*``) keeps the form.
"""

from __future__ import annotations

from typing import Any

from geopd.training.objective import Objective

__all__ = ["check_router_loss", "check_score_weighted_arguments", "check_temperature"]


def check_score_weighted_arguments(args: Any, objective: Objective) -> None:
    """Refuse arguments under which the loss is no longer the objective's.

    Args:
        args: a GRPOConfig.
        objective: what is optimised.

    Raises:
        ValueError: names the option and the remedy.
    """
    check_temperature(args)
    _check_loss(args)
    _check_token_credit(args, objective)
    _check_rollouts(args)
    if objective.rollouts == "teacher":
        for option in ("use_vllm", "use_transformers_continuous_batching"):
            if getattr(args, option):
                raise ValueError(f"{option} samples from the student: leave it out with rollouts='teacher'")


def check_router_loss(args: Any, shape: Any) -> None:
    """Refuse the load-balancing loss of a mixture of experts, whose own coefficient counts unless one is set.

    Args:
        args: a GRPOConfig.
        shape: the model's transformers config.

    Raises:
        ValueError: it would be added.
    """
    text = shape.get_text_config()
    own = getattr(text, "router_aux_loss_coef", 0.0) if hasattr(text, "output_router_logits") else 0.0
    coefficient = own if args.router_aux_loss_coef is None else args.router_aux_loss_coef
    if coefficient:
        raise ValueError(f"router_aux_loss_coef={coefficient} adds a load-balancing loss: set router_aux_loss_coef=0")


def check_temperature(args: Any) -> None:
    """Require a distribution to sample from and to compare.

    Raises:
        ValueError: the temperature is not positive.
    """
    if not args.temperature > 0.0:
        raise ValueError(f"temperature={args.temperature} leaves no distribution to sample from: set it above 0")


def _check_loss(args: Any) -> None:
    if args.beta != 0.0:
        raise ValueError(f"beta={args.beta} adds a KL to a reference model: set beta=0 for these paradigms")
    if args.loss_type != "dapo":
        raise ValueError(
            f"loss_type={args.loss_type!r} is no mean over the tokens of the whole batch, or another loss altogether: "
            "set loss_type='dapo'"
        )
    if args.entropy_coef != 0.0:
        raise ValueError(f"entropy_coef={args.entropy_coef} adds an entropy bonus to the loss: set entropy_coef=0")
    if args.use_adaptive_entropy:
        raise ValueError("use_adaptive_entropy adds an entropy bonus to the loss: leave it out")


def _check_token_credit(args: Any, objective: Objective) -> None:
    uneven = objective.alpha > 0.0 or objective.token_selection != "all"
    if args.importance_sampling_level != "token" and uneven:
        raise ValueError(
            f"importance_sampling_level={args.importance_sampling_level!r} gives every token of a response the mean "
            "credit, so distillation and token_selection lose theirs: set importance_sampling_level='token'"
        )
    if args.top_entropy_quantile < 1.0:
        raise ValueError(
            f"top_entropy_quantile={args.top_entropy_quantile} drops tokens and does not make up for them: set it to "
            "1, and use token_selection with rho"
        )
    if args.off_policy_mask_threshold is not None:
        raise ValueError(
            f"off_policy_mask_threshold={args.off_policy_mask_threshold} drops tokens by the sign of their credit: "
            "leave it out"
        )
    if args.delta is not None:
        raise ValueError(
            f"delta={args.delta} bounds the ratio of negative credit alone: leave it out; epsilon and epsilon_high clip"
        )


def _check_rollouts(args: Any) -> None:
    steps, accumulated = args.steps_per_generation, args.gradient_accumulation_steps
    if steps % accumulated:
        nearest = max(round(steps / accumulated), 1) * accumulated
        raise ValueError(
            f"steps_per_generation={steps} is no multiple of gradient_accumulation_steps={accumulated}, so an update "
            "would average rollouts of unequal length instead of tokens: set steps_per_generation (or what "
            f"generation_batch_size makes of it) to {nearest}, or leave it out for {accumulated}"
        )
