"""A YAML file and flags -> :class:`~geopd.training.config.TrainConfig`, parsed by TRL's parser.

What the parser would pass over in silence is refused in one line: unknown keys (with the nearest right one), values of
another type, and choices that do not exist.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from trl import ModelConfig, TrlParser

from geopd.training.config import (
    PARADIGMS,
    DataArguments,
    MixArguments,
    OpdArguments,
    RewardArguments,
    RunArguments,
    TeacherArguments,
    TrainConfig,
)
from geopd.training.nested_settings import nearest
from geopd.training.trl_arguments import OnPolicyArguments, SupervisedArguments

__all__ = ["config_parser", "help_of", "parse_config"]

_GROUPS: dict[str, dict[str, type]] = {
    "sft": {"training": SupervisedArguments},
    "opd": {
        "reward": RewardArguments,
        "teacher": TeacherArguments,
        "signal": OpdArguments,
        "training": OnPolicyArguments,
    },
    "rlvr": {"reward": RewardArguments, "training": OnPolicyArguments},
    "mix": {
        "reward": RewardArguments,
        "teacher": TeacherArguments,
        "signal": MixArguments,
        "training": OnPolicyArguments,
    },
}
_COMMAND = {
    "config": ("--config", "FILE", "YAML; a flag with the same name as a key wins over it"),
    "dry_run": ("--dry-run", None, "resolve everything, print the plan and a memory estimate"),
    "processes": ("--processes", "N", "devices the plan of a dry run is made for"),
    "json": ("--json", None, "print the plan, or the outcome, as JSON"),
}
_FLAG = re.compile(r"--?[A-Za-z]")


class _Parser(TrlParser):  # type: ignore[misc]
    """TRL's parser without its exits and without abbreviated flags."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def config_parser(paradigm: str) -> TrlParser:
    """The parser of one paradigm.

    Raises:
        ValueError: the paradigm is unknown.
    """
    if paradigm not in PARADIGMS:
        raise ValueError(f"paradigm {paradigm!r} is unknown: use {', '.join(PARADIGMS)}{nearest(paradigm, PARADIGMS)}")
    return _Parser(
        list(_groups(paradigm).values()),
        prog=f"geopd train {paradigm}",
        usage=f"geopd train {paradigm} --config FILE [--key value ...] [--dry-run [--processes N] [--json]]",
        description="Keys of the YAML file and flags have the same names; a flag wins over the file.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )


def help_of(paradigm: str) -> str:
    """Every flag of one paradigm: the command's own, then our fields, then TRL's.

    Raises:
        ValueError: the paradigm is unknown.
    """
    parser = config_parser(paradigm)
    group = parser.add_argument_group("command")
    for flag, value, text in _COMMAND.values():
        shape: dict[str, Any] = {"action": "store_true"} if value is None else {"metavar": value}
        group.add_argument(flag, help=text, default=argparse.SUPPRESS, **shape)
    groups = parser._action_groups
    groups.insert(0, groups.pop())
    groups.append(groups.pop(groups.index(parser._optionals)))  # where the parser puts TRL's fields
    parser._optionals.title = "model and training, as in TRL"
    return str(parser.format_help())


def parse_config(
    paradigm: str, flags: Sequence[str] = (), file: Path | str | None = None, settings: dict[str, Any] | None = None
) -> TrainConfig:
    """The configuration from a YAML file (or a mapping with the same keys) and flags, which win.

    Args:
        paradigm: sft, opd, rlvr or mix.
        flags: ``--key value`` or ``--key=value``; lists as several values, mappings as YAML or JSON.
        file: a YAML mapping; its key ``env`` sets environment variables, as in TRL.
        settings: what ``file`` would hold, instead of it.

    Raises:
        ValueError: a key is unknown, a value has the wrong type or is out of range, or the file is no YAML mapping.
    """
    parser = config_parser(paradigm)
    source = str(file) if file is not None else "settings"
    values = dict(settings or {}) if file is None else _read_yaml(Path(file))
    os.environ.update({str(name): str(value) for name, value in (values.pop("env", None) or {}).items()})
    actions = {action.dest: action for action in reversed(parser._actions) if action.dest != "help"}
    _refuse_unknown(paradigm, source, values, actions)
    # transformers would drop the bar with its notices
    parser.set_defaults(disable_tqdm=not sys.stderr.isatty())
    parser.set_defaults_with_config(**{k: _typed(source, k, v, actions[k]) for k, v in values.items()})
    _, extras = parser.parse_known_args(list(flags))
    _refuse_unknown(paradigm, "the command line", [flag for flag in extras if _FLAG.match(flag)] or extras, actions)
    try:
        parsed = parser.parse_args_into_dataclasses(list(flags), look_for_args_file=False)
        config = TrainConfig(paradigm, **dict(zip(_groups(paradigm), parsed, strict=True)))
        _refuse_trainer_checkpoints(config.training)
        _refuse_no_steps(config.training)
        return config
    except (ValueError, TypeError, ImportError) as error:
        raise ValueError(" ".join(str(error).split())) from error


def _refuse_trainer_checkpoints(training: Any) -> None:
    for name, default in (("save_strategy", "steps"), ("save_steps", 500), ("save_total_limit", None)):
        value = getattr(training, name)
        if getattr(value, "value", value) != default:
            raise ValueError(
                f"{name}: checkpoint_steps or checkpoint_every set the checkpoints, resume_every what a resume needs"
            )
    if training.resume_from_checkpoint is not None:
        raise ValueError("resume_from_checkpoint: the same command again goes on by itself, leave it out")


def _refuse_no_steps(training: Any) -> None:
    steps, epochs = training.max_steps, training.num_train_epochs
    if steps == 0 or steps < -1:
        raise ValueError(f"max_steps={steps}: give 1 or more, or -1 for num_train_epochs")
    if steps < 0 and not epochs > 0:
        raise ValueError(f"num_train_epochs={epochs}: give more than 0, or max_steps")


def _groups(paradigm: str) -> dict[str, type]:
    """The dataclasses of a paradigm, our own first, as help shows them."""
    own = dict(_GROUPS[paradigm])
    training = own.pop("training")
    return {"data": DataArguments, "run": RunArguments, **own, "model": ModelConfig, "training": training}


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file; give --config the path of a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a mapping: one `key: value` a line")
    return values


def _refuse_unknown(paradigm: str, source: str, keys: Any, actions: dict[str, argparse.Action]) -> None:
    for key in keys:
        name = str(key).lstrip("-").partition("=")[0].replace("-", "_")
        if name not in actions or str(key).startswith("-"):
            shown = key if str(key).startswith("-") else f"{key!r}"
            raise ValueError(f"{source}: {shown} is unknown{_hint(paradigm, name, actions)}; --help lists all")


def _hint(paradigm: str, name: str, actions: dict[str, argparse.Action]) -> str:
    if name in _COMMAND:
        return f"; did you mean the flag {_COMMAND[name][0]}?"
    fields = {
        other: {f.name for group in _groups(other).values() for f in dataclasses.fields(group)} for other in PARADIGMS
    }
    others = [other for other in PARADIGMS if name in fields[other]]
    if others and paradigm not in others:
        return (
            f" to {paradigm}: it belongs to {' and '.join([', '.join(others[:-1])] * (len(others) > 1) + others[-1:])}"
        )
    return nearest(name, list(actions))


def _typed(source: str, key: str, value: Any, action: argparse.Action) -> Any:
    """A YAML value as the flag would have given it.

    Raises:
        ValueError: it is of another type, or not among the choices.
    """
    where = f"{source}: {key}"
    if value is None or isinstance(value, dict):
        if isinstance(value, dict) and action.type is not str:
            raise ValueError(f"{where} is a mapping: a single value belongs here")
        return value
    if isinstance(value, list):
        if action.nargs != "+":
            raise ValueError(f"{where} is a list: a single value belongs here")
        return [_scalar(where, item, action) for item in value]
    if action.nargs == "+":
        raise ValueError(f"{where}={value!r}: a list belongs here, such as [{value}]")
    return _scalar(where, value, action)


def _scalar(where: str, value: Any, action: argparse.Action) -> Any:
    boolean = getattr(action.type, "__name__", "") == "string_to_bool"
    if isinstance(value, bool):
        if not boolean:
            raise ValueError(f"{where} is {str(value).lower()} here: quote it, since YAML reads yes, no, on and off so")
        return value
    try:
        typed = action.type(str(value)) if callable(action.type) else value
    except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
        kind = getattr(action.type, "__name__", "value")
        kind = {"string_to_bool": "true or false", "int": "whole number", "float": "number"}.get(kind, kind)
        raise ValueError(f"{where}={value!r} is not a {kind}") from error
    if action.choices is not None and typed not in action.choices:
        raise ValueError(f"{where}={value!r} is unknown: use one of {', '.join(map(str, action.choices))}")
    return typed
