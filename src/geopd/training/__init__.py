"""Training, thin over TRL: one score-weighted trainer, teachers, data, rewards, projections, the live monitor.

``parse_config`` reads a configuration, ``train`` runs it. Names are loaded on first use, since TRL takes seconds to
import.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from geopd.training.bases_of_runs import basis_of_run
    from geopd.training.basis import Basis, read_basis, write_basis
    from geopd.training.checkpoint_schedule import CheckpointSchedule, StepReport, save_checkpoint
    from geopd.training.compatibility import check_teacher, check_teacher_server
    from geopd.training.config import TrainConfig
    from geopd.training.config_file import parse_config
    from geopd.training.data import load_demonstrations, load_prompts
    from geopd.training.evaluation import (
        Evaluation,
        accuracy,
        clustered_mean,
        evaluate_model,
        read_evaluations,
        write_evaluations,
    )
    from geopd.training.evaluation_schedule import EvaluationSchedule, EvaluationSettings
    from geopd.training.geometry_alarms import Alarms
    from geopd.training.health import TrainingHealth
    from geopd.training.language_model import ModelShape, build_model, load_model, load_tokenizer
    from geopd.training.monitor import GeometryMonitor
    from geopd.training.objective import Objective
    from geopd.training.planning import TrainPlan
    from geopd.training.policy_divergence import kl_to
    from geopd.training.projection import Projection
    from geopd.training.quiet import quiet_training_libraries
    from geopd.training.rewards import reward_functions
    from geopd.training.run import RunOutcome, plan_run, train
    from geopd.training.sampling import sample_responses
    from geopd.training.score_weighted import ScoreWeightedTrainer
    from geopd.training.settings import OptimiserSettings, on_policy_config, trainer_arguments
    from geopd.training.task import Rollouts, VerifiableTask
    from geopd.training.teacher import ModelTeacher, Teacher
    from geopd.training.teacher_server import ServerTeacher
    from geopd.training.tokenised import supervised_dataset

_HOME = {
    "bases_of_runs": ("basis_of_run",),
    "basis": ("Basis", "read_basis", "write_basis"),
    "checkpoint_schedule": ("CheckpointSchedule", "StepReport", "save_checkpoint"),
    "compatibility": ("check_teacher", "check_teacher_server"),
    "config": ("TrainConfig",),
    "config_file": ("parse_config",),
    "data": ("load_demonstrations", "load_prompts"),
    "evaluation": (
        "Evaluation",
        "accuracy",
        "clustered_mean",
        "evaluate_model",
        "read_evaluations",
        "write_evaluations",
    ),
    "evaluation_schedule": ("EvaluationSettings", "EvaluationSchedule"),
    "geometry_alarms": ("Alarms",),
    "health": ("TrainingHealth",),
    "language_model": ("ModelShape", "build_model", "load_model", "load_tokenizer"),
    "monitor": ("GeometryMonitor",),
    "objective": ("Objective",),
    "planning": ("TrainPlan",),
    "policy_divergence": ("kl_to",),
    "projection": ("Projection",),
    "quiet": ("quiet_training_libraries",),
    "rewards": ("reward_functions",),
    "run": ("RunOutcome", "plan_run", "train"),
    "sampling": ("sample_responses",),
    "score_weighted": ("ScoreWeightedTrainer",),
    "settings": ("OptimiserSettings", "on_policy_config", "trainer_arguments"),
    "task": ("Rollouts", "VerifiableTask"),
    "teacher": ("ModelTeacher", "Teacher"),
    "teacher_server": ("ServerTeacher",),
    "tokenised": ("supervised_dataset",),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "Alarms",
    "Basis",
    "CheckpointSchedule",
    "Evaluation",
    "EvaluationSchedule",
    "EvaluationSettings",
    "GeometryMonitor",
    "ModelShape",
    "ModelTeacher",
    "Objective",
    "OptimiserSettings",
    "Projection",
    "Rollouts",
    "RunOutcome",
    "ScoreWeightedTrainer",
    "ServerTeacher",
    "StepReport",
    "Teacher",
    "TrainConfig",
    "TrainPlan",
    "TrainingHealth",
    "VerifiableTask",
    "accuracy",
    "basis_of_run",
    "build_model",
    "check_teacher",
    "check_teacher_server",
    "clustered_mean",
    "evaluate_model",
    "kl_to",
    "load_demonstrations",
    "load_model",
    "load_prompts",
    "load_tokenizer",
    "on_policy_config",
    "parse_config",
    "plan_run",
    "quiet_training_libraries",
    "read_basis",
    "read_evaluations",
    "reward_functions",
    "sample_responses",
    "save_checkpoint",
    "supervised_dataset",
    "train",
    "trainer_arguments",
    "write_basis",
    "write_evaluations",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'geopd.training' has no attribute {name!r}")
    return getattr(import_module(f"geopd.training.{_MODULE_OF[name]}"), name)
