"""Files made to exhaust memory, to nest without end, or to lead a reader out of the folder it was given."""

from __future__ import annotations

import json
import pickle
import struct
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from checkpoints_on_disk import save_shards, save_tensors, small_weights
from command_line import geopd
from geopd.checkpoints import CheckpointError, open_checkpoint, open_run
from hostile import distributed, rewrite_metadata, tiny, torch_zip

INDEX = "model.safetensors.index.json"
SPARE = 16 << 20


def header_of(length: int, text: bytes = b"{}", body: bytes = b"") -> bytes:
    return struct.pack("<Q", length) + text + body


def tensor(shape: list[object], offsets: list[object], dtype: object = "F32") -> bytes:
    text = json.dumps({"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode()
    return header_of(len(text), text, bytes(64))


SAFETENSORS: dict[str, bytes] = {
    "a header of 2^60 bytes": header_of(2**60),
    "a header of 2^64 - 1 bytes": header_of(2**64 - 1),
    "a header of 99 MB that is not there": header_of(99_000_000),
    "lists 100,000 deep": header_of(100_000, b"[" * 100_000),
    "objects 100,000 deep": header_of(500_000, b'{"a":' * 100_000),
    "a tensor of 2^60 bytes": tensor([2**58], [0, 2**60]),
    "a shape of 2^80 entries": tensor([2**40, 2**40], [0, 64]),
    "a shape larger than its bytes": tensor([1000], [0, 64]),
    "a negative shape": tensor([-4, -4], [0, 64]),
    "negative offsets": tensor([16], [-64, 0]),
    "an infinite offset": tensor([16], [0, float("inf")]),
    "an integer of 5,000 digits": header_of(5002, b"[" + b"9" * 5000 + b"]"),
    "a dtype that there is not": tensor([16], [0, 64], "F31"),
    "a dtype that is no text": tensor([16], [0, 64], ["F32"]),
}


@pytest.mark.parametrize("attack", SAFETENSORS)
def test_a_safetensors_file_that_claims_what_it_has_not(attack: str, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(SAFETENSORS[attack])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: ") as caught:
        bounded(lambda: read_all(tmp_path), file)
    assert any(word in str(caught.value) for word in ("again", "not a safetensors", "refused"))


def read_all(path: Path) -> None:
    checkpoint = open_checkpoint(path)
    for name in (*checkpoint.unreadable, *checkpoint.tensors):
        checkpoint.read(name)


def bounded(work: Callable[[], object], *files: Path) -> None:
    """Do it in 5 s and in four times the files' bytes, and 16 MiB; what it raises is raised."""
    size = sum(file.stat().st_size for file in files)
    tracemalloc.start()
    began = time.process_time()
    try:
        work()
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert time.process_time() - began < 5
        assert peak < 4 * size + SPARE, f"{peak:,} bytes for {size:,}"


@pytest.mark.parametrize("name", ["config.json", INDEX, "adapter_config.json", "run.json"])
@pytest.mark.parametrize("text", [b"[" * 100_000, b'{"a":' * 100_000, b'{"a": ' + b"9" * 5000 + b"}"])
def test_json_beyond_all_depth(name: str, text: bytes, tmp_path: Path) -> None:
    save_tensors(tmp_path / "c", tiny())
    if name.startswith("adapter"):
        (tmp_path / "c" / "model.safetensors").rename(tmp_path / "c" / "adapter_model.safetensors")
    (tmp_path / "c" / name).write_bytes(text)
    base = save_tensors(tmp_path / "base", tiny())
    with pytest.raises(CheckpointError, match=f"{name}: not readable as JSON"):
        open_run(tmp_path / "c") and open_checkpoint(tmp_path / "c", base)


def secret(tmp_path: Path) -> Path:
    """Weights beside the checkpoint's folder, which nothing in the folder should reach."""
    file = tmp_path / "secret.safetensors"
    save_file(tiny(), file)
    return file


ESCAPES = ("../secret.safetensors", "/etc/hostname", "sub/../../secret.safetensors", ".", "..", "", "a\0b", "x" * 300)


@pytest.mark.parametrize("name", ESCAPES)
@pytest.mark.parametrize("listing", [INDEX, "pytorch_model.bin.index.json"])
def test_an_index_that_names_a_way_out(listing: str, name: str, tmp_path: Path) -> None:
    secret(tmp_path)
    folder = tmp_path / "c"
    folder.mkdir()
    (folder / listing).write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(CheckpointError, match=r"names .* which is not a file of its own folder; refused"):
        open_checkpoint(folder)


def test_a_link_that_leads_out_of_the_folder(tmp_path: Path) -> None:
    outside = secret(tmp_path)
    folder = save_shards(tmp_path / "c", [tiny()])
    shard = folder / "model-00001-of-00001.safetensors"
    shard.unlink()
    shard.symlink_to(outside)
    with pytest.raises(CheckpointError, match=r"a link to .*secret\.safetensors outside its folder; refused"):
        open_checkpoint(folder)


def test_a_link_that_leads_to_itself(tmp_path: Path) -> None:
    folder = save_shards(tmp_path / "c", [tiny()])
    shard = folder / "model-00001-of-00001.safetensors"
    shard.unlink()
    shard.symlink_to(shard)
    with pytest.raises(CheckpointError, match=rf"{shard.name}"):
        open_checkpoint(folder)


def test_links_inside_the_folder_and_in_the_hubs_cache_are_read(tmp_path: Path) -> None:
    folder = save_shards(tmp_path / "c", [tiny()])
    shard = folder / "model-00001-of-00001.safetensors"
    shard.rename(folder / "real")
    shard.symlink_to("real")
    assert set(open_checkpoint(folder).tensors) == set(tiny())
    snapshot = save_shards(tmp_path / "models--team--Base" / "snapshots" / ("a" * 40), [tiny()])
    (snapshot.parents[1] / "blobs").mkdir()
    (snapshot / shard.name).rename(snapshot.parents[1] / "blobs" / "b")
    (snapshot / shard.name).symlink_to("../../blobs/b")
    assert set(open_checkpoint(snapshot).tensors) == set(tiny())
    (snapshot / shard.name).unlink()
    (snapshot / shard.name).symlink_to(secret(tmp_path))
    with pytest.raises(CheckpointError, match="outside its folder; refused"):
        open_checkpoint(snapshot)


@pytest.mark.parametrize("tag", ["../secret", "/tmp", "..", "a/b"])
def test_the_latest_tag_of_deepspeed_cannot_lead_out(tag: str, tmp_path: Path) -> None:
    (tmp_path / "secret").mkdir()
    torch.save({"module": tiny(), "param_shapes": []}, tmp_path / "secret" / "mp_rank_00_model_states.pt")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "latest").write_text(tag)
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path / "c")


@pytest.mark.parametrize("name", ["../secret.distcp", "/etc/hostname", "a/../../secret.distcp"])
def test_metadata_that_names_a_way_out(name: str, tmp_path: Path) -> None:
    folder = distributed(tmp_path / "c", tiny())
    (folder / "__0_0.distcp").rename(tmp_path / "secret.distcp")

    def lead_out(metadata: object) -> None:
        for where in metadata.storage_data.values():
            where.relative_path = name

    rewrite_metadata(folder, lead_out)
    with pytest.raises(CheckpointError, match="refused"):
        read_all(folder)


def test_metadata_that_claims_more_than_its_files(tmp_path: Path) -> None:
    folder = distributed(tmp_path / "c", tiny())

    def inflate(metadata: object) -> None:
        for held in metadata.state_dict_metadata.values():
            held.size = torch.Size([2**40, 2**10])
            for chunk in held.chunks:
                chunk.sizes = torch.Size([2**40, 2**10])

    rewrite_metadata(folder, inflate)
    with pytest.raises(CheckpointError):
        bounded(lambda: read_all(folder), *folder.iterdir())


def bomb(size: int) -> bytes:
    return torch_zip(pickle.dumps(tiny_state(), protocol=2), {"data/0": bytes(size)}, zipfile.ZIP_DEFLATED)


def tiny_state() -> dict[str, object]:
    return {"a": 1}


def test_a_compressed_storage_is_not_inflated(tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    file.write_bytes(bomb(50_000_000))
    assert file.stat().st_size < 100_000
    with pytest.raises(CheckpointError, match=r"is compressed, which torch\.save never does"):
        bounded(lambda: read_all(tmp_path), file)


def test_a_storage_that_claims_more_than_the_file(tmp_path: Path) -> None:
    torch.save(tiny(), tmp_path / "pytorch_model.bin")
    data = (tmp_path / "pytorch_model.bin").read_bytes()
    size = struct.pack("<I", 64)
    (tmp_path / "pytorch_model.bin").write_bytes(data.replace(size, struct.pack("<I", 2**31)))
    with pytest.raises(CheckpointError, match="write or download"):
        bounded(lambda: read_all(tmp_path), tmp_path / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("shape", "stride"), [((2**40,), (1,)), ((2**20, 2**20), (0, 0)), ((2**62, 2**62), (0, 1)), ((-1,), (1,))]
)
def test_a_tensor_that_repeats_its_storage_without_end(
    shape: tuple[int, ...], stride: tuple[int, ...], tmp_path: Path
) -> None:
    class View:
        def __reduce__(self) -> tuple[object, ...]:
            return torch._utils._rebuild_tensor_v2, (Held(), 0, shape, stride, False, {})

    class Held:
        pass

    class Pickler(pickle._Pickler):
        def persistent_id(self, held: object) -> object:
            return ("storage", torch.FloatStorage, "0", "cpu", 16) if isinstance(held, Held) else None

    with (tmp_path / "data.pkl").open("wb") as made:
        Pickler(made, protocol=2).dump({"a": View()})
    (tmp_path / "model.pt").write_bytes(torch_zip((tmp_path / "data.pkl").read_bytes(), {"data/0": bytes(64)}))
    with pytest.raises(CheckpointError, match=r"model\.pt"):
        bounded(lambda: read_all(tmp_path / "model.pt"), tmp_path / "model.pt")


PICKLES: dict[str, bytes] = {
    "50,000 lists deep": b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b".",
    "marks without end": b"\x80\x02" + b"(" * 1_000_000 + b".",
    "doubled forty times": b"\x80\x02]q\x00" + b"(h\x00h\x00tq\x00" * 40 + b".",
    "a text of 2 GB": b"\x80\x02X\xff\xff\xff\x7f.",
    "an integer of 2 GB": b"\x80\x02\x8b\xff\xff\xff\x7f.",
    "a memo index of 4 billion": b"\x80\x02Nr\xff\xff\xff\xff.",
    "300,000 empty dicts": b"\x80\x02(" + b"}" * 300_000 + b"t.",
    "a decimal of 100,000 digits": b"\x80\x02I" + b"9" * 100_000 + b"\n.",
}


@pytest.mark.parametrize("attack", PICKLES)
def test_a_pickle_that_grows_without_end(attack: str, tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    file.write_bytes(torch_zip(PICKLES[attack]))
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        bounded(lambda: read_all(tmp_path), file)


def test_a_hostile_checkpoint_is_one_line_on_the_command_line(tmp_path: Path) -> None:
    base = save_tensors(tmp_path / "base", small_weights())
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / "model.safetensors").write_bytes(SAFETENSORS["objects 100,000 deep"])
    assert "model.safetensors" in geopd("plan", base, tmp_path / "tuned").complaint()
