"""What a finished study reports about its training: accuracies, times, and the notes that go into the report."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from geopd.checkpoints import write_whole
from geopd.study.schedule import read_marker
from geopd.study.stage_evaluation import GRADIENTS
from geopd.study.stages import Phase, Scale, Stage, stage_folder

__all__ = [
    "HILL_K",
    "PRINCIPAL_RANK",
    "ROTATION_K",
    "SIMILARITY_K",
    "StudyOutcome",
    "study_notes",
    "write_costs",
    "write_gradients",
    "write_notes",
]

# Fixed before any result was seen: the matrices are small, so the paper's 512 and 64 would cover them whole.
ROTATION_K = "p/8"
PRINCIPAL_RANK = "p/64"
SIMILARITY_K = (4, 16)
HILL_K = (16, 8, 32)


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


def study_notes(scale: Scale, stages: Path) -> list[dict[str, str]]:
    """The paragraphs about the miniature that belong in its report."""
    notes = [
        {
            "title": f"Scale {scale.name}",
            "text": (
                f"{scale.about} Seeds {', '.join(map(str, scale.seeds))}. A model of fewer than a million parameters "
                "learns to add and subtract numbers of up to three digits by writing out the working. The teacher is "
                "a wider model trained from scratch on clean working; all seeds share it."
            ),
        },
        {"title": "What this cannot say", "text": _limits(scale)},
        {
            "title": "Fixed before looking",
            "text": (
                f"Ranks are shares of p = min(rows, columns) of each matrix, chosen before any result was seen because "
                f"the paper's values would cover these matrices whole: rotation k = {ROTATION_K}, principal rank "
                f"{PRINCIPAL_RANK} with a floor of 2, similarity K = {' and '.join(map(str, SIMILARITY_K))}, Hill k = "
                f"{HILL_K[0]}. Training settings were chosen by accuracy on the selection split and by time, not by "
                "geometry. Adam's betas, epsilon and weight decay are equal for opd, rlvr and both fine-tuning stages."
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
    if any(stage.locked for stage in scale.stages):
        notes.append({"title": "Projection arms", "text": _ARMS})
    return [*notes, {"title": "Stages", "text": _stage_table(scale, stages)}]


_ARMS = (
    "Behind about a fifth of training a run goes on with a fresh optimiser, without weight decay, with nothing but the "
    "layers' matrices in training, and free or confined to a subspace: the leading K directions of its own update so "
    "far (v), of the origin's weights (origin), or random ones. Gradient mode projects the gradient, adapter mode "
    "confines the step itself. All arms of a run see the same data. K = 16 of 128 directions is a loose bottleneck; "
    "K = 4 is the counterpart of the paper's 16 of 4096."
)


def _limits(scale: Scale) -> str:
    draws = (
        "One seed draws one base and one anchor, so no interval here covers what another draw would change: verdicts "
        "that need replicates stay unresolved, and a verdict of one run is an observation. "
        if len(scale.seeds) == 1
        else "Intervals are over seeds, each with its own base and anchor; what has one seed says so. "
    )
    return draws + (
        "The sizes are four orders of magnitude below the paper's, training is in fp32, and the task is one. Nothing "
        "here says anything about an 8B model; the same report on real checkpoints does."
    )


def write_costs(results: Path, scale: Scale, stages: Path) -> Path:
    """Write ``costs.json``: what every stage took, in seconds, bytes and tokens trained on."""
    rows = []
    for stage in scale.stages:
        marker = read_marker(stages, stage.name)
        if marker is not None:
            identity = {"stage": stage.name, "paradigm": stage.paradigm, "seed": stage.seed, "tags": stage.tags}
            rows.append(identity | {"steps": stage.optimiser.steps} | marker["usage"])
    return write_whole(results / "costs.json", json.dumps(rows, indent=1) + "\n")


def write_gradients(results: Path, scale: Scale, stages: Path) -> Path:
    """Write ``gradients.json``: the gradient covariances of all seeds; an empty list where none was asked for."""
    rows = []
    for stage in scale.stages:
        path = stage_folder(stages, stage.name) / GRADIENTS
        if stage.evaluation.gradients and path.is_file():
            rows += [{"seed": stage.seed} | row for row in json.loads(path.read_text(encoding="utf-8"))]
    return write_whole(results / GRADIENTS, json.dumps(rows, indent=1, allow_nan=False) + "\n")


def write_notes(results: Path, notes: list[dict[str, str]]) -> Path:
    """Write ``notes.json`` into a results folder atomically and return its path."""
    return write_whole(results / "notes.json", json.dumps(notes, indent=1, ensure_ascii=False) + "\n")


def _stage_table(scale: Scale, stages: Path) -> str:
    """A Markdown table: what each stage did, and the held-out accuracy of its last checkpoint, seed by seed."""
    lines = ["| stage | from | training | held-out accuracy (95% interval over problems) |", "|---|---|---|---|"]
    for name, drawn in _by_name(scale).items():
        markers = [read_marker(stages, stage.name) for stage in drawn]
        rows = [row for marker in markers if marker for row in marker["accuracy"] if row["benchmark"] == "held_out"]
        lines.append(f"| {name} | {_origin(drawn[0])} | {_training(drawn[0])} | {_accuracies(rows)} |")
    return "\n".join(lines)


def _by_name(scale: Scale) -> dict[str, list[Stage]]:
    found: dict[str, list[Stage]] = {}
    for stage in scale.stages:
        found.setdefault(_without_seed(stage.name), []).append(stage)
    return found


def _without_seed(name: str) -> str:
    return re.sub(r"-s\d+$", "", name)


def _accuracies(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return "not evaluated"
    kinds: dict[tuple[str, int], list[str]] = {}
    for row in rows:
        kinds.setdefault((row["decoding"], row["n"]), []).append(f"{row['value']:.3f} ± {1.96 * row['se']:.3f}")
    return "; ".join(f"{decoding} of {n} problems {', '.join(values)}" for (decoding, n), values in kinds.items())


def _origin(stage: Stage) -> str:
    if stage.start is not None:
        return f"{_without_seed(stage.start.stage)} at step {stage.start.step}"
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
        teacher = (
            f", teacher: {_without_seed(stage.teacher.stage)} at step {stage.teacher.step}" if stage.teacher else ""
        )
        tags = {} if stage.locked else {key: value for key, value in stage.tags.items() if key != "alpha"}
        signal = "".join(f", {key} {value}" for key, value in tags.items())
        return (
            f"{settings}; {rollouts.prompts} prompts x {rollouts.samples} samples, alpha {rollouts.alpha:g}"
            f"{signal}{teacher}{_confined(stage)}"
        )
    phases = ", then ".join(_phase(phase) for phase in stage.phases)
    return f"{settings}; batches of {stage.batch}: {phases}{_confined(stage)}"


def _confined(stage: Stage) -> str:
    locked = stage.locked
    if locked is None:
        return ""
    return "; free" if locked.basis == "none" else f"; {locked.basis} subspace, K {locked.k}, {locked.mode} mode"


def _phase(phase: Phase) -> str:
    if phase.source == "mixture":
        return f"{phase.steps} steps of the mixture with {phase.worked:.0%} worked arithmetic, slips {phase.slip:.0%}"
    if phase.source == "strings":
        return f"{phase.steps} steps of string tasks, slips {phase.slip:.0%}"
    return f"{phase.steps} steps of demonstrations, {phase.direct:.0%} without working, slips {phase.slip:.0%}"
