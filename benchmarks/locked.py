"""Training inside a subspace against free training: optimiser bytes, step time, accuracy and leak, on one core.

The miniature's model (hidden 128, 4 layers, 0.79M parameters) learns addition and subtraction by cross-entropy and is
saved twice a few steps apart; the update between gives V_K. From the second checkpoint every arm takes the same steps
on the same batches: all parameters; the layers' matrices, free; the same inside V_K in either mode, K 4 and 16; and at
K = 16 inside a random and W0's own subspace, and on the entries that had moved. Every arm has a fresh AdamW without
weight decay; the adapter also with sqrt(n / K) times the learning rate. Step times are processor time, medians; they
are this machine's, and the ratios are the point. The accuracies are of one seed of one tiny task: no evidence on which
directions matter.

    OMP_NUM_THREADS=1 python benchmarks/locked.py [--seed 0] [--pretrain 800] [--steps 60]
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from geopd.problems import CLEAN, Demonstration, character_tokenizer, demonstrations, distinct_problems, verify
from geopd.training import VerifiableTask, accuracy, quiet_training_libraries
from geopd.training.bases_of_runs import basis_of_run
from geopd.training.basis import write_basis
from geopd.training.language_model import ModelShape, build_model, load_model
from geopd.training.projection import Projection

BATCH, LENGTH, BEFORE = 32, 24, 20  # BEFORE: steps whose update gives the basis
PRETRAIN_LR, LR = 2e-3, 5e-4
PROBLEMS = 1000


class StepTimes(TrainerCallback):
    """Processor seconds of every optimiser step, forward pass to update."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        self._begun = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        self.seconds.append(time.process_time() - self._begun)


def rows(texts: list[Demonstration], tokenizer: Any) -> list[dict[str, torch.Tensor]]:
    """Prompt and response padded to one length on the right; only the response counts."""
    found = []
    for text in texts:
        prompt, response = (tokenizer(part)["input_ids"] for part in (text.prompt, text.response))
        ids = [*prompt, *response, tokenizer.eos_token_id]
        labels = [-100] * len(prompt) + ids[len(prompt) :]
        pad = LENGTH - len(ids)
        found.append(
            {
                "input_ids": torch.tensor(ids + [tokenizer.pad_token_id] * pad),
                "labels": torch.tensor(labels + [-100] * pad),
            }
        )
    return found


def train(model: Any, data: Any, folder: Path, steps: int, lr: float, projection: Projection | None = None) -> Any:
    times = StepTimes()
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        learning_rate=lr,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=max(1, steps // 10),
        weight_decay=0.0,
        adam_beta2=0.98,
        per_device_train_batch_size=BATCH,
        train_sampling_strategy="sequential",
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_strategy="no",
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=data, callbacks=[times])
    if projection is not None:
        projection.attach(trainer)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.step_seconds = statistics.median(times.seconds)
    return trainer


def optimiser_bytes(trainer: Any) -> int:
    return sum(
        value.numel() * value.element_size()
        for state in trainer.optimizer.state.values()
        for value in state.values()
        if torch.is_tensor(value) and value.ndim
    )


def greedy(model: Any, tokenizer: Any) -> tuple[float, float]:
    task = VerifiableTask(distinct_problems("selection", PROBLEMS, 0), lambda problem: problem.prompt, verify)
    return accuracy(model.eval(), tokenizer, task, temperature=0.0, max_new_tokens=12, seed=0)


def arms(work: Path) -> list[tuple[str, str, str, Projection | None]]:
    """(arm, basis, K, projection); the first two are free."""
    found: list[tuple[str, str, str, Projection | None]] = [
        ("all parameters", "", "", None),
        ("matrices", "", "", None),
    ]
    for k in (4, 16):
        for mode, scale in (("gradient", "none"), ("adapter", "none"), ("adapter", "sqrt")):
            label = f"{mode}, lr sqrt(n/K)" if scale == "sqrt" else mode
            path = work / f"update_{k}.safetensors"
            found.append((label, "update", str(k), Projection(path, mode, lr_scale=scale, leak_every=10_000)))
    for kind in ("random", "origin"):
        path = work / f"{kind}_16.safetensors"
        found.append(("adapter, lr sqrt(n/K)", kind, "16", Projection(path, lr_scale="sqrt", leak_every=10_000)))
    found.append(("mask", "visible", "", Projection(work / "mask_16.safetensors", "mask", leak_every=10_000)))
    return found


def run_arm(work: Path, data: Any, tokenizer: Any, steps: int, arm: tuple[str, str, str, Projection | None]) -> Any:
    label, basis, k, projection = arm
    model = load_model(work / "start")
    if projection is not None:
        model = projection.prepare(model)
    elif label == "matrices":
        model = Projection(work / "update_16.safetensors", "gradient").prepare(model)
    trainer = train(model, data, work / "arm", steps, LR, projection)
    record = projection.record(trainer.model) if projection is not None else {}
    value, se = greedy(trainer.model, tokenizer)
    return label, basis, k, optimiser_bytes(trainer), trainer.step_seconds, value, se, record


def prepare(work: Path, tokenizer: Any, seed: int, pretrain: int) -> tuple[float, float]:
    """The start on disk, the checkpoint before it, and every basis; returns the start's accuracy."""
    rng = random.Random(seed)
    model = build_model(ModelShape(), tokenizer, seed)
    data = rows(demonstrations(pretrain * BATCH, CLEAN, rng), tokenizer)
    train(model, data, work, pretrain, PRETRAIN_LR)
    model.save_pretrained(work / "origin")
    train(model, rows(demonstrations(BEFORE * BATCH, CLEAN, rng), tokenizer), work, BEFORE, LR)
    model.save_pretrained(work / "start")
    for kind, k in (("update", 4), ("update", 16), ("random", 16), ("origin", 16), ("mask", 16)):
        write_basis(
            work / f"{kind}_{k}.safetensors", basis_of_run(work / "origin", work / "start", k=k, kind=kind, seed=seed)
        )
    return greedy(model, tokenizer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pretrain", type=int, default=800, help="steps behind the origin")
    parser.add_argument("--steps", type=int, default=60, help="steps of every arm")
    given = parser.parse_args()
    quiet_training_libraries()
    torch.set_num_threads(1)
    tokenizer, console = character_tokenizer(), Console(stderr=True)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        with console.status("training the start"):
            before, _ = prepare(work, tokenizer, given.seed, given.pretrain)
        data = rows(demonstrations(given.steps * BATCH, CLEAN, random.Random(given.seed + 1)), tokenizer)
        found = [
            run_arm(work, data, tokenizer, given.steps, arm)
            for arm in track(arms(work), description="arms", console=console)
        ]
    show(found, before)


def show(found: list[Any], before: float) -> None:
    full_bytes, full_seconds = found[1][3], found[1][4]
    table = Table(
        "arm", "basis", "K", "optimiser, KB", "of free", "step, ms", "of free", "greedy", "leak", "leak, bf16"
    )
    for label, basis, k, held, seconds, value, se, record in found:
        table.add_row(
            label,
            basis,
            k,
            f"{held / 1024:.0f}",
            f"{held / full_bytes:.3f}",
            f"{1000 * seconds:.0f}",
            f"{seconds / full_seconds:.2f}",
            f"{value:.3f} ± {se:.3f}",
            f"{record['leak']:.1e}" if record else "",
            f"{record['leak_bf16']:.1e}" if record else "",
        )
    table.caption = f"accuracy at the start {before:.3f}, {PROBLEMS} problems; 'free' is the arm 'matrices'"
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
