"""Do token-level coefficients spread the gradient over more directions than one scalar a response does?

On the same responses of a student, response i has under each signal one gradient with respect to each matrix W,

    g_i = sum_t a_{i,t} grad_W log p(y_{i,t} | x_i, y_{i,<t}),

the score-weighted form before any averaging: a sum over the response's tokens, not a mean, and uphill (the trainer's
loss has the opposite sign and one divisor for the whole batch, neither of which changes a rank). Distillation has
a_{i,t} = log p_teacher - log p_student of the token, verifiable reward A_i, the group-normalised reward. Reported is
the effective rank of E[g g^T] for both, and the log of their ratio (:mod:`geopd.spectral.gradient_rank`). It concerns
mean and noise of the gradient at one point, not the update that training makes of it.

For a linear layer with inputs X_i (L, n) and gradients D_i (L, m) of its outputs, g_i = D_i^T X_i: one backward pass of
the sum over responses gives all D_i, since no response sees another. Memory: L (n + 2 m) numbers a response and matrix.

Shapes: B = P * G responses of L tokens with their prompt. Source: arXiv 2606.07082, its account by three gates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from geopd.matrices import Selection, WeightName, canonical_names
from geopd.objectives import group_normalised_advantages, reverse_kl_advantages
from geopd.spectral import effective_rank, gradient_gram, log_rank_ratio, unit_gram
from geopd.training.own_samples import Responses, evaluating, response_logits, sample_own
from geopd.training.task import VerifiableTask
from geopd.training.teacher import Teacher

__all__ = ["gradient_covariance"]

_ROWS = 64  # responses a backward pass
_ENTRIES = 2**23  # of all responses' gradients, formed at a time

P = TypeVar("P")


def gradient_covariance(
    student: Any,
    teacher: Teacher,
    tokenizer: Any,
    task: VerifiableTask[P],
    *,
    samples: int,
    matrices: Sequence[str] = ("layers",),
    seed: int,
    max_new_tokens: int,
) -> list[dict[str, Any]]:
    """Effective rank of the gradient covariance of chosen matrices under both signals, on the same responses.

    Args:
        student: a transformers causal language model, which samples at temperature 1; it is left as it was.
        teacher: scores the responses.
        tokenizer: of both.
        task: the problems; all P are asked.
        samples: G, responses a prompt: one group.
        matrices: presets and globs over canonical names, as ``geopd.matrices.Selection`` takes them.
        seed: of the draws.
        max_new_tokens: longest response, the end token included.

    Returns:
        One row a matrix: ``matrix``, ``layer``, ``module``, ``prompts``, ``samples``; ``opd``, ``rlvr`` (effective
        ranks), ``log_ratio`` (of the first over the second), ``se`` (jackknifed over prompts); the same with ``_unit``
        for gradients of norm 1; ``opd_zero``, ``rlvr_zero`` (responses whose gradient is exactly zero, which count for
        nothing in either); ``note``. What is undefined is None, and the note says why.

    Raises:
        ValueError: there are too few problems or samples, or a chosen matrix is not the weight of one
            linear layer that sees every token once.
    """
    prompts = len(task.problems)
    if prompts < 2 or samples < 2:
        raise ValueError(
            f"{prompts} problems, samples={samples}: a rank needs two problems, a group two samples or more"
        )
    layers = _chosen_layers(student, matrices)
    with evaluating(student):
        texts = [task.prompt(problem) for problem in task.problems]
        responses = sample_own(student, tokenizer, texts, samples=samples, max_new_tokens=max_new_tokens, seed=seed)
        rlvr = _rewarded(tokenizer, task, samples, responses).to(responses.ids.device)
        factors = _gradient_factors(student, teacher, responses, rlvr, layers)
    belongs = torch.arange(prompts, device=responses.ids.device).repeat_interleave(samples)
    rows = []
    for layer, factor in zip(layers, factors, strict=True):
        about = {"matrix": layer.weight.name, "layer": layer.weight.layer, "module": layer.weight.module}
        ranks = _ranks(_gram(factor.inputs, factor.opd), _gram(factor.inputs, factor.rlvr), belongs)
        rows.append({**about, "prompts": prompts, "samples": samples, **ranks})
    return rows


@dataclass(frozen=True, slots=True)
class _Layer:
    weight: WeightName
    module: nn.Linear


@dataclass(frozen=True, slots=True)
class _Factors:
    """Inputs X (B, L, n) and output gradients D (B, L, m) of one layer under both signals."""

    inputs: Tensor
    opd: Tensor
    rlvr: Tensor


def _chosen_layers(student: Any, patterns: Sequence[str]) -> list[_Layer]:
    """The linear layers of the chosen matrices, in name order."""
    shapes = {path: tuple(value.shape) for path, value in student.named_parameters()}
    selection = Selection(tuple(patterns))
    chosen = {path: weight for path, weight in canonical_names(shapes).items() if selection.full(weight)}
    if not chosen:
        raise ValueError(f"matrices={list(patterns)} select none of the model's: name a preset or a glob over names")
    owners: dict[int, list[nn.Module]] = {}
    for module in student.modules():
        if isinstance(parameter := getattr(module, "weight", None), nn.Parameter):
            owners.setdefault(id(parameter), []).append(module)
    found = []
    for path, weight in sorted(chosen.items(), key=lambda item: item[1].name):
        holders = owners.get(id(student.get_parameter(path)), [])
        if len(holders) != 1 or not isinstance(holders[0], nn.Linear):
            raise ValueError(
                f"{weight.name} is not the weight of one linear layer, so its gradient is no product of that layer's "
                "inputs and outputs: choose other matrices, and merge adapters first"
            )
        found.append(_Layer(weight, holders[0]))
    return found


def _rewarded(tokenizer: Any, task: VerifiableTask[P], samples: int, responses: Responses) -> Tensor:
    """The group-normalised advantage of every response (B,), exactly 0 in a group whose rewards are equal."""
    texts = tokenizer.batch_decode(responses.ids, skip_special_tokens=True)
    rewards = torch.tensor(task.judge([problem for problem in task.problems for _ in range(samples)], texts))
    groups = rewards.view(-1, samples)
    equal = (groups.amin(dim=1) == groups.amax(dim=1)).repeat_interleave(samples)
    return group_normalised_advantages(rewards, samples).masked_fill(equal, 0.0)


def _gradient_factors(
    student: Any, teacher: Teacher, responses: Responses, rlvr: Tensor, layers: Sequence[_Layer]
) -> list[_Factors]:
    """Inputs and output gradients of every layer, over all responses."""
    parts: list[list[_Factors]] = []
    for part, scalars in zip(responses.parts(_ROWS), torch.split(rlvr, _ROWS), strict=True):
        judged = teacher.token_logps(part.prompt_ids, part.prompt_mask, part.ids, part.mask, 1.0)
        with torch.enable_grad(), _watched(layers) as seen:
            logps = response_logits(student, part).float().log_softmax(dim=-1)
            logps = logps.gather(2, part.ids.unsqueeze(2)).squeeze(2)
            opd = (reverse_kl_advantages(logps, judged, part.mask) * logps).sum()
            reward = (scalars.unsqueeze(1) * part.mask * logps).sum()
        inputs, outputs = zip(*(seen[layer.module] for layer in layers), strict=True)
        by_opd = torch.autograd.grad(opd, outputs, retain_graph=True)
        by_reward = torch.autograd.grad(reward, outputs)
        parts.append([_Factors(*each) for each in zip(inputs, by_opd, by_reward, strict=True)])
    return [_joined(pieces) for pieces in zip(*parts, strict=True)]


def _joined(pieces: Sequence[_Factors]) -> _Factors:
    return _Factors(*(torch.cat([getattr(piece, name) for piece in pieces]) for name in ("inputs", "opd", "rlvr")))


@contextmanager
def _watched(layers: Sequence[_Layer]) -> Iterator[dict[nn.Module, tuple[Tensor, Tensor]]]:
    """Input and output of each layer in the forward passes inside; the output is in the graph, frozen or not."""
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    names: dict[nn.Module, str] = {layer.module: layer.weight.name for layer in layers}

    def keep(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        if output.dim() != 3 or module in seen:
            raise ValueError(
                f"{names[module]} ran twice or put out {tuple(output.shape)}: only a layer that sees every token of "
                "(B, L, n) once has one gradient a response; choose other matrices"
            )
        if not output.requires_grad:
            output.requires_grad_()
        seen[module] = arguments[0].detach(), output

    handles = [module.register_forward_hook(keep) for module in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _gram(inputs: Tensor, outputs: Tensor) -> Tensor:
    """Inner products (B, B) of g_i = D_i^T X_i, some rows of the matrix at a time."""
    rows = max(1, _ENTRIES // (len(inputs) * inputs.shape[2]))
    return gradient_gram(
        (block.float().transpose(1, 2) @ inputs.float()).flatten(1) for block in torch.split(outputs, rows, dim=2)
    )


def _ranks(opd: Tensor, rlvr: Tensor, belongs: Tensor) -> dict[str, Any]:
    """The numbers of one row, from both Gram matrices."""
    found: dict[str, Any] = {}
    notes: dict[str, None] = {}
    for suffix, first, second in (("", opd, rlvr), ("_unit", unit_gram(opd), unit_gram(rlvr))):
        ranks = {"opd": effective_rank(first, belongs), "rlvr": effective_rank(second, belongs)}
        ratio = log_rank_ratio(first, second, belongs)
        found |= {name + suffix: rank.value for name, rank in ranks.items()}
        found |= {"log_ratio" + suffix: ratio.value, "se" + suffix: ratio.se}
        about = [f"{name}: {rank.note}" for name, rank in ranks.items() if rank.note]
        notes |= dict.fromkeys(about)
    zero = {f"{name}_zero": int((gram.diagonal() == 0).sum()) for name, gram in (("opd", opd), ("rlvr", rlvr))}
    return {**found, **zero, "note": "; ".join(notes) or None}
