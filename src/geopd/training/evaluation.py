"""Accuracy of a model on verifiable problems: greedy, or avg@k with standard errors clustered by problem.

avg@k is the mean accuracy over k sampled responses a problem, as in Section 4 of arXiv 2606.07082. Responses to one
problem are not independent, so the standard error is that of the per-problem means: sd / sqrt(n).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from geopd.training.sampling import sample_responses
from geopd.training.task import VerifiableTask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["Evaluation", "accuracy", "clustered_mean", "evaluate_model", "read_evaluations", "write_evaluations"]

_PROMPTS_A_BATCH = 250

P = TypeVar("P")


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One accuracy: a row of ``evaluations.json``.

    Args:
        step: optimiser steps behind the checkpoint.
        benchmark: name of the problem set, here ``held_out`` or ``selection``.
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
) -> tuple[float, float]:
    """Mean verified accuracy over problems and its standard error, clustered by problem.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer; the prompts must have equal length in tokens.
        task: the problems, how they are asked and judged.
        samples: k responses a problem; 1 with temperature 0 is greedy.
        temperature: of sampling; 0 is greedy.
        max_new_tokens: longest response, the end token included.
        seed: of the draws; the global random state is neither read nor moved.

    Raises:
        ValueError: prompts differ in length, or fewer than two problems are given.
    """
    generator = torch.Generator(model.device).manual_seed(seed)
    scores: list[list[float]] = []
    for start in range(0, len(task.problems), _PROMPTS_A_BATCH):
        batch = task.problems[start : start + _PROMPTS_A_BATCH]
        ids = tokenizer([task.prompt(problem) for problem in batch])["input_ids"]
        if len({len(row) for row in ids}) != 1:
            raise ValueError("prompts of unequal length: this evaluation decodes without padding, so group them first")
        responses = sample_responses(
            model,
            torch.tensor(ids, device=model.device),
            samples=samples,
            max_new_tokens=max_new_tokens,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            temperature=temperature,
            generator=generator,
        )
        texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
        for row, problem in enumerate(batch):
            scores.append([task.verifier(problem, text) for text in texts[row * samples : (row + 1) * samples]])
    return clustered_mean(torch.tensor(scores))


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
) -> list[Evaluation]:
    """Evaluations of one checkpoint, one for each of ``decodings`` (``greedy`` or ``avg@k`` at temperature 1).

    Raises:
        ValueError: a decoding is neither ``greedy`` nor ``avg@k``.
    """
    rows = []
    for decoding in decodings:
        name, _, count = decoding.partition("@")
        if decoding != "greedy" and not (name == "avg" and count.isdigit() and int(count) > 0):
            raise ValueError(f"decoding {decoding!r} is unknown: use 'greedy' or 'avg@8'")
        value, se = accuracy(
            model,
            tokenizer,
            task,
            samples=1 if decoding == "greedy" else int(count),
            temperature=0.0 if decoding == "greedy" else 1.0,
            max_new_tokens=max_new_tokens,
            seed=seed,
        )
        rows.append(Evaluation(step, benchmark, decoding, len(task.problems), value, se))
    return rows


def write_evaluations(run: Path, evaluations: Sequence[Evaluation]) -> Path:
    """Write ``evaluations.json`` of a run folder atomically and return its path."""
    target = run / "evaluations.json"
    partial = target.with_suffix(".json.partial")
    partial.write_text(json.dumps([asdict(row) for row in evaluations], indent=1) + "\n", encoding="utf-8")
    partial.replace(target)
    return target


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
