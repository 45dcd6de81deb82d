"""Demonstrations as tokens, in the order given and all at once: TRL's own preparation takes them one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import Dataset

from geopd.problems import Demonstration

__all__ = ["supervised_dataset"]

_IGNORED = -100


def supervised_dataset(texts: Sequence[Demonstration], tokenizer: Any, *, mask_prompt: bool) -> Dataset:
    """Token columns ``input_ids`` and ``labels``: prompt, response and end token.

    Args:
        texts: demonstrations.
        tokenizer: adds no tokens of its own; the end token is appended here.
        mask_prompt: whether the loss ignores the prompt (fine-tuning) or includes it (pretraining).
    """
    prompts = tokenizer([text.prompt for text in texts])["input_ids"]
    responses = tokenizer([text.response for text in texts])["input_ids"]
    ids = [[*p, *r, tokenizer.eos_token_id] for p, r in zip(prompts, responses, strict=True)]
    labels = [[_IGNORED] * len(p) + row[len(p) :] if mask_prompt else row for p, row in zip(prompts, ids, strict=True)]
    return Dataset.from_dict({"input_ids": ids, "labels": labels})
