"""The teacher: whatever gives log-probabilities of the response tokens, and a model in this process that does.

Shapes: B responses, P prompt tokens (padded on the left), T response tokens (padded on the right).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import GenerationConfig
from trl.distributed import DistributedBackend
from trl.models.utils import prepare_deepspeed, prepare_fsdp, unwrap_model_for_generation
from trl.trainer.utils import add_fused_lm_head, pad

__all__ = ["ModelTeacher", "Teacher", "response_logps"]


class Teacher(Protocol):
    """Scores responses that someone else has written."""

    def token_logps(
        self,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        completion_ids: Tensor,
        completion_mask: Tensor,
        temperature: float,
    ) -> Tensor:
        """Log-probabilities of the response tokens under softmax(logits / temperature).

        Args:
            prompt_ids: (B, P), padded on the left.
            prompt_mask: (B, P), 1 at prompt tokens.
            completion_ids: (B, T), padded on the right.
            completion_mask: (B, T), 1 at response tokens.
            temperature: that the student samples at.

        Returns:
            (B, T) float32 on the ids' device, nats, without gradient; 0 where the completion mask is 0.
        """
        ...


@torch.no_grad()
def response_logps(
    model: Any,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    completion_ids: Tensor,
    completion_mask: Tensor,
    *,
    batch_size: int | None = None,
    accelerator: Any = None,
) -> Tensor:
    """Log-probabilities of response tokens by the very call GRPOTrainer makes, for the student and a teacher alike.

    Args:
        model: has TRL's fused head, which holds the temperature.
        prompt_ids: (B, P), padded on the left.
        prompt_mask: (B, P).
        completion_ids: (B, T), padded on the right.
        completion_mask: (B, T).
        batch_size: responses a forward pass; all when None.
        accelerator: its autocast is used where given.

    Returns:
        (B, T) float32, nats; 0 where the completion mask is 0.
    """
    ids = torch.cat([prompt_ids, completion_ids], dim=1)
    mask = torch.cat([prompt_mask, completion_mask], dim=1)
    length = completion_ids.shape[1]
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :-length] = -100
    rows = batch_size or len(ids)
    parts = []
    for part in range(0, len(ids), rows):
        some = slice(part, part + rows)
        with accelerator.autocast() if accelerator else nullcontext():
            output = model(input_ids=ids[some], attention_mask=mask[some], labels=labels[some], fused_lm_head=True)
        parts.append(output.log_probs[:, -length:])
    return torch.cat(parts).float()


class ModelTeacher:
    """A teacher in this process: a causal language model, frozen and in evaluation mode.

    A model with the student's weights and dtype gives exactly the student's log-probabilities. Where the student is
    sharded (FSDP, DeepSpeed ZeRO-3) the teacher is sharded likewise, unless it is offloaded.

    Args:
        model: a transformers causal language model; it is given TRL's fused head and a generation config without
            sampling settings of its own in place, so that it samples as the student would.
        dtype: of its weights; as they are when None.
        offload: keep the weights in CPU memory and copy them to the device for scoring only. Costs one copy of the
            weights over the bus a rollout, and each process holds a CPU copy.
        batch_size: responses a forward pass; the trainer's per-device batch when None, which exact equality with the
            student needs.
    """

    def __init__(
        self, model: Any, *, dtype: torch.dtype | None = None, offload: bool = False, batch_size: int | None = None
    ) -> None:
        self.model = (model if dtype is None else model.to(dtype)).eval().requires_grad_(False)
        self.offload = offload
        self.batch_size = batch_size
        # transformers fills what a call leaves open (beams, min_p, suppressed tokens) from the model's own config
        own = self.model.generation_config
        self.model.generation_config = GenerationConfig(eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id)
        self._vocabulary: int = model.config.get_text_config().vocab_size
        self._temperature: float | None = None
        self._accelerator: Any = None
        if offload:
            self.model.to("cpu")

    def prepare(
        self, accelerator: Any, *, temperature: float, batch_size: int, cast_lm_head_to_fp32: bool = False
    ) -> None:
        """Bind to a trainer: place or shard the model as its student is, and set what a forward pass needs.

        Raises:
            ValueError: the model already scores at another temperature.
        """
        self._set_temperature(temperature, cast_lm_head_to_fp32)
        self._accelerator = accelerator
        self.batch_size = self.batch_size or batch_size
        if self.offload:
            return
        if accelerator.state.deepspeed_plugin is not None:
            self.model = prepare_deepspeed(self.model, accelerator)
        elif getattr(accelerator.state, "fsdp_plugin", None) is not None:
            self.model = prepare_fsdp(self.model, accelerator)
        else:
            self.model = accelerator.prepare_model(self.model, evaluation_mode=True)

    def token_logps(
        self,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        completion_ids: Tensor,
        completion_mask: Tensor,
        temperature: float,
    ) -> Tensor:
        """As :meth:`Teacher.token_logps`.

        Raises:
            ValueError: a token is beyond the model's vocabulary, or the temperature is not the one it scores at.
        """
        self._set_temperature(temperature)
        largest = int(torch.maximum(prompt_ids.max(), completion_ids.max()))
        if largest >= self._vocabulary:
            raise ValueError(
                f"token id {largest} is beyond the teacher's vocabulary of {self._vocabulary}: "
                "student and teacher must share one tokenizer"
            )
        with self._on(completion_ids.device):
            return response_logps(
                self.model,
                prompt_ids,
                prompt_mask,
                completion_ids,
                completion_mask,
                batch_size=self.batch_size,
                accelerator=self._accelerator,
            )

    @torch.no_grad()
    def generate(self, prompt_ids: list[list[int]], generation: GenerationConfig, device: torch.device) -> list[Any]:
        """Responses of the teacher, each up to and with its first end token, one a prompt.

        Args:
            prompt_ids: B unpadded prompts.
            generation: sampling settings with the pad and end tokens.
            device: to generate on.

        Returns:
            B lists of token ids.
        """
        prompts = [torch.tensor(ids, device=device) for ids in prompt_ids]
        inputs = {
            "input_ids": pad(prompts, padding_value=generation.pad_token_id, padding_side="left"),
            "attention_mask": pad([torch.ones_like(ids) for ids in prompts], padding_value=0, padding_side="left"),
        }
        # Processes that share the weights must take as many forward passes each; transformers knows FSDP 1 only.
        together = True if isinstance(self.model, FSDPModule) else None
        with self._on(device), self._whole() as model:
            generated = model.generate(**inputs, generation_config=generation, synced_gpus=together)
        ends = torch.as_tensor(generation.eos_token_id, device=device)
        return [_up_to_end(row, torch.isin(row, ends)) for row in generated[:, inputs["input_ids"].shape[1] :]]

    def _set_temperature(self, temperature: float, cast_lm_head_to_fp32: bool = False) -> None:
        # The head holds the temperature and must be in place before any sharding, so it is set once.
        if self._temperature is None:
            add_fused_lm_head(self.model, temperature=temperature, cast_lm_head_to_fp32=cast_lm_head_to_fp32)
            self._temperature = temperature
        if temperature != self._temperature:
            raise ValueError(
                f"temperature={temperature}, but this teacher scores at {self._temperature}: student and teacher must "
                "share one temperature; wrap a fresh copy of the model to use another"
            )

    @contextmanager
    def _whole(self) -> Iterator[Any]:
        """The model with all its parameters at hand, as generation needs them."""
        if self._accelerator is None or self.offload:
            yield self.model
            return
        with (
            unwrap_model_for_generation(self.model, self._accelerator) as model,
            DistributedBackend(self._accelerator).summon_full_params(self.model, recurse=False),
        ):
            yield model

    @contextmanager
    def _on(self, device: torch.device) -> Iterator[None]:
        """Lend the device a copy of offloaded weights; they are frozen, so nothing is copied back."""
        if not self.offload or device.type == "cpu":
            yield
            return
        tensors = [*self.model.parameters(), *self.model.buffers()]
        at_home = [tensor.data for tensor in tensors]
        try:
            for tensor in tensors:
                tensor.data = tensor.data.to(device, non_blocking=True)
            yield
        finally:
            for tensor, data in zip(tensors, at_home, strict=True):
                tensor.data = data


def _up_to_end(row: Tensor, is_end: Tensor) -> list[int]:
    length = int(is_end.int().argmax()) + 1 if bool(is_end.any()) else len(row)
    return [int(token) for token in row[:length]]
