"""What looks on while a run trains, built from its configuration before any weights are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from geopd.checkpoints import open_checkpoint
from geopd.matrices import canonical_view
from geopd.training.components import ANSWERED_REWARDS, local_folder
from geopd.training.config import TrainConfig
from geopd.training.data import load_prompts
from geopd.training.evaluation_schedule import EvaluationSchedule, EvaluationSettings, rewarded_task
from geopd.training.geometry_alarms import Alarms
from geopd.training.live_geometry import LiveGeometry
from geopd.training.live_weights import live_matrices
from geopd.training.monitor import GeometryMonitor
from geopd.training.rewards import reward_functions

__all__ = ["PlannedEvaluation", "check_watched", "evaluation_of", "monitor_of"]


@dataclass(frozen=True)
class PlannedEvaluation:
    """An evaluation with its problems and its judge at hand.

    Args:
        settings: what and when.
        rows: prompts and the columns that the reward function wants.
        judge: a TRL reward function.
        max_new_tokens: longest response.
    """

    settings: EvaluationSettings
    rows: Dataset
    judge: Callable[..., Any]
    max_new_tokens: int

    def schedule(self, run: Path, checkpoints: tuple[int, ...], tokenizer: Any) -> EvaluationSchedule:
        """The callback that evaluates at its steps, or at the checkpoints'."""
        every = self.settings.every
        due = checkpoints if every is None else tuple(range(0, checkpoints[-1] + 1, every))
        task = rewarded_task(self.rows.to_list(), tokenizer, self.judge)
        return EvaluationSchedule(run, due, self.settings, task, self.max_new_tokens)


def evaluation_of(config: TrainConfig, rewards: list[Any]) -> PlannedEvaluation | None:
    """The evaluation of a configuration, its problems loaded; None where it has none.

    Args:
        config: the run's settings.
        rewards: the run's reward functions, of which the first judges unless the evaluation names another.

    Raises:
        ValueError: a setting is out of range, the problems cannot be read, or nothing judges or bounds the responses.
    """
    settings = config.run.evaluation
    if settings is None:
        return None
    assert isinstance(settings, dict)
    plan, named = EvaluationSettings(**settings), config.reward
    if plan.reward is None and not rewards:
        raise ValueError("evaluation has no reward to judge by: name one in it")
    longest = plan.max_new_tokens or getattr(config.training, "max_completion_length", None)
    if longest is None:
        raise ValueError("evaluation has no max_new_tokens: name the longest response")
    marks: dict[str, Any] = {}
    if named is not None:
        marks = {"answer_marker": named.answer_marker, "math_seconds": named.math_seconds}
    judge = rewards[0] if plan.reward is None else reward_functions([plan.reward], **marks)[0]
    first = named.reward[0] if named is not None and named.reward else None
    rows = load_prompts(
        plan.dataset,
        split=plan.split,
        subset=plan.subset,
        limit=plan.limit,
        answer_column=plan.answer_column,
        needs_answer=(plan.reward or first) in ANSWERED_REWARDS,
    )
    return PlannedEvaluation(plan, rows, judge, longest)


def monitor_of(config: TrainConfig, *, fetched: bool) -> GeometryMonitor | None:
    """The monitor of a configuration; None where it has none, or where its origin is the student, not fetched yet.

    Args:
        config: the run's settings.
        fetched: the student has been loaded, so that an origin that is not here will not come.

    Raises:
        ValueError: a setting is out of range, or the origin is not on this machine and nothing will fetch it.
    """
    settings, student = config.run.monitor, config.model.model_name_or_path
    if settings is None:
        return None
    assert isinstance(settings, dict)
    origin = str(settings.get("origin") or config.run.origin or student)
    folder = local_folder(origin, config.model.model_revision)
    here = Path(origin).exists() or (folder is not None and any(folder.glob("*.safetensors")))
    if not here and origin == student and not fetched:
        return None
    if folder is None:
        raise ValueError(f"monitor: {origin} is not on this machine, and W0 is read from disk: give its `origin`")
    alarms = None if settings.get("alarms") is None else Alarms(**settings["alarms"])
    return GeometryMonitor(**settings | {"origin": folder, "alarms": alarms})


def check_watched(monitor: GeometryMonitor, model: Any) -> None:
    """Require that a monitor can watch a model of this architecture; its weights may be on the meta device.

    Raises:
        ValueError: the origin is of another architecture, nothing is selected, K is too large or the reference does
            not fit.
    """
    try:
        origin = canonical_view(open_checkpoint(monitor.origin))
        LiveGeometry(origin, live_matrices(model, origin, monitor.matrices), monitor.similarity_k, monitor.reference)
    except ValueError as error:
        bare = [name for name in monitor.matrices if not any(mark in name for mark in "*?[.")]
        hint = f"; for every {bare[0]} write '*.{bare[0]}'" if "select none" in str(error) and bare else ""
        raise ValueError(f"geometry monitor: {error}{hint}") from error
