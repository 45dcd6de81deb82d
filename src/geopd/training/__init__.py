"""Training, thin over TRL: one score-weighted trainer, demonstrations, checkpoints on a schedule, evaluation.

Names are loaded on first use, since TRL takes seconds to import.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from geopd.training.checkpoint_schedule import CheckpointSchedule, StepReport, save_checkpoint
    from geopd.training.evaluation import (
        Evaluation,
        accuracy,
        clustered_mean,
        evaluate_model,
        read_evaluations,
        write_evaluations,
    )
    from geopd.training.language_model import ModelShape, build_model, load_model, load_tokenizer
    from geopd.training.loops import (
        on_policy_config,
        supervised_dataset,
        train_on_policy,
        train_supervised,
        verified_reward,
    )
    from geopd.training.quiet import quiet_training_libraries
    from geopd.training.sampling import sample_responses
    from geopd.training.score_weighted import ScoreWeightedTrainer, paradigm_of
    from geopd.training.settings import OptimiserSettings, trainer_arguments
    from geopd.training.task import Rollouts, VerifiableTask

_HOME = {
    "checkpoint_schedule": ("CheckpointSchedule", "StepReport", "save_checkpoint"),
    "evaluation": (
        "Evaluation",
        "accuracy",
        "clustered_mean",
        "evaluate_model",
        "read_evaluations",
        "write_evaluations",
    ),
    "language_model": ("ModelShape", "build_model", "load_model", "load_tokenizer"),
    "loops": ("on_policy_config", "supervised_dataset", "train_on_policy", "train_supervised", "verified_reward"),
    "quiet": ("quiet_training_libraries",),
    "sampling": ("sample_responses",),
    "score_weighted": ("ScoreWeightedTrainer", "paradigm_of"),
    "settings": ("OptimiserSettings", "trainer_arguments"),
    "task": ("Rollouts", "VerifiableTask"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "CheckpointSchedule",
    "Evaluation",
    "ModelShape",
    "OptimiserSettings",
    "Rollouts",
    "ScoreWeightedTrainer",
    "StepReport",
    "VerifiableTask",
    "accuracy",
    "build_model",
    "clustered_mean",
    "evaluate_model",
    "load_model",
    "load_tokenizer",
    "on_policy_config",
    "paradigm_of",
    "quiet_training_libraries",
    "read_evaluations",
    "sample_responses",
    "save_checkpoint",
    "supervised_dataset",
    "train_on_policy",
    "train_supervised",
    "trainer_arguments",
    "verified_reward",
    "write_evaluations",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'geopd.training' has no attribute {name!r}")
    return getattr(import_module(f"geopd.training.{_MODULE_OF[name]}"), name)
