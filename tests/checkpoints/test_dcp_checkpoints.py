"""Torch distributed checkpoints as their own writers leave them, read in place; what is wrong with one is named."""

from __future__ import annotations

import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata

from checkpoints_on_disk import save_model, small_weights
from geopd.checkpoints import Checkpoint, CheckpointError, open_checkpoint
from geopd.checkpoints.dcp_format import open_dcp, recognises_dcp
from hostile import Touches

# said by torch where one process saves
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
WRITER = Path(__file__).with_name("dcp_writer.py")


def written(out: Path, model: Path, kind: str, world: int) -> Path:
    # a model with rows that do not divide by the ranks, and norms with fewer entries than some ranks need
    command = [sys.executable, "-W", "ignore", str(WRITER), str(model), str(out), str(world), kind]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    return save_model("qwen3", path, intermediate_size=51, vocab_size=67)


def same(found: Checkpoint, model: Path) -> None:
    plain = open_checkpoint(model)
    assert found.unreadable == {}
    assert {name: info.shape for name, info in found.tensors.items()} == {
        name: info.shape for name, info in plain.tensors.items()
    }
    for name in plain.tensors:
        assert torch.equal(found.read(name), plain.read(name))
    assert found.digest() == plain.digest()
    assert found.config["model_type"] == "qwen3"


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "world"), [("torchtitan", 2), ("accelerate", 2), ("mesh", 4)])
def test_real_writers_give_the_weights_and_digest_of_safetensors(
    kind: str, world: int, model: Path, tmp_path: Path
) -> None:
    out = written(tmp_path / "step-3", model, kind, world)
    assert recognises_dcp(out)
    same(open_dcp(out), model)


def saved(path: Path, weights: dict[str, Tensor] | None = None, **more: object) -> Path:
    """One process's ``dcp.save``, in this one."""
    dcp.save((weights or small_weights()) | more, checkpoint_id=path, no_dist=True)
    return path


def test_a_plain_save(tmp_path: Path) -> None:
    weights = small_weights()
    found = open_dcp(saved(tmp_path / "c", optimizer={"state": {"x": torch.ones(3)}}, note="text"))
    assert set(found.tensors) == set(weights)
    for name, tensor in weights.items():
        assert torch.equal(found.read(name), tensor)
        assert found.tensors[name].nbytes == tensor.nbytes


def test_every_dtype_and_a_scalar(tmp_path: Path) -> None:
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.bool)
    weights = {str(dtype): torch.arange(7).to(dtype) for dtype in dtypes} | {"scalar": torch.tensor(2.5)}
    found = open_dcp(saved(tmp_path / "c", weights))
    for name, tensor in weights.items():
        assert torch.equal(found.read(name), tensor)
        assert found.read(name).dtype == tensor.dtype


def test_names_lose_only_what_all_of_them_are_wrapped_in(tmp_path: Path) -> None:
    weights = small_weights()
    for number, wrap in enumerate(("app.model.", "model_state.model.", "model.")):
        path = saved(tmp_path / str(number), {f"{wrap}{name}": tensor for name, tensor in weights.items()})
        assert set(open_dcp(path).tensors) == set(weights)
    assert set(open_dcp(saved(tmp_path / "plain", weights)).tensors) == set(weights)


def test_a_part_reads_only_the_chunks_that_hold_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from geopd.checkpoints.dcp_format import DcpSource

    stack = torch.randn(4, 6, 5)
    path = saved(tmp_path / "c", {f"part{i}": stack[i : i + 1].clone() for i in range(4)})
    metadata = listing(path)
    join(metadata, [f"part{i}" for i in range(4)], "experts", (4, 6, 5))
    write_listing(path, metadata)
    found = open_dcp(path)
    assert torch.equal(found.read("experts"), stack)
    reads: list[tuple[int, ...]] = []
    original = DcpSource._chunk
    monkeypatch.setattr(
        DcpSource, "_chunk", lambda self, name, chunk: reads.append(chunk.offsets) or original(self, name, chunk)
    )
    assert isinstance(found.source, DcpSource)
    assert torch.equal(found.source.read_part("experts", (2,)), stack[2])
    assert torch.equal(found.source.read_part("experts", (3, 1)), stack[3, 1])
    assert reads == [(2, 0, 0), (3, 0, 0)]


