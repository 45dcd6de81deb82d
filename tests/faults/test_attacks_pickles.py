"""Pickles that would make a file if any part of them ran, in every format that holds pickles: refused, nothing run."""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from checkpoints_on_disk import moved, save_tensors, small_weights
from command_line import geopd
from geopd.checkpoints import CheckpointError, open_checkpoint
from hostile import PROGRAMS, distributed, object_pickle, pickle_of, tiny, torch_zip

MODEL_STATES, OPTIMISER_STATES = "mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"


def in_bin(folder: Path, program: bytes) -> Path:
    (folder / "pytorch_model.bin").write_bytes(torch_zip(program))
    return folder


def in_pt(folder: Path, program: bytes) -> Path:
    (folder / "model.pt").write_bytes(torch_zip(program))
    return folder / "model.pt"


def in_shard(folder: Path, program: bytes) -> Path:
    (folder / "pytorch_model-00001-of-00001.bin").write_bytes(torch_zip(program))
    index = {"weight_map": {"model.norm.weight": "pytorch_model-00001-of-00001.bin"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


def in_metadata(folder: Path, program: bytes) -> Path:
    distributed(folder, tiny())
    (folder / ".metadata").write_bytes(program)
    return folder


def in_verl(folder: Path, program: bytes) -> Path:
    (folder / "model_world_size_1_rank_0.pt").write_bytes(torch_zip(program))
    (folder / "fsdp_config.json").write_text(json.dumps({"FSDP_version": 2, "world_size": 1}))
    return folder


def in_model_states(folder: Path, program: bytes) -> Path:
    (folder / MODEL_STATES).write_bytes(torch_zip(program))
    return folder


def in_optimiser_states(folder: Path, program: bytes) -> Path:
    torch.save({"module": {}, "param_shapes": []}, folder / MODEL_STATES)
    (folder / OPTIMISER_STATES).write_bytes(torch_zip(program))
    return folder


def in_legacy(folder: Path, program: bytes) -> Path:
    torch.save(tiny(), folder / "model.pt", _use_new_zipfile_serialization=False)
    with (folder / "model.pt").open("ab") as file:
        file.write(program)
    return folder / "model.pt"


def bare(folder: Path, program: bytes) -> Path:
    (folder / "model.pt").write_bytes(program)
    return folder / "model.pt"


def in_adapter(folder: Path, program: bytes) -> Path:
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1}))
    (folder / "adapter_model.bin").write_bytes(torch_zip(program))
    return folder


PLACES: dict[str, Callable[[Path, bytes], Path]] = {
    place.__name__: place
    for place in (in_bin, in_pt, in_shard, in_metadata, in_verl, in_model_states, in_optimiser_states, in_adapter)
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_programs_are_live(program: str, tmp_path: Path) -> None:
    class Unpickler(pickle._Unpickler):
        def persistent_load(self, pid: object) -> object:
            return pid

    import io

    marker = tmp_path / "ran"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        Unpickler(io.BytesIO(pickle_of(program, marker))).load()
    assert marker.exists()


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("place", PLACES)
def test_a_hostile_pickle_is_refused_and_never_run(place: str, program: str, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    base = save_tensors(tmp_path / "base", tiny())
    folder = tmp_path / "tuned"
    folder.mkdir()
    path = PLACES[place](folder, pickle_of(program, marker))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path, base)
    assert not marker.exists()
    assert str(folder) in str(caught.value)
    assert "refused" in str(caught.value)


@pytest.mark.parametrize("place", PLACES)
def test_an_object_with_a_hostile_reduce(place: str, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    base = save_tensors(tmp_path / "base", tiny())
    folder = tmp_path / "tuned"
    folder.mkdir()
    path = PLACES[place](folder, object_pickle(marker))
    with pytest.raises(CheckpointError, match=r"its pickle names .*open.?, which is not among the classes"):
        open_checkpoint(path, base)
    assert not marker.exists()


@pytest.mark.parametrize("place", [in_legacy, bare])
def test_pickles_that_are_no_zip_are_not_read_at_all(place: Callable[[Path, bytes], Path], tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    path = place(tmp_path, object_pickle(marker))
    with pytest.raises(CheckpointError, match=r"model\.pt: (torch's format before 1\.6|not a file that torch\.save)"):
        open_checkpoint(path)
    assert not marker.exists()


def test_a_script_archive_holds_code_and_is_refused(tmp_path: Path) -> None:
    torch_script = torch_zip(b"\x80\x02}.", {"code/__torch__.py": b"import os", "constants.pkl": b"\x80\x02)."})
    (tmp_path / "model.pt").write_bytes(torch_script)
    with pytest.raises(CheckpointError, match="a TorchScript archive, which holds code; refused"):
        open_checkpoint(tmp_path / "model.pt")


def test_the_command_says_so_in_one_line(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    base = save_tensors(tmp_path / "base", small_weights())
    folder = tmp_path / "tuned"
    folder.mkdir()
    in_bin(folder, pickle_of("GLOBAL and REDUCE", marker))
    complaint = geopd("measure", base, folder, "--out", tmp_path / "out").complaint()
    assert f"{folder / 'pytorch_model.bin'}: its pickle names " in complaint
    assert "os.system" in complaint
    assert "nothing was run" in complaint
    assert not marker.exists()


def test_a_hostile_shard_leaves_the_others_measured(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    weights = small_weights()
    base = save_tensors(tmp_path / "base", weights)
    folder = tmp_path / "tuned"
    folder.mkdir()
    tuned = moved(weights, 1e-3)
    good = {name: tensor for name, tensor in tuned.items() if ".layers.0." in name}
    torch.save(good, folder / "pytorch_model-00001-of-00002.bin")
    (folder / "pytorch_model-00002-of-00002.bin").write_bytes(torch_zip(pickle_of("posix", marker)))
    weight_map = {name: f"pytorch_model-0000{1 if name in good else 2}-of-00002.bin" for name in tuned}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    checkpoint = open_checkpoint(folder)
    assert set(checkpoint.tensors) == set(good)
    assert set(checkpoint.unreadable) == set(tuned) - set(good)
    assert "posix.system" in next(iter(checkpoint.unreadable.values()))
    result = geopd("plan", base, folder, "--json")
    assert result.code == 0
    assert json.loads(result.out)["runs"]["tuned"]["matched"] == len(good)
    assert not marker.exists()
