"""What a policy writes at temperature 1, with the masks and positions that scoring it again needs.

Shapes: B responses, P prompt tokens (padded on the left), T response tokens (padded on the right).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from geopd.training.evaluation import end_tokens, left_padded, pad_token
from geopd.training.sampling import sample_responses

__all__ = ["Responses", "evaluating", "response_logits", "sample_own"]

_PROMPTS_A_BATCH = 250


@dataclass(frozen=True, slots=True)
class Responses:
    """Prompts and what followed them; the response mask covers the end token and nothing behind it."""

    prompt_ids: Tensor
    prompt_mask: Tensor
    ids: Tensor
    mask: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def parts(self, rows: int) -> Iterator[Responses]:
        """The same responses, at most so many at a time, in their order."""
        for start in range(0, len(self), rows):
            yield Responses(*(getattr(self, field.name)[start : start + rows] for field in fields(self)))


@contextmanager
def evaluating(*models: Any) -> Iterator[None]:
    """Models in evaluation mode, without dropout or checkpointing; each gets its own mode back."""
    modes = [model.training for model in models]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for model, training in zip(models, modes, strict=True):
            model.train(training)


def sample_own(
    policy: Any, tokenizer: Any, prompts: Sequence[str], *, samples: int, max_new_tokens: int, seed: int
) -> Responses:
    """Responses of a policy to prompts at temperature 1, the samples of one prompt adjacent.

    Args:
        policy: a transformers causal language model.
        tokenizer: its tokenizer; prompts of unequal length are padded on the left.
        prompts: texts.
        samples: responses a prompt.
        max_new_tokens: T, the end token included.
        seed: of the draws; the global random state is neither read nor moved.

    Returns:
        B = len(prompts) * samples responses on the policy's device.
    """
    prompt_ids, prompt_mask = (each.to(policy.device) for each in left_padded(prompts, tokenizer))
    ends = end_tokens(policy, tokenizer)
    generator = torch.Generator(policy.device).manual_seed(seed)
    ids = torch.cat(
        [
            sample_responses(
                policy,
                prompt_ids[start : start + _PROMPTS_A_BATCH],
                prompt_mask=prompt_mask[start : start + _PROMPTS_A_BATCH],
                samples=samples,
                max_new_tokens=max_new_tokens,
                eos_token_id=ends,
                pad_token_id=pad_token(tokenizer),
                generator=generator,
            )
            for start in range(0, len(prompts), _PROMPTS_A_BATCH)
        ]
    )
    ended = torch.isin(ids, torch.tensor(ends, device=ids.device)).long()
    mask = (ended.cumsum(dim=1) == ended).long()  # the end token may pad too
    repeated = [each.repeat_interleave(samples, dim=0) for each in (prompt_ids, prompt_mask)]
    return Responses(repeated[0], repeated[1], ids, mask)


def response_logits(model: Any, responses: Responses) -> Tensor:
    """Logits (B, T, V) from which the response tokens were, or would have been, drawn; carries the model's gradient."""
    mask = torch.cat([responses.prompt_mask, responses.mask], dim=1)
    output = model(
        input_ids=torch.cat([responses.prompt_ids, responses.ids], dim=1),
        attention_mask=mask,
        position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0),
        use_cache=False,
    )
    logits: Tensor = output.logits[:, -responses.ids.shape[1] - 1 : -1]
    return logits
