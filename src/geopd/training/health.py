"""Warnings on the ways in which on-policy training is known to go wrong, from the figures TRL logs."""

from __future__ import annotations

import logging
from typing import Any

from transformers import TrainerCallback

__all__ = ["TrainingHealth"]

_LOGGER = logging.getLogger(__name__)

_LENGTH = "completions/mean_length"
_TRUNCATED = "completions/clipped_ratio"
_MISMATCH = "sampling/sampling_logp_difference/mean"
_EQUAL = "frac_reward_zero_std"


class TrainingHealth(TrainerCallback):  # type: ignore[misc]
    """Warns once, on the main process, about each of four failures; each message gives the figure and the remedy.

    - Completions grow without bound: the mean length of the last ``window`` logs is at least ``growth`` times that of
      the first ``window``, and the last is the longest so far.
    - Most completions are truncated: more than ``truncated`` of them end without an end token.
    - Sampler and trainer disagree: the mean absolute difference of their log-probabilities of the sampled tokens,
      which TRL logs with vLLM, exceeds ``mismatch`` nats. With ``vllm_importance_sampling_correction`` off TRL logs
      none; that nothing is measured is said when training begins.
    - The reward teaches nothing: in ``window`` logs running, the responses to every prompt got equal rewards; looked
      for with ``rewarded``.

    Lengths are read from the trainer's log history, so a resumed run remembers how it began.

    Args:
        growth: factor of the mean length, above 1.
        truncated: share of completions, in (0, 1).
        mismatch: nats a token, positive.
        window: logs that are averaged, 1 or more.
        rewarded: the run learns from rewards.

    Raises:
        ValueError: a threshold is out of range.
    """

    def __init__(
        self,
        *,
        growth: float = 2.0,
        truncated: float = 0.5,
        mismatch: float = 0.1,
        window: int = 5,
        rewarded: bool = False,
    ) -> None:
        if not (growth > 1.0 and 0.0 < truncated < 1.0 and mismatch > 0.0 and window >= 1):
            raise ValueError(
                f"growth={growth}, truncated={truncated}, mismatch={mismatch}, window={window}: growth is a factor "
                "above 1, truncated a share in (0, 1), mismatch positive nats, window a count"
            )
        self.growth = growth
        self.truncated = truncated
        self.mismatch = mismatch
        self.window = window
        self.rewarded = rewarded
        self._said: set[str] = set()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Say where a failure could not be seen."""
        if state.is_world_process_zero and args.use_vllm and not args.vllm_importance_sampling_correction:
            _LOGGER.warning(
                "vllm_importance_sampling_correction is off: the difference between the log-probabilities of vLLM and "
                "of the trainer is not measured; turn it on, if only for some steps, to have it logged as %s",
                _MISMATCH,
            )

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:  # noqa: ARG002
        """Look at the figures just logged."""
        if logs is None or not state.is_world_process_zero:
            return
        for failure, message in (
            ("growth", self._growing(state.log_history) if _LENGTH in logs else None),
            ("truncated", self._truncating(logs.get(_TRUNCATED), args)),
            ("mismatch", self._disagreeing(logs.get(_MISMATCH))),
            ("equal", self._equal(state.log_history) if self.rewarded and _EQUAL in logs else None),
        ):
            if message is not None and failure not in self._said:
                self._said.add(failure)
                _LOGGER.warning("step %d: %s", state.global_step, message)

    def _growing(self, history: list[dict[str, Any]]) -> str | None:
        lengths = [row[_LENGTH] for row in history if row.get(_LENGTH) is not None]
        if len(lengths) < 2 * self.window:
            return None
        first = sum(lengths[: self.window]) / self.window
        last = sum(lengths[-self.window :]) / self.window
        if last < self.growth * first or lengths[-1] < max(lengths):
            return None
        return (
            f"completions have grown from {first:.1f} to {last:.1f} tokens on average and still grow: look at some; "
            "if they ramble or repeat, lower the learning rate, or check that the teacher ends its responses with the "
            "student's end token"
        )

    def _truncating(self, share: float | None, args: Any) -> str | None:
        if share is None or share <= self.truncated:
            return None
        return (
            f"{share:.0%} of completions were cut off at max_completion_length={args.max_completion_length}: raise it, "
            "or check that the model and the chat template share an end token; rewards and distillation of unfinished "
            "responses mislead"
        )

    def _equal(self, history: list[dict[str, Any]]) -> str | None:
        rows = [row for row in history if row.get(_EQUAL) is not None][-self.window :]
        if len(rows) < self.window or any(row[_EQUAL] < 1.0 for row in rows):
            return None
        given = [row["reward"] for row in rows if row.get("reward") is not None]
        mean = f" (mean reward {sum(given) / len(given):.3g})" if given else ""
        return (
            f"the responses to every prompt got equal rewards in the last {self.window} logs{mean}, so the reward "
            "teaches nothing: check the answers and the format the reward looks for (answer_marker), take prompts that "
            "are solved sometimes, or raise num_generations or temperature"
        )

    def _disagreeing(self, difference: float | None) -> str | None:
        if difference is None or difference <= self.mismatch:
            return None
        return (
            f"sampler and trainer differ by {difference:.3g} nats a sampled token on average: check that both run the "
            "same weights, dtype and sampling settings (with a vLLM server: --logprobs-mode processed_logprobs), and "
            "keep vllm_importance_sampling_correction on"
        )
