"""What a configuration names, loaded: tokenizer, student, teacher, shapes without weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from geopd.training.compatibility import check_teacher, check_teacher_server
from geopd.training.config import TrainConfig
from geopd.training.data import load_demonstrations, load_prompts
from geopd.training.planning import ModelSize, bytes_a_weight
from geopd.training.projection import Projection
from geopd.training.rewards import reward_functions
from geopd.training.score_weighted_arguments import check_router_loss
from geopd.training.teacher import ModelTeacher, Teacher
from geopd.training.teacher_server import ServerTeacher
from geopd.training.weight_files import damaged_file

__all__ = [
    "ANSWERED_REWARDS",
    "check_config_teacher",
    "load_rewards",
    "load_rows",
    "load_student",
    "load_student_tokenizer",
    "load_teacher",
    "local_folder",
    "projection_of",
    "student_on_meta",
    "teacher_server",
    "teacher_size",
]


ANSWERED_REWARDS = frozenset({"exact", "math_verify"})
"""Reward functions that need a ground truth beside each prompt."""


def load_student_tokenizer(config: TrainConfig) -> Any:
    """The student's tokenizer.

    Raises:
        ValueError: there is none, or it has no end token.
    """
    tokenizer = _from_hub(AutoTokenizer, "tokenizer", _name(config), **_source(config))
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{_name(config)}: its tokenizer has no eos_token, so responses cannot end: set one")
    return tokenizer


def load_student(config: TrainConfig) -> Any:
    """The student's weights, in the dtype asked for.

    Raises:
        ValueError: they cannot be loaded, or would be quantised: an update of quantised weights cannot be measured.
    """
    if config.model.load_in_4bit or config.model.load_in_8bit:
        raise ValueError("load_in_4bit and load_in_8bit round the weights whose updates are measured: leave them out")
    return _from_hub(
        AutoModelForCausalLM,
        "weights",
        _name(config),
        dtype=config.model.dtype if config.model.dtype == "auto" else getattr(torch, config.model.dtype or "float32"),
        attn_implementation=config.model.attn_implementation,
        **_source(config),
    )


def load_rows(config: TrainConfig) -> Dataset:
    """Prompts, or demonstrations for sft, in TRL's columns.

    Raises:
        ValueError: none are named, or they cannot be read.
    """
    data = config.data
    if data.dataset is None:
        raise ValueError(
            "dataset is missing: name a JSONL or Parquet file, a saved folder, a hub id or problem:arithmetic"
        )
    common: dict[str, Any] = {
        "split": data.dataset_split,
        "subset": data.dataset_subset,
        "limit": data.dataset_limit,
        "seed": data.dataset_seed,
    }
    if config.paradigm == "sft":
        return load_demonstrations(data.dataset, form=data.dataset_form, **common)
    judged = set(config.reward.reward or ()) if config.reward is not None else set()
    needs = bool(judged & ANSWERED_REWARDS)
    return load_prompts(data.dataset, answer_column=data.answer_column, needs_answer=needs, **common)


def load_rewards(config: TrainConfig) -> list[Any]:
    """The reward functions; none for sft, and for opd where none is named.

    Raises:
        ValueError: one does not exist.
    """
    if config.reward is None or not config.reward.reward:
        return []
    return reward_functions(
        config.reward.reward, answer_marker=config.reward.answer_marker, math_seconds=config.reward.math_seconds
    )


def load_teacher(config: TrainConfig) -> Teacher | None:
    """The teacher, in this process or behind its address; None where the objective has no use for one.

    Raises:
        ValueError: the weights cannot be loaded.
    """
    if config.teacher is None or not config.objective.needs_teacher:
        return None
    if config.teacher.teacher_url is not None:
        return teacher_server(config)
    return ModelTeacher(load_teacher_model(config), offload=config.teacher.teacher_offload)


def load_teacher_model(config: TrainConfig) -> Any:
    """The weights of a teacher in this process."""
    assert config.teacher is not None
    assert config.teacher.teacher is not None
    return _from_hub(
        AutoModelForCausalLM,
        "weights",
        config.teacher.teacher,
        dtype=getattr(torch, config.teacher.teacher_dtype),
        attn_implementation=config.model.attn_implementation,
        trust_remote_code=config.training.trust_remote_code,
    )


def teacher_server(config: TrainConfig) -> ServerTeacher:
    """The client of a served teacher; nothing is sent yet.

    Raises:
        ValueError: a setting of ``teacher_server`` is out of range.
    """
    assert config.teacher is not None
    assert config.teacher.teacher_url is not None
    options = config.teacher.teacher_server or {}
    assert isinstance(options, dict)
    return ServerTeacher(config.teacher.teacher_url, config.teacher.teacher_name, **options)


def check_config_teacher(config: TrainConfig, tokenizer: Any, student_rows: int) -> None:
    """Refuse a teacher that does not fit the student; nothing where there is none.

    Args:
        config: names the teacher.
        tokenizer: the student's.
        student_rows: rows of the student's output matrix.

    Raises:
        ValueError: what does not fit, with the remedy.
    """
    if config.teacher is None:
        return
    if config.teacher.teacher_url is not None:
        check_teacher_server(
            teacher_server(config),
            tokenizer,
            teacher_tokenizer=config.teacher.teacher_tokenizer,
            student_vocab_size=student_rows,
            allow_template_mismatch=config.teacher.allow_template_mismatch,
            student_temperature=getattr(config.training, "temperature", 1.0),
        )
        return
    name, trust = str(config.teacher.teacher), config.training.trust_remote_code
    shape = _from_hub(AutoConfig, "config", name, trust_remote_code=trust)
    check_teacher(
        tokenizer,
        _from_hub(AutoTokenizer, "tokenizer", name, trust_remote_code=trust),
        student_vocab_size=student_rows,
        teacher_vocab_size=shape.get_text_config().vocab_size,
        allow_template_mismatch=config.teacher.allow_template_mismatch,
    )


def student_on_meta(config: TrainConfig) -> tuple[ModelSize, Any]:
    """The student's shape from its config alone, and a model of that shape without weights, as it will be trained.

    Raises:
        ValueError: there is no config, the projection's basis does not fit the shape, or the loss would not be the
            objective's.
    """
    shape = _from_hub(AutoConfig, "config", _name(config), **_source(config))
    if config.paradigm != "sft" and config.divergence == "sampled":
        check_router_loss(config.training, shape)
    size, model = _size(_name(config), shape, bytes_a_weight(config.model.dtype), config.training.trust_remote_code)
    if config.run.projection is not None:
        model = projection_of(config).prepare(model)
    elif config.model.use_peft:
        from peft import get_peft_model
        from trl import get_peft_config

        model = get_peft_model(model, get_peft_config(config.model))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return replace(size, trained=trained), model


def teacher_size(config: TrainConfig) -> ModelSize | str | None:
    """The teacher's shape, or its address, or None."""
    if config.teacher is None:
        return None
    if config.teacher.teacher is None:
        return config.teacher.teacher_url
    trust = config.training.trust_remote_code
    shape = _from_hub(AutoConfig, "config", config.teacher.teacher, trust_remote_code=trust)
    size, _ = _size(config.teacher.teacher, shape, bytes_a_weight(config.teacher.teacher_dtype), trust)
    return replace(size, trained=0)


