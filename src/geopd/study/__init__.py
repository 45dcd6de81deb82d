"""The paper in miniature: stages as data, run by dependency, then measured and reported."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from geopd.study.outcome import StudyOutcome
    from geopd.study.run import run_study, train_stages
    from geopd.study.schedule import StageFailedError
    from geopd.study.stages import Scale, Stage
    from geopd.study.whole import SCALES, scale_of

_MODULE_OF = {
    "SCALES": "whole",
    "Scale": "stages",
    "Stage": "stages",
    "StageFailedError": "schedule",
    "StudyOutcome": "outcome",
    "run_study": "run",
    "scale_of": "whole",
    "train_stages": "run",
}

__all__ = ["SCALES", "Scale", "Stage", "StageFailedError", "StudyOutcome", "run_study", "scale_of", "train_stages"]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'geopd.study' has no attribute {name!r}")
    return getattr(import_module(f"geopd.study.{_MODULE_OF[name]}"), name)
