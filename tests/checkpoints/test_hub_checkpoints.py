"""Checkpoints by hub id: the real client against a hub on loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from checkpoints_on_disk import moved, q_name, save_shards, save_tensors, small_weights
from command_line import geopd
from geopd.checkpoints import CheckpointError, checkpoint_digest, located, open_checkpoint, open_run
from geopd.checkpoints.hub import hub_name
from model_hub import COMMIT, Hub, serving

constants = pytest.importorskip("huggingface_hub.constants")
SMALL = ("--rotation-k", "p/4", "--principal-rank", "p/4", "--similarity-k", "2", "--hill-k", "4", "--workers", "1")
BESIDES = ("tokenizer.json", "README.md", "pytorch_model.bin", "original/model.safetensors", "vocab.txt")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    base = small_weights()
    single = save_tensors(tmp_path / "on_hub" / "base", base, {"model_type": "qwen3"})
    tuned = moved(base, 1e-3)
    first = {name: tensor for name, tensor in tuned.items() if ".layers.0." in name}
    shards = save_shards(tmp_path / "on_hub" / "tuned", [first, {n: t for n, t in tuned.items() if n not in first}])
    for folder in (single, shards):
        for name in BESIDES:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(f"{name} of {folder.name}")
    with serving(Hub(repositories={"team/Base-1B": single, "team/Tuned-1B": shards})) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.chdir(tmp_path)
        yield hub


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.utils import close_session

    close_session()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_one_file_and_its_config_are_fetched_and_nothing_else(hub: Hub) -> None:
    folder = located("team/Base-1B")
    assert names_in(folder) == ["config.json", "model.safetensors"]
    assert hub_name(folder) == "Base-1B"
    checkpoint = open_checkpoint(folder)
    assert checkpoint.config == {"model_type": "qwen3"}
    assert checkpoint.digest() == checkpoint_digest(hub.repositories["team/Base-1B"])
    assert not [path for path in hub.fetched() if "tokenizer" in path or "README" in path or ".bin" in path]


def test_an_index_brings_the_shards_that_it_names(hub: Hub) -> None:
    save_tensors(hub.repositories["team/Tuned-1B"] / "stray", small_weights())
    folder = located("team/Tuned-1B")
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert names_in(folder) == [*shards, "model.safetensors.index.json"]
    checkpoint = open_checkpoint(folder)
    assert not checkpoint.unreadable
    assert checkpoint.digest() == checkpoint_digest(hub.repositories["team/Tuned-1B"])


def test_what_is_in_the_cache_is_not_fetched_again(hub: Hub) -> None:
    located("team/Tuned-1B")
    before = hub.fetched()
    assert located("team/Tuned-1B") == located(f"team/Tuned-1B@{COMMIT}")
    assert hub.fetched() == before


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub: Hub) -> None:
    hub.revisions["step-100"] = "b" * 40
    assert located("team/Base-1B@step-100").name == "b" * 40
    assert located(f"team/Base-1B@{'b' * 40}").name == "b" * 40
    assert located("team/Base-1B").name == COMMIT


def test_a_transfer_cut_short_goes_on_where_it_stopped(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 256)
    hub.cut_after = 1024
    folder = located("team/Base-1B")
    assert hub.ranges == ["bytes=1024-"]
    assert checkpoint_digest(folder) == checkpoint_digest(hub.repositories["team/Base-1B"])


def test_an_adapter_is_fetched_with_its_config(hub: Hub, tmp_path: Path) -> None:
    folder = save_tensors(tmp_path / "on_hub" / "adapter", {"x.lora_A.weight": torch.ones(2, 3)})
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")
    hub.repositories["team/Adapter"] = folder
    assert names_in(located("team/Adapter")) == ["adapter_config.json", "adapter_model.safetensors"]


def test_local_paths_and_what_cannot_be_an_id_are_left_alone(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "team" / "Base-1B").mkdir(parents=True)
    for named in (
        "team/Base-1B",
        "origin",
        "/a/b",
        "../a",
        "runs/a/b",
        "a--b/c",
        "runs/model.safetensors",
        "x.git/y.git",
    ):
        assert located(named) == Path(named)
    assert hub.asked == []


def test_measuring_from_the_hub_is_measuring_the_files(hub: Hub, tmp_path: Path) -> None:
    result = geopd("measure", "team/Base-1B", "team/Tuned-1B", "--out", tmp_path / "hub", *SMALL)
    assert result.code == 0, result.err
    local = [hub.repositories[name] for name in ("team/Base-1B", "team/Tuned-1B")]
    assert geopd("measure", local[0], f"Tuned-1B={local[1]}", "--out", tmp_path / "disk", *SMALL).code == 0
    tables = [(tmp_path / name / "measurements.parquet").read_bytes() for name in ("hub", "disk")]
    assert tables[0] == tables[1]
    manifest = json.loads((tmp_path / "hub" / "manifest.json").read_text())
    assert COMMIT in manifest["inputs"]["Tuned-1B"]["path"], "the commit is on record"


def test_plan_and_basis_take_hub_ids(hub: Hub, tmp_path: Path) -> None:
    planned = geopd("plan", "team/Base-1B", "mine=team/Tuned-1B@main", "--json")
    assert json.loads(planned.out)["runs"]["mine"]["matched"] == 6
    out = tmp_path / "basis.safetensors"
    made = geopd("basis", "team/Base-1B", "team/Tuned-1B", "--k", "2", "--out", out, "--json")
    assert made.code == 0, made.err
    assert q_name().removeprefix("model.").removesuffix(".weight") in json.loads(made.out)["matrices"]


def test_offline_mode_uses_the_cache_and_asks_nothing(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    online = [located(name) for name in ("team/Base-1B", "team/Tuned-1B")]
    hub.asked.clear()
    offline(monkeypatch)
    assert [located(name) for name in ("team/Base-1B", "team/Tuned-1B")] == online
    assert hub.asked == []


def test_a_hub_that_is_down_leaves_the_cache(hub: Hub) -> None:
    online = located("team/Base-1B")
    hub.fail_with = 503
    assert located("team/Base-1B") == online
    with pytest.raises(
        CheckpointError, match=r"team/Tuned-1B: the hub refused it \(.*503.*\); check HF_TOKEN, or try again"
    ):
        located("team/Tuned-1B")


def complaint(*named: str) -> str:
    return geopd("plan", *named).complaint()


def test_no_such_repository(hub: Hub) -> None:
    text = "team/Bass-1B: no such file or folder here, and no such repository on the hub; check the name, and if it is"
    assert text in complaint("team/Bass-1B", "team/Tuned-1B")
    assert text in complaint("team/Base-1B", "team/Bass-1B")


def test_no_such_revision(hub: Hub) -> None:
    message = complaint("team/Base-1B@step-9", "team/Tuned-1B")
    assert "team/Base-1B@step-9: its repository has no such revision; name one of its branches, tags or" in message


def test_a_gated_repository(hub: Hub) -> None:
    hub.gated.add("team/Base-1B")
    assert "team/Base-1B: gated on the hub; ask for access on its page there, then `hf auth login` or set" in complaint(
        "team/Base-1B", "team/Tuned-1B"
    )


def test_no_safetensors_in_the_repository(hub: Hub) -> None:
    (hub.repositories["team/Base-1B"] / "model.safetensors").unlink()
    message = complaint("team/Base-1B", "team/Tuned-1B")
    assert "team/Base-1B: has no model.safetensors and no model.safetensors.index.json on the hub" in message
    assert "(it holds original/model.safetensors, pytorch_model.bin); name a revision" in message


@pytest.mark.parametrize("before", ["nothing", "the other one", "the index alone"])
def test_offline_and_not_in_the_cache(before: str, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    if before == "the other one":
        located("team/Base-1B")
    elif before == "the index alone":
        from huggingface_hub import hf_hub_download

        hf_hub_download("team/Tuned-1B", "model.safetensors.index.json")
    offline(monkeypatch)
    with pytest.raises(CheckpointError) as caught:
        located("team/Tuned-1B")
    text = (
        "team/Tuned-1B: no such file or folder here, and not whole in the hub's cache, which is all that HF_HUB_OFFLINE"
    )
    assert text in str(caught.value)
    assert "`hf download team/Tuned-1B` first" in str(caught.value)


def test_no_server_at_all(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    message = complaint("team/Base-1B", "team/Tuned-1B")
    assert "not whole in the hub's cache, and fetching it failed (" in message
    assert "check the connection and the disk" in message


def test_an_index_on_the_hub_cannot_name_other_folders(hub: Hub) -> None:
    index = hub.repositories["team/Tuned-1B"] / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../../secret.safetensors"}}))
    assert "which is not a file of its own folder; refused" in complaint("team/Base-1B", "team/Tuned-1B")


def test_a_shard_that_the_repository_lacks_is_told_by_the_reader(hub: Hub) -> None:
    (hub.repositories["team/Tuned-1B"] / "model-00002-of-00002.safetensors").unlink()
    checkpoint = open_checkpoint(located("team/Tuned-1B"))
    assert "names it and it is absent" in checkpoint.unreadable[q_name(1)]
    assert q_name(0) in checkpoint.tensors


def test_a_run_is_labelled_after_the_repository(hub: Hub) -> None:
    run = open_run("team/Tuned-1B")
    assert run.label == "Tuned-1B"
    assert run.checkpoints[0][1].name == COMMIT


def test_the_environment_of_the_client_holds_in_a_process_of_its_own(hub: Hub, tmp_path: Path) -> None:
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    environment |= {"HF_HUB_DISABLE_TELEMETRY": "1"}
    program = "from geopd.checkpoints import located; print(located('team/Base-1B'))"
    found = []
    for settings in ({"HF_HUB_OFFLINE": "0"}, {"HF_HUB_OFFLINE": "1"}):
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment | settings, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr == "", "no bar where nobody looks"
        found.append(done.stdout.strip())
    assert found[0] == found[1]
    assert found[0].startswith(str(tmp_path / "home"))
