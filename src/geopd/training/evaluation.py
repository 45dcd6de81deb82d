"""Accuracy of a model on verifiable problems: greedy, or avg@k with standard errors clustered by problem.

avg@k is the mean accuracy over k sampled responses a problem, as in Section 4 of arXiv 2606.07082. Responses to one
problem are not independent, so the standard error is that of the per-problem means: sd / sqrt(n).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from geopd.checkpoints import write_whole
from geopd.training.sampling import sample_responses
from geopd.training.task import VerifiableTask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = [
    "Evaluation",
    "accuracy",
    "clustered_mean",
    "evaluate_model",
    "read_evaluations",
    "samples_of",
    "write_evaluations",
]

_PROMPTS_A_BATCH = 250

P = TypeVar("P")


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One accuracy: a row of ``evaluations.json``.

    Args:
        step: optimiser steps behind the checkpoint.
        benchmark: name of the problem set.
        decoding: ``greedy`` or ``avg@k``.
        n: number of problems.
        value: mean accuracy, 0 to 1.
        se: standard error of the mean over problems; 0 for one problem is undefined and refused.
    """

    step: int
    benchmark: str
    decoding: str
    n: int
    value: float
    se: float


def clustered_mean(scores: torch.Tensor) -> tuple[float, float]:
    """Mean of (n, k) scores and its standard error with the n rows as independent clusters.

    ``se = sd(row means) / sqrt(n)`` with the unbiased standard deviation.

    Raises:
        ValueError: fewer than two rows, whose standard error is undefined.
    """
    if scores.dim() != 2 or scores.shape[0] < 2:
        raise ValueError(f"scores of shape {tuple(scores.shape)}: pass (problems, samples) with two problems or more")
    means = scores.double().mean(dim=1)
    return float(means.mean()), float(means.std(correction=1) / means.shape[0] ** 0.5)


def accuracy(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    task: VerifiableTask[P],
    *,
    samples: int = 1,
    temperature: float,
    max_new_tokens: int,
    seed: int,
    prompts_a_batch: int = _PROMPTS_A_BATCH,
    accelerator: Any = None,
) -> tuple[float, float]:
    """Mean verified accuracy over problems and its standard error, clustered by problem.

    Args:
        model: a causal language model; may be sharded, if ``accelerator`` is given.
        tokenizer: its tokenizer; prompts of unequal length are padded on the left.
        task: the problems, how they are asked and judged.
        samples: k responses a problem; 1 with temperature 0 is greedy.
        temperature: of sampling; 0 is greedy.
        max_new_tokens: longest response, the end token included.
        seed: of the draws; the global random state is neither read nor moved.
        prompts_a_batch: problems decoded at a time.
        accelerator: divides the problems over its processes; each must call.

    Raises:
        ValueError: fewer than two problems are given.
    """
    rank, processes = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    # every process takes as many problems, so that all call a sharded model equally often; the surplus is dropped
    share = -(-len(task.problems) // processes)
    places = [min(rank * share + i, len(task.problems) - 1) for i in range(share)]
    decoding: dict[str, Any] = {
        "samples": samples,
        "max_new_tokens": max_new_tokens,
        "eos_token_id": end_tokens(model, tokenizer),
        "pad_token_id": pad_token(tokenizer),
        "temperature": temperature,
        "generator": torch.Generator(model.device).manual_seed(seed + rank),
        "any_process": _any_process(accelerator, model.device) if processes > 1 else None,
    }
    scores: list[list[float]] = []
    for start in range(0, share, prompts_a_batch):
        batch = [task.problems[place] for place in places[start : start + prompts_a_batch]]
        ids, mask = left_padded([task.prompt(problem) for problem in batch], tokenizer)
        responses = sample_responses(model, ids.to(model.device), prompt_mask=mask.to(model.device), **decoding)
        texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
        judged = task.judge([problem for problem in batch for _ in range(samples)], texts)
        scores += [judged[row * samples : (row + 1) * samples] for row in range(len(batch))]
    table = torch.tensor(scores, dtype=torch.float32)
    if processes > 1:
        table = accelerator.gather(table.to(accelerator.device)).cpu()[: len(task.problems)]
    return clustered_mean(table)


def left_padded(prompts: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask, (B, P) each."""
    rows = tokenizer(list(prompts))["input_ids"]
    longest = max(map(len, rows))
    ids = torch.tensor([[pad_token(tokenizer)] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def pad_token(tokenizer: PreTrainedTokenizerFast) -> int:
    found = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return int(found)


def end_tokens(model: Any, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Whatever ends a response: the tokenizer's end token and those the model declares."""
    declared = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    several = [declared] if isinstance(declared, int) else list(declared or [])
    return sorted({tokenizer.eos_token_id, *several} - {None})


def _any_process(accelerator: Any, device: torch.device) -> Callable[[bool], bool]:
    return lambda here: bool(accelerator.reduce(torch.tensor(float(here), device=device), reduction="sum") > 0)


def evaluate_model(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    task: VerifiableTask[P],
    *,
    step: int,
    benchmark: str,
    decodings: Sequence[str],
    max_new_tokens: int,
    seed: int,
    prompts_a_batch: int = _PROMPTS_A_BATCH,
    accelerator: Any = None,
) -> list[Evaluation]:
    """Evaluations of one checkpoint, one for each of ``decodings`` (``greedy`` or ``avg@k`` at temperature 1).

    Raises:
        ValueError: a decoding is neither ``greedy`` nor ``avg@k``.
    """
    rows = []
    for decoding in decodings:
        samples = samples_of(decoding)
        value, se = accuracy(
            model,
            tokenizer,
            task,
            samples=samples or 1,
            temperature=1.0 if samples else 0.0,
            max_new_tokens=max_new_tokens,
            seed=seed,
            prompts_a_batch=prompts_a_batch,
            accelerator=accelerator,
        )
        rows.append(Evaluation(step, benchmark, decoding, len(task.problems), value, se))
    return rows


def samples_of(decoding: str) -> int:
    """k of ``avg@k``; 0 for ``greedy``.

    Raises:
        ValueError: the decoding is neither.
    """
    name, _, count = decoding.partition("@")
    if decoding != "greedy" and not (name == "avg" and count.isdigit() and int(count) > 0):
        raise ValueError(f"decoding {decoding!r} is unknown: use 'greedy' or 'avg@8'")
    return 0 if decoding == "greedy" else int(count)


def write_evaluations(run: Path, evaluations: Sequence[Evaluation]) -> Path:
    """Write ``evaluations.json`` of a run folder atomically and return its path."""
    return write_whole(run / "evaluations.json", json.dumps([asdict(row) for row in evaluations], indent=1) + "\n")


def read_evaluations(run: Path) -> list[Evaluation]:
    """The evaluations of a run folder; an empty list when it has none.

    Raises:
        ValueError: the file is not a list of evaluation rows.
    """
    path = run / "evaluations.json"
    if not path.is_file():
        return []
    try:
        return [Evaluation(**row) for row in json.loads(path.read_text(encoding="utf-8"))]
    except (TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a list of evaluation rows: remove it and evaluate again ({error})") from error
