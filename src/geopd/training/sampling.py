"""Batched decoding: one prefill a prompt, shared by all its samples.

The prompt is read once and its cache repeated for the samples, and rows that have ended leave the batch. Prompts of
unequal length are padded on the left; padding is masked and takes no position.

Shapes: B prompts of P tokens, S samples of each, at most T response tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
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
    eos_token_id: int | Collection[int],
    pad_token_id: int,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    prompt_mask: Tensor | None = None,
    any_process: Callable[[bool], bool] | None = None,
) -> Tensor:
    """Responses to prompts, sampled or greedy.

    Args:
        model: a transformers causal language model; its cache must support repeating and selecting batch rows.
        prompt_ids: (B, P), padded on the left where ``prompt_mask`` is 0.
        samples: S, responses a prompt.
        max_new_tokens: T.
        eos_token_id: ends a response; it is part of it. Several may.
        pad_token_id: fills the places behind the end.
        temperature: of the sampled distribution softmax(logits / temperature); 0 takes the most likely token.
        generator: random state of the draws; the global one when None.
        prompt_mask: (B, P), 1 on prompt tokens; None where nothing is padded.
        any_process: says whether any process still decodes, given whether this one does. A sharded model needs it,
            since every process must then call the forward equally often.

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
        ends = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
        end = torch.tensor(ends, device=prompt_ids.device)
        _decode(model, prompt_ids, prompt_mask, responses, end, temperature, generator, any_process)
        return responses
    finally:
        model.train(training)


def _decode(
    model: Any,
    prompt_ids: Tensor,
    prompt_mask: Tensor | None,
    responses: Tensor,
    end: Tensor,
    temperature: float,
    generator: torch.Generator | None,
    any_process: Callable[[bool], bool] | None,
) -> None:
    """Fill (B * S, T) responses in place, token by token, until every row has ended."""
    rows, longest = responses.shape
    samples = rows // prompt_ids.shape[0]
    places = _Places(prompt_mask, samples)
    output = model(input_ids=prompt_ids, use_cache=True, logits_to_keep=1, **places.of_prompt())
    cache, logits = output.past_key_values, output.logits[:, -1]
    if samples > 1:
        cache.batch_repeat_interleave(samples)
        logits = logits.repeat_interleave(samples, dim=0)
    active = torch.arange(rows, device=prompt_ids.device)
    for place in range(longest):
        tokens = _choose(logits, temperature, generator)
        responses[active, place] = tokens
        going = (~torch.isin(tokens, end)).nonzero().squeeze(1)
        unfinished = bool(going.numel())
        if place == longest - 1 or not (any_process(unfinished) if any_process else unfinished):
            return
        if 0 < going.numel() < active.numel():
            active, tokens = active[going], tokens[going]
            cache.batch_select_indices(going)
            places.keep(going)
        elif not unfinished:
            # this process keeps the others company: its last rows run on and are written nowhere
            responses = torch.empty_like(responses)
        output = model(input_ids=tokens.unsqueeze(1), past_key_values=cache, use_cache=True, **places.of_next_token())
        cache, logits = output.past_key_values, output.logits[:, -1]


class _Places:
    """Attention mask and positions of left-padded rows while they grow; empty arguments where nothing is padded."""

    def __init__(self, prompt_mask: Tensor | None, samples: int) -> None:
        padded = prompt_mask is not None and not bool(prompt_mask.all())
        self.prompt_mask = prompt_mask if padded else None
        self.mask = self.prompt_mask.repeat_interleave(samples, dim=0) if self.prompt_mask is not None else None

    def of_prompt(self) -> dict[str, Tensor]:
        """Arguments of the prefill."""
        if self.prompt_mask is None:
            return {}
        positions = (self.prompt_mask.cumsum(dim=1) - 1).clamp(min=0)
        return {"attention_mask": self.prompt_mask, "position_ids": positions}

    def of_next_token(self) -> dict[str, Tensor]:
        """Arguments of the next step, behind which every row is one token longer."""
        if self.mask is None:
            return {}
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
        return {"attention_mask": self.mask, "position_ids": self.mask.sum(dim=1, keepdim=True) - 1}

    def keep(self, rows: Tensor) -> None:
        """Keep the rows that go on."""
        if self.mask is not None:
            self.mask = self.mask[rows]


def _choose(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    if temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = torch.softmax(logits.float() / temperature, dim=-1)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(1)