def listing(path: Path) -> Metadata:
    found: Metadata = pickle.loads((path / ".metadata").read_bytes())
    return found


def write_listing(path: Path, metadata: object) -> None:
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


def join(metadata: Metadata, parts: list[str], name: str, shape: tuple[int, ...]) -> None:
    """Make tensors the chunks, one after the other along the first dimension, of one."""
    first = metadata.state_dict_metadata[parts[0]]
    chunks, at = [], 0
    for part in parts:
        held = metadata.state_dict_metadata.pop(part)
        (index,) = [index for index in metadata.storage_data if index.fqn == part]
        place = metadata.storage_data.pop(index)
        offsets = torch.Size((at, *(0 for _ in shape[1:])))
        chunk = held.chunks[0]
        chunk.offsets = offsets
        chunks.append(chunk)
        metadata.storage_data[type(index)(name, offsets)] = place
        at += held.size[0]
    first.size, first.chunks = torch.Size(shape), chunks
    metadata.state_dict_metadata[name] = first


def test_without_its_listing(tmp_path: Path) -> None:
    path = saved(tmp_path / "c")
    (path / ".metadata").unlink()
    assert recognises_dcp(path)
    with pytest.raises(CheckpointError, match=r"holds \.distcp files and no \.metadata.*copy without hidden files"):
        open_dcp(path)


def test_a_file_that_the_listing_names_and_that_is_absent(tmp_path: Path) -> None:
    path = saved(tmp_path / "c")
    metadata = listing(path)
    name = "model.norm.weight"
    for index, place in metadata.storage_data.items():
        if index.fqn == name:
            place.relative_path = "__7_0.distcp"
    write_listing(path, metadata)
    found = open_dcp(path)
    assert set(found.unreadable) == {name}
    assert f"{path / '__7_0.distcp'}: .metadata names it and it is absent" in found.unreadable[name]
    assert set(found.tensors) == set(small_weights()) - {name}
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight: .*__7_0\.distcp"):
        found.read(name)


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ((7, 4), r"its chunks hold 24 of its 28 entries"),
        ((5, 4), r"its chunk at \[3, 0\] of \[3, 4\] reaches out of its shape \[5, 4\]"),
        ((6, 3), r"its chunk at \[0, 0\] of \[3, 4\] reaches out of its shape \[6, 3\]"),
    ],
)
def test_chunks_that_do_not_cover_their_tensor(shape: tuple[int, int], reason: str, tmp_path: Path) -> None:
    weights = {"a": torch.ones(3, 4), "b": torch.ones(3, 4), "other": torch.ones(2)}
    path = saved(tmp_path / "c", weights)
    metadata = listing(path)
    join(metadata, ["a", "b"], "whole", shape)
    write_listing(path, metadata)
    found = open_dcp(path)
    assert list(found.tensors) == ["other"]
    with pytest.raises(CheckpointError, match=f"tensor whole: .*{reason}"):
        found.read("whole")


def test_chunks_that_overlap(tmp_path: Path) -> None:
    path = saved(tmp_path / "c", {"a": torch.ones(4, 4), "b": torch.ones(4, 4), "other": torch.ones(2)})
    metadata = listing(path)
    join(metadata, ["a", "b"], "whole", (8, 4))
    chunk = metadata.state_dict_metadata["whole"].chunks[1]
    (index,) = [index for index in metadata.storage_data if index.offset == chunk.offsets and index.fqn == "whole"]
    place = metadata.storage_data.pop(index)
    chunk.offsets = torch.Size((3, 0))
    metadata.storage_data[type(index)("whole", chunk.offsets)] = place
    write_listing(path, metadata)
    assert "its chunks overlap" in open_dcp(path).unreadable["whole"]


