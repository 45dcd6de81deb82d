"""The settings of ``geopd train``: every field of TRL's configs, with this field's defaults, and our own beside them.

A field is a key of the YAML file and a flag of the command line. :mod:`geopd.training.config_file` parses them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import yaml
from trl import ModelConfig

from geopd.training.evaluation_schedule import EvaluationSettings
from geopd.training.monitor import GeometryMonitor
from geopd.training.nested_settings import check_settings
from geopd.training.objective import Objective
from geopd.training.projection import Projection
from geopd.training.rewards import DEFAULT_ANSWER_MARKER
from geopd.training.score_weighted_arguments import check_score_weighted_arguments
from geopd.training.teacher_server import ServerTeacher
from geopd.training.trl_arguments import OnPolicyArguments, SupervisedArguments

__all__ = [
    "DIVERGENCES",
    "PARADIGMS",
    "DataArguments",
    "MixArguments",
    "OpdArguments",
    "RewardArguments",
    "RunArguments",
    "TeacherArguments",
    "TrainConfig",
]

PARADIGMS = ("sft", "opd", "rlvr", "mix")
DIVERGENCES = ("sampled", "reverse_kl", "forward_kl", "jsd")
"""``sampled`` is the sampled-token reverse KL; the others sum over the vocabulary."""


@dataclass
class DataArguments:
    """Where prompts or demonstrations come from."""

    _argument_group_name = "data"

    dataset: str | None = field(
        default=None,
        metadata={"help": "JSONL or Parquet file, saved folder, hub id, problem:arithmetic or problem:strings."},
    )
    dataset_subset: str | None = field(default=None, metadata={"help": "Configuration of a hub dataset."})
    dataset_split: str | None = field(default=None, metadata={"help": "Part of it. Default: train."})
    dataset_limit: int | None = field(default=None, metadata={"help": "At most so many rows, duplicates not counted."})
    dataset_seed: int | None = field(
        default=None, metadata={"help": "Draws those rows at random. Default: takes the first."}
    )
    dataset_form: str | None = field(
        default=None, metadata={"help": "messages, prompt-completion or text, where demonstrations allow several."}
    )
    answer_column: str | None = field(
        default=None, metadata={"help": "Ground truth of prompts: column or column.field. Default: answer."}
    )


@dataclass
class RunArguments:
    """What a run leaves behind and what watches it."""

    _argument_group_name = "run"

    origin: str | None = field(
        default=None,
        metadata={"help": "Checkpoint that updates are measured from, for run.json. Default: the model trained."},
    )
    checkpoint_steps: list[int] | None = field(
        default=None, metadata={"help": "Optimiser steps to keep checkpoints at; 0 is the start."}
    )
    checkpoint_every: int | None = field(default=None, metadata={"help": "Or: keep one every so many steps."})
    resume_every: int | None = field(
        default=None,
        metadata={"help": "Steps between resume points (0: none). Default: about 50, a multiple of a rollout's steps."},
    )
    projection: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Mapping: basis, mode (adapter, gradient, mask), lr_scale, train_rest. See Lock."},
    )
    monitor: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Mapping: every, matrices, similarity_k, reference, alarms. See Watch."},
    )
    evaluation: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Mapping: dataset, split, limit, every, decodings (greedy, avg@8), max_new_tokens."},
    )

    def __post_init__(self) -> None:
        for name in ("projection", "monitor", "evaluation"):
            setattr(self, name, _mapping(name, getattr(self, name)))
        if isinstance(self.projection, dict):
            check_settings("projection", self.projection, Projection)
        if isinstance(self.monitor, dict):
            check_settings("monitor", self.monitor, GeometryMonitor, optional=("origin",))
        if isinstance(self.evaluation, dict):
            check_settings("evaluation", self.evaluation, EvaluationSettings)
        if self.checkpoint_steps is not None and self.checkpoint_every is not None:
            raise ValueError("checkpoint_steps and checkpoint_every are both given: keep one of them")
        if self.checkpoint_every is not None and self.checkpoint_every < 1:
            raise ValueError(f"checkpoint_every={self.checkpoint_every}: use a positive number of steps")
        if self.checkpoint_steps is not None and min(self.checkpoint_steps, default=0) < 0:
            raise ValueError(f"checkpoint_steps {self.checkpoint_steps} must not be negative")


@dataclass
class RewardArguments:
    """What judges responses."""

    _argument_group_name = "reward"

    reward: list[str] | None = field(
        default=None, metadata={"help": "Reward functions: exact, math_verify, arithmetic, strings, module:function."}
    )
    answer_marker: str = field(
        default=DEFAULT_ANSWER_MARKER, metadata={"help": "What precedes the final answer, for exact."}
    )
    math_seconds: float = field(default=10.0, metadata={"help": "Longest comparison of one response, for math_verify."})


@dataclass
class TeacherArguments:
    """Who the student is distilled from."""

    _argument_group_name = "teacher"

    teacher: str | None = field(default=None, metadata={"help": "Path or hub id of a teacher run in this process."})
    teacher_url: str | None = field(
        default=None, metadata={"help": "Or: base URL of a server that returns prompt log-probabilities."}
    )
    teacher_name: str | None = field(default=None, metadata={"help": "Model name the server knows its teacher by."})
    teacher_dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="bfloat16", metadata={"help": "Weights of a teacher in this process."}
    )
    teacher_offload: bool = field(
        default=False, metadata={"help": "Keep the teacher's weights in CPU memory between scorings."}
    )
    teacher_tokenizer: str | None = field(
        default=None, metadata={"help": "Path or hub id of the served teacher's tokenizer, for the vocabulary check."}
    )
    teacher_server: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Mapping: batch_size, concurrency, timeout, retries, backoff, api_key_env, style."},
    )
    allow_template_mismatch: bool = field(
        default=False, metadata={"help": "Accept a teacher trained under another chat template."}
    )

    def __post_init__(self) -> None:
        self.teacher_server = _mapping("teacher_server", self.teacher_server)
        if self.teacher_server is not None:
            check_settings("teacher_server", self.teacher_server, ServerTeacher, excluded=("url", "model"))
        if self.teacher == "none":  # how a flag takes back what the file says
            self.teacher = None
        if self.teacher is None and self.teacher_url is None:
            raise ValueError(
                "a teacher is needed: give it as `teacher` (path or hub id) or as `teacher_url` (a server)"
            )
        if self.teacher is not None and self.teacher_url is not None:
            raise ValueError("`teacher` (in this process) and `teacher_url` (a server) are both given, not both can be")


@dataclass
class OpdArguments:
    """The signal of on-policy distillation."""

    _argument_group_name = "objective"

    divergence: Literal["sampled", "reverse_kl", "forward_kl", "jsd"] = field(
        default="sampled",
        metadata={"help": "sampled: the sampled-token reverse KL; the others sum over the whole vocabulary."},
    )
    token_selection: Literal["all", "top-gap", "random"] = field(
        default="all", metadata={"help": "Response tokens that carry the signal."}
    )
    rho: float = field(default=1.0, metadata={"help": "Share of tokens kept by token_selection."})
    rollouts: Literal["student", "teacher"] = field(default="student", metadata={"help": "Who samples responses."})


@dataclass
class MixArguments:
    """The mixture ``alpha * distillation + (1 - alpha) * reward``."""

    _argument_group_name = "objective"

    alpha: float = field(default=0.5, metadata={"help": "Weight of distillation, between 0 and 1."})
    normalise: bool = field(default=False, metadata={"help": "Bring both signals to unit RMS before mixing."})
    token_selection: Literal["all", "top-gap", "random"] = field(
        default="all", metadata={"help": "Response tokens that carry the signal."}
    )
    rho: float = field(default=1.0, metadata={"help": "Share of tokens kept by token_selection."})
    rollouts: Literal["student", "teacher"] = field(default="student", metadata={"help": "Who samples responses."})


@dataclass(frozen=True)
class TrainConfig:
    """Everything one run is made of.

    Args:
        paradigm: sft, opd, rlvr or mix.
        model: the student.
        data: prompts or demonstrations.
        run: checkpoints, resume, projection, monitor, evaluation.
        training: TRL's arguments, ``output_dir`` and ``seed`` among them.
        reward: reward functions; None for sft.
        teacher: None for sft and rlvr.
        signal: the objective's own fields; None for sft and rlvr.
    """

    paradigm: str
    model: ModelConfig
    data: DataArguments
    run: RunArguments
    training: OnPolicyArguments | SupervisedArguments
    reward: RewardArguments | None = None
    teacher: TeacherArguments | None = None
    signal: OpdArguments | MixArguments | None = None

    def __post_init__(self) -> None:
        if self.paradigm in ("rlvr", "mix") and not (self.reward and self.reward.reward):
            raise ValueError(f"{self.paradigm} needs a reward: exact, math_verify or module:function")
        if self.paradigm != "sft":
            self._check_teacher_can(self.objective)
            if self.divergence == "sampled":
                check_score_weighted_arguments(self.training, self.objective)
        if self.run.projection is not None and self.model.use_peft:
            raise ValueError("projection and use_peft are both set: an adapter projection brings its own adapter")

    def _check_teacher_can(self, objective: Objective) -> None:
        if objective.rollouts == "teacher" and (self.teacher is None or self.teacher.teacher is None):
            raise ValueError("rollouts=teacher samples in this process: give `teacher`, not `teacher_url`")
        if self.divergence == "sampled":
            return
        if objective != Objective(alpha=1.0):
            raise ValueError(
                f"divergence={self.divergence} sums over the vocabulary: "
                "token_selection, rho and rollouts go with sampled"
            )
        assert self.teacher is not None
        if self.teacher.teacher is None or self.teacher.teacher_offload:
            raise ValueError(
                f"divergence={self.divergence} needs the teacher's whole distribution beside the student's: "
                "give `teacher`, without teacher_offload, or set divergence to sampled"
            )

    @property
    def objective(self) -> Objective:
        """The score-weighted objective.

        Raises:
            ValueError: the paradigm is sft, which has none, or a field is out of range.
        """
        if self.paradigm == "rlvr":
            return Objective(alpha=0.0)
        if isinstance(self.signal, MixArguments):
            # at unit root mean square each signal alone is not what opd and rlvr train on
            if not 0.0 < self.signal.alpha < 1.0 and not self.signal.normalise:
                raise ValueError(f"alpha={self.signal.alpha} is no mixture: train opd for 1 and rlvr for 0")
            return Objective(**vars(self.signal))
        if self.signal is None:
            raise ValueError(f"{self.paradigm} has no score-weighted objective")
        return Objective(1.0, False, self.signal.token_selection, self.signal.rho, self.signal.rollouts)

    @property
    def divergence(self) -> str:
        """Which divergence to the teacher is descended; ``sampled`` wherever nothing else was asked."""
        return self.signal.divergence if isinstance(self.signal, OpdArguments) else "sampled"


def _mapping(name: str, value: dict[str, Any] | str | None) -> dict[str, Any] | None:
    """A nested setting, which the command line gives as a YAML or JSON mapping."""
    if not isinstance(value, str):
        return value
    try:
        found = yaml.safe_load(value)
    except yaml.YAMLError as error:
        where = " ".join(str(error).split())
        raise ValueError(f"{name} cannot be read ({where}): give a mapping, such as '{{every: 10}}'") from error
    if not isinstance(found, dict):
        raise ValueError(f"{name} must be a mapping, such as '{{every: 10}}', not {value!r}")
    return found
