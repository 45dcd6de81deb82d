"""Projections on a model sharded by rows (FSDP2) over two CPU processes: the same weights and leak as on one."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from geopd.problems import character_tokenizer
from geopd.training.language_model import build_model

ROWS, COLUMNS, STEPS = 5, 8, 3  # five rows do not divide by two: the processes hold three and two


def confined_model(folder, mode):
    """A linear layer on disk, in memory, and the projection that confines it."""
    from safetensors.torch import save_file

    from geopd.training.basis import Basis, Provenance, pack_mask, write_basis
    from geopd.training.projection import Projection

    generator = torch.Generator().manual_seed(0)
    model = nn.ModuleDict({"proj": nn.Linear(COLUMNS, ROWS, bias=False)})
    with torch.no_grad():
        model["proj"].weight.copy_(torch.randn(ROWS, COLUMNS, generator=generator))
    V = torch.linalg.qr(torch.randn(COLUMNS, 3, generator=generator)).Q.contiguous()
    mask = torch.rand(ROWS, COLUMNS, generator=generator) < 0.4
    kind = "mask" if mode == "mask" else "update"
    provenance = Provenance(kind, None, None, "", "", "", "", ("layers",), widths={"proj": COLUMNS})
    basis = Basis({}, provenance, {"proj": pack_mask(mask)}) if mode == "mask" else Basis({"proj": V}, provenance)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"proj.weight": model["proj"].weight.detach().clone()}, folder / "start.safetensors")
    write_basis(folder / "basis.safetensors", basis)
    return model, Projection(folder / "basis.safetensors", mode, start=folder / "start.safetensors")


def adapted_model(folder):
    """A tiny language model in an adapter with longer steps, its norms, embedding and head trained as well."""
    from geopd.training.basis import Basis, write_basis
    from geopd.training.named_parameters import named_parameters
    from geopd.training.projection import Projection
    from tiny_projection import SHAPE, provenance

    generator = torch.Generator().manual_seed(0)
    model = build_model(SHAPE, character_tokenizer(), seed=0)
    widths = {name: p.parameter.shape[1] for name, p in named_parameters(model).items() if name.endswith("_proj")}
    bases = {
        name: torch.linalg.qr(torch.randn(width, 3, generator=generator)).Q.contiguous()
        for name, width in widths.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_basis(folder / "basis.safetensors", Basis(bases, provenance()))
    projection = Projection(folder / "basis.safetensors", lr_scale="sqrt", train_rest=True)
    return projection.prepare(model), projection


def train_adapter(model, projection):
    """Three Adam steps; returns every trained parameter, whole, and the leak."""
    from geopd.training.confinement import Confinement
    from geopd.training.sharding import whole

    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    optimiser = torch.optim.AdamW(trained.values(), lr=0.01, weight_decay=0.0)
    state = SimpleNamespace(global_step=0)
    Confinement(projection).on_train_begin(None, state, None, model=model, optimizer=optimiser)
    ids = torch.randint(2, 20, (4, 8), generator=torch.Generator().manual_seed(1))
    for _ in range(STEPS):
        optimiser.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()
    record = projection.record(model)
    return {name: whole(value.detach()) for name, value in trained.items()}, record["leak"], record["base_moved"]


def work_adapter(folder, rank):
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, init_device_mesh

    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    model, projection = adapted_model(folder / str(rank))
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(value, DTensor) for value in model.parameters())
    result = train_adapter(model, projection)
    if rank == 0:
        torch.save(result, folder / "result.pt")
    dist.barrier()


def train(model, projection):
    """Three Adam steps through the projection's own callback; returns the whole weight and the leak."""
    from geopd.training.confinement import Confinement
    from geopd.training.sharding import whole

    weight = model["proj"].weight
    optimiser = torch.optim.AdamW([weight], lr=0.05, weight_decay=0.0)
    confinement = Confinement(projection)
    state = SimpleNamespace(global_step=0)
    confinement.on_train_begin(None, state, None, model=model, optimizer=optimiser)
    inputs = torch.randn(6, COLUMNS, generator=torch.Generator().manual_seed(1))
    for _ in range(STEPS):
        optimiser.zero_grad()
        model["proj"](inputs).square().sum().backward()
        optimiser.step()
    leak = projection.leak(model)
    return whole(weight.detach()), leak.total["proj"], leak.outside["proj"]


def work(folder, rank, mode):
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh

    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    model, projection = confined_model(folder / str(rank), mode)
    fully_shard(model["proj"], mesh=mesh)
    weight = model["proj"].weight
    assert isinstance(weight, DTensor)
    assert weight.to_local().shape[0] == (3, 2)[rank]
    result = train(model, projection)
    if rank == 0:
        torch.save(result, folder / "result.pt")
    columns = distribute_tensor(torch.zeros(ROWS, COLUMNS), mesh, [Shard(1)])
    by_columns = nn.Module()
    by_columns.proj = nn.Module()
    by_columns.proj.weight = nn.Parameter(columns)
    with pytest.raises(ValueError, match=r"proj: placed as .*1.*needs whole rows, Shard\(0\)"):
        projection.prepare(by_columns)
    dist.barrier()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["gradient", "mask"])
def test_two_processes_take_the_step_of_one(mode, tmp_path):
    weight, total, outside = two_processes(tmp_path, mode)
    expected, expected_total, expected_outside = train(*confined_model(tmp_path / "one", mode))
    assert torch.allclose(weight, expected, atol=1e-6)
    assert total == pytest.approx(expected_total, rel=1e-5)
    assert outside == pytest.approx(expected_outside, rel=1e-5)
    assert (outside == 0) == (mode == "mask")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT reads it
def test_two_processes_adapt_as_one_with_longer_steps_and_the_rest(tmp_path):
    trained, leak, moved = two_processes(tmp_path, "adapter")
    expected, expected_leak, _ = train_adapter(*adapted_model(tmp_path / "one"))
    assert set(trained) == set(expected)
    assert any("embed_tokens" in name for name in trained)
    for name, value in expected.items():
        assert torch.allclose(trained[name], value, atol=1e-4), name
        assert name.endswith("norm.weight") or float(value.norm()) > 0
    assert max(leak, expected_leak) < 1e-10
    assert moved == 0


def two_processes(tmp_path, mode):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, str(tmp_path), str(rank), mode], stderr=subprocess.PIPE, env=environment
        )
        for rank in range(2)
    ]
    errors = [worker.communicate(timeout=120)[1].decode() for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], errors
    return torch.load(tmp_path / "result.pt")


if __name__ == "__main__":
    if sys.argv[3] == "adapter":
        work_adapter(Path(sys.argv[1]), int(sys.argv[2]))
    else:
        work(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
    os._exit(0)  # all is written; taking gloo's threads down in order can wait for ever, or abort
