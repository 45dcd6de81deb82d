"""Two gloo processes: raw ``fully_shard`` and ZeRO-3 against the same model whole, what fails there, and plain DDP.

The Trainer turns an fsdp setting into DDP on a CPU, so the measuring function is called directly for shards.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from geopd.checkpoints import open_checkpoint
from geopd.training.live_geometry import LiveGeometry, on_every_process, raise_everywhere
from geopd.training.live_weights import live_matrices

# seven matrices: more than two processes divide, and none of their sides is even in all
SHAPES = {"q_proj": (33, 24), "k_proj": (17, 24), "v_proj": (17, 24), "o_proj": (24, 33)}
ATTENTION, K = ["attention"], 3


class Model(nn.Module):
    """Two attention blocks without the attention, the second without its o_proj."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layers = nn.ModuleList([nn.Module(), nn.Module()])
        for layer, names in zip(self.layers, (list(SHAPES), list(SHAPES)[:3]), strict=True):
            layer.self_attn = nn.Module()
            for name in names:
                m, n = SHAPES[name]
                linear = nn.Linear(n, m, bias=False)
                linear.weight.data = torch.randn(m, n, generator=generator) * 0.02
                layer.self_attn.add_module(name, linear)

    def forward(self, x):
        first, second = (layer.self_attn for layer in self.layers)
        x = x + first.o_proj(torch.tanh(first.q_proj(x))) + (first.k_proj(x) * first.v_proj(x)).sum(-1, keepdim=True)
        return torch.cat([second.q_proj(x), second.k_proj(x), second.v_proj(x)], dim=-1)


def two_looks(model, geometry):
    """Two steps of plain gradient descent, with a look after each."""
    optimiser = torch.optim.SGD(model.parameters(), lr=1.0)
    looks = []
    for seed in (1, 2):
        optimiser.zero_grad()
        model(torch.randn(5, 24, generator=torch.Generator().manual_seed(seed))).square().mean().backward()
        optimiser.step()
        looks.append(as_dicts(geometry.look()))
    return looks


def as_dicts(rows):
    return [{"name": row.name, "note": row.note, **row.values} for row in rows]


def shard(model):
    from torch.distributed.fsdp import fully_shard

    for layer in model.layers:
        for linear in layer.self_attn.children():
            fully_shard(linear)
    fully_shard(model)
    return model


