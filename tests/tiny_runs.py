"""Tiny checkpoints on disk and the settings that train them in a second."""

from pathlib import Path

from safetensors.torch import load_file

from geopd.problems import character_tokenizer
from geopd.training import ModelShape, build_model
from geopd.training.config_file import parse_config
from geopd.training.run import train

SHAPE = ModelShape(hidden=32, layers=2, heads=2, key_value_heads=1, intermediate=48)
COMMON = {
    "dataset": "problem:arithmetic",
    "learning_rate": 1e-3,
    "activation_checkpointing": False,
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
    "seed": 3,
}
ON_POLICY = COMMON | {
    "dataset_limit": 12,
    "per_device_train_batch_size": 4,
    "num_generations": 2,
    "max_completion_length": 6,
    "max_steps": 8,
}


def save_model(folder, seed=0):
    tokenizer = character_tokenizer()
    build_model(SHAPE, tokenizer, seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def settings(paradigm, models, out, **changes):
    """A run of the student in ``models`` (a folder with ``student`` and ``teacher``)."""
    common = {"model_name_or_path": str(models / "student"), "output_dir": str(out)}
    if paradigm == "sft":
        rows = {"dataset_limit": 20, "per_device_train_batch_size": 4, "num_train_epochs": 2}
        return COMMON | rows | common | changes
    teacher = {"teacher": str(models / "teacher"), "teacher_dtype": "float32"} if paradigm in ("opd", "mix") else {}
    return ON_POLICY | {"reward": ["arithmetic"]} | teacher | common | changes


def run(paradigm, models, out, callbacks=(), **changes):
    config = parse_config(paradigm, settings=settings(paradigm, models, out, **changes))
    return train(config, callbacks=callbacks, quiet=True)


def weights(run_folder, step):
    return load_file(Path(run_folder) / f"checkpoint-{step}" / "model.safetensors")
