"""A distillation step against TRL's GRPO step with old log-probabilities plus one teacher forward pass.

Both take the same batch in the same process, in turns: score the fixed responses, loss, backward, AdamW (at learning
rate 0, so that every turn sees the same weights). Sampling is left out, being the same and the larger part. CPU time
of the process on one thread; medians, and the median of the ratios turn by turn, since the machine may be shared. Two
forms: GRPO's old log-probabilities reused (several updates a rollout, or vLLM), and scored by us (one update a
rollout, where GRPO computes none).

    python benchmarks/opd_step.py [--turns 21] [--most 1.05]
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from trl import GRPOTrainer
from trl.trainer.utils import add_fused_lm_head

from geopd.problems import character_tokenizer, distinct_problems
from geopd.training import (
    ModelShape,
    OptimiserSettings,
    Rollouts,
    ScoreWeightedTrainer,
    build_model,
    on_policy_config,
    quiet_training_libraries,
)
from geopd.training.objective import Objective
from geopd.training.teacher import ModelTeacher

PROMPTS, SAMPLES, LENGTH = 16, 8, 12
STUDENT, TEACHER = ModelShape(), ModelShape(hidden=192, intermediate=576)

FORMS = {"old log-probabilities reused": 2, "scored by the trainer": 1}


class FixedResponses:
    """Mixed into a trainer: the same random responses at every turn, of unequal length."""

    def _generate_single_turn(self, prompt_ids: list[list[int]], *_: Any, **__: Any) -> tuple[list[list[int]], None]:
        generator = torch.Generator().manual_seed(0)
        lengths = torch.randint(4, LENGTH + 1, (len(prompt_ids),), generator=generator).tolist()
        return [torch.randint(0, 20, (length,), generator=generator).tolist() for length in lengths], None


class Grpo(FixedResponses, GRPOTrainer):  # type: ignore[misc]
    """TRL's trainer."""


class Distillation(FixedResponses, ScoreWeightedTrainer):
    """Ours."""


def trainer(cls: type, tokenizer: Any, run: str, updates: int, **kwargs: Any) -> Any:
    """A trainer at learning rate 0 whose rollouts serve ``updates`` updates (2: GRPO keeps old log-probabilities)."""
    rollouts = Rollouts(PROMPTS, SAMPLES, LENGTH)
    args = on_policy_config(OptimiserSettings(10, 1e-4), rollouts, run=Path(run), seed=0)
    args.steps_per_generation = updates
    made = cls(
        model=build_model(STUDENT, tokenizer, 0),
        reward_funcs=lambda completions, **_: [float(len(text) % 2) for text in completions],
        args=args,
        train_dataset=Dataset.from_dict({"prompt": [each.prompt for each in distinct_problems("train", PROMPTS, 0)]}),
        processing_class=tokenizer,
        **kwargs,
    )
    made.model.train()
    made.current_gradient_accumulation_steps = 1
    made.optimizer = torch.optim.AdamW(made.model.parameters(), lr=0.0)
    return made


def step(made: Any, after_scoring: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """One rollout scored and one update; the batch of it."""
    prompts = [{"prompt": text} for text in made.train_dataset["prompt"] for _ in range(SAMPLES)]
    batch: dict[str, Any] = made._generate_and_score_completions(prompts)
    after_scoring(batch)
    made.compute_loss(made.model, batch).backward()
    made.optimizer.step()
    made.optimizer.zero_grad()
    return batch


def turns(updates: int, count: int) -> tuple[list[float], list[float]]:
    """CPU seconds of GRPO's step with a teacher pass, and of ours, in turns."""
    tokenizer = character_tokenizer()
    plain_teacher = build_model(TEACHER, tokenizer, 1).eval().requires_grad_(False)
    add_fused_lm_head(plain_teacher)
    with tempfile.TemporaryDirectory() as folder:
        # GRPO always with old log-probabilities: distillation needs the student's score of its own responses.
        theirs = trainer(Grpo, tokenizer, folder, 2)
        teacher = ModelTeacher(build_model(TEACHER, tokenizer, 1))
        ours = trainer(Distillation, tokenizer, folder, updates, objective=Objective(1.0), teacher=teacher)

        @torch.no_grad()
        def teacher_pass(batch: dict[str, Any]) -> None:
            assert "old_per_token_logps" in batch
            theirs._get_per_token_logps_and_entropies(
                plain_teacher,
                torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
                torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
                batch["completion_ids"].size(1),
            )

        def own(batch: dict[str, Any]) -> None:
            assert ("old_per_token_logps" in batch) == (updates == 2)

        spent: tuple[list[float], list[float]] = ([], [])
        for turn in range(count + 2):
            for seconds, made, after in zip(spent, (theirs, ours), (teacher_pass, own), strict=True):
                begin = time.process_time()
                step(made, after)
                if turn >= 2:
                    seconds.append(time.process_time() - begin)
        return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=21)
    parser.add_argument("--most", type=float, default=1.05, help="exit 1 when a ratio is above")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    quiet_training_libraries()
    table = Table("form", "GRPO + teacher pass, s", "distillation, s", "ratio")
    worst = 0.0
    for name, updates in FORMS.items():
        theirs, ours = turns(updates, arguments.turns)
        ratio = statistics.median(mine / other for mine, other in zip(ours, theirs, strict=True))
        worst = max(worst, ratio)
        table.add_row(name, f"{statistics.median(theirs):.4f}", f"{statistics.median(ours):.4f}", f"{ratio:.3f}")
    Console().print(table)
    sys.exit(worst > arguments.most)


if __name__ == "__main__":
    main()
