"""Batched decoding for prompts of equal length: one prefill a prompt, shared by all its samples.

``model.generate`` handles any prompt; this handles the case of the miniature faster. The prompt is read once and its
cache repeated for the samples, and rows that have ended leave the batch.

Shapes: B prompts of P tokens, S samples of each, at most T response tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["sample_responses"]


@torch.inference_mode()
def sample_responses(
    model: Any,
    prompt_ids: Tensor,
    *,
    samples: int = 1,
    max_new_tokens: int,
    eos_token_id: int,
    pad_token_id: int,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Responses to prompts of equal length.

    Args:
        model: a transformers causal language model; its cache must support repeating and selecting batch rows.
        prompt_ids: (B, P) without padding.
        samples: S, responses a prompt.
        max_new_tokens: T.
        eos_token_id: ends a response; it is part of it.
        pad_token_id: fills the places behind the end.
        temperature: of the sampled distribution softmax(logits / temperature); 0 takes the most likely token.
        generator: random state of the draws; the global one when None.

    Returns:
        (B * S, T), the samples of one prompt adjacent.

    Raises:
        ValueError: the temperature is negative, or greedy decoding is asked for more than one sample.
    """
    if temperature < 0 or (temperature == 0 and samples != 1):
        raise ValueError(f"temperature={temperature} with samples={samples}: greedy decoding has one response a prompt")
    training = model.training
    model.eval()
    try:
        shape = (prompt_ids.shape[0] * samples, max_new_tokens)
        responses = torch.full(shape, pad_token_id, dtype=torch.long, device=prompt_ids.device)
        _decode(model, prompt_ids, responses, eos_token_id, temperature, generator)
        return responses
    finally:
        model.train(training)


def _decode(
    model: Any,
    prompt_ids: Tensor,
    responses: Tensor,
    eos_token_id: int,
    temperature: float,
    generator: torch.Generator | None,
) -> None:
    """Fill (B * S, T) responses in place, token by token, until every row has ended."""
    rows, longest = responses.shape
    samples = rows // prompt_ids.shape[0]
    output = model(input_ids=prompt_ids, use_cache=True, logits_to_keep=1)
    cache, logits = output.past_key_values, output.logits[:, -1]
    if samples > 1:
        cache.batch_repeat_interleave(samples)
        logits = logits.repeat_interleave(samples, dim=0)
    active = torch.arange(rows, device=prompt_ids.device)
    for place in range(longest):
        tokens = _choose(logits, temperature, generator)
        responses[active, place] = tokens
        going = (tokens != eos_token_id).nonzero().squeeze(1)
        if going.numel() == 0 or place == longest - 1:
            return
        if going.numel() < active.numel():
            active, tokens = active[going], tokens[going]
            cache.batch_select_indices(going)
        output = model(input_ids=tokens.unsqueeze(1), past_key_values=cache, use_cache=True)
        cache, logits = output.past_key_values, output.logits[:, -1]


def _choose(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    if temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = torch.softmax(logits.float() / temperature, dim=-1)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(1)
