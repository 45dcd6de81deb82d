"""Evaluation while training: accuracies at chosen steps, into ``evaluations.json`` and the trainer's log."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback

from geopd.training.evaluation import evaluate_model, read_evaluations, samples_of, write_evaluations
from geopd.training.task import VerifiableTask

__all__ = ["EvaluationSchedule", "EvaluationSettings", "rewarded_task"]

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSettings:
    """What is evaluated, when and how.

    Args:
        dataset: prompts with answers, as for training.
        subset: configuration of a hub dataset.
        split: part of it.
        limit: problems, two or more.
        answer_column: ground truth of the prompts.
        reward: reward function that judges; the run's first by default.
        name: the benchmark's name in ``evaluations.json``; the split's when None.
        every: optimiser steps between evaluations; the checkpoints' steps when None.
        decodings: ``greedy``, or ``avg@k`` at temperature 1.
        max_new_tokens: longest response; the training's when None.
        prompts_a_batch: problems decoded at a time on one device.
        seed: of the draws.

    Raises:
        ValueError: a setting is out of range.
    """

    dataset: str
    subset: str | None = None
    split: str | None = None
    limit: int | None = None
    answer_column: str | None = None
    reward: str | None = None
    name: str | None = None
    every: int | None = None
    decodings: Sequence[str] = ("greedy", "avg@8")
    max_new_tokens: int | None = None
    prompts_a_batch: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        for decoding in self.decodings:
            samples_of(decoding)
        if (self.every is not None and self.every < 1) or self.prompts_a_batch < 1:
            raise ValueError(f"evaluation every={self.every}, prompts_a_batch={self.prompts_a_batch}: use 1 or more")

    @property
    def benchmark(self) -> str:
        """The name the figures carry."""
        return self.name or self.split or "train"


def rewarded_task(rows: Sequence[Row], tokenizer: Any, reward: Callable[..., Any]) -> VerifiableTask[Row]:
    """Rows in TRL's columns as problems: asked through the chat template, judged by a TRL reward function.

    Args:
        rows: ``prompt`` (a text or messages), and columns for the reward function.
        tokenizer: renders messages.
        reward: called with prompts, completions and every other column; a None of its is refused.
    """

    def prompt(row: Row) -> str:
        asked = row["prompt"]
        if isinstance(asked, str):
            return asked
        return str(tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False))

    def judge(problems: Sequence[Row], responses: Sequence[str]) -> list[float]:
        prompts = [row["prompt"] for row in problems]
        written: list[Any] = [
            text if isinstance(asked, str) else [{"role": "assistant", "content": text}]
            for asked, text in zip(prompts, responses, strict=True)
        ]
        columns = {name: [row[name] for row in problems] for name in problems[0] if name != "prompt"}
        given = reward(prompts=prompts, completions=written, **columns)
        if any(value is None for value in given):
            raise ValueError("the evaluation's reward function gave None: every problem needs a verdict")
        return [float(value) for value in given]

    return VerifiableTask(list(rows), prompt, lambda row, text: judge([row], [text])[0], judge)


class EvaluationSchedule(TrainerCallback):  # type: ignore[misc]
    """Evaluates the model in training after given steps; 0 is the start.

    The draws have a generator of their own, so training is the same with and without it. A run that is resumed keeps
    the rows of the steps it is past.

    Args:
        run: the run folder; rows go to its ``evaluations.json``.
        steps: optimiser steps to evaluate after.
        settings: what and how.
        task: the problems.
        max_new_tokens: longest response.
    """

    def __init__(
        self,
        run: Path,
        steps: Iterable[int],
        settings: EvaluationSettings,
        task: VerifiableTask[Any],
        max_new_tokens: int,
    ) -> None:
        self.run = run
        self.steps = frozenset(steps)
        self.settings = settings
        self.task = task
        self.max_new_tokens = max_new_tokens
        self.trainer: Any = None

    def attach(self, trainer: Any) -> None:
        """Follow a trainer, on every process."""
        self.trainer = trainer
        trainer.add_callback(self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Drop rows of steps that will run again; evaluate the start when step 0 is scheduled."""
        if state.is_world_process_zero:
            write_evaluations(self.run, [row for row in read_evaluations(self.run) if row.step <= state.global_step])
        if state.global_step == 0 and 0 in self.steps:
            self._evaluate(state, kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Evaluate when the step that just ended is scheduled."""
        if state.global_step in self.steps:
            self._evaluate(state, kwargs["model"])

    def _evaluate(self, state: Any, model: Any) -> None:
        accelerator = self.trainer.accelerator
        rows = evaluate_model(
            accelerator.unwrap_model(model),
            self.trainer.processing_class,
            self.task,
            step=state.global_step,
            benchmark=self.settings.benchmark,
            decodings=self.settings.decodings,
            max_new_tokens=self.max_new_tokens,
            seed=self.settings.seed,
            prompts_a_batch=self.settings.prompts_a_batch,
            accelerator=accelerator,
        )
        if state.is_world_process_zero:
            kept = [row for row in read_evaluations(self.run) if row.step != state.global_step]
            write_evaluations(self.run, [*kept, *rows])
        for row in rows:
            # the base class's log: a TRL trainer's own would clear the metrics it gathers for its next line
            key = f"evaluation/{row.benchmark}/{row.decoding}"
            Trainer.log(self.trainer, {key: row.value, f"{key}/standard_error": row.se})