def test_a_chunk_that_no_file_is_named_for(tmp_path: Path) -> None:
    path = saved(tmp_path / "c")
    metadata = listing(path)
    metadata.storage_data = {i: p for i, p in metadata.storage_data.items() if i.fqn != "model.norm.weight"}
    write_listing(path, metadata)
    assert "no file is named for its chunk at [0]" in open_dcp(path).unreadable["model.norm.weight"]


def test_truncated_and_damaged_files(tmp_path: Path) -> None:
    path = saved(tmp_path / "c")
    (file,) = path.glob("*.distcp")
    data = file.read_bytes()
    file.write_bytes(data[:-100])
    (lost,) = open_dcp(path).unreadable.items()
    assert f"{file}: truncated ({len(data) - 100:,} bytes)" in lost[1]
    file.write_bytes(b"\0" * len(data))
    found = open_dcp(path)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight: .*no readable chunk at byte"):
        found.read("model.norm.weight")


def test_a_chunk_of_another_shape_than_listed(tmp_path: Path) -> None:
    path = saved(tmp_path / "c", {"a": torch.ones(3, 4), "b": torch.ones(4, 3)})
    metadata = listing(path)
    places = {index.fqn: index for index in metadata.storage_data}
    data = metadata.storage_data
    data[places["a"]], data[places["b"]] = data[places["b"]], data[places["a"]]
    write_listing(path, metadata)
    with pytest.raises(CheckpointError, match=r"tensor a: .*no torch\.float32 tensor of shape \[3, 4\] in it"):
        open_dcp(path).read("a")


@pytest.mark.parametrize("where", ["listing", "chunk"])
def test_nothing_in_a_pickle_is_run(where: str, tmp_path: Path) -> None:
    canary, path = tmp_path / "canary", saved(tmp_path / "c")
    if where == "listing":
        metadata = listing(path)
        metadata.planner_data = Touches(canary)
        write_listing(path, metadata)
        with pytest.raises(CheckpointError, match=r"\.metadata: its pickle names .*open.*nothing was run"):
            open_dcp(path)
    else:
        metadata = listing(path)
        file = path / "__evil.distcp"
        torch.save(Touches(canary), file)
        for index, place in metadata.storage_data.items():
            if index.fqn == "model.norm.weight":
                place.relative_path, place.offset, place.length = file.name, 0, file.stat().st_size
        write_listing(path, metadata)
        with pytest.raises(CheckpointError, match=r"its pickle names .*open"):
            open_dcp(path).read("model.norm.weight")
    assert not canary.exists()


@pytest.mark.parametrize("name", ["../secret.distcp", "/etc/passwd", "sub/x.distcp"])
def test_a_listing_cannot_lead_out_of_its_folder(name: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "c")
    shutil.copy(next(path.glob("*.distcp")), tmp_path / "secret.distcp")
    metadata = listing(path)
    for place in metadata.storage_data.values():
        place.relative_path = name
    write_listing(path, metadata)
    with pytest.raises(CheckpointError, match="not a file of its own folder; refused"):
        open_dcp(path)


def test_only_an_optimiser(tmp_path: Path) -> None:
    path = saved(tmp_path / "c", {"optimizer.state.x": torch.ones(2)})
    with pytest.raises(CheckpointError, match="lists no weights"):
        open_dcp(path)


@pytest.mark.parametrize("data", [b"", b"\x80\x04", b"garbage", pickle.dumps([1, 2]), pickle.dumps({"a": 1})])
def test_a_listing_that_is_none(data: bytes, tmp_path: Path) -> None:
    path = saved(tmp_path / "c")
    (path / ".metadata").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"\.metadata: (an empty file|not )"):
        open_dcp(path)
