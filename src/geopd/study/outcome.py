"""What a finished study reports about its training: accuracies, times, and the notes that go into the report."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from geopd.checkpoints import write_whole
from geopd.study.schedule import read_marker
from geopd.study.stages import Phase, Scale, Stage

__all__ = ["PRINCIPAL_RANK", "ROTATION_K", "SIMILARITY_K", "StudyOutcome", "study_notes", "write_notes"]

# Fixed before any result was seen: the matrices are small, so the paper's 512 and 64 would cover them whole.
ROTATION_K = "p/8"
PRINCIPAL_RANK = "p/64"
SIMILARITY_K = (4, 16)


@dataclass(frozen=True, slots=True)
class StudyOutcome:
    """Where a study's files are and how it went.

    Args:
        out: the study's folder.
        results: the results folder of the measurement.
        report: the HTML report.
        stages: folder of each stage's run.
        accuracy: evaluations of each stage's last checkpoint, as rows of ``evaluations.json``.
        usage: seconds and peak memory in bytes of each stage.
        seconds: wall time of this call; short when it resumed.
    """

    out: Path
    results: Path
    report: Path
    stages: dict[str, Path]
    accuracy: dict[str, list[dict[str, Any]]]
    usage: dict[str, dict[str, float]]
    seconds: float


def study_notes(scale: Scale, stages: Path, seed: int) -> list[dict[str, str]]:
    """The paragraphs about the miniature that belong in its report."""
    notes = [
        {
            "title": f"Scale {scale.name}",
            "text": (
                f"{scale.about} Seed {seed}. A model of fewer than a million parameters learns to add and subtract "
                "numbers of up to three digits by writing out the working. The teacher is a wider model trained from "
                "scratch on clean working."
            ),
        },
        {
            "title": "What this cannot say",
            "text": (
                "One seed draws one base and one anchor, so no interval here covers what another draw would change: "
                "verdicts that need replicates stay unresolved, and a verdict of one run is an observation. The sizes "
                "are four orders of magnitude below the paper's, training is in fp32, and the task is one. Nothing "
                "here says anything about an 8B model; the same report on real checkpoints does."
            ),
        },
        {
            "title": "Fixed before looking",
            "text": (
                f"Ranks are shares of p = min(rows, columns) of each matrix, chosen before any result was seen because "
                f"the paper's values would cover these matrices whole: rotation k = {ROTATION_K}, principal rank "
                f"{PRINCIPAL_RANK} with a floor of 2, similarity K = {' and '.join(map(str, SIMILARITY_K))}. Training "
                "settings were chosen by accuracy on the selection split and by time, not by geometry. Adam's betas, "
                "epsilon and weight decay are equal for opd, rlvr and both fine-tuning stages."
            ),
        },
        {
            "title": "Comparisons",
            "text": (
                "sft is measured from the base, opd, rlvr and sft_continued from the anchor, which is the end of sft. "
                "sft_continued separates the paradigm from the origin: it is fine-tuning on clean demonstrations from "
                "the same anchor."
            ),
        },
    ]
    return [*notes, {"title": "Stages", "text": _stage_table(scale, stages)}]


def write_notes(results: Path, notes: list[dict[str, str]]) -> Path:
    """Write ``notes.json`` into a results folder atomically and return its path."""
    return write_whole(results / "notes.json", json.dumps(notes, indent=1, ensure_ascii=False) + "\n")


def _stage_table(scale: Scale, stages: Path) -> str:
    """A Markdown table: what each stage did, and the held-out accuracy of its last checkpoint."""
    lines = ["| stage | from | training | held-out accuracy (95% interval) |", "|---|---|---|---|"]
    for stage in scale.stages:
        marker = read_marker(stages, stage.name)
        rows = [row for row in (marker["accuracy"] if marker else []) if row["benchmark"] == "held_out"]
        accuracy = ", ".join(f"{row['decoding']} {row['value']:.3f} ± {1.96 * row['se']:.3f}" for row in rows)
        problems = f" ({rows[0]['n']} problems)" if rows else "not evaluated"
        lines.append(f"| {stage.name} | {_origin(stage)} | {_training(stage)} | {accuracy}{problems} |")
    return "\n".join(lines)


def _origin(stage: Stage) -> str:
    if stage.start is not None:
        return f"{stage.start.stage} at step {stage.start.step}"
    return f"scratch, width {stage.shape.hidden}" if stage.shape is not None else ""


def _training(stage: Stage) -> str:
    optimiser = stage.optimiser
    settings = (
        f"{optimiser.steps} steps, lr {optimiser.learning_rate:g} {optimiser.schedule.replace('_', ' ')}, "
        f"warm-up {optimiser.warmup_steps}, betas ({optimiser.beta1}, {optimiser.beta2}), eps {optimiser.epsilon:g}, "
        f"weight decay {optimiser.weight_decay}"
    )
    if stage.on_policy is not None:
        rollouts = stage.on_policy
        teacher = f", teacher: {stage.teacher.stage} at step {stage.teacher.step}" if stage.teacher else ""
        return f"{settings}; {rollouts.prompts} prompts x {rollouts.samples} samples, alpha {rollouts.alpha:g}{teacher}"
    phases = ", then ".join(_phase(phase) for phase in stage.phases)
    return f"{settings}; batches of {stage.batch}: {phases}"


def _phase(phase: Phase) -> str:
    if phase.source == "mixture":
        return f"{phase.steps} steps of the mixture with {phase.worked:.0%} worked arithmetic, slips {phase.slip:.0%}"
    return f"{phase.steps} steps of demonstrations, {phase.direct:.0%} without working, slips {phase.slip:.0%}"