def adapt(model):
    """LoRA with a B that is not zero, then everything sharded: the base, A and B."""
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(0)
    inject_adapter_in_model(LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"], init_lora_weights=False), model)
    return model


def damage(geometry, rank, broken, error):
    """Make one matrix of one process fail while it is measured."""
    real = geometry.origin.source

    def read(name):
        if rank == broken and "layers.0.self_attn.k_proj" in name:
            raise error
        return real.read(name)

    object.__setattr__(geometry.origin, "source", SimpleNamespace(read=read))


def raised(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing raised"


def fsdp2(folder):
    """What one process sees of a model sharded by ``fully_shard``."""
    from torch.distributed.tensor import DTensor

    rank = torch.distributed.get_rank()
    origin = open_checkpoint(folder)
    found = {}
    model = shard(Model())
    matrices = live_matrices(model, origin, ATTENTION)
    found["sharded"] = {m.weight.name: isinstance(m.parameter, DTensor) for m in matrices}
    found["local_rows"] = [m.parameter.to_local().shape[0] for m in matrices]
    found["looks"] = two_looks(model, LiveGeometry(origin, matrices, K))
    found["still_sharded"] = all(isinstance(m.parameter, DTensor) for m in matrices)

    failing = LiveGeometry(open_checkpoint(folder), matrices, K)
    damage(failing, rank, 0, OSError("the disk went away"))
    found["failure"] = raised(failing.look)
    found["after_failure"] = len(on_every_process(rank))
    unreadable = LiveGeometry(open_checkpoint(folder), matrices, K)
    damage(unreadable, rank, 0, ValueError("a truncated shard"))
    found["notes"] = {row.name: row.note for row in unreadable.look() if row.note}
    found["refusal"] = raised(lambda: raise_everywhere("no origin on this node" if rank == 1 else None))

    lora = shard(adapt(Model()))
    matrices = live_matrices(lora, origin, ATTENTION)
    parts = [p for m in matrices for p in (m.parameter, *(q for layer in m.adapters for q in layer.parameters()))]
    found["adapter_sharded"] = all(isinstance(p, DTensor) for p in parts)
    found["adapter_looks"] = [as_dicts(LiveGeometry(origin, matrices, K).look())]
    return found


def zero3(folder):
    """Two steps under DeepSpeed's ZeRO-3; the weights gathered at the end are the oracle."""
    import deepspeed

    plain = {"stage": 3, "stage3_param_persistence_threshold": 0}
    adam = {"type": "Adam", "params": {"lr": 1e-2, "torch_adam": True}}
    engine, *_ = deepspeed.initialize(
        model=Model(),
        config={"train_micro_batch_size_per_gpu": 5, "zero_optimization": plain, "optimizer": adam},
    )
    origin = open_checkpoint(folder)
    matrices = live_matrices(engine.module, origin, ATTENTION)
    geometry = LiveGeometry(origin, matrices, K)
    for seed in (1, 2):
        engine.backward(engine(torch.randn(5, 24, generator=torch.Generator().manual_seed(seed))).square().mean())
        engine.step()
        look = as_dicts(geometry.look())
    found = {"shards": [list(matrix.parameter.shape) for matrix in matrices], "look": look, "dense": {}}
    for matrix in matrices:
        with deepspeed.zero.GatheredParameters([matrix.parameter]):
            dW = matrix.parameter.detach().double() - origin.read(matrix.origin_tensor).double()
        sigma = torch.linalg.svdvals(dW)
        values = {"update_norm": float(sigma.norm()), "stable_rank": float((sigma / sigma[0]).square().sum())}
        found["dense"][matrix.weight.name] = values
    return found


def ddp(folder):
    """The Trainer on two processes, stopped by an alarm."""
    from transformers import Trainer, TrainingArguments

    from geopd.training.geometry_alarms import Alarms
    from geopd.training.monitor import GeometryMonitor

    class Supervised(Model):
        def forward(self, x):
            return {"loss": super().forward(x).square().mean()}

    args = TrainingArguments(
        output_dir=str(folder.parent / "run"), max_steps=9, per_device_train_batch_size=2, use_cpu=True,
        report_to="none", disable_tqdm=True, logging_steps=2, save_strategy="no", dataloader_pin_memory=False,
        learning_rate=1e-2, remove_unused_columns=False, ddp_backend="gloo",
    )  # fmt: skip
    generator = torch.Generator().manual_seed(torch.distributed.get_rank())
    data = [{"x": torch.randn(24, generator=generator)} for _ in range(40)]
    trainer = Trainer(model=Supervised(), args=args, train_dataset=data)
    alarms = Alarms(stable_rank=(100, 200), stop=True)
    GeometryMonitor(folder, every=3, similarity_k=K, alarms=alarms).attach(trainer)
    trainer.train()
    looks = [line for line in trainer.state.log_history if "geometry/update_norm" in line]
    return {"wrapped": type(trainer.model_wrapped).__name__, "stopped": trainer.state.global_step, "looks": looks}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("sharded")
    (root / "origin").mkdir()
    save_file(dict(Model().state_dict()), root / "origin" / "model.safetensors")
    return root


def launch(folder, mode):
    """What each of two processes saw."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    environment |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "DS_ACCELERATOR": "cpu"}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, mode, str(folder)],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=90)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
    return [json.loads((folder / f"{mode}-{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def seen(folder):
    return launch(folder, "fsdp2")


def assert_same_looks(found, expected):
    for look, whole in zip(found, expected, strict=True):
        assert [row["name"] for row in look] == [row["name"] for row in whole]
        for row, other in zip(look, whole, strict=True):
            for key, value in other.items():
                assert row[key] == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value), key


@pytest.mark.slow
def test_every_watched_parameter_is_a_dtensor_before_and_after(seen):
    for found in seen:
        assert len(found["sharded"]) == 7
        assert all(found["sharded"].values())
        assert found["still_sharded"]
    total = [sum(rows) for rows in zip(*(found["local_rows"] for found in seen), strict=True)]
    assert total == [17, 24, 33, 17, 17, 33, 17]


@pytest.mark.slow
def test_values_are_those_of_the_whole_model_on_every_process(seen, folder):
    model, origin = Model(), open_checkpoint(folder / "origin")
    expected = two_looks(model, LiveGeometry(origin, live_matrices(model, origin, ATTENTION), K))
    assert expected[1][0]["similarity_previous"] is not None
    for found in seen:
        assert_same_looks(found["looks"], expected)


@pytest.mark.slow
def test_sharded_adapters_count_as_whole_ones(seen, folder):
    model, origin = adapt(Model()), open_checkpoint(folder / "origin")
    expected = [as_dicts(LiveGeometry(origin, live_matrices(model, origin, ATTENTION), K).look())]
    assert max(row["update_norm"] for row in expected[0]) > 0
    for found in seen:
        assert found["adapter_sharded"]
        assert_same_looks(found["adapter_looks"], expected)


@pytest.mark.slow
def test_a_failure_on_one_process_is_raised_on_both_and_none_waits(seen):
    for found in seen:
        assert found["failure"].startswith("RuntimeError: the geometry could not be measured: process 0: OSError")
        assert "the disk went away" in found["failure"]
        assert found["after_failure"] == 2
        assert found["refusal"] == "ValueError: no origin on this node"


@pytest.mark.slow
def test_a_matrix_that_one_process_cannot_read_is_named_on_both(seen, folder):
    says = (
        "tensor layers.0.self_attn.k_proj.weight: not readable (ValueError: a truncated shard); write or copy it again"
    )
    for found in seen:
        assert found["notes"] == {"layers.0.self_attn.k_proj": f"{folder / 'origin' / 'model.safetensors'}: {says}"}


@pytest.mark.slow
def test_zero_3_partitions_are_gathered_one_matrix_at_a_time(folder):
    pytest.importorskip("deepspeed")
    for found in launch(folder, "zero3"):
        assert found["shards"] == [[0]] * 7
        for row in found["look"]:
            for metric, value in found["dense"][row["name"]].items():
                assert row[metric] == pytest.approx(value, rel=1e-4)


def test_zero_3_without_deepspeed_is_refused_by_name(folder, monkeypatch):
    model = Model()
    for parameter in model.parameters():
        parameter.ds_shape, parameter.data = parameter.shape, torch.empty(0)
    monkeypatch.setattr("geopd.training.live_weights.find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"k_proj is partitioned by ZeRO-3 and deepspeed is not installed"):
        live_matrices(model, open_checkpoint(folder / "origin"), ATTENTION)


@pytest.mark.slow
def test_two_processes_of_a_trainer_log_one_record_and_stop_together(folder):
    seen = launch(folder, "ddp")
    for found in seen:
        assert found["wrapped"] == "DistributedDataParallel"
        assert found["stopped"] == 3
        assert [line["step"] for line in found["looks"]] == [3]
    assert seen[0]["looks"][0]["geometry/update_norm"] == seen[1]["looks"][0]["geometry/update_norm"] > 0
    lines = [json.loads(line) for line in (folder / "run" / "geometry.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3]
    assert len(lines[0]["matrices"]) == 7


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`:UserWarning")
def test_version_one_of_fsdp_is_refused_by_name(folder, tmp_path):
    from torch.distributed.fsdp import FullyShardedDataParallel

    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = Model()
        model.layers[0] = FullyShardedDataParallel(model.layers[0], device_id=torch.device("cpu"))
        with pytest.raises(ValueError, match=r"module layers.0 is sharded by FSDP version 1.*fsdp_version to 2"):
            live_matrices(model, open_checkpoint(folder / "origin"), ATTENTION)
    finally:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    mode, root = sys.argv[1], Path(sys.argv[2])
    torch.distributed.init_process_group("gloo")
    result = {"fsdp2": fsdp2, "zero3": zero3, "ddp": ddp}[mode](root / "origin")
    (root / f"{mode}-{torch.distributed.get_rank()}.json").write_text(json.dumps(result))
    torch.distributed.barrier()
    os._exit(0)  # all is written; taking gloo's threads down in order can wait for ever, or abort
