"""How far a policy has gone from a reference: sequence KL on the policy's own samples.

KL(policy || reference) = E_{y ~ policy} sum_t D_t, with D_t = sum_v p(v|s_t) log(p(v|s_t) / q(v|s_t)) taken over the
whole vocabulary at every generated position, the end token's included. That is the expectation of the log ratio of the
sampled tokens given each prefix, so it has the same mean and a smaller variance, and it is never negative. Responses
cut at T tokens count up to the cut. Gate I of arXiv 2606.07082 bounds the update by a budget of this kind.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor

from geopd.training.evaluation import clustered_mean
from geopd.training.own_samples import Responses, evaluating, response_logits, sample_own
from geopd.training.task import VerifiableTask

__all__ = ["kl_to"]

_LOGITS_AT_ONCE = 2**22
"""Of each model, in float64; a whole response is always scored together."""

P = TypeVar("P")


@torch.no_grad()
def kl_to(
    policy: Any,
    reference: Any,
    tokenizer: Any,
    task: VerifiableTask[P],
    *,
    samples: int = 1,
    max_new_tokens: int,
    seed: int,
) -> tuple[float, float, int]:
    """Sequence KL(policy || reference) at temperature 1, nats per response.

    Args:
        policy: a transformers causal language model, which samples.
        reference: another over the same vocabulary, on the policy's device.
        tokenizer: of both; prompts of unequal length are padded on the left.
        task: the problems; all are asked.
        samples: responses a problem.
        max_new_tokens: longest response, the end token included.
        seed: of the draws; the global random state is neither read nor moved.

    Returns:
        Mean over responses, its standard error clustered by problem, and the number of responses.

    Raises:
        ValueError: fewer than two problems are given, the vocabularies differ, or a divergence is not finite.
    """
    if len(task.problems) < 2:
        raise ValueError(f"{len(task.problems)} problems have no standard error: pass two or more to kl_to")
    prompts = [task.prompt(problem) for problem in task.problems]
    with evaluating(policy, reference):
        responses = sample_own(policy, tokenizer, prompts, samples=samples, max_new_tokens=max_new_tokens, seed=seed)
        vocabulary = _shared_vocabulary(policy, reference)
        rows = max(1, _LOGITS_AT_ONCE // (vocabulary * responses.ids.shape[1]))
        found = torch.cat([_divergences(policy, reference, part) for part in responses.parts(rows)])
    if not bool(torch.isfinite(found).all()):
        raise ValueError("the KL of a response is not finite: check that neither model is in a state of overflow")
    value, se = clustered_mean(found.view(-1, samples).cpu())
    return value, se, len(found)


def _divergences(policy: Any, reference: Any, responses: Responses) -> Tensor:
    """sum_t D_t of each response, (B,), float64."""
    # float64: D_t is of second order in the difference of the logits, and would drown in float32's rounding of logs
    log_p, log_q = (response_logits(model, responses).double().log_softmax(dim=-1) for model in (policy, reference))
    each = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
    return each.masked_fill(responses.mask == 0, 0.0).sum(dim=1)


def _shared_vocabulary(policy: Any, reference: Any) -> int:
    mine, other = (int(model.config.get_text_config().vocab_size) for model in (policy, reference))
    if mine != other:
        raise ValueError(
            f"the policy has {mine} tokens and the reference {other}: the divergence needs one vocabulary; "
            "resize the embeddings of one to the other's"
        )
    return mine
