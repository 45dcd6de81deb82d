"""Listings that claim more than their files hold, pipes where files should be, and damage that no format foresees."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from checkpoints_on_disk import save_run, save_shards, save_tensors, small_weights
from geopd.checkpoints import Checkpoint, CheckpointError, NotEnoughMemoryError, open_checkpoint, open_run
from geopd.checkpoints.checkpoint import tensor_info
from geopd.checkpoints.megatron_names import Attention, parts_of
from hostile import distributed, rewrite_metadata, tiny, told_within, torch_zip

ERRORS = (ValueError, TypeError, AttributeError, RuntimeError, OverflowError, KeyError, RecursionError)


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("act", [Checkpoint.read, Checkpoint.tensor_digest])
def test_whatever_reading_raises_names_the_checkpoint_and_its_tensor(
    act: Callable[[Checkpoint, str], object], error: type[Exception]
) -> None:
    class Raises:
        def read(self, _name: str) -> Tensor:
            raise error("deep inside")

    checkpoint = Checkpoint(Path("c"), "x", {"w": tensor_info("w", (2,), torch.float32)}, Raises())
    with pytest.raises(CheckpointError, match=rf"^c: tensor w: not readable \({error.__name__}: .*again"):
        act(checkpoint, "w")


@pytest.mark.parametrize("error", ERRORS)
def test_whatever_opening_raises_names_the_checkpoint(
    error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise error("deep inside")

    monkeypatch.setattr("geopd.checkpoints.safetensors_format.read_header", fails)
    path = save_tensors(tmp_path / "c", tiny())
    with pytest.raises(CheckpointError, match=rf"^{path}: not readable \({error.__name__}"):
        open_checkpoint(path)


def test_memory_that_is_wanting_is_told_as_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise MemoryError("none left")

    path = save_tensors(tmp_path / "c", tiny())
    checkpoint = open_checkpoint(path)
    monkeypatch.setattr("geopd.checkpoints.safetensors_format.read_header", fails)
    says = r"not enough memory \(MemoryError: none left\); free some and run it again"
    with pytest.raises(NotEnoughMemoryError, match=rf"^{path}: {says}"):
        open_checkpoint(path)
    monkeypatch.setattr(type(checkpoint.source), "read", fails)
    name = next(iter(checkpoint.tensors))
    with pytest.raises(NotEnoughMemoryError, match=rf"model\.safetensors: tensor {name}: {says}"):
        checkpoint.read(name)


def test_a_name_that_is_no_text(tmp_path: Path) -> None:
    torch.save({"a\ud800": torch.ones(2)}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"model\.pt: tensor 'a\\ud800': a name that is no text"):
        open_checkpoint(tmp_path / "model.pt")


def test_a_zip_whose_entries_begin_before_it(tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    data = bytearray(torch_zip(b"\x80\x02}."))
    end = data.rindex(b"PK\x05\x06")
    (start,) = struct.unpack("<I", data[end + 16 : end + 20])
    data[end + 16 : end + 20] = struct.pack("<I", start + len(data))
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: entry .* begins before the file does"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["[" * 100_000, '[{"step": 1' + "0" * 5000 + "}]", "x" * (5 << 20)])
def test_evaluations_beyond_all_bounds(text: str, tmp_path: Path) -> None:
    run = save_run(tmp_path / "r", small_weights(), [1])
    (run / "evaluations.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"evaluations\.json: .*(again|right file)"):
        open_run(run)


@pytest.mark.parametrize("origin", ["a\0b", "a\ud800", 3])
def test_an_origin_that_is_no_path(origin: object, tmp_path: Path) -> None:
    run = save_run(tmp_path / "r", small_weights(), [1])
    (run / "run.json").write_text(json.dumps({"schema_version": 1, "paradigm": "sft", "origin": {"path": origin}}))
    with pytest.raises(CheckpointError, match=r"run\.json: a field has the wrong type"):
        open_run(run)


def short(metadata: Any) -> None:
    for place in metadata.storage_data.values():
        place.length = 8


def doubled(metadata: Any) -> None:
    """A tensor of twice the rows, whose second half is said to lie where the first does."""
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

    held = metadata.state_dict_metadata["w"]
    held.size = torch.Size([8, 4])
    held.chunks.append(ChunkStorageMetadata(torch.Size([4, 0]), torch.Size([4, 4])))
    (place,) = metadata.storage_data.values()
    metadata.storage_data[MetadataIndex("w", torch.Size([4, 0]), 1)] = place


@pytest.mark.parametrize(
    ("change", "said"), [(short, r"is said to take 8 bytes, too few"), (doubled, r"two of its chunks share bytes of")]
)
def test_a_listing_that_claims_more_than_its_files_hold(
    change: Callable[[Any], None], said: str, tmp_path: Path
) -> None:
    folder = distributed(tmp_path / "c", {"w": torch.ones(4, 4)})
    rewrite_metadata(folder, change)
    assert said in open_checkpoint(folder).unreadable["w"]


def test_two_tensors_with_one_list_of_chunks(tmp_path: Path) -> None:
    folder = distributed(tmp_path / "c", {"v": torch.ones(4), "w": torch.ones(4)})

    def share(metadata: Any) -> None:
        held = metadata.state_dict_metadata
        held["v"].chunks = held["w"].chunks

    rewrite_metadata(folder, share)
    with pytest.raises(CheckpointError, match=r"\.metadata: .*has the list of chunks of another tensor"):
        open_checkpoint(folder)


def test_a_tensor_without_properties_is_no_listing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.checkpoint.metadata import TensorProperties

    folder = distributed(tmp_path / "c", {"w": torch.ones(4)})
    monkeypatch.setattr(TensorProperties, "__getstate__", lambda _: ())
    rewrite_metadata(folder, lambda _: None)
    with pytest.raises(
        CheckpointError, match=r"\.metadata: not the metadata of a torch distributed checkpoint \(tuple"
    ):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("decoder.layers.input_layernorm.weight", (10**9, 1)),
        ("decoder.layers.mlp.experts.experts.linear_fc2.weight", (4000, 10**6, 0, 4)),
        ("decoder.layers.3.mlp.experts.experts.linear_fc2.weight", (10**9, 1, 1)),
    ],
)
def test_a_stack_higher_than_any_model_is_refused_by_name(name: str, shape: tuple[int, ...]) -> None:
    ((stored, said),) = parts_of(name, shape, Attention(None, None, None), {})
    assert stored == name
    assert "more than any model has" in said


PIPES = {
    "an index's shard": "a.safetensors",
    "latest": "latest",
    "a rank's file": "model_world_size_1_rank_0.pt",
    "model states": "mp_rank_00_model_states.pt",
    "weights": "model.safetensors",
}


@pytest.mark.parametrize("pipe", PIPES)
def test_a_pipe_is_never_waited_for(pipe: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / PIPES[pipe])
    if pipe == "an index's shard":
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": PIPES[pipe]}}))
    for path in (tmp_path, tmp_path / PIPES[pipe]):
        assert told_within(5, path).startswith(str(tmp_path))


def directory_of(entries: int) -> bytes:
    """A zip whose directory lists its last entry over and over."""
    whole = torch_zip(b"\x80\x02}.")
    start, end = whole.rindex(b"PK\x01\x02"), whole.index(b"PK\x05\x06")
    first = whole.index(b"PK\x01\x02")
    listed = whole[first:end] + whole[start:end] * entries
    large = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, entries, entries, len(listed), first)
    large += struct.pack("<4sLQL", b"PK\x06\x07", 0, first + len(listed), 1)
    return (
        whole[:first]
        + listed
        + large
        + struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 65535, 65535, 2**32 - 1, 2**32 - 1, 0)
    )


GROWING = {
    "a memo of 2 million": torch_zip(b"\x80\x02N" + b"\x94" * 2_000_000 + b"."),
    "a million texts": torch_zip(b"\x80\x02(" + b"\x8c\x02ab" * 1_000_000 + b"1}."),
    "250,000 entries": directory_of(250_000),
}


@pytest.mark.parametrize("attack", GROWING)
def test_what_would_take_more_memory_than_weights_need(attack: str, tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(GROWING[attack])
    said = told_within(5, tmp_path)
    assert any(words in said for words in ("than a file of its size", "more than weights need: refused"))


@pytest.mark.parametrize("name", ["config.json", "run.json", "fsdp_config.json"])
def test_only_an_index_may_be_large(name: str, tmp_path: Path) -> None:
    save_tensors(tmp_path / "c", tiny())
    torch.save(tiny(), tmp_path / "c" / "model_world_size_1_rank_0.pt")
    (tmp_path / "c" / name).write_text('{"a": [' + "[]," * 2_000_000 + "[]]}")
    with pytest.raises(CheckpointError, match=rf"{name}: 6,000,\d+ bytes of JSON, at most 4,194,304 are read"):
        open_run(tmp_path / "c") and open_checkpoint(
            tmp_path / "c" / ("model_world_size_1_rank_0.pt" * (name[0] == "f"))
        )


def test_an_index_of_300000_shards(tmp_path: Path) -> None:
    folder = save_shards(tmp_path / "c", [tiny()])
    listing = folder / "model.safetensors.index.json"
    listing.write_text(json.dumps({"weight_map": {str(i): f"{i}.safetensors" for i in range(300_000)}}))
    assert "names 300,000 shards, at most 10,000 are looked for" in told_within(5, folder)


def test_weights_that_are_negated_when_read_are_refused(tmp_path: Path) -> None:
    torch.save({"w": torch._neg_view(torch.ones(2, 2))}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"model\.pt: .*a negative or conjugate bit"):
        open_checkpoint(tmp_path / "model.pt")


def test_the_model_beside_a_step_that_is_a_tensor(tmp_path: Path) -> None:
    torch.save({"epoch": torch.tensor(3), "model_state_dict": tiny()}, tmp_path / "model.pt")
    found = open_checkpoint(tmp_path / "model.pt")
    assert set(found.tensors) == set(tiny())
    assert "under model_state_dict; the rest is ignored, the tensor epoch too" in found.warnings[0]


def test_tensors_in_a_list_are_told_of(tmp_path: Path) -> None:
    torch.save({**tiny(), "more": [torch.ones(2)], "other": {"x": torch.ones(2)}}, tmp_path / "model.pt")
    found = open_checkpoint(tmp_path / "model.pt")
    assert set(found.tensors) == set(tiny())
    assert found.warnings[-1].endswith("'more' and 1 more hold tensors without names of their own: not read")


def test_a_shard_beside_the_single_file_is_told_of(tmp_path: Path) -> None:
    folder = save_tensors(tmp_path / "c", tiny())
    save_file(tiny(), folder / "model-00002-of-00002.safetensors")
    assert "model-00002-of-00002.safetensors beside model.safetensors" in open_checkpoint(folder).warnings[0]


@pytest.mark.parametrize("tag", ["../secret", "/tmp", "\xff" * 10])
def test_a_latest_tag_that_is_refused_is_told(tag: str, tmp_path: Path) -> None:
    (tmp_path / "latest").write_bytes(tag.encode("latin-1"))
    with pytest.raises(CheckpointError, match=rf"{tmp_path}/latest: (names .* refused|not the name of a folder)"):
        open_checkpoint(tmp_path)