def projection_of(config: TrainConfig) -> Projection:
    """The projection that ``run.projection`` describes.

    Raises:
        ValueError: a setting is out of range.
    """
    settings = config.run.projection
    assert isinstance(settings, dict)
    start: dict[str, Any] = {"start": local_folder(_name(config), config.model.model_revision)}
    return Projection(**start | settings)


def local_folder(name: str, revision: str | None = None) -> Path | None:
    """Where a checkpoint lies on this machine: its own folder, or the hub's cache; None when it is not here."""
    if Path(name).exists():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (OSError, ValueError):
        return None


def _name(config: TrainConfig) -> str:
    if config.model.model_name_or_path is None:
        raise ValueError("model_name_or_path is missing: name the checkpoint to train")
    return str(config.model.model_name_or_path)


def _source(config: TrainConfig) -> dict[str, Any]:
    return {"revision": config.model.model_revision, "trust_remote_code": config.training.trust_remote_code}


def _size(name: str, shape: Any, width: int, trust: bool) -> tuple[ModelSize, Any]:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape, trust_remote_code=trust)
    parameters = sum(p.numel() for p in model.parameters())
    text = shape.get_text_config()
    return ModelSize(name, parameters, parameters, text.num_hidden_layers, text.hidden_size, width), model


def _from_hub(kind: Any, what: str, name: str, **options: Any) -> Any:
    """``kind.from_pretrained`` whose failure is one line."""
    if not Path(name).exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ValueError(f"{name}: no {what} to be had, there is no such folder")
    try:
        return kind.from_pretrained(name, **options)
    except SafetensorError as error:
        folder = local_folder(name, options.get("revision"))
        damaged = damaged_file(folder) if folder is not None and folder.is_dir() else None
        file, reason = damaged if damaged is not None else (name, " ".join(str(error).split()))
        raise ValueError(f"{file} is damaged ({reason}): copy or download it again") from error
    except (OSError, ValueError, KeyError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        place = "the folder" if Path(name).is_dir() else "no folder here, and the hub"
        raise ValueError(f"{name}: no {what} to be had ({place}: {reason})") from error
